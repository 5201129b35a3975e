"""Base of engines with workers elsewhere: who carries out what, what is given out again, how all is stopped.

A worker carries out a task in the directory of the sweep, and whatever happens comes back as text.
"""

import os
import socket
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from endwise.common.errors import ConfigError, EndwiseError, Interrupted, RunFolderError
from endwise.common.remedies import reason, remedy
from endwise.common.stopping import polite_stop
from endwise.config.places import Recipe
from endwise.sweeps.tasks import Outcome, Task, Worker, folder_of, is_finished


class Lost(Exception):
    """A worker has ended without a result; the text says what is known of it."""


class Refused(ConfigError):
    """A task was not taken."""


@dataclass(frozen=True)
class Job:
    """A task, and how often its worker may still be lost."""

    task: Task
    losses_left: int


class Remote(ABC):
    """An engine whose tasks are carried out by other processes, as jobs of a scheduler.

    What a worker has done lies in the run folders, so the task of one that was lost, or was asked to stop in favour of
    others, is simply given out again.

    Args:
        retries: how often, for each task.
        at_once: most jobs that the scheduler is given at a time; None: all.
    """

    visible_seconds = 60.0
    """Time that a file that another machine wrote may take to be seen here: what NFS keeps in mind by default."""

    def __init__(self, retries: int, at_once: int | None = None) -> None:
        self._retries, self._at_once = retries, at_once
        self._waiting: deque[Job] = deque()
        self._given: dict[Any, Job] = {}
        self._full = False
        """The scheduler refused a job, and none has ended since."""

    @abstractmethod
    def _submit(self, task: Task) -> Any:
        """Give a task to the scheduler; its handle, which can be hashed.

        Raises:
            Refused: the scheduler does not take it.
        """

    @abstractmethod
    def _ended(self, jobs: Sequence[Any]) -> Sequence[Any]:
        """Return jobs that have ended, after waiting for about a second."""

    @abstractmethod
    def _result(self, handle: Any, task: Task) -> list[Outcome] | None:
        """Return the outcomes of a job that has ended; None: it was asked to stop.

        Raises:
            Lost: it has left no result.
        """

    @abstractmethod
    def _ask_to_stop(self, jobs: Sequence[Any]) -> None:
        """Have running jobs save and end, and take back those that have not begun."""

    @abstractmethod
    def _kill(self, jobs: Sequence[Any]) -> None:
        """End jobs at once."""

    def carry_out(self, tasks: Sequence[Task]) -> Iterator[list[Outcome]]:
        """See `Engine`.

        Raises:
            Interrupted: the user asked to stop, and every worker has saved.
            ConfigError: the scheduler takes none of the tasks.
        """
        self._waiting = deque(Job(task, self._retries) for task in tasks)
        with polite_stop() as stop_asked, self._killing():
            while self._waiting or self._given:
                self._give_out()
                for handle in self._ended(list(self._given)):
                    job, self._full = self._given.pop(handle), False
                    yield from self._outcomes(handle, job)
                if stop_asked():
                    self._stop()
                    raise Interrupted(
                        "Stopped as asked; what was in training is saved. The same command resumes from there."
                    )

    def close(self) -> None:
        """End what is still being carried out (nothing, unless an error ended the sweep), and let it save."""
        with polite_stop(), self._killing():
            self._stop()

    def _give_out(self) -> None:
        while self._waiting and not self._full and (self._at_once is None or len(self._given) < self._at_once):
            job = self._waiting.popleft()
            try:
                self._given[self._submit(job.task)] = job
            except Refused:
                if not self._given:
                    raise
                self._waiting.appendleft(job)  # a limit on jobs, perhaps: it is asked again when one has ended
                self._full = True

    def _outcomes(self, handle: Any, job: Job) -> Iterator[list[Outcome]]:
        """Return the outcomes of a task, unless it is given out again."""
        try:
            outcomes = self._result(handle, job.task)
        except Lost as error:
            yield from self._again(job, f"{error}")
            return
        if outcomes is None:  # for another's sake, by the scheduler: no fault of the task's
            self._waiting.appendleft(job)
        else:
            yield [self._seen(outcome, config) for outcome, config in zip(outcomes, job.task, strict=True)]

    def _again(self, job: Job, reason: str) -> Iterator[list[Outcome]]:
        """Give out once more what lost its worker; a group that it happens to each time, one run at a time."""
        task = job.task
        if job.losses_left:
            self._waiting.appendleft(Job(task, job.losses_left - 1))
        elif len(task) > 1:
            self._waiting.extendleft(Job((config,), 0) for config in reversed(task))
        else:
            yield failed(task, f"Every worker that it was given to was lost, the last one with: {reason}")

    def _seen(self, outcome: Outcome, config: Recipe) -> Outcome:
        """The outcome, or a failure where a run reported as finished cannot be found: given out again it would
        be finished again, and so without end.
        """
        folder, give_up = folder_of(config), time.monotonic() + self.visible_seconds
        while outcome.error is None:
            with suppress(EndwiseError):
                if self._shows_finished(config):
                    break
            if time.monotonic() >= give_up:
                return Outcome(
                    folder,
                    f"A worker has finished it, but {folder} does not show that here. Give the sweep an `out` on a "
                    "disk that this machine and all workers share.",
                )
            time.sleep(1)
        return Outcome(folder, outcome.error)

    def _shows_finished(self, config: Recipe) -> bool:
        return is_finished(config)

    def _stop(self) -> None:
        """Return when no job is left."""
        self._waiting.clear()
        if self._given:
            self._ask_to_stop(list(self._given))
        while self._given:
            for handle in self._ended(list(self._given)):
                del self._given[handle]

    @contextmanager
    def _killing(self) -> Iterator[None]:
        """A second Ctrl-C waits for nothing."""
        try:
            yield
        except KeyboardInterrupt:
            self._waiting.clear()
            self._kill(list(self._given))
            self._given.clear()
            raise


_worker = Worker()
"""Worker with what the tasks need that this process carried out before."""


def work(task: Task, directory: Path, threads: int) -> list[Outcome] | None:
    """Carry out a task; None: it was asked to stop, and what it had done is saved.

    Args:
        directory: the sweep's working directory. Paths in recipes mean the same there as they did to the sweep, and run
            folders hold the recipes as they were given, whoever writes them.
        threads: to compute with.
    """
    try:
        _enter(directory, task)
        torch.set_num_threads(threads)
        return _worker.carry_out(task)
    except (Interrupted, KeyboardInterrupt):
        return None
    except Exception as error:  # noqa: BLE001  Another process may not know its class.
        return failed(task, one_line(error))


def failed(task: Task, reason: str) -> list[Outcome]:
    return [Outcome(folder_of(config), reason) for config in task]


def one_line(error: BaseException) -> str:
    """An error's name and the end of what it says, where a traceback has its reason."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 600 else f'... {text[-600:]}'}"


_SHARED = "start the sweep in a directory that all machines share, or give it an absolute `out` that they share"


def _enter(directory: Path, task: Task) -> None:
    """
    Raises:
        RunFolderError: this machine has no such directory, and a run folder is given relative to it.
    """
    try:
        os.chdir(directory)
    except OSError as error:
        relative = [folder_of(config) for config in task if not folder_of(config).is_absolute()]
        if relative:
            raise RunFolderError(
                f"{socket.gethostname()} does not have the directory that the sweep was started in, {directory} "
                f"({reason(error)}), and so not {relative[0]} within it. {remedy(error, _SHARED)}"
            ) from None
