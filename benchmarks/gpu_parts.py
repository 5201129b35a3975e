"""Parts of what a card is to show. Started by `gpu.py`, a part in each process, with what it is given as JSON.

A part is a list of rows, each of which can be made without the others. A row that is done goes out as a line of JSON;
one that raises goes out with what it raised, and the next is made. On a processor every part is what it is on a card,
with the kernels that a processor has.
"""

import json
import os
import shutil
import sys
import traceback
import warnings
from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import endwise
from card import NUMBERS, Act, tf32
from endwise.config.run import RunConfig
from endwise.models.blocks import find_blocks
from endwise.training.planning.dry_run import STEP, DryRun
from flops import minimal_flops
from gpu_job import Job, Row, Step, apart, made_model
from gpu_kernels import kernels
from ours import Ours
from reference import Reference
from roofline import PRECISIONS, seconds, step_kernels
from sae_peers import PEERS
from shapes import OBJECTIVES, Shape, model_config

STEPS_WATCHED = 3
AS_ON_A_PROCESSOR, RESUMED = 1e-2, 1e-3
"""Largest relative difference of losses: of a card's run and a processor's, and of a run and one that was resumed."""


def card(job: Job) -> list[Row]:
    def rate(numbers: str) -> dict[str, Any]:
        return {"flops_per_second": job.host.product_rate(numbers, job.seconds)}

    def described() -> dict[str, Any]:
        versions = {name: _version(name) for name in ("torch", "triton", "transformers")}
        return {"name": job.host.name, **job.host.describe(), "versions": {"endwise": endwise.__version__, **versions}}

    return [
        ("device", described),
        *((numbers, partial(rate, numbers)) for numbers in NUMBERS),
        ("memory", lambda: {"bytes_per_second": job.host.bandwidth(job.seconds)}),
    ]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not there"


def steps(job: Job, name: str, precision: str, objectives: Iterable[str] = OBJECTIVES) -> list[Row]:
    shape = job.shape(name)
    model = cache(partial(made_model, job, shape, precision))

    def row(objective: str) -> dict[str, Any]:
        job.host.free()
        with tf32(precision == "exact, TF32"):
            step = Step(model(), shape, objective, precision, job.l0)
            job.host.begin_memory()
            timed = job.host.timed(step, job.seconds)
            memory = job.host.peak_memory()
        report, machine = step.trainee.report(), job.machine
        least = sum(minimal_flops(shape, objective, job.l0).values())
        paper = seconds(step_kernels(shape, objective, precision, job.l0), machine)
        return {
            **asdict(timed),
            "tokens_per_second": shape.tokens / timed.seconds,
            "mfu": least / timed.seconds / machine.rate(PRECISIONS[precision].products),
            "share_of_roofline": paper / timed.seconds,
            "l0": report["l0"],
            "loss": report["loss"],
            "attention": model().model.config._attn_implementation,  # noqa: SLF001
            **{f"{kind}_bytes": size for kind, size in memory.items()},
        }

    return [(objective, partial(row, objective)) for objective in objectives]


def waits(job: Job) -> list[Row]:
    """Count how often the host waits for the device between two reports, where nothing is to be read back."""
    shape = job.shape("gpt2-small")
    model = cache(partial(made_model, job, shape, "mixed"))

    def row(objective: str) -> dict[str, Any]:
        step = Step(model(), shape, objective, "mixed", job.l0)
        several: Act = lambda: [step() for _ in range(STEPS_WATCHED)]  # noqa: E731
        several()
        events = job.host.waits(several)
        places = job.host.places_of_waits(several)
        return {
            "steps": STEPS_WATCHED,
            "waits_per_step": sum(events.values()) / STEPS_WATCHED,
            "events": events,
            "places": places,
        }

    return [(objective, partial(row, objective)) for objective in OBJECTIVES]


def compiled(job: Job) -> list[Row]:
    """Time a step whose frozen blocks `torch.compile` has taken against the step as it is: whether it pays."""

    def side(shape: Shape, compiles: bool) -> dict[str, Any]:
        job.host.free()
        model = made_model(job, shape, "mixed")
        for block in find_blocks(model.model, model.n_layers) if compiles else ():
            block.module.compile()
        step = Step(model, shape, "e2e", "mixed", job.l0)
        step()
        loss = step.trainee.report()["loss"]
        return _side_timed(job, step, shape.tokens) | {"loss": loss}

    def row(name: str) -> dict[str, Any]:
        plain, compiled = (side(job.shape(name), compiles) for compiles in (False, True))
        difference = abs(compiled["loss"] - plain["loss"]) / abs(plain["loss"])
        faster = plain["seconds"] / compiled["seconds"]
        return {**compiled, "plain": plain, "times_as_fast": faster, "loss_difference": difference}

    names = ("gpt2-small",) if job.tiny else ("gpt2-small", "smollm2-135m")  # compiling takes a processor a minute
    return [(name, partial(row, name)) for name in names]


