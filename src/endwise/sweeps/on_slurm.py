"""Tasks as SLURM jobs, by submitit; or, to try a sweep out, as processes of this machine in the same form."""

import getpass
import math
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from endwise.common.errors import ConfigError
from endwise.common.stopping import ask_to_stop
from endwise.sweeps.remote import Lost, Refused, Remote, failed, one_line, work
from endwise.sweeps.sweep_config import SlurmConfig
from endwise.sweeps.tasks import Outcome, Task

try:
    import submitit
    from submitit.helpers import DelayedSubmission, clean_env
except ImportError as error:
    raise ConfigError(f"engine: slurm needs submitit ({error}). Install it: pip install 'endwise[slurm]'") from None

TIMEOUTS = 10_000
"""Times that a job may reach its time limit: always, but submitit wants a number."""


@dataclass(frozen=True)
class Assignment:
    """Task that a job does."""

    task: Task
    directory: Path
    threads: int

    def __call__(self) -> list[Outcome] | None:
        """Carry out the task. At the signal that its time is nearly over (or, where SLURM sends it, that it is
        preempted), it saves before submitit queues it again.
        """
        near_the_end = signal.Signals[f"SIG{submitit.JobEnvironment.USR_SIG}"]
        requeue: Any = signal.getsignal(near_the_end)
        time_is_over = False

        def at_the_end(_number: int, _frame: object) -> None:
            nonlocal time_is_over
            time_is_over = True
            if not ask_to_stop():
                raise KeyboardInterrupt

        def at_once(_number: int, _frame: object) -> None:
            raise KeyboardInterrupt

        with _handled({near_the_end: at_the_end, signal.SIGTERM: at_once}):
            outcomes = work(self.task, self.directory, self.threads)
        if outcomes is None and time_is_over:
            with suppress(Exception):  # SLURM may refuse; the sweep then submits it again
                requeue(near_the_end, None)
        return outcomes

    def checkpoint(self) -> DelayedSubmission:
        """Return what submitit queues again: the same, since all that is done lies in the run folders."""
        return DelayedSubmission(self)


