"""endwise's training step against that of the paper's own code, on the same model, batch and SAE.

    python benchmarks/versus_reference.py                                # GPT2-small's shape, 4 × 1024 tokens
    python benchmarks/versus_reference.py --shapes gpt2-small-4 gpt2-small-1 tinystories-1m-4 tinystories-1m-20
    python benchmarks/versus_reference.py --l0 init --objectives e2e     # half the dictionary active
    python benchmarks/versus_reference.py --layers 3 --d-model 16 --heads 2 --vocab 50 --positions 8 --context 8 \\
        --layer 1 --d-sae 64 --l0 5 --seconds 1                          # seconds, to see that everything is there

It needs one environment that has both, which takes these lines:

    python -m venv .venv-bench
    .venv-bench/bin/pip install -c constraints.txt -e . accelerate beartype better_abc einops fancy_einsum \\
        python-dotenv typeguard wandb
    .venv-bench/bin/pip install --no-deps e2e-sae==2.1.1 transformer-lens==3.9.0
    .venv-bench/bin/python benchmarks/versus_reference.py

Both sides run in processes of their own and take steps in turn; nothing else should compute meanwhile. What others
disturbed is discarded (`harness.kept`). *Tuned* means that glibc's allocator keeps freed memory
(`harness.TUNED`), which spares large tensors their page faults. The tuned sides are timed after the others, since the
memory they hold would not leave room for all at once.

Before anything is timed, one step of each side is compared: loss terms, gradient norm, and the gradients of the four
SAE parameters. Beyond 1e-5 (exact) or 1e-2 (mixed) the script says so and ends with status 1. The
reference's step is computed twice for this, as it is and with its KL in float64 (`reference.CarefulKL`), since its own
sums over a large vocabulary are off by more than 1e-5; ours must agree with one of the two.

The last line of the output is one JSON object; `--out` keeps it after every objective.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from flops import minimal_flops
from harness import Timing, Worker, WorkerError, cores, machine, time_in_turn, worker_environment, write_json
from shapes import OBJECTIVES, SHAPES, Shape

HERE = Path(__file__).parent
TOLERANCE = {"exact": 1e-5, "mixed": 1e-2}
"""Largest relative error of a loss term or a gradient against the reference."""
BREAKDOWN_STEPS = 3


@dataclass(frozen=True)
class SideName:
    """One of the programs: `ours`, `mixed` (ours in mixed precision) or `reference`, each also `-tuned`."""

    program: str
    tuned: bool

    @classmethod
    def parse(cls, text: str) -> "SideName":
        program, _, ending = text.partition("-")
        if program not in ("ours", "mixed", "reference") or ending not in ("", "tuned"):
            raise argparse.ArgumentTypeError(f"no side {text!r}: ours, mixed, reference, each also with -tuned")
        return cls(program, ending == "tuned")

    def __str__(self) -> str:
        return self.program + "-tuned" * self.tuned

    @property
    def script(self) -> Path:
        return HERE / ("reference.py" if self.program == "reference" else "ours.py")

    @property
    def precision(self) -> str:
        return "mixed" if self.program == "mixed" else "exact"


@dataclass(frozen=True)
class Settings:
    sides: tuple[SideName, ...]
    seconds: float
    threads: int
    l0: float | None
    """None: as initialised."""
    seed: int
    microbatch: int | None
    source: str | None


def compare(ours: dict[str, float], theirs: dict[str, float], files: tuple[Path, Path]) -> dict[str, float]:
    """Relative errors: of each loss term, of the gradient's norm before clipping, and of each parameter's gradient in
    the Frobenius norm. Reads both sides' gradients from `files`. What is not a number is infinitely wrong.
    """
    errors = {}
    for name in sorted(set(theirs) - {"l0"}):
        errors[name] = abs(ours[name] - theirs[name]) / max(abs(theirs[name]), 1e-30)
    gradients, expected = (load_file(path) for path in files)
    for name, truth in expected.items():
        gap = np.linalg.norm((gradients[name].astype(np.float64) - truth).ravel())
        errors[f"gradient.{name}"] = float(gap / max(np.linalg.norm(truth.astype(np.float64).ravel()), 1e-30))
    return {name: error if math.isfinite(error) else math.inf for name, error in errors.items()}


class Contest:
    """One shape: what both sides read is written once, then every objective is checked and timed."""

    def __init__(self, shape: Shape, settings: Settings, folder: Path) -> None:
        self.shape, self.settings, self.folder = shape, settings, folder
        self.spec: dict[str, Any] = {
            "threads": settings.threads,
            "shape": asdict(shape),
            "folder": str(folder),
            "seed": settings.seed,
            "l0": settings.l0,
            "microbatch": settings.microbatch,
            "source": settings.source,
        }
        maker = Worker(HERE / "ours.py", worker_environment(settings.threads))
        try:
            maker.call("prepare", spec=self.spec)
        finally:
            maker.stop()

    def run(self, objective: str) -> dict[str, Any]:
        """`disagreements` names our sides that do not compute what the reference does, `failed` those that broke."""
        result: dict[str, Any] = {"sides": {}, "agreement": {}, "disagreements": {}, "failed": {}}
        for tuned in (False, True):
            group = [side for side in self.settings.sides if side.tuned is tuned]
            if group:
                self._run_group(objective, group, result)
        timed = result["sides"]
        result["ratios"] = {
            f"{name}/{other}": timed[name]["tokens_per_second"] / timed[other]["tokens_per_second"]
            for name in timed
            for other in timed
            if not name.startswith("reference") and other.startswith("reference")
        }
        for name in ("ours", "ours-tuned"):
            if name in timed:
                result["bound"] = self._bound(objective, timed[name])
                break
        return result

    def _run_group(self, objective: str, group: Sequence[SideName], result: dict[str, Any]) -> None:
        workers: dict[str, Worker] = {}
        try:
            for side in group:
                workers[str(side)] = Worker(side.script, worker_environment(self.settings.threads, side.tuned))
            self._build(objective, group, workers, result)
            self._first_steps(group, workers, result)
            for worker in workers.values():
                worker.call("begin_memory")  # the peak is that of ordinary steps, not of the check
            timings, failed = time_in_turn(workers, self.settings.seconds, cores())
            self._note_failures(failed, workers, result)
            for name, timing in timings.items():
                result["sides"][name] |= self._figures(timing) | {"peak_gib": workers[name].call("peak_memory")}
                result["sides"][name]["l0_end"] = workers[name].call("l0")
            self._look_inside(workers, result)
        finally:
            for worker in workers.values():
                worker.stop()

    def _build(
        self, objective: str, group: Sequence[SideName], workers: dict[str, Worker], result: dict[str, Any]
    ) -> None:
        failed: dict[str, str] = {}
        for side in group:
            name = str(side)
            try:
                made = workers[name].call(
                    "build", spec={**self.spec, "objective": objective, "precision": side.precision}
                )
                result["sides"][name] = made | {"memory": workers[name].call("begin_memory")}
            except WorkerError as error:
                failed[name] = str(error)
        self._note_failures(failed, workers, result)

    def _first_steps(self, group: Sequence[SideName], workers: dict[str, Worker], result: dict[str, Any]) -> None:
        """One step each, which warms up; ours are compared with the reference, unless an earlier group did that."""
        reports: dict[str, dict[str, float]] = {}
        failed: dict[str, str] = {}
        for side in group:
            name = str(side)
            if name not in workers:
                continue
            try:
                if side.program == "reference" and not result["agreement"]:
                    files = {kind: str(self._gradients(kind)) for kind in ("plain", "careful")}
                    reports |= workers[name].call("checked_step", **files)
                    continue
                workers[name].call("step")
                if side.program != "reference":
                    reports[name] = workers[name].call("report")
                    workers[name].call("write_gradients", path=str(self._gradients(name)))
            except WorkerError as error:
                failed[name] = str(error)
        self._note_failures(failed, workers, result)
        for side in group:
            if str(side) in reports:
                result["sides"][str(side)]["l0_start"] = reports[str(side)]["l0"]
                self._compare(side, reports, result)
            elif str(side) in workers:
                result["sides"][str(side)]["l0_start"] = workers[str(side)].call("l0")
        for name in reports:
            self._gradients(name).unlink(missing_ok=True)

    def _compare(self, side: SideName, reports: dict[str, dict[str, float]], result: dict[str, Any]) -> None:
        """Ours against the reference's plain step and, where there is a KL, its careful one; one of them must agree."""
        name, limit = str(side), TOLERANCE[side.precision]
        found: dict[str, dict[str, float]] = {}
        for kind in ("plain", "careful"):
            if kind in reports:
                files = (self._gradients(name), self._gradients(kind))
                found[kind] = compare(reports[name], reports[kind], files)
                listed = ", ".join(f"{part} {error:.1e}" for part, error in found[kind].items())
                print(f"  {name} against the reference ({kind}), relative errors: {listed}", flush=True)
        if "careful" in reports:
            files = (self._gradients("plain"), self._gradients("careful"))
            found["plain/careful"] = compare(reports["plain"], reports["careful"], files)
        if found:
            result["agreement"][name] = found
            kind = min(("plain", "careful"), key=lambda kind: max(found.get(kind, {"": float("inf")}).values()))
            worst = max(found[kind], key=lambda part: found[kind][part])
            if found[kind][worst] > limit:
                message = f"{worst} is {found[kind][worst]:.2e} off the reference's ({kind}), over {limit:g}"
                print(f"  {name} DISAGREES: {message}", flush=True)
                result["disagreements"][name] = message

    def _gradients(self, name: str) -> Path:
        return self.folder / f"gradients-{name}.safetensors"

    @staticmethod
    def _note_failures(failed: dict[str, str], workers: dict[str, Worker], result: dict[str, Any]) -> None:
        for name, message in failed.items():
            print(f"  {name} failed: {message}", flush=True)
            result["failed"][name] = message
            result["sides"].pop(name, None)
            workers.pop(name).stop()

    def _figures(self, timing: Timing) -> dict[str, Any]:
        return {"timing": asdict(timing), "tokens_per_second": self.shape.tokens / timing.seconds}

    @staticmethod
    def _look_inside(workers: dict[str, Worker], result: dict[str, Any]) -> None:
        """Print what costs time in our steps, and how fast the machine multiplies just now."""
        for name, worker in workers.items():
            if name in result["sides"] and not name.startswith("reference"):
                result["sides"][name]["breakdown_seconds"] = worker.call("breakdown", steps=BREAKDOWN_STEPS)
                result["sides"][name]["gemm_flops_per_second"] = worker.call("gemm_rate")

    def _bound(self, objective: str, figures: dict[str, Any]) -> dict[str, Any]:
        parts = minimal_flops(self.shape, objective, figures["l0_start"])
        least = sum(parts.values()) / figures["gemm_flops_per_second"]
        return {
            "minimal_flops": parts,
            "gemm_flops_per_second": figures["gemm_flops_per_second"],
            "minimal_seconds": least,
            "share": least / figures["timing"]["seconds"],
        }


