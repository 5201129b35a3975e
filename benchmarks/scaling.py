"""Measure how a step's cost grows: `python benchmarks/scaling.py --out scaling.json --plot docs/images/scaling.png`.

From one base shape, one quantity at a time is varied: width, vocabulary, dictionary size, L0, the SAE's layer. For
each, the median seconds of a whole training step per token, of each objective. Then, for three shapes of dictionary,
the seconds of its forward and backward pass with sparse and with dense latents at rising L0, and where the two cross:
that share of the dictionary is what `endwise.dictionaries.relu.SPARSE_BELOW` is set from.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from endwise.dictionaries import ReluSAE
from harness import cores, machine, write_json
from ours import Ours, bias_shift
from shapes import OBJECTIVES, Shape

BASE = Shape("gpt2", 8, 256, 4, 8192, 512, 512, batch=2, layer=4, d_sae=4096)
L0 = 50.0
AXES: dict[str, tuple[int, ...]] = {
    "d_model": (64, 128, 256, 512),
    "vocab": (2048, 8192, 32768),
    "d_sae": (1024, 4096, 16384, 32768),
    "L0": (8, 32, 128, 512, 2048),
    "layer": (0, 2, 4, 6),
}
LABELS = {
    "d_model": "width",
    "vocab": "vocabulary",
    "d_sae": "dictionary size",
    "L0": "L0",
    "layer": "layer",
}
DICTIONARIES = ((64, 3200), (128, 1536), (768, 11520))
SHARES = (1 / 256, 1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4)
ROWS = 512


def variants() -> Iterator[tuple[str, int, Shape, float]]:
    for axis, values in AXES.items():
        for value in values:
            if axis == "L0":
                yield axis, value, BASE, float(value)
            else:
                yield axis, value, replace(BASE, **{axis: value}), L0  # pyrefly: ignore[bad-argument-type]


def median_seconds(act: Callable[[], object], seconds: float) -> float:
    act()
    times: list[float] = []
    while len(times) < 5 or sum(times) < seconds:
        start = time.perf_counter()
        act()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def step_costs(seconds: float, threads: int) -> Iterator[dict[str, Any]]:
    """Microseconds per token of one training step, by axis, value and objective."""
    for axis, value, shape, l0 in variants():
        with tempfile.TemporaryDirectory() as scratch:
            spec = {"threads": threads, "shape": asdict(shape), "folder": scratch, "l0": l0, "seed": 0}
            Ours().prepare(spec)
            for objective in OBJECTIVES:
                side = Ours()
                side.build(spec | {"objective": objective})
                cost = median_seconds(side.step, seconds) / shape.tokens * 1e6
                yield {"axis": axis, "value": value, "objective": objective, "microseconds_per_token": cost}


def crossings(seconds: float) -> Iterator[dict[str, Any]]:
    """Seconds of a dictionary's forward and backward pass, sparse and dense, by share of active features."""
    for d_model, d_sae in DICTIONARIES:
        x = torch.randn(ROWS, d_model)
        for share in SHARES:
            sae = ReluSAE(d_model, d_sae)
            with torch.no_grad():
                sae.b_enc.sub_(bias_shift(x, sae.encoder, sae.b_enc, share * d_sae))
            record: dict[str, Any] = {"d_model": d_model, "d_sae": d_sae, "share": share}
            for name, below in (("sparse", 1.0), ("dense", 0.0)):
                sae.sparse_below = below
                record[name] = median_seconds(partial(_pass, sae, x), seconds)
            yield record


def _pass(sae: ReluSAE, x: torch.Tensor) -> None:
    sae.zero_grad(set_to_none=True)
    latents = sae.encode(x)
    ((sae.decode(latents) - x).square().mean() + latents.penalty().mean()).backward()


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 7), layout="constrained")
    for panel, axis in zip(axes.flat, AXES, strict=False):
        for objective in OBJECTIVES:
            points = [row for row in result["steps"] if row["axis"] == axis and row["objective"] == objective]
            panel.plot(
                [row["value"] for row in points],
                [row["microseconds_per_token"] for row in points],
                marker="o",
                label=objective.replace("_ds", "+ds"),
            )
        panel.set(xlabel=LABELS[axis], ylabel="µs per token", ylim=(0, None))
        if axis != "layer":
            panel.set_xscale("log", base=2)
    axes.flat[0].legend()
    panel = axes.flat[-1]
    for d_model, d_sae in DICTIONARIES:
        rows = [row for row in result["crossings"] if (row["d_model"], row["d_sae"]) == (d_model, d_sae)]
        speedup = [row["dense"] / row["sparse"] for row in rows]
        panel.plot([row["share"] for row in rows], speedup, marker="o", label=f"{d_model} × {d_sae:,}")
    panel.axhline(1, color="grey", linewidth=1)
    panel.set(xlabel="share of features active", ylabel="dense time / sparse time")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=2)
    panel.legend()
    for panel in axes.flat:
        panel.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("scaling.json"))
    parser.add_argument("--plot", type=Path, help="draw what is in --out, after measuring")
    parser.add_argument("--only-plot", action="store_true", help="measure nothing")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timed steps per point, and at least 5 steps")
    parser.add_argument("--threads", type=int, default=cores())
    arguments = parser.parse_args()
    if not arguments.only_plot:
        torch.set_num_threads(arguments.threads)
        result: dict[str, Any] = {"machine": machine(arguments.threads), "base": asdict(BASE), "steps": []}
        result["crossings"] = []
        for key, rows in (
            ("steps", step_costs(arguments.seconds, arguments.threads)),
            ("crossings", crossings(arguments.seconds)),
        ):
            for row in rows:
                result[key].append(row)
                print(json.dumps(row), flush=True)
                write_json(arguments.out, result)
    if arguments.plot:
        plot(json.loads(arguments.out.read_text()), arguments.plot)


if __name__ == "__main__":
    main()
