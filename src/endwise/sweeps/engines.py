"""Engines that carry out tasks. One takes tasks and returns the outcomes of their runs, in any order."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from endwise.sweeps.sweep_config import EngineConfig
from endwise.sweeps.tasks import Outcome, Task, Worker


@runtime_checkable
class Engine(Protocol):
    """Carries out tasks.

    What a task has done lies in its run folders, which every place that an engine uses must see; so a task that was
    lost is simply given out again, and resumes from there.
    """

    def carry_out(self, tasks: Sequence[Task]) -> Iterator[list[Outcome]]:
        """Yield the outcomes of each task as it ends.

        Raises:
            Interrupted: the user asked to stop.
        """
        ...

    def close(self) -> None:
        """Give back what was started or reserved."""
        ...


class InProcess:
    """One task after another, here; those that another process is at work on, another copy of the sweep perhaps, are
    looked at again behind the others.
    """

    look_seconds = 5.0
    """Between two looks at runs all of which are taken."""

    def __init__(self, worker: Worker | None = None) -> None:
        self._worker = worker or Worker()

    def carry_out(self, tasks: Sequence[Task]) -> Iterator[list[Outcome]]:
        waiting, taken_in_a_row = deque(tasks), 0
        while waiting:
            task = waiting.popleft()
            outcomes = self._worker.carry_out(task)
            if ended := [outcome for outcome in outcomes if not outcome.taken]:
                yield ended
                taken_in_a_row = 0
            if taken := tuple(each for each, outcome in zip(task, outcomes, strict=True) if outcome.taken):
                waiting.append(taken)
                taken_in_a_row += 1
            if taken_in_a_row >= len(waiting) > 0:
                time.sleep(self.look_seconds)

    def close(self) -> None:
        self._worker.loaded.clear()


def engine_of(config: EngineConfig, folder: Path) -> Engine:
    """The engine that is asked for, which may write into the folder.

    Raises:
        ConfigError: what it needs is not installed.
    """
    if config.engine == "ray":
        from endwise.sweeps.on_ray import OnRay

        return OnRay(config.ray)
    if config.engine == "slurm":
        from endwise.sweeps.on_slurm import OnSlurm

        return OnSlurm(config.slurm, folder / "slurm")
    return InProcess()
