"""Test `endwise plan`'s memory predictions: `python benchmarks/plan_versus_measured.py --out plan.json`.

For each case a process of its own loads a model of random weights, trains a new SAE for a few steps, measures it on
held-out tokens and saves it, on the CPU. What each of these stages holds at most beyond what the process held after its
imports (resident memory, whose peak the kernel is asked to count again) stands beside what was planned from the same
recipe. The SAE is new, so that its latents are dense, as is planned for.
"""

import argparse
import contextlib
import ctypes
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import endwise
from endwise.config.run import EvaluationConfig, RunConfig
from endwise.evaluation.measure import measure
from endwise.runs.checkpoints import write_checkpoint
from endwise.tokens.corpus import Corpus, Documents, SequenceLayout, TokenBatch
from endwise.training.making import new_trainee
from endwise.training.planning.dry_run import CHECKPOINT, EVALUATION, STEP, DryRun
from endwise.training.step import tail_model, take_step
from harness import Side, Worker, cores, machine, resident, serve, worker_environment, write_json
from shapes import GPT2, OBJECTIVES, TINYSTORIES, Shape, random_model

STEPS = 3
WIDE = Shape("gpt2", 6, 256, 4, 8192, 512, 512, batch=8, layer=2, d_sae=8192)
MIB = 1 << 20


@dataclass(frozen=True)
class Case:
    name: str
    shape: Shape
    objective: str
    accumulation: int = 1
    microbatch: int | None = None
    evaluation_batch: int = 2


CASES = (
    *(Case("6 × 256", WIDE, objective) for objective in OBJECTIVES),
    Case("6 × 256", WIDE, "e2e", microbatch=8),
    Case("6 × 256", WIDE, "e2e_ds", accumulation=2, microbatch=1),
    Case("6 × 256", replace(WIDE, d_sae=1024), "e2e", accumulation=4, microbatch=2, evaluation_batch=8),
    Case("6 × 256", replace(WIDE, vocab=50257, d_sae=2048), "e2e", microbatch=4),
    *(Case("TinyStories-1M", TINYSTORIES, objective) for objective in ("local", "e2e")),
    Case("GPT2-small", replace(GPT2, batch=1, d_sae=11520), "e2e", evaluation_batch=1),
    Case("GPT2-small", replace(GPT2, batch=2, d_sae=23040), "local", accumulation=2, evaluation_batch=1),
)
QUICK = (0, 4)
"""Those that `--quick` runs."""


def give_back_free_memory() -> None:
    """glibc keeps freed memory of the stage before, which a stage would use again or not, as it happens."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def corpus_of(tokens: torch.Tensor) -> Corpus:
    """Held-out sequences that need no file."""
    ids = tokens.reshape(-1).numpy().astype(np.uint32)
    ends = [np.array([value]) for value in (0, len(ids))]
    documents = Documents(ids, *ends, hashes=np.zeros(1, np.uint64), comparable=np.zeros(1, bool))
    return Corpus(documents, SequenceLayout(tokens.shape[1]))


def recipe(case: Case, folder: str) -> RunConfig:
    shape = case.shape
    return RunConfig.build(
        {
            "model": {"name": folder, "device": "cpu"},
            "site": shape.site,
            "dictionary": {"size": shape.d_sae},
            "objective": OBJECTIVES[case.objective],
            "data": {"context": shape.context},
            "training": {
                "tokens": STEPS * shape.tokens,
                "batch": shape.batch,
                "accumulation": case.accumulation,
                "microbatch": case.microbatch,
            },
            "evaluation": {
                "tokens": case.evaluation_batch * shape.context,
                "during_training_tokens": case.evaluation_batch * shape.context,
                "batch": case.evaluation_batch,
                "bootstrap": 1,
            },
        }
    )


class Measured(Side):
    """The worker: each method is a stage, and returns the bytes it held at most beyond those after the imports."""

    def build(self, spec: dict[str, Any]) -> dict[str, Any]:
        torch.set_num_threads(spec["threads"])
        self.imported = resident("VmRSS")
        shape = Shape(**spec["case"].pop("shape"))
        self.case = Case(**spec["case"], shape=shape)
        self.config = recipe(self.case, spec["folder"])
        self.model = endwise.load_model(spec["folder"], device="cpu")
        self.tail = tail_model(self.model, self.config.training)
        self.trainee = new_trainee(self.config, self.model, STEPS)
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(shape.vocab, (shape.batch, shape.context), generator=generator)
        return {}

    def step(self) -> None:
        batch = TokenBatch(self.tokens, torch.ones_like(self.tokens, dtype=torch.bool))
        take_step(self.model, [self.trainee], batch, self.case.accumulation, tail=self.tail)

    def peak(self, stage: str, folder: str) -> int:
        """The peak of a stage; the training step's is that of some steps after the first, which makes the optimiser."""
        if stage == STEP:
            self.step()
        give_back_free_memory()
        self.begin_memory()
        if stage == STEP:
            for _ in range(STEPS - 1):
                self.step()
        elif stage == EVALUATION:
            self.evaluate(self.config.evaluation)
        else:
            self.trainee.sae.save(Path(folder) / "sae")
            write_checkpoint(Path(folder) / "checkpoint", self.trainee.checkpoint())
        return resident("VmHWM") - self.imported

    def evaluate(self, settings: EvaluationConfig) -> None:
        corpus = corpus_of(self.tokens[: settings.batch])
        measure(self.model, {"sae": (self.trainee.place, self.trainee.sae)}, corpus, settings, baselines=False)


