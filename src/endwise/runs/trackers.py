"""Trackers: whoever listens to a run gets the lines of its folder, as they are written.

The run folder is the truth, and trackers mirror it: one that fails is reported once, and training continues without.
A tracker is one file: a class with the methods of `Tracker`, registered by `TRACKERS.add("its name")`, and named in a
recipe's `trackers`. Those that ship (`tracking`) work in processes of their own.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from endwise.common.errors import ConfigError, Interrupted
from endwise.common.registry import Registry
from endwise.common.terminal import note

if TYPE_CHECKING:  # a process of a tracker reads no recipe
    from endwise.config.places import Recipe

Status = Literal["finished", "interrupted", "failed"]


@runtime_checkable  # the tests check types as they run
class Tracker(Protocol):
    """Listener to one run, from one start of it to its end or interruption."""

    def started(self, config: "Recipe", folder: Path, step: int | None) -> None:
        """Hear of a run that starts (step 0), is resumed, or is measured (None) by this process.

        Args:
            folder: holds all earlier lines, for a tracker that was not there.
            step: the step of the checkpoint that the run is resumed from. Lines of later steps that were sent before
                are void: they were cut from the folder, and come again.
        """
        ...

    def line(self, name: str, record: Mapping[str, Any]) -> None:
        """Take one record of the run.

        Args:
            name: `metrics`, `timings` or `changes`, the file of the run folder that has the line; `evaluation`, the
                content of `evaluation.json`; `checkpoint`, of one that was saved, its step and file; `failure`, what
                ended the run.
        """
        ...

    def ended(self, status: Status) -> None:
        """Hear that this process does no more for the run."""
        ...


TRACKERS: Registry[Callable[[], Tracker]] = Registry("trackers", "endwise.runs.tracking")
"""Classes of trackers, by the names that recipes call them by; each run has an instance of its own."""


class NotSent(Exception):
    """A tracker lacks lines of the run; the message says so, and how they are sent."""


class Mirror(AbstractContextManager["Mirror"]):
    """The trackers of one run. At the end of its context all hear how that ended."""

    def __init__(self, trackers: Mapping[str, Tracker] | None = None) -> None:
        self._waiting = dict(trackers or {})
        self._listening: dict[str, Tracker] = {}

    @classmethod
    def named(cls, names: Iterable[str]) -> "Mirror":
        """A mirror of new trackers.

        Raises:
            ConfigError: see `made`.
        """
        return cls(cls.made(names))

    @staticmethod
    def made(names: Iterable[str]) -> dict[str, Tracker]:
        """New trackers by their names.

        Raises:
            ConfigError: one is not known, or cannot be made here.
        """
        made: dict[str, Tracker] = {}
        for name in names:
            kind = TRACKERS[name]
            try:
                made[name] = kind()
            except Exception as error:
                raise ConfigError(
                    f"The tracker {name} cannot be set up ({_one_line(error)}). Set it up, or leave it out of trackers."
                ) from error
        return made

    def started(self, config: "Recipe", folder: Path, step: int | None) -> None:
        """Begin to send: until then nothing is heard."""
        self._listening, self._waiting = self._waiting, {}
        self._each(lambda tracker: tracker.started(config, folder, step))

    def line(self, name: str, record: Mapping[str, Any]) -> None:
        self._each(lambda tracker: tracker.line(name, record))

    def ended(self, status: Status) -> None:
        """Report the end, after which nothing is heard."""
        self._each(lambda tracker: tracker.ended(status))
        self._listening = {}

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            return self.ended("finished")
        if isinstance(error, Interrupted | KeyboardInterrupt):
            return self.ended("interrupted")
        self.line("failure", {"error": _one_line(error)})
        return self.ended("failed")

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._listening.items()):
            try:
                act(tracker)
            except Exception as error:  # noqa: BLE001  Whatever it is, the run does not depend on it.
                del self._listening[name]
                failed = f"The tracker {name} failed and gets no more of this run, which continues: {_one_line(error)}"
                note(str(error) if isinstance(error, NotSent) else failed)


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
