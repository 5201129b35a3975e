"""End-to-end training at local's price: `python tools/price_study.py --minutes 60`.

What is trained stands in docs/results/price/study.yaml (or another folder's: `--study smollm2`): methods, each a change
of the base recipe, at levels of one knob. For every site and method the learning rate is chosen at the middle level, on
held-out text that nothing is reported on; then all levels are trained at that rate, finalists with further levels and
seeds. Each run leaves one row, `rows/<hash of its recipe>.json`, so that the command, started again elsewhere, makes
only the missing ones.

Written are `table.md` (every point), and `price.csv`: of each method its cost, in operations and in seconds of a whole
training relative to local training, and its L0 relative to local's at equal CE increase. `--costs` measures the
seconds, on an idle machine.
"""

import argparse
import csv
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from endwise import RunConfig, load_model, train
from endwise.analysis.pareto.curves import front
from endwise.analysis.ratios import Ratio, ratio_of
from endwise.common.files import write_atomic, write_json
from endwise.common.statistics import LEAST_SEEDS, interval_over_seeds
from endwise.config.base import with_values
from endwise.config.method import Knob, Method
from endwise.evaluation.summary import RunSummary
from endwise.sweeps.points import fingerprint
from endwise.training.planning.plan import plan
from study_rows import Row, Rows, batches, machine

RESULTS = Path(__file__).parent.parent / "docs" / "results"