def _recipe(job: Job, folder: Path, count: int, device: str | None = None, **training: Any) -> dict[str, Any]:
    """An e2e+ds run on the embedded model of so many steps, whose rate does not depend on how many there are."""
    batch, context = (2, 32) if job.tiny else (64, 256)
    tokens = count * batch * context
    return {
        "model": {"name": "embedded", "device": device or job.device},
        "site": "blocks.3.hook_resid_pre",
        "dictionary": {"ratio": 1 if job.tiny else 12},
        "objective": {"kind": "e2e_ds", "downstream_mse": 1.0, "sparsity": {"coefficient": 2.0}},
        "data": {"context": context, "epochs": 1 + tokens // 3_500_000},
        "training": {
            "tokens": tokens,
            "batch": batch,
            "learning_rate": 4e-3,
            "warmup": 0,
            "schedule": "constant",
            **training,
        },
        "evaluation": {"tokens": 8 * batch * context, "during_training_tokens": 2 * batch * context},
        "out": str(folder),
    }


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def long_run(job: Job) -> list[Row]:
    count, compared = (8, 3) if job.tiny else (1280, 20)

    def whole() -> dict[str, Any]:
        logs: dict[str, Any] = {"log_every": max(1, count // 160), "evaluate_every": max(1, count // 8)}
        recipe = _recipe(job, job.scratch / "whole", count, **logs)
        run = endwise.train(recipe, display=False)
        lines = _lines(job.scratch / "whole")
        losses, held = [line["loss"] for line in lines], [line["heldout"] for line in lines if "heldout" in line]
        part = max(1, len(losses) // 20)
        first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
        tokens = recipe["training"]["tokens"]
        return {
            "tokens": tokens,
            "epochs": recipe["data"]["epochs"],
            "seconds": run.seconds,
            "tokens_per_second": tokens / run.seconds,
            "curve": [[line["tokens"], line["loss"]] for line in lines],
            "held_out": [each["ce_increase"] for each in held],
            "first_loss": first,
            "last_loss": last,
            "falls": last < first and held[-1]["ce_increase"] < held[0]["ce_increase"],
        }

    def as_on_a_processor() -> dict[str, Any]:
        curves = []
        for number, device in enumerate(("cpu", job.device)):
            folder = job.scratch / f"first-{number}"
            endwise.train(_recipe(job, folder, compared, device, log_every=1), display=False)
            curves.append([[line["tokens"], line["loss"]] for line in _lines(folder)])
        largest = max(abs(a - b) / abs(a) for (_, a), (_, b) in zip(*curves, strict=True))
        agrees = largest <= AS_ON_A_PROCESSOR
        return {"steps": compared, "curves": curves, "largest_difference": largest, "agrees": agrees}

    return [("first steps, as on a processor", as_on_a_processor), ("whole", whole)]


def resume(job: Job) -> list[Row]:
    count = 4 if job.tiny else 40

    def trained(name: str, **how: Any) -> tuple[list[dict[str, Any]], list[Tensor]]:
        folder = job.scratch / name
        recipe = _recipe(job, folder, count, log_every=1, checkpoint_every=count // 2, keep_checkpoints=3)
        run = endwise.train(recipe, display=False, **how)
        return _lines(folder), [each.detach().clone() for each in run.sae.parameters()]

    whole = cache(partial(trained, "whole"))

    def against(other: tuple[list[dict[str, Any]], list[Tensor]]) -> dict[str, Any]:
        (lines, weights), (others, other_weights) = whole(), other
        loss = abs(others[-1]["loss"] - lines[-1]["loss"]) / abs(lines[-1]["loss"])
        pairs = list(zip(other_weights, weights, strict=True))
        return {
            "steps": count,
            "loss_difference": loss,
            "weight_difference": max(apart(a.double(), b.double()) for a, b in pairs),
            "same_bits": all(torch.equal(a, b) for a, b in pairs),
            "agrees": loss <= RESUMED,
        }

    def resumed() -> dict[str, Any]:
        whole()
        shutil.copytree(job.scratch / "whole", job.scratch / "resumed")
        return against(trained("resumed", resume=True, from_step=count // 2))

    return [("resumed in the middle", resumed), ("the same again", lambda: against(trained("again")))]


def planned(job: Job) -> list[Row]:
    """Plan each step whose peak was measured, as `endwise plan` does."""

    def row(name: str, precision: str, objective: str, measured: int) -> dict[str, Any]:
        shape, folder = job.shape(name), job.scratch / name
        model_config(shape).save_pretrained(folder)
        save_file({}, folder / "model.safetensors")  # whose weights nobody reads
        recipe = {
            "model": {"name": str(folder), "device": job.device},
            "site": shape.site,
            "dictionary": {"size": shape.d_sae},
            "objective": OBJECTIVES[objective],
            "data": {"context": shape.context},
            "training": {
                "tokens": shape.tokens,
                "batch": shape.batch,
                "precision": "mixed" if precision == "mixed" else "exact",
            },
        }
        run = DryRun(RunConfig.build(recipe), job.host.device, shape.batch)
        held = run.stages(run.accumulation, run.microbatch, only_step=True)[STEP]
        return {"planned_bytes": held.bytes, "measured_bytes": measured, "ratio": held.bytes / measured}

    rows: list[Row] = []
    for part, made in job.found.items():
        for objective, row_made in made.items():
            if part.startswith("steps ") and row_made.get("tensors_bytes"):  # a processor may have had them before
                _, name, precision = part.split(" ", 2)
                given = partial(row, name, precision, objective, row_made["tensors_bytes"])
                rows.append((f"{name} {precision} {objective}", given))
    return rows


def papers_step(job: Job) -> list[Row]:
    """A whole step of the paper's own code and of ours, on the same weights and tokens."""
    shape = replace(job.shape("gpt2-small"), batch=2 if job.tiny else 4)
    threads = torch.get_num_threads()
    spec = {"threads": threads, "shape": asdict(shape), "seed": 0, "l0": float(job.l0), "folder": str(job.scratch)}

    @cache
    def prepared() -> dict[str, Any]:
        Ours().prepare(spec)
        return spec

    def row(program: str, objective: str, precision: str) -> dict[str, Any]:
        job.host.free()
        side = {"ours": Ours, "reference": Reference}[program]()
        side.build({**prepared(), "device": job.device, "objective": objective, "precision": precision})
        return _side_timed(job, side.step, shape.tokens)

    sides = (("reference", "exact"), ("ours", "exact"), ("ours", "mixed"))
    return [
        (f"{program} {precision} {objective}", partial(row, program, objective, precision))
        for objective in ("e2e", "local", "e2e_ds")
        for program, precision in sides
    ]


def _side_timed(job: Job, step: Act, tokens: int) -> dict[str, Any]:
    job.host.begin_memory()
    timed = job.host.timed(step, job.seconds)
    memory = job.host.peak_memory()
    return {**asdict(timed), "tokens_per_second": tokens / timed.seconds, "tensors_bytes": memory["tensors"]}


def peer(job: Job, name: str, architecture: str) -> list[Row]:
    """An SAE's own step on given activations: a package's and ours."""
    shape = job.shape("gpt2-small")
    spec = {
        "threads": torch.get_num_threads(),
        "rows": shape.tokens,
        "d_model": shape.d_model,
        "d_sae": shape.d_sae,
        "l0": float(job.l0),
        "k": round(job.l0),
        "seed": 0,
        "device": job.device,
        "architecture": architecture,
    }

    def row(of: str) -> dict[str, Any]:
        job.host.free()
        side = PEERS[of]()
        side.build(spec)
        return _side_timed(job, side.step, shape.tokens)

    return [(each, partial(row, each)) for each in (name, "ours")]


def rows_of(part: str, job: Job) -> list[Row]:
    """The rows of a part, by its name in `gpu.py`."""
    kind, _, rest = part.partition(" ")
    if kind == "steps":
        name, _, precision = rest.partition(" ")
        return steps(job, name, precision, ("e2e",) if name == "gemma-2-2b" else OBJECTIVES)
    if kind == "peer":
        name, _, architecture = rest.partition(" ")
        return peer(job, name, architecture)
    return {
        "card": card,
        "compiled": compiled,
        "kernels": kernels,
        "waits": waits,
        "long run": long_run,
        "resume": resume,
        "plan": planned,
        "paper's step": papers_step,
    }[part](job)


def made(row: Row) -> dict[str, Any]:
    """A row, or what it raised; with what does not go into JSON as such."""
    try:
        found = row[1]()
        json.dumps(found, allow_nan=False)
    except Exception as error:  # noqa: BLE001 - the next row is made all the same
        return {"failed": f"{type(error).__name__}: {error}"[:2000], "traceback": traceback.format_exc(limit=-5)}
    return found


def work(given: dict[str, Any], replies: IO[str]) -> None:
    """Make the rows of a part that are not there.

    Args:
        given: `gpu.Runner.job_of`.
        replies: gets a line of JSON for every row.
    """
    found = {name: one["rows"] for name, one in json.loads(Path(given["results"]).read_text())["parts"].items()}
    job = Job(given["device"], given["tiny"], given["seconds"], Path(given["scratch"]), found)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for row in rows_of(given["part"], job):
            if row[0] not in given["have"]:
                replies.write(json.dumps({"row": row[0], "found": made(row)}) + "\n")
                replies.flush()


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log
    work(json.loads(sys.argv[1]), replies)


if __name__ == "__main__":
    main()
