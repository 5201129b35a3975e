"""The seam by which commands that read runs take finished SAEs that are none."""

from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar

from typer import Option

from endwise.cli.overriding import with_options

if TYPE_CHECKING:
    from endwise.config.places import Recipe

MODEL = (
    "The model it belongs to: embedded, a local folder, or a Hugging Face hub id; unset: the one that the file names."
)
OPTIONS = {
    "model": (
        "For SAEs that are not runs: their model; unset: that of the runs beside them, or the one they name.",
        "NAME",
    ),
    "data": ("For such SAEs: text to measure them on, as data.source; unset: that of the runs beside them.", "SOURCE"),
    "site": ("For such SAEs: their place, where their files say none: blocks.3.hook_resid_pre", "SITE"),
}

P = ParamSpec("P")
R = TypeVar("R")


def taking_saes(function: Callable[P, R]) -> Callable[P, R]:
    """Let the `runs` of a command be SAEs of any format too, with three options that say where they belong. Each is
    adopted into the cache (`evaluation.adopting`), and found there again the next time.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        belongs = {name: kwargs.pop(name, None) for name in OPTIONS}
        given: Any = kwargs["runs"]
        taken = _as_runs(given, belongs)
        kwargs["runs"] = [taken[path] for path in given]
        pairs: Any = kwargs.get("pair")
        if pairs:
            names: Any = {str(path): str(folder) for path, folder in taken.items()}
            kwargs["pair"] = [",".join(names.get(each, each) for each in text.split(",")) for text in pairs]
        return function(*args, **kwargs)

    types = {name: Annotated[str | None, Option(help=text, metavar=form)] for name, (text, form) in OPTIONS.items()}
    return with_options(run, function, types)


def _as_runs(paths: Sequence[Path], belongs: dict[str, Any]) -> dict[Path, Path]:
    """The run folder, or the folder that holds some, that stands for each path.

    Raises:
        ConfigError: options for SAEs are given, and all are runs.
        EndwiseError: see `adopt`.
    """
    from endwise.common.errors import ConfigError
    from endwise.evaluation.adopting import Belonging, adopted, is_no_run

    foreign = [path for path in paths if is_no_run(path)]
    if not foreign and (options := [f"--{name}" for name, value in belongs.items() if value is not None]):
        raise ConfigError(f"{', '.join(options)}: only runs are given, and their recipes state it. Leave it out.")
    like = _recipe_beside([path for path in paths if path not in foreign]) if foreign else None
    return {path: adopted(path, Belonging(**belongs, like=like)) if path in foreign else path for path in paths}


def _recipe_beside(paths: Sequence[Path]) -> "Recipe | None":
    """The recipe of the first run among and below the paths."""
    from endwise.evaluation.provenance import pinned
    from endwise.runs.folder import RunFolder

    for path in paths:
        here = RunFolder(path).has_run()
        for file in [path / "config.yaml"] if here else sorted(path.rglob("config.yaml")):
            return pinned(file.parent, RunFolder(file.parent).recipe())
    return None
