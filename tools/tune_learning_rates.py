"""Chooses the quickstart's learning rate of each kind on one grid: `python tools/tune_learning_rates.py`.

Each kind is trained at one sparsity coefficient with every rate, all on the same batches. What the quickstart compares
is L0 at equal CE increase, so that is what a rate is judged by, the same for every kind: by L0 × CE increase, among the
rates whose CE increase lies within the compared range; of rates within 2 % of the lowest, the smallest. (Along one
kind's curve the product changes little: halving L0 about doubles the CE increase.) The objective is no such measure: it
is flat around its best rate, while L0 still falls with the rate.

Writes docs/results/learning_rates.md; `--rates` adds to the rows that are there.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from endwise import RunConfig, SomeFailed, corpora_for, load_model, measure, train_together
from endwise.files import write_atomic
from endwise.quickstart import BATCH, RATIO, SITE, recipe
from endwise.run_folder import RunFolder

GRID = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
COEFFICIENTS = {"local": 2.0, "e2e": 0.5, "e2e_ds": 4.0}
TRAINING_TOKENS, HELDOUT_TOKENS = 280_000, 100_000
HIGHEST_CE_INCREASE = 0.7
TARGET = Path(__file__).parents[1] / "docs" / "results" / "learning_rates.md"
HEADING = """# Learning rates

Every kind of SAE gets the same grid, at one sparsity coefficient, in the quickstart's setting ({site} of the embedded
model, {ratio} features per dimension, {batch} sequences a step) with {tokens:,} training tokens, seed 0. Bold is the
rate that the quickstart uses: of those with a CE increase up to {highest:g}, the range compared there, the one with the
lowest L0 × CE increase (the smallest rate within 2 % of it). What is compared there is L0 at equal CE increase, and
along one kind's curve the product changes little.

The objective, which is the training loss over the last fifth of training, every batch of it new to the SAE, is no such
measure: it is nearly flat around its best rate, where L0 still falls with the rate. L0, CE loss increase and alive
features are on {heldout:,} held-out tokens. Made by
`{command}`.

| kind | coefficient | learning rate | objective | L0 | CE loss increase | L0 × CE increase | alive |
|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Row:
    kind: str
    coefficient: float
    rate: float
    objective: float
    l0: float
    ce_increase: float
    alive: int

    @classmethod
    def parse(cls, line: str) -> "Row":
        kind, *numbers, _product, alive = (cell.strip(" *") for cell in line.strip().strip("|").split("|"))
        return cls(kind, *map(float, numbers), alive=int(alive))

    @property
    def product(self) -> float:
        return self.l0 * self.ce_increase

    def format(self, chosen: bool) -> str:
        rate = f"**{self.rate:g}**" if chosen else f"{self.rate:g}"
        return (
            f"| {self.kind} | {self.coefficient:g} | {rate} | {self.objective:.4f} | {self.l0:.1f} "
            f"| {self.ce_increase:+.3f} | {self.product:.1f} | {self.alive} |"
        )


def configurations(rates: Sequence[float], folder: Path) -> Iterator[RunConfig]:
    for kind, coefficient in COEFFICIENTS.items():
        for rate in rates:
            base = recipe(folder / f"{kind}-{rate:g}", kind, coefficient, seed=0)
            training = base.training.model_copy(
                update={"learning_rate": rate, "log_every": 1, "tokens": TRAINING_TOKENS}
            )
            evaluation = base.evaluation.model_copy(update={"tokens": HELDOUT_TOKENS})
            yield base.model_copy(update={"training": training, "evaluation": evaluation})


def measured(rates: Sequence[float]) -> list[Row]:
    with tempfile.TemporaryDirectory() as scratch:
        configs = list(configurations(rates, Path(scratch)))
        model = load_model("embedded")
        corpora = corpora_for(model, configs[0].data, training_tokens=TRAINING_TOKENS, evaluation_tokens=HELDOUT_TOKENS)
        try:
            runs = train_together(configs, model=model, corpora=corpora)
        except SomeFailed as some:  # of a grid of rates the highest may; each has been told of
            runs = some.finished
        saes = {str(run.folder): (model.site(SITE), run.sae) for run in runs}
        evaluations = measure(model, saes, corpora.heldout, configs[0].evaluation)
        rows = []
        for run in runs:
            losses = [line["loss"] for line in RunFolder.open(run.folder).metrics()]
            last = losses[-max(1, len(losses) // 5) :]
            objective, evaluation = run.config.objective, evaluations[str(run.folder)]
            numbers = (sum(last) / len(last), evaluation["l0"], evaluation["ce_increase"], evaluation.alive)
            rate = run.config.training.learning_rate
            rows.append(Row(objective.kind, objective.sparsity.coefficient, rate, *numbers))
        return rows


def chosen(rows: Sequence[Row], kind: str) -> Row:
    compared = [row for row in rows if row.kind == kind and row.ce_increase <= HIGHEST_CE_INCREASE]
    lowest = min(row.product for row in compared)
    return min((row for row in compared if row.product <= 1.02 * lowest), key=lambda row: row.rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", help="only these, added to the table")
    rates = parser.parse_args().rates
    rows, commands = [], []
    if rates and TARGET.exists():
        text = TARGET.read_text()
        rows = [Row.parse(line) for line in text.splitlines() if line.split(" | ")[0].strip("| ") in COEFFICIENTS]
        commands = [text.split("Made by\n`", 1)[1].split("`", 1)[0]]
    fresh = measured(rates or GRID)
    kept = [row for row in rows if (row.kind, row.rate) not in {(new.kind, new.rate) for new in fresh}]
    rows = sorted(kept + fresh, key=lambda row: (list(COEFFICIENTS).index(row.kind), row.rate))
    best = [chosen(rows, kind) for kind in COEFFICIENTS]
    command = " && ".join([*commands, " ".join(["python", "tools/tune_learning_rates.py", *sys.argv[1:]])])
    heading = HEADING.format(
        site=SITE,
        ratio=RATIO,
        batch=BATCH,
        tokens=TRAINING_TOKENS,
        heldout=HELDOUT_TOKENS,
        highest=HIGHEST_CE_INCREASE,
        command=command,
    )
    table = "\n".join(row.format(row in best) for row in rows)
    write_atomic(TARGET, f"{heading}{table}\n".encode())
    print(table)


if __name__ == "__main__":
    main()