def compare(case: Case, threads: int, python: str | Sequence[str] = sys.executable) -> dict[str, Any]:
    """Planned and measured bytes of each stage, in a process that `python` starts."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(Path(scratch) / "model")
        random_model(case.shape).save_pretrained(folder)
        config = recipe(case, folder)
        rehearsal = DryRun(config, torch.device("cpu"), config.training.batch)
        planned = rehearsal.stages(rehearsal.accumulation, rehearsal.microbatch)
        worker = Worker(Path(__file__), worker_environment(threads) | {"ENDWISE_PLAN_WORKER": "1"}, python)
        try:
            spec = {"threads": threads, "folder": folder, "case": {**vars(case), "shape": vars(case.shape)}}
            worker.call("build", spec=spec)
            measured = {s: worker.call("peak", stage=s, folder=scratch) for s in (STEP, EVALUATION, CHECKPOINT)}
        finally:
            worker.stop()
    return {
        "case": {**vars(case), "shape": vars(case.shape)},
        "microbatch": rehearsal.microbatch,
        "stages": {
            stage: {"planned": held.bytes, "measured": measured[stage], "during": held.during}
            for stage, held in planned.items()
        },
    }


def row(result: dict[str, Any]) -> str:
    """A line of the table in docs/planning.md."""
    case = result["case"]
    shape = case["shape"]
    batch = f"{shape['batch']} × {shape['context']}"
    if case["accumulation"] > 1:
        batch += f" in {case['accumulation']} passes"
    cells = [
        case["name"],
        f"{shape['vocab']:,}",
        f"{shape['d_sae']:,}",
        case["objective"],
        batch,
        str(result["microbatch"]),
    ]
    for stage in (STEP, EVALUATION, CHECKPOINT):
        planned, measured = (result["stages"][stage][key] for key in ("planned", "measured"))
        cells.append(f"{planned / MIB:,.0f} / {measured / MIB:,.0f} = {planned / measured:.2f}")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("plan.json"))
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--quick", action="store_true", help="two cases only")
    arguments = parser.parse_args()
    cases = [CASES[number] for number in QUICK] if arguments.quick else CASES
    results: list[dict[str, Any]] = []
    print("| model | vocabulary | features | kind | batch | microbatch | step, MiB | evaluation | checkpoint |")
    print("|---|---|---|---|---|---|---|---|---|")
    for case in cases:
        results.append(compare(case, arguments.threads))
        print(row(results[-1]), flush=True)
        write_json(arguments.out, {"machine": machine(arguments.threads), "cases": results})


if __name__ == "__main__":
    import os

    if os.environ.get("ENDWISE_PLAN_WORKER"):
        serve(Measured())
    else:
        main()