def show(objective: str, result: dict[str, Any]) -> None:
    print(f"\n  {objective}")
    print(
        f"    {'side':16} {'tokens/s':>10} {'s/step':>9} {'quartiles':>19} {'kept':>5} {'dropped':>7} {'peak GiB':>9}"
    )
    for name, side in result["sides"].items():
        timing = side["timing"]
        quartiles = f"{timing['low']:.4f}-{timing['high']:.4f}"
        print(
            f"    {name:16} {side['tokens_per_second']:10,.0f} {timing['seconds']:9.4f} {quartiles:>19} "
            f"{timing['samples']:5} {timing['discarded']:7} {side['peak_gib']:5.2f} GiB"
            + ("" if timing["quiet"] else "  (never quiet: all samples taken)")
            + f"  L0 {side['l0_start']:.1f}-{side['l0_end']:.1f}, {side['memory']['before']:.2f} GiB before"
        )
    for pair, ratio in result["ratios"].items():
        print(f"    {pair}: {ratio:.2f}×")
    if "bound" in result:
        bound = result["bound"]
        print(
            f"    bound: {sum(bound['minimal_flops'].values()) / 1e9:,.1f} Gflop at "
            f"{bound['gemm_flops_per_second'] / 1e9:,.1f} Gflop/s = {bound['minimal_seconds']:.4f} s, "
            f"{bound['share']:.0%} of the measured step"
        )
    for name, side in result["sides"].items():
        if "breakdown_seconds" in side:
            parts = ", ".join(f"{part} {seconds * 1e3:.1f}" for part, seconds in side["breakdown_seconds"].items())
            print(f"    {name}, ms: {parts}")
    sys.stdout.flush()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["gpt2-small-4"])
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    sides = [SideName.parse(name) for name in ("ours", "mixed", "reference", "ours-tuned", "reference-tuned")]
    parser.add_argument("--sides", nargs="+", type=SideName.parse, default=sides)
    parser.add_argument("--seconds", type=float, default=60, help="of timed steps for each side and objective")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--l0", default="50", help="mean active features per token, or `init` for a new SAE's")
    parser.add_argument("--microbatch", type=int, help="training.microbatch of our side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reference-source", help="a source tree of e2e_sae, instead of the installed package")
    parser.add_argument("--out", type=Path, help="JSON file, written after every objective")
    parser.add_argument("--folder", type=Path, help="for what both sides read; default: a temporary one")
    custom = parser.add_argument_group("the shape, where it is to differ from the named one")
    for field in fields(Shape):
        kind = {"family": str}.get(field.name, int)
        custom.add_argument(f"--{field.name.replace('_', '-')}", type=kind, dest=f"shape_{field.name}")
    return parser.parse_args()


