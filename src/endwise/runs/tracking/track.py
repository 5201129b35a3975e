"""Mirrors runs that are there: all lines of the folder that a tracker has not got yet."""

from collections.abc import Sequence
from pathlib import Path

from endwise.common.errors import ConfigError, RunFolderError
from endwise.runs.folder import RunFolder
from endwise.runs.trackers import TRACKERS, Mirror, NotSent, Tracker
from endwise.runs.tracking.outside import Outside


def track(run: str | Path, to: Sequence[str] = ()) -> list[str]:
    """Send a run folder to trackers, in the tracked run that it has there already, if any.

    Args:
        to: their names; none: those of the recipe.

    Returns:
        The names.

    Raises:
        RunFolderError: it is no run, it is being trained, or a tracker did not take it; the others have it.
        ConfigError: no tracker is named, or one cannot be set up.
    """
    folder = RunFolder.open(Path(run))
    config = folder.recipe()
    names = list(to) or list(config.trackers)
    if not names:
        known = ", ".join(TRACKERS.names())
        raise ConfigError(f"The recipe of {folder.path} names no trackers. Name one with --to; there are {known}.")
    made = Mirror.made(names)
    failed: list[str] = []
    with folder.claimed():
        for tracker in made.values():
            tracker.started(config, folder.path, None)
            try:
                _send(folder, tracker)
            except NotSent as error:
                failed.append(str(error))
    if failed:
        raise RunFolderError(" ".join(failed))
    return names


def _send(folder: RunFolder, tracker: Tracker) -> None:
    if isinstance(tracker, Outside):
        return tracker.finish("finished", None)
    metrics = folder.metrics() if folder.metrics_file.exists() else []  # an adopted SAE has none
    for name, records in (("metrics", metrics), ("evaluation", [folder.evaluation()])):
        for record in records:
            if record is not None:
                tracker.line(name, record)
    return tracker.ended("finished")
