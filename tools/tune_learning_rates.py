"""Chooses the quickstart's learning rate of each kind on one grid: `python tools/tune_learning_rates.py`.

Each kind is trained at its middle sparsity coefficient with every rate, all on the same batches. A rate is judged by
the objective itself, averaged over the last fifth of training: one epoch, so every batch is new to the SAE, and the
same number that training minimises, so no kind is judged by another's measure. Objectives are flat around their best
rate while L0 still falls, so of the rates within 1 % of the lowest objective the one with the lowest L0 is taken.

Writes docs/results/learning_rates.md; `--rates` adds to the rows that are there.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from endwise import RunConfig, load_corpora, load_model, measure, train_together
from endwise.files import write_atomic
from endwise.quickstart import COEFFICIENTS, HELDOUT_TOKENS, SITE, TRAINING_TOKENS, recipes
from endwise.run_folder import RunFolder

GRID = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
TIE = 0.01
TARGET = Path(__file__).parents[1] / "docs" / "results" / "learning_rates.md"
HEADING = """# Learning rates

Every kind of SAE gets the same grid, at its middle sparsity coefficient, in the quickstart's setting: {site} of the
embedded model, {tokens:,} training tokens, seed 0. Objective: over the last fifth of training. Bold is the rate that
the quickstart uses: the one with the lowest L0 among those whose objective is within {tie:.0%} of the lowest. L0, CE
loss increase and alive features are on {heldout:,} held-out tokens. Made by
`{command}`.

| kind | coefficient | learning rate | objective | L0 | CE loss increase | alive |
|---|---|---|---|---|---|---|
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
        kind, *numbers, alive = (cell.strip(" *") for cell in line.strip().strip("|").split("|"))
        return cls(kind, *map(float, numbers), alive=int(alive))

    def format(self, chosen: bool) -> str:
        rate = f"**{self.rate:g}**" if chosen else f"{self.rate:g}"
        return (
            f"| {self.kind} | {self.coefficient:g} | {rate} | {self.objective:.4f} | {self.l0:.1f} "
            f"| {self.ce_increase:+.3f} | {self.alive} |"
        )


def configurations(rates: Sequence[float], folder: Path) -> Iterator[RunConfig]:
    middle = {kind: coefficients[len(coefficients) // 2] for kind, coefficients in COEFFICIENTS.items()}
    for recipe in recipes(folder, seed=0):
        if recipe.objective.sparsity.coefficient == middle[recipe.objective.kind]:
            for rate in rates:
                training = recipe.training.model_copy(update={"learning_rate": rate, "log_every": 1})
                out = folder / f"{recipe.objective.kind}-{rate:g}"
                yield recipe.model_copy(update={"training": training, "out": out})


def measured(rates: Sequence[float]) -> list[Row]:
    with tempfile.TemporaryDirectory() as scratch:
        configs = list(configurations(rates, Path(scratch)))
        model = load_model("embedded")
        corpora = load_corpora(
            configs[0].data,
            tokenizer=model.tokenizer,
            model_context=model.context,
            vocab_size=model.vocab_size,
            training_tokens=TRAINING_TOKENS,
            evaluation_tokens=HELDOUT_TOKENS,
        )
        runs = train_together(configs, model=model, corpora=corpora)
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
    mine = [row for row in rows if row.kind == kind]
    lowest = min(row.objective for row in mine)
    return min((row for row in mine if row.objective <= (1 + TIE) * lowest), key=lambda row: row.l0)


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
    heading = HEADING.format(site=SITE, tokens=TRAINING_TOKENS, heldout=HELDOUT_TOKENS, tie=TIE, command=command)
    table = "\n".join(row.format(row in best) for row in rows)
    write_atomic(TARGET, f"{heading}{table}\n".encode())
    print(table)


if __name__ == "__main__":
    main()
