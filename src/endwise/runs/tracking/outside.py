"""Trackers outside: a process of its own reads the run folder and sends what is new, so that training never waits."""

import json
import os
import shlex
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from endwise.common.errors import ConfigError, FormatError
from endwise.common.files import read_json
from endwise.runs.trackers import NotSent, Status

if TYPE_CHECKING:
    from endwise.config.places import Recipe

FOLDER = "trackers"
"""Folder in a run's that holds of each tracker what was sent, in which tracked run, and the log of its process."""
PATIENCE = "ENDWISE_TRACKER_PATIENCE"
"""Variable that holds the seconds that a run waits at its end for a tracker to have everything; 30 without it."""
LAST_WORDS = 400
"""Characters of a log's last line that are shown."""


@dataclass(frozen=True)
class TrackedRun:
    """A run as a tracker hears of it."""

    folder: Path
    recipe: Mapping[str, Any]
    id: str | None
    """The id by which the tracker knows it from an earlier start; None: it is new there."""
    sent: int
    """The latest step that was sent before; -1: none was."""

    @property
    def name(self) -> str:
        return self.folder.name


class Outside(ABC):
    """A tracker that shows runs elsewhere. Its abstract methods are called in a process of their own (`sending`), which
    may wait, fail or hang; the others are a `Tracker`'s, in the process that trains.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    """The module that it needs; `pip install "endwise[NAME]"` brings it."""

    @abstractmethod
    def begin(self, run: TrackedRun) -> str:
        """Start a tracked run, or resume that of `run.id`, and return its id."""

    @abstractmethod
    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Take numbers of one training step; steps never fall."""

    @abstractmethod
    def summary(self, values: Mapping[str, float]) -> None:
        """Take numbers of the whole run: its evaluation."""

    @abstractmethod
    def files(self, files: Sequence[Path]) -> None:
        """Take files of the run folder: the recipe, the evaluation, reports and figures. Some may have come before."""

    @abstractmethod
    def end(self, status: Status, error: str | None) -> None:
        """Return once everything is kept or sent.

        Args:
            error: what ended the run, of one that failed.
        """

    _late: ClassVar[set[str]] = set()
    """Names of those that a run of this process has waited for in vain; the next does not wait for them."""
    _process: subprocess.Popen[bytes] | None = None
    _error: str | None = None

    def __init__(self) -> None:
        if find_spec(self.package) is None:
            raise ModuleNotFoundError(f'there is no package {self.package}; pip install "endwise[{self.name}]"')
        self._patience = patience()

    def started(self, config: "Recipe", folder: Path, step: int | None) -> None:
        self._folder = folder.absolute()
        log = log_of(self._folder, self.name)
        log.parent.mkdir(exist_ok=True)
        # Its own session: Ctrl-C is for the run alone, and whatever it starts ends with it.
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "endwise.runs.tracking.sending", self.name, str(self._folder)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )

    def line(self, name: str, record: Mapping[str, Any]) -> None:
        """Keep what ended the run; all other lines its process reads in the folder."""
        if name == "failure":
            self._error = str(record["error"])
        process = self._process
        if process is not None and process.poll() is not None:
            with process:  # its standard input is closed
                self._process = None
            raise NotSent(self._not_sent("stopped"))

    def ended(self, status: Status) -> None:
        self.finish(status, 0.0 if self.name in self._late else self._patience)

    def finish(self, status: Status, patience: float | None) -> None:
        """Tell the process that nothing more comes, and wait until it has sent all.

        Args:
            patience: seconds, after which it is ended; None: as long as it takes.

        Raises:
            NotSent: it failed or took longer, with the command that sends the rest.
        """
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        try:
            with suppress(OSError), process.stdin as pipe:  # if it is gone, its exit code says so
                pipe.write(json.dumps({"status": status, "error": self._error, "patience": patience}).encode())
            if process.wait(patience):
                raise NotSent(self._not_sent("failed"))
        except subprocess.TimeoutExpired:
            self._late.add(self.name)
            raise NotSent(self._not_sent(f"did not take everything within {self._patience:g} s")) from None
        finally:
            if process.poll() is None:
                _end(process)

    def _not_sent(self, what: str) -> str:
        sent = sent_of(self._folder, self.name).get("step", -1)
        reached = f"it has the lines up to step {sent}" if sent >= 0 else "it has no line"
        words = last_words(log_of(self._folder, self.name))
        return (
            f"The tracker {self.name} {what}; {reached}, and the run folder has all. Send the rest with: endwise track "
            f"{shlex.quote(str(self._folder))} --to {self.name}{f'. Its last output: {words}' if words else ''}"
        )


def patience() -> float:
    """
    Raises:
        ConfigError: `$ENDWISE_TRACKER_PATIENCE` is no number of seconds.
    """
    text = os.environ.get(PATIENCE, "30")
    try:
        return abs(float(text))
    except ValueError:
        raise ConfigError(f"${PATIENCE} must be a number of seconds, given {text!r:.40}") from None


def log_of(folder: Path, name: str) -> Path:
    return folder / FOLDER / f"{name}.log"


def sent_of(folder: Path, name: str) -> dict[str, Any]:
    """Read what was sent to a tracker before: `id`, `step`, and `files` with size and time; empty where none was."""
    try:
        return read_json(folder / FOLDER / f"{name}.json")
    except (FileNotFoundError, FormatError):
        return {}


def last_words(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1][:LAST_WORDS] if lines else ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started."""
    with suppress(OSError):
        if os.name == "posix":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()
