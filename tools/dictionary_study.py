"""Compare the dictionaries of today under every objective: `python tools/dictionary_study.py --minutes 60`.

What is trained stands in docs/results/dictionaries/study.yaml. For every site, kind and architecture the learning rate
is chosen at the middle level, on held-out text that nothing is reported on; then all levels are trained at that rate.
The kinds and architectures named there as finalists get further levels and seeds; `equal_cost` gives cheaper kinds as
many more tokens as a step of them costs less. Each run leaves one row, `rows/<hash of its recipe>.json`, beside that
file; a run whose row is there is not made again, wherever the command is started. Runs of one site and one text are
trained side by side in one pass. What is found is printed and written to `table.md` (every point) and `ratios.csv`
(every curve against the best with local, and against the paper's). With `--keep` the run folders stay, and `seeds.csv`
says how alike the features of different seeds are.
"""

import argparse
import csv
import json
import math
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import yaml

from endwise import SAE, RunConfig, load_model, train
from endwise.analysis.geometry.cosines import nearest_across
from endwise.analysis.pareto.curves import front
from endwise.analysis.ratios import Ratio, ratio_of
from endwise.common.files import write_atomic, write_json
from endwise.common.tables import as_csv
from endwise.config.base import with_values
from endwise.config.method import Knob, Method
from endwise.config.objective import LABELS
from endwise.evaluation.summary import RunSummary
from endwise.runs.folder import RunFolder
from endwise.sweeps.points import fingerprint
from study_rows import Row, Rows, batches, machine

HERE = Path(__file__).parent.parent / "docs" / "results" / "dictionaries"
ROWS = Rows(HERE / "rows")
PAPER = "standard"
"""The architecture that docs/results/paper-embedded.md has trained at the same sites, sizes and lengths."""
PAPER_RUNS = HERE.parent / "paper-embedded" / "tables" / "runs.csv"
REFERENCES = (("local", "batchtopk"), ("e2e", PAPER), ("e2e_ds", PAPER))
"""Curves that every other is compared with."""