@contextmanager
def _handled(handlers: dict[signal.Signals, Any]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class OnSlurm(Remote):
    """Every task is a job. Jobs that a sweep left behind, whose own process was lost, are taken over by the next.

    Args:
        folder: for what submitit writes: each job's script, task, output and result.

    Raises:
        ConfigError: there is no SLURM here, or it does not know an option.
    """

    look_seconds = 1.0
    queue_seconds = 15.0
    """Between two looks at the queue, which a cluster's users share; results are files, looked for more often."""
    lag_seconds = 30.0
    """Time that a result may take to be seen here once its job has left the queue."""

    def __init__(self, config: SlurmConfig, folder: Path) -> None:
        super().__init__(config.retries, config.at_once)
        self._config, self._folder = config, folder.absolute()
        self._local = config.cluster == "local"
        self._executor = _executor(config, self._folder)
        self._queue = _Queue(self.queue_seconds)
        self._left_behind = [] if self._local else self._find_left_behind()
        self._unseen: dict[Any, float] = {}
        """Since when a job has been out of the queue, by the clock, with no result to be seen."""
        self._asked: set[Any] = set()
        """Jobs that were asked to stop, whose results matter no more."""

    def _find_left_behind(self) -> list[tuple[Any, Task | None]]:
        """Jobs of this folder that are in the queue, with their tasks; None: not to be read."""
        found: list[tuple[Any, Task | None]] = []
        for file in sorted(self._folder.glob("*_submitted.pkl")):
            job: Any = submitit.SlurmJob(self._folder, file.name.partition("_")[0])
            if job.paths.result_pickle.exists() or not self._queue.holds(job.job_id):
                continue
            try:
                found.append((job, job.submission().function.task))
            except Exception:  # noqa: BLE001  Whatever an earlier version left: it is ended below.
                found.append((job, None))
        return found

    def carry_out(self, tasks: Sequence[Task]) -> Iterator[list[Outcome]]:
        strangers = [job for job, task in self._left_behind if task not in tasks]
        self._left_behind = [(job, task) for job, task in self._left_behind if task in tasks]
        self._ask_to_stop(strangers)  # each may hold a run folder that another task needs now
        while any(not self._is_over(job) for job in strangers):
            time.sleep(self.look_seconds)
        yield from super().carry_out(tasks)

    def _submit(self, task: Task) -> Any:
        for number, (job, same) in enumerate(self._left_behind):
            if same == task:
                del self._left_behind[number]
                return job
        assignment = Assignment(task, Path.cwd(), self._config.cpus)
        try:
            with clean_env(), _signals_kept_from_children():
                return self._executor.submit(assignment)
        except Exception as error:
            raise Refused(
                f"SLURM does not take a job ({one_line(error)}). Correct the sweep's `slurm` section (partition, "
                "minutes, cpus, gpus, memory_gb, options)."
            ) from error

    def _ended(self, jobs: Sequence[Any]) -> Sequence[Any]:
        ended = [job for job in jobs if self._is_over(job)]
        if not ended:
            time.sleep(self.look_seconds)
        return ended

    def _is_over(self, job: Any) -> bool:
        with suppress(OSError):  # has a network disk look again which files there are
            self._folder.chmod(self._folder.stat().st_mode)
        if job.paths.result_pickle.exists():
            return True
        if self._local:
            return job.get_info()["jobState"] != "RUNNING"
        if self._queue.holds(job.job_id):
            self._unseen.pop(job, None)
            return False
        lag = 0 if job in self._asked else self.lag_seconds
        return time.monotonic() - self._unseen.setdefault(job, time.monotonic()) >= lag

    def _result(self, handle: Any, task: Task) -> list[Outcome] | None:
        if not handle.paths.result_pickle.exists():
            if not self._local:
                self._kill([handle])  # it may come back: SLURM itself queues jobs of a lost machine again
            raise Lost(f"job {handle.job_id} ended without a result; its output is in {handle.paths.stderr}")
        try:
            return handle.result()
        except Exception as error:  # noqa: BLE001  What the handle raised before its task began.
            return failed(task, one_line(error))

    def _ask_to_stop(self, jobs: Sequence[Any]) -> None:
        self._asked.update(jobs)
        if self._local:
            for job in jobs:
                with suppress(ProcessLookupError):
                    os.kill(int(job.job_id), signal.SIGTERM)  # which submitit's controller passes on
        elif jobs:
            names = [job.job_id for job in jobs]
            _run("scancel", "--state=PENDING", *names)
            _run("scancel", "--signal=TERM", *names)
            self._queue.forget()

    def _kill(self, jobs: Sequence[Any]) -> None:
        if self._local:
            self._ask_to_stop(jobs)  # they end by themselves; nothing waits for them
        elif jobs:
            _run("scancel", *(job.job_id for job in jobs))


class _Queue:
    """This user's jobs that SLURM has not ended. (`sacct`, which submitit would ask, does not work on a cluster that
    keeps no accounts.)
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._ids: set[str] | None = None
        """None: SLURM does not answer."""
        self._looked = -math.inf

    def holds(self, job_id: str) -> bool:
        """Also true as long as SLURM does not answer."""
        if time.monotonic() - self._looked >= self._seconds:
            listed = _run("squeue", "--noheader", "--format=%i", f"--user={getpass.getuser()}")
            self._ids, self._looked = None if listed is None else set(listed.split()), time.monotonic()
        return self._ids is None or job_id in self._ids

    def forget(self) -> None:
        """Have the next question asked again."""
        self._looked = -math.inf


def _run(*command: str) -> str | None:
    """Run a command and return what it says; None: it failed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _executor(config: SlurmConfig, folder: Path) -> submitit.AutoExecutor:
    timeouts: dict[str, Any] = {"slurm_max_num_timeout": TIMEOUTS, "local_max_num_timeout": TIMEOUTS}
    options = {key: value for key, value in {"requeue": True, **config.options}.items() if value is not False}
    try:
        executor = submitit.AutoExecutor(folder, cluster=config.cluster, **timeouts)
        executor.update_parameters(
            name="endwise",
            timeout_min=config.minutes,
            cpus_per_task=config.cpus,
            gpus_per_node=config.gpus or None,
            mem_gb=config.memory_gb,
            slurm_partition=config.partition,
            slurm_signal_delay_s=config.save_seconds,
            slurm_additional_parameters=options,
        )
    except Exception as error:
        raise ConfigError(
            f"SLURM cannot be used here ({one_line(error)}). Start the sweep where jobs are submitted (sbatch, srun), "
            "or set slurm.cluster=local to run its jobs as processes of this machine."
        ) from error
    return executor


@contextmanager
def _signals_kept_from_children() -> Iterator[None]:
    """A Ctrl-C at the terminal goes to all that was started from it; processes that are to save are asked in turn."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
