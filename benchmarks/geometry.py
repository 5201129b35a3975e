"""Measure the comparison of two dictionaries: `python benchmarks/geometry.py --out geometry.json`.

Two dictionaries of random directions are compared as `endwise geometry` does it: within each, across both, and matched
one to one. The bar: 46,080 × 768 in under 180 s and 4 GiB on two cores. The naive way (one table of all cosines, its
maxima along both sides) is timed beside ours at a size at which its table fits (`--naive`), in turn, and both results
must agree. Nothing is discarded: run it while nothing else computes.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize

from endwise.analysis.geometry.cosines import MEMORY, Directions, nearest_across, nearest_within
from endwise.analysis.geometry.matching import CANDIDATES, match
from endwise.common.machine import parse_size
from harness import GIB, cores, machine, resident, write_json

TURNS = 3
"""In which ours and the naive way are timed."""
SAME = 1e-5
"""By which their cosines may differ."""


def dictionary(size: int, width: int, seed: int) -> Directions:
    """Random rows of unit length."""
    return normalize(torch.randn(size, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def naive(a: Directions, b: Directions) -> list[torch.Tensor]:
    """The nearest within each and across both, from whole tables."""
    found = []
    for own in (a, b):
        table = own @ own.T
        table.fill_diagonal_(-torch.inf)
        found.append(table.max(1).values)
        del table
    table = a @ b.T
    return [*found, table.max(1).values, table.max(0).values]


def ours(a: Directions, b: Directions, memory: int) -> list[torch.Tensor]:
    """The same, tile by tile."""
    within = [nearest_within(own, memory=memory).best for own in (a, b)]
    return [*within, *(found.best for found in nearest_across(a, b, memory=memory))]


def versus_naive(size: int, width: int, memory: int) -> dict[str, float]:
    """Median seconds of both, and their ratio.

    Raises:
        SystemExit: they find other cosines.
    """
    a, b = dictionary(size, width, 0), dictionary(size, width, 1)
    sides: dict[str, Callable[[], list[torch.Tensor]]] = {
        "naive": lambda: naive(a, b),
        "ours": lambda: ours(a, b, memory),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(TURNS):
        results = {}
        for name, side in sides.items():
            start = time.perf_counter()
            results[name] = side()
            seconds[name].append(time.perf_counter() - start)
        for x, y in zip(*results.values(), strict=True):
            if (x - y).abs().max() > SAME:
                raise SystemExit(f"The naive way and ours differ by {(x - y).abs().max():.2g}.")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"size": size, **medians, "ours/naive": medians["ours"] / medians["naive"]}


def whole(size: int, width: int, memory: int) -> dict[str, Any]:
    """Seconds of each part as the command does it, and the peak of resident memory after it."""
    a, b = dictionary(size, width, 0), dictionary(size, width, 1)
    found: dict[str, Any] = {}
    parts: dict[str, Callable[[], Any]] = {
        "within a": lambda: nearest_within(a, k=CANDIDATES, memory=memory),
        "within b": lambda: nearest_within(b, k=CANDIDATES, memory=memory),
        "across": lambda: found.update(across=nearest_across(a, b, k=CANDIDATES, memory=memory)),
        "matching": lambda: match(a, b, found["across"]),
    }
    seconds = {}
    for name, part in parts.items():
        start = time.perf_counter()
        part()
        seconds[name] = time.perf_counter() - start
        print(f"{name:<10}{seconds[name]:>9.1f} s   peak {resident('VmHWM') / GIB:.2f} GiB", flush=True)
    total = sum(seconds.values())
    print(f"{'together':<10}{total:>9.1f} s   peak {resident('VmHWM') / GIB:.2f} GiB")
    return {"size": size, "width": width, "seconds": seconds, "together": total, "peak_gib": resident("VmHWM") / GIB}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=46_080, help="features of each dictionary")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--naive", type=int, default=8192, help="size at which the naive way is timed; 0: not at all")
    parser.add_argument("--memory", default=f"{MEMORY >> 20}MiB", help="for a search beside the dictionaries")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    memory = parse_size(given.memory)
    measured = whole(given.size, given.width, memory)  # first, since the peak is the whole process's
    result = {"machine": machine(given.threads), "memory_bytes": memory, "whole": measured}
    if given.naive:
        result["naive"] = versus_naive(given.naive, given.width, memory)
        print(
            "at {size:,}: naive {naive:.2f} s, ours {ours:.2f} s, ours/naive {ours/naive:.2f}".format(**result["naive"])
        )
    if given.out is not None:
        write_json(given.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
