"""Recipes that ship: the paper's published settings, and the embedded model's."""

import difflib
from contextlib import suppress
from pathlib import Path

from endwise.errors import ConfigError

FOLDER = Path(__file__).parent


def recipe_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """The file of a recipe given by its path or by the name of one that ships.

    Raises:
        ConfigError: there is neither.
    """
    with suppress(OSError):  # a name longer than the file system takes
        if Path(name).is_file():
            return Path(name)
    if name in recipe_names():
        return FOLDER / f"{name}.yaml"
    near = difflib.get_close_matches(Path(name).stem, recipe_names(), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"recipes that ship: {', '.join(recipe_names())}"
    raise ConfigError(f"There is no recipe {name!r}, neither a file nor one that ships; {hint}")
