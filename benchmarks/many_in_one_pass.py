"""Several local SAEs trained in one pass against one alone: what sharing the clean pass saves.

    python benchmarks/many_in_one_pass.py                      # six, TinyStories-1M's shape
    python benchmarks/many_in_one_pass.py --saes 2 --shape gpt2-small-1 --objective e2e

Needs endwise alone. The SAEs differ in their sparsity coefficient; both sides are timed in turn (`harness.py`).
"""

import argparse
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import Worker, cores, give_out, machine, time_in_turn, unquiet, worker_environment
from shapes import OBJECTIVES, SHAPES, Shape

HERE = Path(__file__).parent


def run(shape: Shape, saes: int, objective: str, l0: float | None, seconds: float, threads: int) -> dict[str, Any]:
    """
    Raises:
        WorkerError: a side failed.
    """
    environment = worker_environment(threads)
    with tempfile.TemporaryDirectory() as folder:
        spec: dict[str, Any] = {"threads": threads, "shape": asdict(shape), "folder": folder, "seed": 0, "l0": l0}
        spec["objective"] = objective
        workers: dict[str, Worker] = {}
        try:
            workers["one"] = Worker(HERE / "ours.py", environment)
            workers["many"] = Worker(HERE / "ours.py", environment)
            workers["one"].call("prepare", spec=spec)
            memory: dict[str, Any] = {}
            for name, count in (("one", 1), ("many", saes)):
                workers[name].call("build", spec=spec | {"saes": count})
                memory[name] = workers[name].call("begin_memory")
                workers[name].call("step")
            timings, failed = time_in_turn(workers, seconds, cores())
            if failed:
                raise RuntimeError("\n".join(failed.values()))
            sides = {
                name: {
                    "timing": asdict(timing),
                    "memory": memory[name],
                    "peak_gib": workers[name].call("peak_memory"),
                    "l0": workers[name].call("l0"),
                }
                for name, timing in timings.items()
            }
        finally:
            for worker in workers.values():
                worker.stop()
    ratio = timings["many"].seconds / timings["one"].seconds
    return {"shape": asdict(shape), "objective": objective, "saes": saes, "sides": sides, "many/one": ratio}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="tinystories-1m-4")
    parser.add_argument("--saes", type=int, default=6)
    parser.add_argument("--objective", choices=OBJECTIVES, default="local")
    parser.add_argument("--l0", default="50", help="mean active features per token, or `init`")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    l0 = None if arguments.l0 == "init" else float(arguments.l0)
    result = {
        "machine": machine(arguments.threads),
        **run(SHAPES[arguments.shape], arguments.saes, arguments.objective, l0, arguments.seconds, arguments.threads),
    }
    for name, side in result["sides"].items():
        timing = side["timing"]
        print(
            f"{name:5} {timing['seconds']:.4f} s/step, {timing['samples']} samples, {timing['discarded']} discarded, "
            f"peak {side['peak_gib']:.2f} GiB, L0 {side['l0']:.1f}" + unquiet(timing)
        )
    print(f"{result['saes']} in one pass cost {result['many/one']:.2f} times as much as one alone")
    give_out(result, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
