"""Transcoders at all MLPs of a model, spliced jointly, against the same apart in one pass and in single runs.

    python benchmarks/joint_step.py                                   # the embedded model
    python benchmarks/joint_step.py --shape gpt2-small --seconds 60   # GPT2-small's shape, random weights

Needs endwise alone. *Single* is one step of each, one after another, in passes of their own. Every side is there twice,
with the allocator as it is and tuned (`harness.TUNED`), all in one run and timed in turn (`harness.py`).
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import Worker, WorkerError, cores, give_out, machine, time_in_turn, unquiet, worker_environment
from shapes import GPT2, OBJECTIVES

HERE = Path(__file__).parent
HOWS = ("joint", "apart", "single")
SHAPES = {"embedded": None, "gpt2-small": asdict(GPT2)}
SIZES = {"embedded": (4, 256, 8.0), "gpt2-small": (1, 128, 2.0)}
"""Sequences a step, tokens a sequence, and features as a multiple of the width, unless they are given."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="embedded")
    parser.add_argument("--objective", choices=OBJECTIVES, default="e2e")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--context", type=int)
    parser.add_argument("--ratio", type=float)
    parser.add_argument("--l0", type=float, default=30, help="mean active features per token, at each place")
    parser.add_argument("--allocators", nargs="+", choices=("untuned", "tuned"), default=["untuned", "tuned"])
    parser.add_argument("--seconds", type=float, default=20, help="of timed steps for each side")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    for name, usual in zip(("batch", "context", "ratio"), SIZES[arguments.shape], strict=True):
        if getattr(arguments, name) is None:
            setattr(arguments, name, usual)
    return arguments


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """
    Raises:
        WorkerError: a side failed.
    """
    spec = {name: getattr(arguments, name) for name in ("batch", "context", "ratio", "objective", "l0", "threads")}
    spec |= {"seed": arguments.seed, "shape": SHAPES[arguments.shape]}
    found: dict[str, Any] = {}
    workers: dict[str, Worker] = {}
    try:
        for allocator in arguments.allocators:
            environment = worker_environment(arguments.threads, allocator == "tuned")
            for how in HOWS:
                name = f"{how}, {allocator}"
                workers[name] = Worker(HERE / "joint_worker.py", environment)
                versions = workers[name].call("build", spec=spec | {"how": how})
                found[name] = {"versions": versions, "memory": workers[name].call("begin_memory")}
                workers[name].call("step")
        timings, failed = time_in_turn(workers, arguments.seconds, cores())
        if failed:
            raise WorkerError("\n".join(failed.values()))
        for name, timing in timings.items():
            found[name] |= {"timing": asdict(timing), "peak_gib": workers[name].call("peak_memory")}
            found[name]["l0"] = workers[name].call("l0")
    finally:
        for worker in workers.values():
            worker.stop()
    ratios = {
        f"joint/{how}, {allocator}": timings[f"joint, {allocator}"].seconds / timings[f"{how}, {allocator}"].seconds
        for allocator in arguments.allocators
        for how in HOWS[1:]
    }
    return {"spec": spec, "sides": found, "ratios": ratios}


def show(result: dict[str, Any]) -> None:
    print(f"{'side':16} {'s/step':>9} {'kept':>5} {'dropped':>7} {'peak GiB':>9} {'L0':>7}")
    for name, side in result["sides"].items():
        timing = side["timing"]
        print(
            f"{name:16} {timing['seconds']:9.4f} {timing['samples']:5} {timing['discarded']:7} "
            f"{side['peak_gib']:9.2f} {side['l0']:7.1f}" + unquiet(timing)
        )
    for pair, ratio in result["ratios"].items():
        print(f"{pair}: {ratio:.2f}×")


def main() -> int:
    arguments = parse()
    result = {"machine": machine(arguments.threads), **run(arguments)}
    show(result)
    give_out(result, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
