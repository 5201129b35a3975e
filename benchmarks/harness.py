"""Several programs timed in turn, each in a process of its own, while nothing else computes.

Standard library only: a worker may run in the environment of another project. The driver starts a worker per program
(`Worker`), the worker builds its side and then waits (`serve`). `time_in_turn` lets one after the other take steps for
a while, so that whatever drifts on the machine meets all of them; samples that other processes disturbed are dropped.
"""

import contextlib
import json
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SAMPLE_SECONDS = 0.3
"""Steps shorter than this are timed in bunches: the kernel counts the CPU time of others in ticks of 10 ms."""
OTHERS_SHARE = 0.05
"""A sample is disturbed if other processes used more than this share of all cores meanwhile."""
STARVED_SHARE = 0.9
"""... or if the program itself got less than this share of the CPU time that its samples usually get."""
TURNS = 5
"""A side's seconds are spread over this many turns."""
LEAST_SAMPLES = 2
PATIENCE = 3
"""A side whose samples are disturbed is given up to this many times its seconds."""
TUNED = {"MALLOC_MMAP_THRESHOLD_": str(16 << 30), "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}
"""With these glibc keeps freed memory, so that large tensors are not faulted in again at every step."""
GIB = 1 << 30


class WorkerError(Exception):
    """A worker died or a call in it raised; the message holds the end of what it wrote."""


@dataclass(frozen=True)
class Sample:
    """Some steps in a row."""

    steps: int
    wall: float
    """Seconds."""
    cpu: float
    """Seconds of CPU time, user and system, of all threads of the process."""
    others: float
    """Seconds of CPU time that others used meanwhile: other processes, and other machines of the same host (steal)."""

    @property
    def seconds(self) -> float:
        """Per step."""
        return self.wall / self.steps


@dataclass(frozen=True)
class Timing:
    """The steps of one side."""

    seconds: float
    """Median per step, of the samples that were kept."""
    low: float
    """First quartile (the least, of fewer than four)."""
    high: float
    """Third quartile (the greatest, of fewer than four)."""
    samples: int
    steps: int
    discarded: int
    """Samples left out because others disturbed them."""
    quiet: bool
    """False: too few samples were undisturbed, so that all of them were taken."""


def kept(samples: Sequence[Sample], cores: int) -> list[Sample]:
    """The samples that nothing else disturbed (`OTHERS_SHARE`, `STARVED_SHARE`).

    The kernel's count of busy time is off by up to one tick per core at both ends, which is granted.
    """
    if not samples:
        return []
    usual = statistics.median(sample.cpu / sample.wall for sample in samples)
    ticks = 2 * cores / os.sysconf("SC_CLK_TCK")
    return [
        sample
        for sample in samples
        if sample.others <= OTHERS_SHARE * cores * sample.wall + ticks
        and sample.cpu / sample.wall >= STARVED_SHARE * usual
    ]


def timing(samples: Sequence[Sample], cores: int) -> Timing:
    """
    Raises:
        ValueError: there is no sample.
    """
    quiet = kept(samples, cores)
    chosen = quiet if len(quiet) >= LEAST_SAMPLES else list(samples)
    times = sorted(sample.seconds for sample in chosen)
    quartiles = statistics.quantiles(times, n=4) if len(times) >= 4 else [times[0], 0.0, times[-1]]
    return Timing(
        statistics.median(times),
        quartiles[0],
        quartiles[2],
        len(chosen),
        sum(sample.steps for sample in chosen),
        len(samples) - len(chosen),
        chosen is quiet,
    )


class Worker:
    """The driver's end of a worker process.

    Args:
        python: the interpreter, or what else runs a script.
    """

    def __init__(
        self, script: Path, environment: Mapping[str, str], python: str | Sequence[str] = sys.executable
    ) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            [*([python] if isinstance(python, str) else python), str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=dict(environment),
            text=True,
        )

    def call(self, name: str, **arguments: Any) -> Any:
        """Runs a method of the worker's side and waits for what it returns.

        Raises:
            WorkerError: the method raised, or the process ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"call": name, "arguments": arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"the process ended ({self._ending()}). Its last lines:\n{self._tail()}")
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply["result"]

    def stop(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # the end of its input ends the worker
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _ending(self) -> str:
        code = self._process.wait()
        if code < 0:
            name = signal.Signals(-code).name
            return f"{name}, as when memory runs out" if name == "SIGKILL" else name
        return f"exit status {code}"

    def _tail(self) -> str:
        self._log.seek(0)
        return "\n".join(self._log.read().decode(errors="replace").splitlines()[-15:])


class Side(ABC):
    """The worker's end: a program that takes training steps. Its other methods can be called by name as well."""

    @abstractmethod
    def build(self, spec: dict[str, Any]) -> dict[str, Any]:
        """Makes everything that a step needs; returns versions and what else is worth writing down."""

    @abstractmethod
    def step(self) -> None:
        """One training step, finished when it returns."""

    def turn(self, seconds: float) -> list[dict[str, float]]:
        """Steps for `seconds`, at least one sample of them."""
        samples: list[Sample] = []
        while not samples or sum(sample.wall for sample in samples) < seconds:
            samples.append(self._sample())
        return [asdict(sample) for sample in samples]

    def _sample(self) -> Sample:
        busy, cpu, start = busy_seconds(), time.process_time(), time.perf_counter()
        steps, wall = 0, 0.0
        while wall < SAMPLE_SECONDS:
            self.step()
            steps += 1
            wall = time.perf_counter() - start
        cpu, busy = time.process_time() - cpu, busy_seconds() - busy
        return Sample(steps, wall, cpu, max(0.0, busy - cpu))

    def begin_memory(self) -> dict[str, Any]:
        """Return the process's memory now, in GiB; from here on its peak is counted again, where the kernel lets us."""
        again = begin_peak()
        return {"before": resident("VmRSS") / GIB, "peak_counted_anew": again}

    def peak_memory(self) -> float:
        """GiB."""
        return resident("VmHWM") / GIB


def serve(side: Side) -> None:
    """Answers the driver until it closes our input. What libraries print goes to the log."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = {"result": getattr(side, request["call"])(**request["arguments"])}
        except Exception:  # noqa: BLE001 - the driver says what it was
            reply = {"error": traceback.format_exc(limit=-6)}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def time_in_turn(workers: Mapping[str, Worker], seconds: float, cores: int) -> tuple[dict[str, Timing], dict[str, str]]:
    """Lets the workers take steps in turn until each has had its seconds and two undisturbed samples.

    Returns the timings, and for each worker that failed what it said.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in workers}
    failed: dict[str, str] = {}
    waiting = list(workers)
    while waiting:
        for name in waiting:
            time.sleep(0.1)  # the threads of the one before stop waiting for work
            try:
                samples[name] += [Sample(**sample) for sample in workers[name].call("turn", seconds=seconds / TURNS)]
            except WorkerError as error:
                failed[name] = str(error)
        waiting = [name for name in waiting if name not in failed and not _enough(samples[name], seconds, cores)]
    return {name: timing(taken, cores) for name, taken in samples.items() if taken and name not in failed}, failed


