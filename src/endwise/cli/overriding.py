"""The seam by which commands that take a recipe take its most used keys as options."""

import inspect
import json
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

from typer import Option

KEYS: dict[str, tuple[str, Any, str]] = {
    "model": ("model.name", str, "Model: embedded, a local folder or .gguf file, or a Hugging Face hub id."),
    "data": ("data.source", str, "Text: embedded, a file or folder, or a Hugging Face dataset id."),
    "tokens": ("training.tokens", int, "Training tokens."),
    "seed": ("seed", int, "Seed of the SAE's first weights."),
    "device": ("model.device", str, "auto, cpu, cuda or cuda:N."),
    "out": ("out", Path, "Folder to write; unset: the recipe's."),
}
"""Options: for each the recipe's key, its type, and help."""

P = ParamSpec("P")
R = TypeVar("R")


def taking_keys(*names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a command with `overrides` take some of `KEYS` as options too, which come after them; unset: all."""
    keys = {name: KEYS[name] for name in names or KEYS}

    def taking(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            given = {name: kwargs.pop(name, None) for name in keys}
            options = [f"{keys[name][0]}={_yaml(value)}" for name, value in given.items() if value is not None]
            before: Any = kwargs.get("overrides")
            kwargs["overrides"] = [*(before or []), *options]
            return function(*args, **kwargs)

        types = {
            name: Annotated[kind | None, Option(help=f"{text} ({key})", metavar=name.upper())]
            for name, (key, kind, text) in keys.items()
        }
        return with_options(run, function, types)

    return taking


def on_device(function: Callable[P, R]) -> Callable[P, R]:
    """Let a command that loads a run's model take `--device`, which stands in place of the recipe's."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device: Any = kwargs.pop("device", None)
        if device is None:
            return function(*args, **kwargs)
        from endwise.models.loading import DEVICE

        before = DEVICE.set(device)
        try:
            return function(*args, **kwargs)
        finally:
            DEVICE.reset(before)

    text = f"{KEYS['device'][2]} Unset: the recipe's."
    return with_options(run, function, {"device": Annotated[str | None, Option(help=text, metavar="DEVICE")]})


def with_options(run: Callable[P, R], function: Callable[P, R], types: Mapping[str, Any]) -> Callable[P, R]:
    """Give a command's wrapper the command's signature, and options more."""
    added = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=types[n]) for n in types]
    signature = inspect.signature(function)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *added])  # type: ignore[pyrefly:missing-attribute]
    run.__annotations__ = {**function.__annotations__, **types}
    return run


def _yaml(value: Any) -> str:
    return str(value) if isinstance(value, int) else json.dumps(str(value))