@dataclass(frozen=True)
class Setting:
    """One curve of the study: a site, a kind, an architecture, a seed, and how much longer than the base it trains."""

    site: str
    kind: str
    architecture: str
    study: dict[str, Any]
    seed: int = 0
    tokens: int | None = None

    @property
    def own(self) -> dict[str, Any]:
        return self.study["architectures"][self.architecture]

    def named(self) -> tuple[tuple[str, str], ...]:
        """Names that `--only` can ask for, and where the study lists them."""
        return (self.site, "sites"), (self.kind, "kinds"), (self.architecture, "architectures")

    @property
    def levels(self) -> list[float]:
        """Three; a finalist's five at equal tokens."""
        further = self.own.get("further", {}).get(self.kind, []) if self.final and self.tokens is None else []
        return sorted([*self.own["levels"][self.kind], *further])

    @property
    def method(self) -> Method:
        """Method: all that stays the same along the curve."""
        longer = "" if self.tokens is None else f", {self.tokens:,} tokens"
        return Method(f"{self.kind} {self.architecture}{longer}", f"{LABELS[self.kind]} {self.architecture}{longer}")

    @property
    def final(self) -> bool:
        return [self.kind, self.architecture] in self.study["finalists"]

    def tuning(self) -> list[RunConfig]:
        """The runs by which a learning rate is chosen: seed 0's, at the middle level."""
        levels, rates = self.own["levels"][self.kind], self.own["rates"][self.kind]
        first = Setting(self.site, self.kind, self.architecture, self.study)
        return [first.recipe(levels[len(levels) // 2], rate) for rate in rates[self.site]]

    def recipe(self, level: float, rate: float) -> RunConfig:
        """The recipe at one level of the knob."""
        dictionary = {"ratio": self.study["ratio"], "architecture": self.architecture, **self.own.get("dictionary", {})}
        objective = {"kind": self.kind, **self.study["kinds"][self.kind], **self.own.get("objective", {})}
        base = {**self.study["base"], "site": self.site, "dictionary": dictionary, "objective": objective}
        changes: dict[str, Any] = {
            self.own["knob"]: level,
            "training.learning_rate": rate,
            "seed": self.seed,
            "data.seed": self.seed,
        }
        changes |= {} if self.tokens is None else {"training.tokens": self.tokens}
        return RunConfig.build(with_values(base, changes), f"{self.architecture} {self.kind}")

    def rate(self) -> float | None:
        """The rate whose middle level needs the fewest features, against `standard`'s of this site and kind at the same
        CE increase, both on the text that is for tuning; None while a run that says so is missing.
        """
        tuning = self.tuning()
        if len(tuning) == 1:
            return tuning[0].training.learning_rate
        rows = [ROWS.of(config) for config in tuning]
        if None in rows:
            return None
        curve = paper_rows(self.site, self.kind, 0, "learning_rates")
        needed = {
            row["tuning"]["l0"] / l0_at(curve, row["tuning"]["ce_increase"]): row["learning_rate"]
            for row in rows
            if row and "failed" not in row and row["tuning"]["ce_increase"] > 0
        }
        return needed[min(needed)] if needed else None

    def rows(self) -> list[Row | None]:
        """The rows of its levels, None where there is none yet."""
        if self.architecture == PAPER:
            return [*paper_rows(self.site, self.kind, self.seed, "seeds" if self.seed else "curves")]
        rate = self.rate()
        return [None if rate is None else ROWS.of(self.recipe(level, rate)) for level in self.levels]

    def wanted(self) -> list[RunConfig]:
        """Runs that can be trained now: those that choose the rate or, once it is chosen, the levels."""
        if self.architecture == PAPER:
            return []
        rate = self.rate()
        return self.tuning() if rate is None else [self.recipe(level, rate) for level in self.levels]


def paper_rows(site: str, kind: str, seed: int, experiment: str) -> list[Row]:
    """Rows of the paper's own kinds, at the rate that its study chose: they were trained and measured alike there."""
    with PAPER_RUNS.open(newline="") as file:
        found = [run for run in csv.DictReader(file) if (run["site"], run["kind"]) == (site, kind)]
    chosen = next(run["learning_rate"] for run in found if run["experiments"] == "curves")
    numbers = ("l0", "ce_increase", "alive", "learning_rate", "coefficient")
    return [
        {name: float(run[name]) for name in numbers} | {"folder": run["run"]}
        for run in found
        if (run["experiments"], run["seed"], run["learning_rate"]) == (experiment, str(seed), chosen)
    ]


def l0_at(curve: Sequence[Row], ce_increase: float) -> float:
    """L0 of a curve at a CE increase, on straight lines between the points in the logarithms of both. The first and the
    last line are extended, since rates are compared wherever their middle level falls.
    """
    points = sorted((math.log(row["ce_increase"]), math.log(row["l0"])) for row in curve)
    at, after = math.log(ce_increase), 1
    while after < len(points) - 1 and points[after][0] < at:
        after += 1
    (x, y), (x2, y2) = points[after - 1], points[after]
    return math.exp(y + (at - x) * (y2 - y) / (x2 - x))


def settings(study: dict[str, Any]) -> list[Setting]:
    """Every curve, in the order in which they are made: seed 0's of all, longer runs, other seeds of the finalists."""
    first = [
        Setting(site, kind, name, study)
        for name in study["architectures"]
        for site in study["sites"]
        for kind in study["kinds"]
    ]
    finalists = [curve for curve in first if curve.final]
    paper = [curve for curve in first if curve.architecture == PAPER]
    longer = [
        Setting(curve.site, curve.kind, curve.architecture, study, tokens=study["equal_cost"][curve.kind])
        for curve in finalists
        if curve.kind in study["equal_cost"]
    ]
    again = [
        Setting(curve.site, curve.kind, curve.architecture, study, seed)
        for seed in study["seeds"]
        for curve in (*paper, *finalists)
    ]
    return [*first, *longer, *again]


def summaries(curve: Setting) -> list[RunSummary]:
    """The points of a curve, of one seed."""
    known = {each.name for each in fields(RunSummary)} - {"method", "knob"}
    found = []
    for row in curve.rows():
        if row and "failed" not in row:
            value = row.get("knob.value") or row["coefficient"]
            nothing = dict.fromkeys(("kl", "explained_variance", "seconds", "d_sae", "alive_tokens"), 0)
            whole: Row = {"site": curve.site, "downstream_mse": {}, "tokens": curve.tokens or 0, **nothing, **row}
            whole |= {"seed": curve.seed, "data_seed": curve.seed, "text": None, "heldout": None}
            own = {name: given for name, given in whole.items() if name in known}
            found.append(RunSummary(method=curve.method, knob=Knob(value, curve.own["knob"]), **own))
    return found


def over_seeds(curve: Setting) -> list[RunSummary]:
    """The points of all its seeds. A level that another level beats in both numbers, in any seed, is no part of it."""
    seeds = [summaries(replace(curve, seed=seed)) for seed in (0, *curve.study["seeds"])]
    beaten = {run.knob for runs in seeds for run in runs if run.folder not in front(runs, "l0", "ce_increase")}
    return [run for runs in seeds for run in runs if run.knob not in beaten]


def ratio(curve: Setting, kind: str, architecture: str) -> Ratio:
    """Its L0 relative to that of another curve of its site, at equal CE increase, over the seeds that it has."""
    other, own = Setting(curve.site, kind, architecture, curve.study), over_seeds(curve)
    runs = [*own, *(run for run in over_seeds(other) if run.seeds in {each.seeds for each in own})]
    return ratio_of(runs, curve.method, "l0", "ce_increase", resamples=0, seed=0, reference=other.method)


def ratios(curves: Sequence[Setting]) -> Iterator[Row]:
    """Each curve against `REFERENCES`. Intervals are over seeds alone: the rows hold no sums of single sequences."""
    for curve in curves:
        for kind, architecture in REFERENCES:
            if curve.seed == 0 and (curve.tokens, curve.kind, curve.architecture) != (None, kind, architecture):
                found = ratio(curve, kind, architecture).to_row()
                named = {"site": curve.site, "method": curve.method.label, "relative_to": f"{kind} {architecture}"}
                ends = [f"{of}.{end}" for of in ("over", "ratio_at_ends") for end in ("low", "high")]
                over = {"ratio": found["ratio"], "low": found["seeds.low"], "high": found["seeds.high"]}
                yield named | over | {name: found[name] for name in (*ends, "crossings", "seeds", "reason")}


def costs(curves: Sequence[Setting]) -> dict[str, float]:
    """Milliseconds of a step of each curve, trained alone on one thread at its middle level: the median of all but the
    first ten of 40 steps. The machine must be idle.
    """
    torch.set_num_threads(1)
    model, found = load_model("embedded"), {}
    for curve in curves:
        with tempfile.TemporaryDirectory() as folder:
            tokens = 40 * curve.study["base"]["training"]["batch"] * (model.context or 1)
            changes = {"training.tokens": tokens, "training.log_every": 1, "out": f"{folder}/run"}
            config = RunConfig.build(with_values(curve.tuning()[0].model_dump(exclude_unset=True), changes))
            run = train(config, model=model, display=False)
            timings = RunFolder.open(run.folder).timings_file.read_text().splitlines()
        seconds = [json.loads(line)["seconds"] for line in timings]
        found[f"{curve.site} {curve.kind} {curve.architecture}"] = 1e3 * float(np.median(np.diff(seconds)[10:]))
    return found


def table(curves: Sequence[Setting]) -> str:
    """Every level that was measured."""
    lines = [
        "| site | kind | architecture | tokens | seed | rate | L0 → CE increase | alive | features that carry 90 % |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for curve in curves:
        rows = [row for row in curve.rows() if row]
        if rows:
            whole = [row for row in rows if "failed" not in row]
            points = ", ".join(f"{row['l0']:.1f} → {row['ce_increase']:.3f}" for row in whole)
            alive = " ".join(f"{row['alive']:.0f}" for row in whole)
            carried = " ".join(f"{row['importance']['carrying']:.0f}" if "importance" in row else "–" for row in whole)
            tokens = curve.tokens or curve.study["base"]["training"]["tokens"]
            parts = (
                curve.site,
                curve.kind,
                curve.architecture,
                f"{tokens:,}",
                curve.seed,
                f"{rows[0]['learning_rate']:g}",
            )
            lines.append(f"| {' | '.join(map(str, parts))} | {points} | {alive} | {carried} |")
    return "\n".join(lines)


def stability(curves: Sequence[Setting], kept: Path) -> Iterator[Row]:
    """Measure, at each level with two seeds or more that are kept, the mean cosine of a feature's direction with the
    nearest one of another seed.
    """
    for curve in curves:
        rate = curve.rate()
        if curve.seed == 0 and curve.architecture != PAPER and curve.tokens is None and rate is not None:
            seeds = [replace(curve, seed=seed) for seed in (0, *curve.study["seeds"])]
            for level in curve.levels:
                paths = [kept / fingerprint(seed.recipe(level, rate)) for seed in seeds]
                own = [SAE.load(path).W_dec.detach() for path in paths if path.exists()]
                if len(own) > 1:
                    first, *others = (torch.nn.functional.normalize(directions, dim=-1) for directions in own)
                    near = [nearest_across(first, other)[0].best.mean().item() for other in others]
                    named = {"site": curve.site, "method": curve.method.label, "level": level}
                    yield named | {"seeds": len(own), "cosine": float(np.mean(near))}


def write_rows(rows: Iterable[Row], file: Path) -> None:
    write_atomic(file, as_csv(pa.Table.from_pylist(list(rows))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further runs after this time")
    parser.add_argument("--only", nargs="*", default=[], help="architectures, kinds and sites to train")
    parser.add_argument("--keep", type=Path, help="a folder for the runs; with it, seeds.csv is written")
    parser.add_argument("--costs", action="store_true", help="time a step of each on an idle machine, and end")
    arguments = parser.parse_args()
    study = yaml.safe_load((HERE / "study.yaml").read_text())
    only = set(arguments.only)
    curves = [
        curve
        for curve in settings(study)
        if all(its in only or not only & {PAPER, *study[of]} for its, of in curve.named())
    ]
    if arguments.costs:
        timed = costs([curve for curve in curves if curve.seed == 0 and curve.tokens is None])
        write_json(HERE / "costs.json", {"milliseconds a step": timed, **machine()})
        return
    ends = time.monotonic() + 60 * arguments.minutes
    while time.monotonic() < ends:
        wanted = {fingerprint(config): config for curve in curves for config in curve.wanted()}
        missing = [config for config in wanted.values() if ROWS.of(config) is None]
        if not missing:
            break
        batch = next(batches(missing))
        print(f"{len(missing)} runs to make; now {', '.join(map(fingerprint, batch))}", flush=True)
        ROWS.make(batch, arguments.keep)
    text = table(settings(study))
    (HERE / "table.md").write_text(text + "\n")
    print(text)
    write_rows(ratios(settings(study)), HERE / "ratios.csv")
    if arguments.keep is not None:
        write_rows(stability(settings(study), arguments.keep), HERE / "seeds.csv")


if __name__ == "__main__":
    main()
