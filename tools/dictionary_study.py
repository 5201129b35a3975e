"""Compare the dictionaries of today under every objective: `python tools/dictionary_study.py --minutes 60`.

What is trained stands in docs/results/dictionaries/study.yaml: for every site, kind and architecture the learning rate
is chosen at the middle level, on held-out text that nothing is reported on, then every level is trained at that rate.
Each run leaves one row, `rows/<hash of its recipe>.json`, beside that file; a run whose row is there is not made again,
wherever the command is started. Runs of one site are trained side by side in one pass. The table of all rows is printed
at the end and written to `table.md`.
"""

import argparse
import json
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from endwise import SAE, RunConfig, corpora_for, load_model, measure, train_together
from endwise.common.files import write_json
from endwise.config.base import with_values
from endwise.evaluation.summary import RunSummary
from endwise.sweeps.points import fingerprint
from endwise.training.members import SomeFailed

HERE = Path(__file__).parent.parent / "docs" / "results" / "dictionaries"
ROWS = HERE / "rows"
TOGETHER = 6
"""Most runs in one pass."""


@dataclass(frozen=True)
class Setting:
    """One curve of the study: a site, a kind and an architecture."""

    site: str
    kind: str
    architecture: str
    study: dict[str, Any]

    @property
    def own(self) -> dict[str, Any]:
        return self.study["architectures"][self.architecture]

    @property
    def levels(self) -> list[float]:
        return self.own["levels"][self.kind]

    def tuning(self) -> list[RunConfig]:
        """The runs by which a learning rate is chosen."""
        return [self.recipe(self._middle, rate, tuning=True) for rate in self.own["rates"][self.kind]]

    @property
    def _middle(self) -> float:
        return self.levels[len(self.levels) // 2]

    def recipe(self, level: float, rate: float, *, tuning: bool = False, seed: int = 0) -> RunConfig:
        """The recipe at one level of the knob."""
        dictionary = {"ratio": self.study["ratio"], "architecture": self.architecture, **self.own.get("dictionary", {})}
        objective = {"kind": self.kind, **self.study["kinds"][self.kind], **self.own.get("objective", {})}
        base = {**self.study["base"], "site": self.site, "dictionary": dictionary, "objective": objective}
        tokens = self.study["base"]["evaluation"]["tokens"]
        changes = {
            self.own["knob"]: level,
            "training.learning_rate": rate,
            "evaluation.skip": tokens if tuning else 0,
            "seed": seed,
            "data.seed": seed,
        }
        return RunConfig.build(with_values(base, changes), f"{self.architecture} {self.kind}")

    def best_rate(self) -> float | None:
        """The rate at which L0 × CE increase is lowest; None while one of the runs that say so is missing."""
        rows = [row_of(config) for config in self.tuning()]
        if any(row is None for row in rows):
            return None
        whole = [row for row in rows if row is not None and "failed" not in row]
        costs = {row["l0"] * row["ce_increase"]: row["learning_rate"] for row in whole}
        return costs[min(costs)] if costs else None


def settings(study: dict[str, Any], only: Sequence[str]) -> list[Setting]:
    """Every curve, the sites first."""
    return [
        Setting(site, kind, name, study)
        for site in study["sites"]
        for kind in study["kinds"]
        for name in study["architectures"]
        if not only or name in only
    ]


def row_file(config: RunConfig) -> Path:
    return ROWS / f"{fingerprint(config)}.json"


def row_of(config: RunConfig) -> dict[str, Any] | None:
    """The row of a run that was made before, here or elsewhere."""
    file = row_file(config)
    return json.loads(file.read_text()) if file.exists() else None


def missing(curves: Sequence[Setting]) -> list[RunConfig]:
    """The runs that can be made now: those that choose rates, and the levels of curves whose rate is chosen."""
    wanted: list[RunConfig] = []
    for curve in curves:
        rate = curve.best_rate()
        wanted += curve.tuning() if rate is None else [curve.recipe(level, rate) for level in curve.levels]
    return [config for config in wanted if row_of(config) is None]


def batches(configs: list[RunConfig]) -> Iterator[list[RunConfig]]:
    """Runs that share their passes: of one site and one held-out text."""
    groups: dict[tuple[str, int], list[RunConfig]] = {}
    for config in configs:
        groups.setdefault((config.site, config.evaluation.skip), []).append(config)
    for group in groups.values():
        for start in range(0, len(group), TOGETHER):
            yield group[start : start + TOGETHER]


def make(configs: list[RunConfig]) -> None:
    """Train and measure runs together, and write the row of each."""
    first = configs[0]
    model = load_model("embedded")
    corpora = corpora_for(
        model, first.data, training_tokens=first.training.tokens, evaluation_tokens=first.evaluation.needed
    )
    scratch = Path(tempfile.mkdtemp())
    try:
        placed = [config.model_copy(update={"out": scratch / fingerprint(config)}) for config in configs]
        start = time.monotonic()
        try:
            runs = train_together(placed, model=model, corpora=corpora, display=False)
        except SomeFailed as error:
            runs = error.finished
            for failure in error.failures:
                write_json(ROWS / f"{failure.folder.name}.json", {"failed": str(failure.error), **machine()})
        seconds = (time.monotonic() - start) / len(configs)
        for run in runs:
            config = next(each for each in configs if fingerprint(each) == run.folder.name)
            found = measure(
                model, {"": (model.place(config.place), SAE.load(run.folder))}, corpora.heldout, config.evaluation
            )[""]
            summary = RunSummary.of(config, found, seconds, fingerprint(config)).to_json()
            write_json(row_file(config), summary | {"architecture": config.dictionary.architecture, **machine()})
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def machine() -> dict[str, str]:
    return {"machine": platform.machine(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}


def table(curves: Sequence[Setting]) -> str:
    """Every level that was measured, one line each."""
    lines = [
        "| site | kind | architecture | rate | knob | L0 | CE increase | alive |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for curve in curves:
        rate = curve.best_rate()
        rows = [] if rate is None else [row_of(curve.recipe(level, rate)) for level in curve.levels]
        for level, row in zip(curve.levels, rows, strict=False):
            if row is not None and "failed" not in row:
                numbers = f"{row['l0']:.1f} | {row['ce_increase']:.3f} | {row['alive']}"
                lines.append(
                    f"| {curve.site} | {curve.kind} | {curve.architecture} | {rate:g} | {level:g} | {numbers} |"
                )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further runs after this time")
    parser.add_argument("--only", nargs="*", default=[], help="architectures to train, instead of all")
    arguments = parser.parse_args()
    study = yaml.safe_load((HERE / "study.yaml").read_text())
    curves = settings(study, arguments.only)
    ends = time.monotonic() + 60 * arguments.minutes
    while (configs := missing(curves)) and time.monotonic() < ends:
        batch = next(batches(configs))
        print(f"{len(configs)} runs to make; now {', '.join(map(fingerprint, batch))}", flush=True)
        make(batch)
    told = table(settings(study, []))
    (HERE / "table.md").write_text(told + "\n")
    print(told)


if __name__ == "__main__":
    main()
