"""Layout of a run on the hub, and the way from a run folder to it and back.

    <run>/cfg.json, sae_weights.safetensors     the SAE, as SAELens and endwise load it
    <run>/endwise/                              of the run folder: recipe, what it stands on, evaluation
    <run>/<place>/...                           the same of each place, of a run of several

Nothing else goes up: no checkpoint, no optimiser's state. Absolute paths, the command and its folder are left out;
names of local models and texts lose the folders that they are in.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from endwise.common.digests import of_file
from endwise.common.errors import ConfigError, RunFolderError
from endwise.common.files import read_json
from endwise.common.text import model_title
from endwise.formats import FORMATS, NATIVE
from endwise.formats.reading import yaml_at
from endwise.runs.folder import RunFolder
from endwise.runs.several import PART, PLACES, is_several, place_folders

OWN = "endwise"
"""The folder of what is endwise's."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
FILES = (
    *("config.yaml", "data.json", "digests.json", "environment.json", "start.json", PART),
    *("evaluation.json", "evaluation_sums.safetensors", "evaluation_firings.safetensors"),
)
"""Files of a run folder that go up beside its SAE."""
_OF_THE_MACHINE = ("command", "directory", "relative", "out", "cache", "activations", "trackers")
"""Keys that say where a run lay, how it was started, and who heard of it."""
_HEADER = 8
"""Bytes of the length of a safetensors file's header."""


@dataclass(frozen=True)
class _Words:
    """Words of a run, with what is written for each: paths of this machine, and digests of what is written again."""

    instead: Mapping[str, str]

    def of(self, value: Any) -> Any:
        """Return a value of JSON or YAML as it goes up."""
        if isinstance(value, Mapping):
            return {self.of(key): self.of(each) for key, each in value.items() if key not in _OF_THE_MACHINE}
        if isinstance(value, list):
            return [self.of(each) for each in value]
        return self.text(value) if isinstance(value, str) else value

    def text(self, text: str) -> str:
        for word in sorted(self.instead, key=len, reverse=True):
            text = text.replace(word, self.instead[word])
        return Path(text).name if Path(text).is_absolute() else text


def stage(run: Path, target: Path) -> None:
    """Lay a measured run out as it goes up.

    Raises:
        ConfigError: the run's folder has a name that the hub does not take.
        RunFolderError: it is no run, has no SAE, was not measured, or what it says of itself holds a path of this
            machine even so.
        FormatError: a file of it cannot be read, or its SAE is not what its training wrote.
    """
    folder = RunFolder.open(run)
    recipe, name = folder.recipe(), run.resolve().name
    if not NAME.fullmatch(name):
        raise ConfigError(f"{run}: {name!r:.80} holds more than letters, digits, dots, - and _. Rename the folder.")
    if folder.measured() is None:
        raise RunFolderError(f"{run} was not measured yet. Measure it: endwise evaluate {run}")
    local = [path for path in dict.fromkeys(_paths(recipe.model_dump(mode="json"))) if len(Path(path).parts) > 1]
    words = {path: model_title(path) for path in local}
    parts = place_folders(run, recipe) if is_several(run) else []
    for part in parts or [run]:
        at = target / part.name if parts else target
        words |= _sae_staged(RunFolder(part), at, _Words(words))
    for part, at in [(run, target), *((part, target / part.name) for part in parts)]:
        _files_staged(part, at / OWN, _Words(words))
    _check_hidden(target, [*local, str(Path.home())])


def _paths(value: Any) -> Iterator[str]:
    """List the absolute paths in a value of JSON."""
    if isinstance(value, str) and Path(value).is_absolute():
        yield value
    elif isinstance(value, Mapping | list):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _paths(each)


def _sae_staged(folder: RunFolder, target: Path, words: _Words) -> dict[str, str]:
    """Lay out an SAE; returns its digest with the new one, where its file's metadata changed."""
    folder.config_of_trained(folder.path)
    form, digest = FORMATS[NATIVE], folder.weights_digest()
    source, weights = form.weights(folder.sae), form.weights(target)
    target.mkdir(parents=True)
    cfg = source.parent / "cfg.json"
    (target / cfg.name).write_text(json.dumps(words.of(read_json(cfg)), indent=2) + "\n", encoding="utf-8")
    with source.open("rb") as file:
        size = int.from_bytes(file.read(_HEADER), "little")
        header = file.read(size)
        fields = json.loads(header)
        kept = {key: words.text(value) for key, value in fields.get("__metadata__", {}).items()}
        if kept == fields.get("__metadata__", {}):
            _linked(source, weights)
            return {}
        own = json.dumps({**fields, "__metadata__": kept}, separators=(",", ":")).encode()
        own += b" " * (-len(own) % _HEADER)
        with weights.open("wb") as written:
            written.write(len(own).to_bytes(_HEADER, "little") + own)
            shutil.copyfileobj(file, written)
    return {digest: of_file(weights)}


def _files_staged(run: Path, target: Path, words: _Words) -> None:
    target.mkdir(parents=True)
    for file in (run / name for name in FILES):
        if not file.is_file():
            continue
        if file.suffix == ".json":
            (target / file.name).write_text(json.dumps(words.of(read_json(file)), indent=2) + "\n", encoding="utf-8")
        elif file.suffix == ".yaml":
            recipe = words.of(yaml.safe_load(file.read_text(encoding="utf-8")))
            (target / file.name).write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        else:
            _linked(file, target / file.name)


def _linked(source: Path, target: Path) -> None:
    """Put a file there without copying it, where the disk can."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _check_hidden(target: Path, paths: list[str]) -> None:
    words = {str(Path(path).parent) if path != str(Path.home()) else path for path in paths}
    for file in target.rglob("*"):
        if file.suffix not in (".json", ".yaml"):
            continue
        text = file.read_text(encoding="utf-8")
        if found := next((word for word in words if len(word) > 1 and f"{word}/" in text), None):
            raise RunFolderError(
                f"{file.name} of {target.name} holds the path {found}, which is not pushed. Remove it."
            )


def pushed(folder: Path) -> Iterator[Path]:
    """List the runs laid out in a folder, or the folder if it is one."""
    if (folder / OWN / "config.yaml").is_file():
        yield folder
    elif folder.is_dir():
        for below in sorted(folder.iterdir()):
            yield from pushed(below)


def restored(source: Path, target: Path) -> None:
    """Make a run folder of what `stage` laid out, of which the SAE may be missing. A recipe that comes from elsewhere
    runs no code of a model's, and names no trackers and no folders here, whatever it says.

    Raises:
        FormatError: the recipe is none.
    """
    target.mkdir(parents=True)
    for file in sorted(each for each in (source / OWN).iterdir() if each.name in FILES):
        shutil.copyfile(file, target / file.name)
    recipe = {key: value for key, value in yaml_at(target / FILES[0]).items() if key not in ("out", "trackers")}
    for section, key in (("model", "trust_remote_code"), ("data", "cache")):
        if isinstance(recipe.get(section), dict):
            recipe[section].pop(key, None)
    (target / FILES[0]).write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    for file in (each for each in source.iterdir() if each.is_file()):
        (target / "sae").mkdir(exist_ok=True)
        shutil.copyfile(file, target / "sae" / file.name)
    for place in (each for each in source.iterdir() if (each / OWN).is_dir()):
        restored(place, target / PLACES / place.name)
