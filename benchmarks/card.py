"""The device that is measured: a processor, or a CUDA card, behind the few things that differ between them.

Nothing else in `gpu.py` and what it starts names CUDA.
"""

import gc
import math
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from harness import begin_peak, machine, resident

SAMPLE_SECONDS = 0.2
"""Calls shorter than this are timed in bunches, so that the device never waits to be asked."""
WARM_UP = 3
LEAST_SAMPLES, MOST_SAMPLES = 3, 50
NUMBERS = {"bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
Act = Callable[[], Any]


class BlindProfiler(Exception):
    """The profiler did not see a wait that was there, so that its counts would mean nothing."""


@dataclass(frozen=True)
class Timed:
    """Seconds of a call."""

    seconds: float
    """Median of the samples."""
    low: float
    high: float
    samples: int
    calls: int


class Host:
    """A processor, and what a card has in common with it."""

    device = torch.device("cpu")
    product_size = 384
    """Rows and columns of the products whose rate is measured."""
    copied = 1 << 25
    """Bytes of the copy by which the memory's rate is measured."""
    host_waits: tuple[str, ...] = ("aten::_local_scalar_dense", "aten::nonzero")
    """Events in which the host waits for values; on a processor those in which it would, were it a card's."""
    activities: tuple[ProfilerActivity, ...] = (ProfilerActivity.CPU,)

    def __init__(self) -> None:
        self._at_first = resident("VmRSS")

    def describe(self) -> dict[str, Any]:
        return machine(torch.get_num_threads())

    @property
    def name(self) -> str:
        return f"{self.describe()['cpu']}, a processor"

    def synchronize(self) -> None:
        """Wait until all that was asked of the device is done."""

    def free(self) -> None:
        """Give back what no tensor holds."""
        gc.collect()

    def begin_memory(self) -> None:
        """Count the peak from here on."""
        begin_peak()

    def peak_memory(self) -> dict[str, int]:
        """Bytes at the peak: `tensors` (on a processor: of the process beyond its imports), and `reserved` for them."""
        held = resident("VmHWM") - self._at_first
        return {"tensors": held, "reserved": held}

    def timed(self, act: Act, seconds: float) -> Timed:
        """Time a call, in samples of `SAMPLE_SECONDS` or of one call, for so many seconds; for less than one such
        sample's, it is only tried.
        """
        warm_up, least = (WARM_UP, LEAST_SAMPLES) if seconds >= SAMPLE_SECONDS else (1, 1)
        for _ in range(warm_up):
            act()
        once = self._elapsed(act, 1)
        calls = max(1, math.ceil(min(SAMPLE_SECONDS, seconds) / max(once, 1e-6)))
        found: list[float] = []
        while len(found) < least or (sum(found) * calls < seconds and len(found) < MOST_SAMPLES):
            found.append(self._elapsed(act, calls) / calls)
        return Timed(statistics.median(found), min(found), max(found), len(found), calls)

    def _elapsed(self, act: Act, calls: int) -> float:
        self.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            act()
        self.synchronize()
        return time.perf_counter() - start

    def product_rate(self, numbers: str, seconds: float) -> float:
        """Operations a second of a large product."""
        size = self.product_size
        left, right = (torch.randn(size, size, device=self.device).to(NUMBERS[numbers]) for _ in range(2))
        with tf32(numbers == "tf32"):
            return 2 * size**3 / self.timed(lambda: left @ right, seconds).seconds

    def bandwidth(self, seconds: float) -> float:
        """Bytes a second that a large copy reads and writes."""
        source = torch.zeros(self.copied, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * self.copied / self.timed(lambda: target.copy_(source), seconds).seconds

    def events(self, act: Act) -> Counter[str]:
        """Count what the profiler sees of a call, by name."""
        self.synchronize()
        with profile(activities=list(self.activities)) as seen:
            act()
        return Counter({event.key: event.count for event in seen.key_averages()})

    def waits(self, act: Act) -> dict[str, int]:
        """Count the events of a call in which the host waits for the device, less those of the profiler itself.

        Raises:
            BlindProfiler: it does not see a wait that is there.
        """
        value = torch.ones((), device=self.device)
        empty, known = self.events(lambda: None), self.events(lambda: float(value))
        if not any(self._waiting(known - empty).values()):
            raise BlindProfiler("the profiler sees no wait where there is one: its events of the driver are missing")
        return self._waiting(self.events(act) - empty)

    def _waiting(self, events: Counter[str]) -> dict[str, int]:
        return {name: count for name, count in sorted(events.items()) if name.startswith(self.host_waits)}

    def places_of_waits(self, act: Act) -> dict[str, int]:
        """Count the waits of a call by the line of Python that asked for them, as far as PyTorch notices."""
        return {}


class Card(Host):
    """A CUDA card."""

    device = torch.device("cuda", 0)
    product_size = 8192
    copied = 1 << 31
    host_waits = (
        *("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
        *("cuStreamSynchronize", "cuCtxSynchronize", "cuEventSynchronize"),
    )
    """Copies to the host are waited for by one of them, where they are waited for."""
    activities = (ProfilerActivity.CPU, ProfilerActivity.CUDA)

    def __init__(self) -> None:
        super().__init__()
        if not torch.cuda.is_available():
            built = torch.version.cuda or "none: this is a build for processors"
            raise RuntimeError(f"no CUDA device is there (torch {torch.__version__}, its CUDA: {built})")
        torch.cuda.set_device(self.device)

    def describe(self) -> dict[str, Any]:
        card = torch.cuda.get_device_properties(self.device)
        return super().describe() | {
            "gpu": card.name,
            "capability": f"{card.major}.{card.minor}",
            "gpu_memory_gib": round(card.total_memory / (1 << 30), 1),
            "multiprocessors": card.multi_processor_count,
            "cuda": torch.version.cuda,
        }

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def free(self) -> None:
        super().free()
        torch.cuda.empty_cache()

    def begin_memory(self) -> None:
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak_memory(self) -> dict[str, int]:
        tensors, reserved = torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved
        return {"tensors": tensors(self.device), "reserved": reserved(self.device)}

    def places_of_waits(self, act: Act) -> dict[str, int]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                act()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits = (each for each in caught if "synchronizing CUDA operation" in str(each.message))
        return dict(Counter(f"{each.filename}:{each.lineno}" for each in waits))


@contextmanager
def tf32(allowed: bool) -> Any:
    """Within it, products of fp32 may be taken in TF32, or may not."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def device_named(name: str) -> Host:
    return Card() if name == "cuda" else Host()
