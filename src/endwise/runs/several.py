"""Folders of a run of several places, and how such a place's folder differs from a run's."""

import shlex
from pathlib import Path

from endwise.common.errors import RunFolderError
from endwise.common.files import read_json, there_is, write_json
from endwise.config.places import PlacesConfig, Recipe
from endwise.config.run import RunConfig

PLACES, PART = "places", "part.json"


def place_folder(run: Path, recipe: RunConfig) -> Path:
    """The folder of one of a run's places, by its recipe for one."""
    two = recipe.written != recipe.site
    return run / PLACES / (f"{recipe.site}-to-{recipe.written}" if two else recipe.site)


def place_folders(run: Path, config: Recipe) -> list[Path]:
    """The folders that hold a run's dictionaries, in the order of the recipe: its own, of one place."""
    return [place_folder(run, recipe) for recipe in config.recipes] if isinstance(config, PlacesConfig) else [run]


def is_several(run: Path) -> bool:
    """Return whether a folder is a run of several places."""
    return there_is(run / PLACES)


def mark_part(folder: Path, config: PlacesConfig) -> None:
    """Write into a place's folder that it is one of several, trained jointly."""
    shared = {"run": folder.parent.parent.name, "joint": config.place, "inputs": config.inputs}
    write_json(folder / PART, {"seed": config.seed, **shared})


def joint_with(folder: Path) -> tuple[str, str | None] | None:
    """Return the places of the joint run that a folder is one place of, and its `inputs`; None: of no joint run."""
    if not is_part(folder):
        return None
    part = read_json(folder / PART)
    return str(part.get("joint")), part.get("inputs")


def is_part(folder: Path) -> bool:
    """Return whether a folder is one place of a run that trains several jointly."""
    return there_is(folder / PART)


def resuming(folder: Path) -> str:
    """The command that resumes a run, which for one of several places is that of all."""
    run = folder.parent.parent if is_part(folder) else folder
    return f"endwise train --resume {shlex.quote(str(run))}"


def check_whole(folder: Path) -> None:
    """
    Raises:
        RunFolderError: it is one place of a run that trains several jointly.
    """
    if is_part(folder):
        run = read_json(folder / PART).get("run")
        raise RunFolderError(
            f"{folder} is one place of the run {run}, trained jointly with others. Resume that: {resuming(folder)}"
        )
