"""Tasks of a sweep's engine that wait in the midst of a run, if a test asks for that, until the test has acted.

A test that looked on from outside would miss the moment where workers are quick and the machine is busy. As a program
(`python holding.py FOLDER`) it is a job of submitit's that waits likewise.
"""

import os
import runpy
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

from endwise.sweeps import remote
from endwise.training import loop

HELD_AFTER = 25
"""Steps: two checkpoints where one is saved every 10, and a line of timings after the last of them."""


def files(sweep: Path, kind: str) -> tuple[Path, Path, Path]:
    """Beside a sweep's folder: what asks that a run of a kind waits, what names the one that does, what ends that."""
    wanted, held, over = (sweep.parent / f"{kind}-{state}" for state in ("wanted", "held", "over"))
    return wanted, held, over


def work(task, directory, threads):
    """Carry out a task in a worker, as `endwise.sweeps.remote.work` does."""
    _wait_if_asked()
    return remote.work(task, directory, threads)


@cache
def _wait_if_asked() -> None:
    plain = loop._record

    def record(prepared, done, shown):
        plain(prepared, done, shown)
        for member in prepared.group.members if done == HELD_AFTER else ():
            run = member.folder.path.absolute()
            wanted, held, over = files(run.parents[1], member.config.objective.kind)
            with suppress(FileNotFoundError):
                wanted.unlink()  # which only one of several can
                whole = held.with_suffix(".tmp")
                whole.write_text(f"{os.getpid()} {run}")
                whole.rename(held)
                while not over.exists():
                    time.sleep(0.01)

    loop._record = record


if __name__ == "__main__":
    from endwise.sweeps import on_slurm

    on_slurm.work = work
    runpy.run_module("submitit.core._submit", run_name="__main__", alter_sys=True)
