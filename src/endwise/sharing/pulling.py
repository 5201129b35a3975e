"""Bringing what is on the Hugging Face hub to a local folder: pushed runs as run folders, other SAEs as they are."""

import glob
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath

from endwise.common.errors import RunFolderError
from endwise.common.files import PARTIAL, check_can_write, expanded, there_is, write_json
from endwise.common.hub import asking
from endwise.formats import on_hub
from endwise.formats.fetching import chosen, files_of
from endwise.formats.naming import OnHub
from endwise.sharing.layout import OWN, pushed, restored

ORIGIN = "hub.json"
"""File of a pulled folder that says where it is from."""


def pull(name: str, out: str | Path | None = None) -> list[Path]:
    """Bring runs, or an SAE, from the hub to a folder.

    A download that broke off is resumed by the same call, from huggingface_hub's cache. A folder appears whole or not.

    Args:
        name: `owner/name[@revision][/path]`, with or without `hf://`, or `release/sae_id` of SAELens's registry.
        out: the folder; unset: `runs/<repository>[/<path>]`. Of several runs each is in it, by its name.

    Returns: run folders, or the path of an SAE.

    Raises:
        HubError: the hub does not have it, or does not give it.
        RunFolderError: there is something in its place already, or it cannot be written.
    """
    found = on_hub(name) or on_hub(f"hf://{name}")
    assert found is not None, "a name with hf:// is one on the hub"
    target = expanded(out or Path("runs") / found.repo.partition("/")[2] / found.inside)
    check_can_write(target)
    with asking(str(found)):
        files = [file for file in files_of(found.repo, found.revision) if _below(file, found.inside)]
    if any(f"/{OWN}/config.yaml" in f"/{file}" for file in files):
        snapshot = _fetched(found, files)
        runs = list(pushed(snapshot / found.inside))
        targets = [target if run == snapshot / found.inside else target / run.name for run in runs]
        for run, place in zip(runs, targets, strict=True):
            _placed(place, found, snapshot.name, partial(restored, run))
        return targets
    return [_foreign(found, target)]


def _below(file: str, inside: str) -> bool:
    return not inside or file == inside or file.startswith(f"{inside}/")


def _fetched(found: OnHub, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    with asking(str(found)):
        patterns = [glob.escape(file) for file in files]
        return Path(snapshot_download(found.repo, revision=found.revision, allow_patterns=patterns))


def _foreign(found: OnHub, target: Path) -> Path:
    """Bring the files of an SAE of others, as they lie in its folder; returns its path."""
    with asking(str(found)):
        wanted, place = chosen(files_of(found.repo, found.revision), found.inside, str(found))
    snapshot, at = _fetched(found, wanted), PurePosixPath(place)
    file = next((each for each in (at, *at.parents) if str(each) in wanted), None)
    folder = at if file is None else file.parent
    own = {each: PurePosixPath(each).relative_to(folder) for each in wanted if folder in PurePosixPath(each).parents}

    def write(partial: Path) -> None:
        for each, below in own.items():
            (partial / below).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(snapshot / each, partial / below)

    _placed(target, found, snapshot.name, write)
    return target / at.relative_to(folder)


def _placed(target: Path, found: OnHub, commit: str, write: Callable[[Path], None]) -> None:
    """Have a folder written, which appears at once and whole.

    Raises:
        RunFolderError: there is something in its place.
    """
    if there_is(target):
        raise RunFolderError(f"{target} is there already. Name another folder, or remove it.")
    unready = target.parent / f".{target.name}.{os.getpid()}{PARTIAL}"
    try:
        unready.parent.mkdir(parents=True, exist_ok=True)
        write(unready)
        write_json(unready / ORIGIN, {"repository": found.repo, "path": found.inside, "commit": commit})
        unready.rename(target)
    finally:
        shutil.rmtree(unready, ignore_errors=True)
