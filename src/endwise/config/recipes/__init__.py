"""Recipes that ship: the paper's published settings, and the embedded model's; and sweeps over them."""

import difflib
from contextlib import suppress
from pathlib import Path
from typing import Literal

from endwise.common.errors import ConfigError, OtherKind
from endwise.common.files import expanded, there_is
from endwise.common.kinds import other_kind

FOLDER = Path(__file__).parent
SWEEPS = FOLDER / "sweeps"


def recipe_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def sweep_names() -> list[str]:
    return sorted(path.stem for path in SWEEPS.glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """The file of a recipe given by its path or by the name of one that ships.

    Raises:
        ConfigError: there is neither.
    """
    return _find("recipe", name, FOLDER, recipe_names())


def find_sweep(name: str) -> Path:
    """Variant of `find_recipe`, the file of a sweep."""
    return _find("sweep", name, SWEEPS, sweep_names())


def shipped(name: str) -> OtherKind | None:
    """An error that says what to do with a name of what ships where its outcome is wanted; None: it is no such name."""
    names = {"train": recipe_names(), "sweep": sweep_names()}
    ways = [f"endwise {verb} {name}" for verb, known in names.items() if name in known]
    return OtherKind(f"{name} is a recipe or sweep that ships. Train it first: {ways[0]}") if ways else None


def _find(kind: Literal["recipe", "sweep"], name: str, folder: Path, names: list[str]) -> Path:
    with suppress(OSError):  # a name longer than the file system takes
        if (path := expanded(name)).is_file():
            return path
    if name in names:
        return folder / f"{name}.yaml"
    other = {"recipe": sweep_names(), "sweep": recipe_names()}[kind]
    if name in other:
        verb, what = ("sweep", "sweep") if kind == "recipe" else ("train", "recipe")
        raise ConfigError(f"{name} is a {what} that ships, and no {kind}. Use it: endwise {verb} {name}")
    if name and there_is(path := expanded(name)):
        raise other_kind(path, kind) or ConfigError(f"{name} is a folder, and a {kind} is a file. Correct the path.")
    near = difflib.get_close_matches(Path(name).stem, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"{kind}s that ship: {', '.join(names)}"
    raise ConfigError(f"There is no {kind} {name!r}, neither a file nor one that ships; {hint}")
