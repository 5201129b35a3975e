"""A bar or a table on a terminal, or some lines in a log, that say how far something is."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

from endwise.common.terminal import Bars, Grid
from endwise.common.text import printable

LOG_SECONDS, CELL_SECONDS = 60.0, 1.0


class Log:
    """Lines on how far something is: in a log below each other, in a notebook in place of each other.

    Args:
        every: seconds between two of a log.
    """

    def __init__(self, console: Console, every: float = LOG_SECONDS) -> None:
        self._console = console
        self._cell = None if console.quiet else running_cell()
        self.every = every if self._cell is None else CELL_SECONDS

    def say(self, *lines: str) -> None:
        if self._cell is not None:
            self._cell("\n".join(map(printable, lines)))
            return
        for line in lines:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class Board:
    """Progress display: on a terminal a live table; elsewhere lines now and then (`Log`); nothing when switched off."""

    def __init__(self, shown: bool, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, quiet=not shown)
        watched = shown and self._console.is_terminal
        self._live = Live(console=self._console, auto_refresh=False) if watched else None
        self._log = Log(self._console)
        self._started = self._shown_at = time.monotonic()

    def __enter__(self) -> "Board":
        if self._live is not None:
            self._live.__enter__()
        return self

    def __exit__(self, *ended: Any) -> None:
        if self._live is not None:
            self._live.__exit__(*ended)

    def _update(self, table: Callable[[], Grid], lines: Callable[[], Sequence[str]], every: float) -> None:
        """Show how far it is, if it is time: a table after `every` seconds, lines as often as the log has them."""
        now = time.monotonic()
        if now - self._shown_at < (self._log.every if self._live is None else every):
            return
        self._shown_at = now
        if self._live is None:
            self._log.say(*lines())
        else:
            self._live.update(table(), refresh=True)

    def _show_failure(self, text: str) -> None:
        self._console.print(printable(f"failed: {text}"), style="red", markup=False, highlight=False, soft_wrap=True)


_SHOWN: ContextVar[bool] = ContextVar("shown", default=False)


@contextmanager
def showing_progress(display: bool) -> Iterator[None]:
    """Show or hide the progress of all counts within it that leave it open."""
    token = _SHOWN.set(display)
    try:
        yield
    finally:
        _SHOWN.reset(token)


@contextmanager
def counting(
    what: str,
    total: int,
    display: bool | None,
    *,
    console: Console | None = None,
    every: float = LOG_SECONDS,
    unit: str = "sequences",
) -> Iterator[Callable[[int], None]]:
    """A function to call with the number of `unit` newly done: a bar on a terminal, a line now and then in a log,
    either with the time that is left.

    Args:
        display: None: as `showing_progress` has it; without, not.
        console: unset: stderr.
        every: seconds between two lines of a log.
    """
    display = _SHOWN.get() if display is None else display
    console = console or Console(stderr=True, quiet=not display)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    shown, log = display and console.is_terminal, Log(console, every)
    with Bars(*columns, console=console, disable=not shown) as progress:
        task = progress.add_task(what, total=total)
        started = shown_at = time.monotonic()
        done = 0

        def advance(count: int) -> None:
            nonlocal shown_at, done
            progress.advance(task, count)
            done += count
            now = time.monotonic()
            if not console.is_terminal and now - shown_at > log.every and done:
                left = (now - started) / done * (total - done)
                log.say(f"{what}: {done:,} of {total:,} {unit} · {left / 60:.1f} min left")
                shown_at = now

        yield advance


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
    from IPython.display import display  # type: ignore[pyrefly:missing-import]

    handles = []

    def put(text: str) -> None:
        content = {"text/plain": text}
        if handles:
            handles[0].update(content, raw=True)
        else:
            handles.append(display(content, raw=True, display_id=True))

    return put


def _of_marimo() -> Callable[[str], None] | None:
    marimo = sys.modules.get("marimo")
    if marimo is None or not marimo.running_in_notebook():
        return None
    return lambda text: marimo.output.replace(marimo.plain_text(text))
