"""Fetching one SAE of a repository on the Hugging Face hub: which files it is made of, and no other."""

import difflib
import glob
import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path, PurePosixPath

from endwise.common.errors import HubError
from endwise.common.hub import SECONDS, asking, is_offline
from endwise.formats.base import FORMATS
from endwise.formats.reading import READERS

SETTINGS = (".json", ".yaml", ".yml")
IN_A_RUN = "sae"
"""The folder of a run that holds its SAE."""
LISTED = 8
"""Names listed in an error."""


def fetched(repo: str, inside: str, revision: str | None, name: str) -> tuple[Path, str]:
    """Fetch an SAE into huggingface_hub's cache. Without a connection, or if the hub is down, what is there is taken.

    Args:
        inside: the path in the repository, of a file or a folder; of one that holds a single SAE somewhere below, that.
        name: all of it, for errors.

    Returns:
        The snapshot's folder, which is called by the commit, and the SAE's path in it.

    Raises:
        HubError: there is no such repository, revision or path, this token may not read it, the path holds several
            SAEs or none, or the hub cannot be asked and the SAE is not in the cache.
    """
    from huggingface_hub import snapshot_download

    def snapshot(files: Sequence[str], local: bool) -> Path:
        patterns = [glob.escape(file) for file in files]
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, local_files_only=local))

    try:
        files = files_of(repo, revision)
    except Exception as error:
        if not is_offline(error):
            with asking(name):
                raise
        try:
            kept = snapshot([], True)
        except Exception:  # noqa: BLE001  what is reported is why the hub was not asked
            with asking(name):
                raise error from None
        there = [path.relative_to(kept).as_posix() for path in kept.rglob("*") if path.is_file()]
        _, inside = chosen(there, inside, name)
        if type(error).__name__ != "OfflineModeIsEnabled":
            message = f"{name}: the hub does not answer, so commit {kept.name} is read, the last one here."
            warnings.warn(message, stacklevel=4)
        return kept, inside
    wanted, inside = chosen(files, inside, name)
    with asking(name):
        return snapshot(wanted, False), inside


def files_of(repo: str, revision: str | None = None) -> list[str]:
    """List the files of a repository, as huggingface_hub gives them, which raises its own errors."""
    from huggingface_hub import HfApi

    return [each.rfilename for each in HfApi().model_info(repo, revision=revision, timeout=SECONDS).siblings or ()]


def chosen(files: Sequence[str], inside: str, name: str) -> tuple[list[str], str]:
    """Choose what an SAE is made of among the files of a repository, and say where it is.

    Raises:
        HubError: see `fetched`.
    """
    if inside in files:
        return [inside, *_settings(files, PurePosixPath(inside).parent)], inside
    for above in PurePosixPath(inside).parents:  # a site in a file of several: samples_100.pt/blocks.6.hook_resid_pre
        if str(above) in files and above.suffix in READERS:
            return [str(above), *_settings(files, above.parent)], inside
    below = [file for file in files if not inside or file.startswith(f"{inside}/")]
    if not below:
        near = difflib.get_close_matches(inside, [*saes_in(files), *files], n=LISTED, cutoff=0.3)
        raise HubError(f"{name}: there is no such path there. {_listed(near or list(saes_in(files)) or files)}")
    saes = saes_in(below)
    place = next((at for at in (inside, f"{inside}/{IN_A_RUN}".strip("/")) if at in saes), None)
    if place is None and len(saes) != 1:
        message = f"{name} holds {len(saes):,} SAEs. Name one" if saes else f"{name} holds no file of an SAE"
        raise HubError(f"{message}. {_listed(list(saes) or below)}")
    place = next(iter(saes)) if place is None else place
    return [saes[place], *_settings(files, PurePosixPath(saes[place]).parent, PurePosixPath(place))], place


def saes_in(files: Iterable[str]) -> dict[str, str]:
    """List the SAEs among the files of a repository: by the path of each, the file of its weights. A file of tensors
    counts if it lies in no folder that is one.
    """
    saes: dict[str, str] = {}
    alone: list[str] = []
    for file in files:
        mark = next((mark for mark in _marks() if f"/{file}".endswith(f"/{mark}")), None)
        if mark is not None:
            saes[file.removesuffix(mark).rstrip("/")] = file
        elif PurePosixPath(file).suffix in READERS:
            alone.append(file)
    folders = {PurePosixPath(place) for place in saes}
    folders |= {place.parent for place in folders if place.name == IN_A_RUN}
    return saes | {file: file for file in alone if folders.isdisjoint(PurePosixPath(file).parents)}


@cache
def _marks() -> tuple[str, ...]:
    """Return the files of weights by which formats know a folder."""
    folder, marks = Path("a"), []
    for form in (FORMATS[name] for name in FORMATS.names()):
        weights = form.weights(folder)
        if folder in weights.parents:
            marks.append(weights.relative_to(folder).as_posix())
    return tuple(marks)


def _settings(files: Iterable[str], *folders: PurePosixPath) -> list[str]:
    """List the settings in some folders, and what the folder above the first says of a whole set."""
    settings = [PurePosixPath(each) for each in files if PurePosixPath(each).suffix in SETTINGS]
    above = folders[0].parent / "config.json"
    return [str(each) for each in settings if each.parent in folders or each == above]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED:,} more" if len(names) > LISTED else ""
    return f"There {'are' if len(names) > 1 else 'is'} {', '.join(names[:LISTED]) or 'nothing'}{more}."
