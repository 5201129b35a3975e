"""Bringing what is on the Hugging Face hub to a local folder: pushed runs as run folders, other SAEs as they are."""

import glob
import shutil
from pathlib import Path

from endwise.common.errors import RunFolderError
from endwise.common.files import check_can_write, expanded, there_is, write_json
from endwise.common.hub import asking
from endwise.formats import here, on_hub
from endwise.formats.fetching import files_of
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
    ours = [file for file in files if f"/{OWN}/config.yaml" in f"/{file}"]
    if not ours:
        at = here(str(found))
        weights = at.path if at.path.is_file() else None
        _placed(weights or at.path, target / weights.name if weights else target, found, at.commit)
        return [target / weights.name if weights else target]
    snapshot = _fetched(found, files)
    runs = list(pushed(snapshot / found.inside))
    targets = [target if run == snapshot / found.inside else target / run.name for run in runs]
    for run, place in zip(runs, targets, strict=True):
        _placed(run, place, found, snapshot.name)
    return targets


def _below(file: str, inside: str) -> bool:
    return not inside or file == inside or file.startswith(f"{inside}/")


def _fetched(found: OnHub, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    with asking(str(found)):
        patterns = [glob.escape(file) for file in files]
        return Path(snapshot_download(found.repo, revision=found.revision, allow_patterns=patterns))


def _placed(source: Path, target: Path, found: OnHub, commit: str | None) -> None:
    """Put a run, or the files of an SAE, into its place, all at once."""
    if there_is(target):
        raise RunFolderError(f"{target} is there already. Name another folder, or remove it.")
    partial = target.parent / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        if (source / OWN / "config.yaml").is_file():
            restored(source, partial)
        elif source.is_dir():
            shutil.copytree(source, partial)
        else:
            shutil.copyfile(source, partial)
        if partial.is_dir():
            write_json(partial / ORIGIN, {"repository": found.repo, "path": found.inside, "commit": commit})
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
