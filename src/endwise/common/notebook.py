"""The running cell of a notebook: text in it that is replaced, rather than added to."""

import sys
from collections.abc import Callable


def running_cell() -> Callable[[str], None] | None:
    """Return what puts a text into the running cell, in place of what it put there before; None: no notebook runs this.

    Jupyter (and what speaks its protocol: VS Code, Colab) and marimo are known; neither is imported by this.
    """
    return _of_jupyter() or _of_marimo()


def _of_jupyter() -> Callable[[str], None] | None:
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    if getattr(shell, "kernel", None) is None:
        return None
    from IPython.display import display  # pyright: ignore[reportMissingImports]

    handles = []

    def put(text: str) -> None:
        told = {"text/plain": text}
        if handles:
            handles[0].update(told, raw=True)
        else:
            handles.append(display(told, raw=True, display_id=True))

    return put


def _of_marimo() -> Callable[[str], None] | None:
    marimo = sys.modules.get("marimo")
    if marimo is None or not marimo.running_in_notebook():
        return None
    return lambda text: marimo.output.replace(marimo.plain_text(text))