def chosen_shapes(arguments: argparse.Namespace) -> dict[str, Shape]:
    changes = {
        field.name: value for field in fields(Shape) if (value := getattr(arguments, f"shape_{field.name}")) is not None
    }
    named = {name: replace(SHAPES[name], **changes) for name in arguments.shapes}
    return {name + "-changed" * bool(changes): shape for name, shape in named.items()}


def main() -> int:
    arguments = parse()
    settings = Settings(
        sides=tuple(arguments.sides),
        seconds=arguments.seconds,
        threads=arguments.threads,
        l0=None if arguments.l0 == "init" else float(arguments.l0),
        seed=arguments.seed,
        microbatch=arguments.microbatch,
        source=arguments.reference_source,
    )
    report: dict[str, Any] = {
        "machine": machine(settings.threads),
        "settings": asdict(settings) | {"sides": [str(side) for side in settings.sides]},
        "shapes": {},
    }
    status = 0
    for name, shape in chosen_shapes(arguments).items():
        print(f"{name}: {shape}", flush=True)
        results: dict[str, Any] = {}
        report["shapes"][name] = {"shape": asdict(shape), "objectives": results}
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            contest = Contest(shape, settings, Path(folder))
            for objective in arguments.objectives:
                results[objective] = contest.run(objective)
                show(objective, results[objective])
                status = status or int(bool(results[objective]["failed"] or results[objective]["disagreements"]))
                if arguments.out:
                    write_json(arguments.out, report)
    print(json.dumps(report))
    return status


if __name__ == "__main__":
    sys.exit(main())
