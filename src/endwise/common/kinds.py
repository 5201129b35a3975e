"""Kinds of files and folders that commands take, so that one of another kind is refused in words that help."""

import json
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Literal

import yaml

from endwise.common.errors import OtherKind
from endwise.common.files import there_is

Wanted = Literal["recipe", "sweep", "study", "run folder", "SAE"]
LARGEST = 1 << 20
"""Bytes of a file that is read to see what it is."""
KEYS = (
    ("sweep", {"recipe", "grids"}, "Carry it out first: endwise sweep {}; then give its folder."),
    ("study", {"recipe", "kinds"}, "Carry it out first: endwise reproduce paper --model {}; then give its folder."),
    ("recipe", {"objective", "training"}, "Train it first: endwise train {}; then give its run folder."),
    ("recipe", {"phases", "training"}, "Train it first: endwise train {}; then give its run folder."),
)
"""Files of settings: what they are, by which keys, and what to do where their outcome is wanted."""
RUN, SWEEP = "config.yaml", "sweep.yaml"
HOLD = {
    "harvest.json": ("a harvest", "Give the folder of the run that was harvested."),
    "explanations.json": ("a run's explanations", "Give the folder of the run."),
    "patterns.json": ("a run's patterns", "Give the folder of the run."),
}
"""Kind of a folder by a file in it, and what to do with it."""
PARTS = ("sae", "saes", "checkpoints", "harvest", "explanations", "patterns", "dashboard", "bench", "trackers", RUN)
"""Names in a run folder that say nothing without it."""


def other_kind(path: Path, wanted: Wanted) -> OtherKind | None:
    """An error that says what is at a path, if that is known and is not what is wanted."""
    if not there_is(path):
        hub = "; an SAE on the hub is hf://OWNER/NAME/PATH, one of SAELens's registry RELEASE/SAE_ID"
        return OtherKind(f"There is no file or folder {path}. Correct the path{hub if wanted == 'SAE' else ''}.")
    if (found := _found(path, wanted)) is None or found[0].split(" ", 1)[1] == wanted:
        return None
    what, remedy = found
    taken = "an SAE or a run folder" if wanted == "SAE" else _article(wanted)
    return OtherKind(f"{path} is {what}, and {taken} is needed here. {remedy}")


def _found(path: Path, wanted: Wanted) -> tuple[str, str] | None:
    """Describe what is at the path, and what to do where something else is wanted."""
    name, is_made = shlex.quote(str(path)), wanted in ("run folder", "SAE")
    run = path if (path / RUN).is_file() else _run_around(path)
    if run is not None and (run != path or not is_made):
        own = "a run folder" if run == path else f"a part of the run {run}"
        again = f"Its recipe is {run / RUN}; to resume the run: endwise train --resume {shlex.quote(str(run))}"
        return own, "Give that." if is_made else again if wanted == "recipe" else f"Give the file of a {wanted}."
    if path.is_file():
        keys = _keys(path)
        kind = next((each for each in KEYS if each[1] <= keys), None)
        return None if kind is None else (_article(kind[0]), kind[2].format(name))
    if (path / SWEEP).is_file() and not is_made:
        return "a sweep's folder", f"Its file is {path / SWEEP}."
    if "model_type" in _keys(path / "config.json"):
        return "a language model", f"Write a recipe for it: endwise init {name}"
    if (path / "cfg.json").is_file():
        return "an SAE", f"{'Make one of it: endwise adopt' if is_made else 'Tune it: endwise finetune'} {name}"
    for file, (what, remedy) in HOLD.items():
        if (path / file).is_file():
            return what, remedy
    return None if any(path.iterdir()) else ("an empty folder", "Correct the path.")


def _run_around(path: Path) -> Path | None:
    """The run folder that the path is a part of."""
    below = [path, *path.parents][:3]
    return next((each.parent for each in below if each.name in PARTS and (each.parent / RUN).is_file()), None)


def _keys(path: Path) -> set[str]:
    """Keys of a file of settings; none of what is no such file."""
    with suppress(OSError, ValueError, yaml.YAMLError, RecursionError):
        if path.suffix in (".yaml", ".yml", ".json") and path.stat().st_size < LARGEST:
            values = (json.loads if path.suffix == ".json" else yaml.safe_load)(path.read_text())
            return {str(key) for key in values} if isinstance(values, dict) else set()
    return set()


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'AEIOUaeiou' or words.startswith('SAE') else 'a'} {words}"