def _enough(samples: list[Sample], seconds: float, cores: int) -> bool:
    quiet = kept(samples, cores)
    spent, all_spent = (sum(sample.wall for sample in some) for some in (quiet, samples))
    if all_spent >= PATIENCE * seconds and len(samples) >= PATIENCE * LEAST_SAMPLES:
        return True
    return spent >= seconds and len(quiet) >= LEAST_SAMPLES


def worker_environment(threads: int, tuned: bool = False) -> dict[str, str]:
    """Ours without what would tune the allocator, and without network."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    return environment | (TUNED if tuned else {})


def busy_seconds() -> float:
    """CPU time that anything on the machine has used since it started, and that its host withheld (steal).

    0 where the kernel does not say, so that only `STARVED_SHARE` finds disturbances.
    """
    try:
        with Path("/proc/stat").open() as file:
            user, nice, system, _idle, _wait, irq, softirq, steal = map(int, file.readline().split()[1:9])
    except (OSError, ValueError):
        return 0.0
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def begin_peak() -> bool:
    """Have the kernel count this process's peak again from here on; False: it does not let us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident(field: str) -> int:
    """`VmRSS` (now) or `VmHWM` (peak) of this process, in bytes.

    Not `ru_maxrss`, which a child inherits from the process that started it; only where there is no /proc.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(threads: int) -> dict[str, Any]:
    """Machine and versions that a figure depends on besides the code."""
    info: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            info.setdefault(key.strip(), value.strip())
    flags = set(info.get("flags", "").split())
    known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return {
        "cpu": info.get("model name") or platform.processor(),
        "family_model": f"{info.get('cpu family', '?')}/{info.get('model', '?')}",
        "cores": cores(),
        "threads": threads,
        "flags": [flag for flag in known if flag in flags],
        "memory_gib": round(memory, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def unquiet(timing: Mapping[str, Any]) -> str:
    """Note beside a timing that other work disturbed throughout; empty for others."""
    return "" if timing["quiet"] else "  (never quiet: all samples taken)"


def give_out(result: Mapping[str, Any], out: Path | None) -> None:
    """Print a result as one line of JSON, and write it to a file where one is asked for."""
    if out:
        write_json(out, result)
    print(json.dumps(result))


def write_json(path: Path, value: Any) -> None:
    """As a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(value, indent=1) + "\n")
    draft.replace(path)