@dataclass(frozen=True)
class Study:
    """Runs of one study, and the folder of its results."""

    folder: Path

    @cached_property
    def values(self) -> dict[str, Any]:
        return yaml.safe_load((self.folder / "study.yaml").read_text())

    @property
    def rows(self) -> Rows:
        return Rows(self.folder / "rows", importance=False)

    @property
    def costs_file(self) -> Path:
        return self.folder / "costs.json"

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Seconds of a whole training, by site and method, as far as they were timed."""
        return json.loads(self.costs_file.read_text())["seconds"] if self.costs_file.exists() else {}

    def __getitem__(self, key: str) -> Any:
        return self.values[key]


@dataclass(frozen=True)
class Curve:
    """A method at a site, of one seed."""

    study: Study
    site: str
    name: str
    seed: int = 0

    @property
    def own(self) -> dict[str, Any]:
        own = self.study["methods"][self.name]
        return {**self.study["methods"][own["of"]], **own} if "of" in own else own

    def held_against(self, role: str) -> "Curve":
        """Return the curve that is its `reference`, or the `full` objective: its own of that role, or the study's."""
        return replace(self, name=self.own.get(role, self.study[role]))

    @property
    def is_final(self) -> bool:
        return self.name in self.study["finalists"]

    @property
    def is_wanted(self) -> bool:
        return self.site in self.own.get("sites", [self.site])

    @property
    def middle(self) -> float:
        levels = self.study["levels"]
        return levels[len(levels) // 2]

    @property
    def levels(self) -> list[float]:
        levels = self.own.get("levels", self.study["levels"])
        return sorted([*levels, *(self.own.get("further", self.study["further"]) if self.is_final else [])])

    @property
    def rates(self) -> list[float]:
        return self.own.get("rates", {}).get(self.site, self.study["rates"])

    @property
    def knob(self) -> str:
        return self.own.get("knob", self.study["knob"])

    def recipe(self, level: float, rate: float, seed: int | None = None) -> RunConfig:
        """Return the recipe at one level of the knob."""
        base, own = self.study["base"], self.own
        objective = {**base["objective"], **own.get("objective", {})}
        values = {**base, "site": self.site, "objective": objective}
        values |= {key: own[key] for key in ("data", "dictionary", "phases") if key in own}
        seed = self.seed if seed is None else seed
        changes = {f"training.{key}": value for key, value in own.get("training", {}).items()}
        changes |= {self.knob: level, "training.learning_rate": rate, "seed": seed, "data.seed": seed}
        return RunConfig.build(with_values(values, changes), self.name)

    def tuning(self) -> list[RunConfig]:
        """Return the runs by which the learning rate is chosen."""
        return [self.recipe(self.middle, rate, 0) for rate in self.rates]

    def rate(self) -> float | None:
        """Return the rate with the smallest CE increase at the middle level, which all have one L0 at, on text for
        tuning; None while a run is missing.
        """
        rows = [self.study.rows.of(config) for config in self.tuning()]
        if None in rows:
            return None
        found = {row["tuning"]["ce_increase"]: row["learning_rate"] for row in rows if row and "failed" not in row}
        return found[min(found)] if found else None

    def wanted(self) -> list[RunConfig]:
        """Return what can be trained now."""
        rate = self.rate()
        return self.tuning() if rate is None else [self.recipe(level, rate) for level in self.levels]

    @property
    def method(self) -> Method:
        return Method(self.name, self.name)

    def rows(self) -> list[Row]:
        rate = self.rate()
        if rate is None:
            return []
        found = [self.study.rows.of(self.recipe(level, rate)) for level in self.levels]
        return [row for row in found if row is not None and "failed" not in row]

    def summaries(self) -> list[RunSummary]:
        """Return its points; one that another beats in both numbers is no part of the curve."""
        known = {each.name for each in fields(RunSummary)} - {"method", "knob"}
        found = []
        for row in self.rows():
            own = {name: value for name, value in row.items() if name in known}
            own |= {"seed": self.seed, "data_seed": self.seed, "tokens": 0, "text": None, "heldout": None}
            found.append(RunSummary(method=self.method, knob=Knob(row["knob.value"], self.knob), **own))
        whole = front(found, "l0", "ce_increase")
        return [run for run in found if run.folder in whole]

    @cached_property
    def operations(self) -> float:
        """Operations of the whole training, once latents are sparse, with all its tokens."""
        config = self.tuning()[0]
        planned = plan(config)
        return (planned.sparse_flops or planned.flops.per_token) * config.training.tokens


def curves_of(study: Study) -> list[Curve]:
    """Every curve: seed 0's of all methods, then other seeds of the finalists."""
    every = [Curve(study, site, name) for site in study["sites"] for name in study["methods"]]
    first = [curve for curve in every if curve.is_wanted]
    again = [replace(curve, seed=seed) for seed in study["seeds"] for curve in first if curve.is_final]
    return [*first, *again]


def ratio(curve: Curve, seeds: Sequence[int] | None = None) -> Ratio:
    """Return its L0 relative to the reference's at equal CE increase, over the seeds that both have, or those given."""
    study = curve.study
    each_seed = [replace(curve, seed=seed) for seed in seeds or (0, *study["seeds"])]
    own = [run for each in each_seed for run in each.summaries()]
    others = [run for each in each_seed for run in each.held_against("reference").summaries()]
    runs = [*own, *(run for run in others if run.seed in {each.seed for each in own})]
    reference = curve.held_against("reference").method
    return ratio_of(runs, curve.method, "l0", "ce_increase", resamples=0, seed=0, reference=reference)


def saving(curve: Curve) -> Row:
    """Return its saving of L0 as a share of that of `full`, both in logarithms; over seeds, where three have one."""
    shares = []
    for seed in (0, *curve.study["seeds"]):
        own, full = (ratio(each, [seed]).estimate for each in (curve, curve.held_against("full")))
        if own and full:
            shares.append(math.log(own) / math.log(full))
    if len(shares) < LEAST_SEEDS:
        return {"saving": shares[0]} if shares else {}
    found = interval_over_seeds(np.array(shares))
    return {"saving": found.estimate, "saving.low": found.low, "saving.high": found.high}


def prices(curves: Sequence[Curve]) -> Iterator[Row]:
    """Each method at each site: what it costs, and what it saves."""
    for curve in curves:
        reference = curve.held_against("reference")
        if curve.seed or not curve.rows() or not reference.rows():
            continue
        row: Row = {"site": curve.site, "method": curve.name, "operations": curve.operations / reference.operations}
        timed = curve.study.seconds
        seconds = [timed.get(f"{each.site} {each.name}", float("nan")) for each in (curve, reference)]
        row["seconds"] = seconds[0] / seconds[1]
        if curve.name != reference.name:
            found = ratio(curve).to_row()
            row |= {"ratio": found["ratio"], "low": found["seeds.low"], "high": found["seeds.high"]}
            ends = [f"{of}.{end}" for of in ("over", "ratio_at_ends") for end in ("low", "high")]
            row |= {name: found[name] for name in (*ends, "crossings", "seeds", "reason")} | saving(curve)
        yield row


def table(curves: Sequence[Curve]) -> str:
    """Every level that was measured."""
    lines = [
        "| site | method | seed | rate | L0 → CE increase | last downstream MSE | alive |",
        "|---|---|---|---|---|---|---|",
    ]
    for curve in curves:
        if rows := curve.rows():
            points = ", ".join(f"{row['l0']:.1f} → {row['ce_increase']:.3f}" for row in rows)
            last = " ".join(f"{[*row['downstream_mse'].values()][-1]:.2f}" for row in rows)
            alive = " ".join(f"{row['alive']:.0f}" for row in rows)
            lines.append(
                f"| {curve.site} | {curve.name} | {curve.seed} | {curve.rate():g} | {points} | {last} | {alive} |"
            )
    return "\n".join(lines)


def costs(curves: Sequence[Curve], study: Study) -> None:
    """Time the whole training of each method at the middle level, alone on one thread, and keep the seconds of its
    loop; those that were timed before are left as they are. The machine must be idle.
    """
    torch.set_num_threads(1)
    model = load_model(**curves[0].tuning()[0].model.model_dump())
    for curve in curves:
        rate, name = curve.rate(), f"{curve.site} {curve.name}"
        if rate is None or name in study.seconds:
            continue
        with tempfile.TemporaryDirectory() as folder:
            placed = curve.recipe(curve.middle, rate).model_copy(update={"out": Path(folder) / "run"})
            study.seconds[name] = train(placed, model=model, display=False).seconds
        write_json(study.costs_file, {"seconds": study.seconds, **machine()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", default="price", help="the folder of docs/results that holds its study.yaml")
    parser.add_argument("--inputs", type=Path, default=Path(), help="where relative paths of its recipes start")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further runs after this time")
    parser.add_argument("--only", nargs="*", default=[], help="methods and sites to train")
    parser.add_argument("--costs", action="store_true", help="time a training of each on an idle machine, and end")
    arguments = parser.parse_args()
    study = Study(RESULTS / arguments.study)
    os.chdir(arguments.inputs)
    only, curves = set(arguments.only), curves_of(study)
    chosen = [
        curve
        for curve in curves
        if (curve.name in only or not only & set(study["methods"]))
        and (curve.site in only or not only & set(study["sites"]))
    ]
    if arguments.costs:
        costs([curve for curve in chosen if curve.seed == 0], study)
        return
    ends = time.monotonic() + 60 * arguments.minutes
    while time.monotonic() < ends:
        wanted = {fingerprint(config): config for curve in chosen for config in curve.wanted()}
        missing = [config for config in wanted.values() if study.rows.of(config) is None]
        if not missing:
            break
        batch = next(batches(missing))
        print(f"{len(missing)} runs to make; now {', '.join(config.objective_name for config in batch)}", flush=True)
        study.rows.make(batch)
    text = table(curves)
    write_atomic(study.folder / "table.md", f"{text}\n".encode())
    print(text)
    rows = list(prices(curves))
    if rows:
        columns = list(dict.fromkeys(name for row in rows for name in row))
        with (study.folder / "price.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
