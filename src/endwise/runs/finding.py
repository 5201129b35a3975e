"""Run folders in a folder of runs: a sweep's, a study's, or all that somebody trained."""

from collections.abc import Callable, Iterable
from pathlib import Path

from endwise.common.errors import FormatError, RunFolderError
from endwise.common.files import expanded
from endwise.runs.folder import RunFolder, parts_of
from endwise.runs.no_run import no_run

NOT_RUNS = ("trials", "checkpoints", "sae")
"""Folders in which no run is looked for; a sweep's trials are short ones, made to find a coefficient."""

Paths = str | Path | Iterable[str | Path]


def each_path(paths: Paths) -> list[Path]:
    """List one path, or several, as a user gives them."""
    return [expanded(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]


def run_folders(path: Path) -> list[Path]:
    """List the runs among a folder and those below it, in order; a run's own places are none of them.

    Raises:
        RunFolderError: it is no folder.
    """
    path = expanded(path)
    if RunFolder(path).has_run():
        return [path]
    if not path.is_dir():
        raise no_run(path)
    files = sorted(path.rglob("config.yaml"))
    below = [file.parent for file in files if not {*NOT_RUNS} & {*file.relative_to(path).parts[:-2]}]
    found = set(below)
    return [run for run in below if not found & {*run.parents}]


def refuse_several(path: Path) -> None:
    """
    Raises:
        RunFolderError: the path, where one run is taken, is a folder of several.
    """
    if not RunFolder(path).has_run() and path.is_dir() and (below := run_folders(path)):
        runs = f"{len(below)} run{'s' * (len(below) > 1)}"
        raise RunFolderError(f"{path} is a folder of {runs}, and one run is needed here. Name it: {below[0]}")


def runs_at(paths: Paths, has: Callable[[Path], bool], *, lacking: str, remedy: str) -> list[Path]:
    """List what a command that takes runs is given: a run as it is, of a folder of runs those that have what is needed.

    Args:
        has: whether a run below a folder has it; others are passed over.
        lacking: completes "none of which …".
        remedy: what to do then.

    Raises:
        RunFolderError: a folder has no such run.
    """
    found: dict[Path, None] = {}
    for path in each_path(paths):
        if RunFolder(path).has_run() or not path.is_dir() or not (below := run_folders(path)):
            found[path] = None  # which is refused in its own words, if it is no run
            continue
        fit = [run for run in below if has(run)]
        if not fit:
            raise RunFolderError(f"{path} holds {len(below)} run folders, none of which {lacking}. {remedy}")
        found |= dict.fromkeys(fit)
    return list(found)


def trained_runs(paths: Paths) -> list[Path]:
    """List the runs among and below the paths; of those below, the trained ones.

    Raises:
        RunFolderError: a folder has none.
    """
    return runs_at(
        paths,
        lambda run: all(part.sae.exists() for part in parts_of(run)),
        lacking="holds a trained SAE",
        remedy="Train them: endwise train --resume.",
    )


def harvested_runs(paths: Paths) -> list[Path]:
    """Variant of `trained_runs` for those that were harvested."""
    return runs_at(
        paths,
        lambda run: (run / "harvest").is_dir(),
        lacking="was harvested",
        remedy="Gather what their features fire on: endwise harvest.",
    )


def check_same_weights(run: Path, digest: object, done: str, again: str) -> None:
    """
    Args:
        digest: of the weights that it was gathered from.
        done: what was done to the run with them, `harvested`.
        again: the remedy.

    Raises:
        FormatError: the SAE has other weights now, or see `RunFolder.weights_digest`.
    """
    if digest != RunFolder(run).weights_digest():
        raise FormatError(f"{run} was {done} with other weights than its SAE has now. {again}")
