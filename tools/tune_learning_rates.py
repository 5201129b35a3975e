"""Chooses the quickstart's learning rate of each kind on one grid: `python tools/tune_learning_rates.py`.

Each kind is trained at its middle sparsity coefficient with every rate, all on the same batches. A rate is judged by
the objective itself, averaged over the last fifth of training: one epoch, so every batch is new to the SAE, and the
same number that training minimises, so no kind is judged by another's measure. Writes docs/results/learning_rates.md.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from endwise import load_corpora, load_model, measure, train_together
from endwise.files import write_atomic
from endwise.quickstart import COEFFICIENTS, HELDOUT_TOKENS, SITE, TRAINING_TOKENS, recipes
from endwise.run_folder import RunFolder

GRID = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
TARGET = Path(__file__).parents[1] / "docs" / "results" / "learning_rates.md"
HEADING = """# Learning rates

Every kind of SAE gets the same grid, at its middle sparsity coefficient, in the quickstart's setting: {site} of the
embedded model, {tokens:,} training tokens, seed {seed}. The rate with the lowest objective over the last fifth of
training is the quickstart's (bold). L0 and CE loss increase are on {heldout:,} held-out tokens.
Made by `{command}`.

| kind | coefficient | learning rate | objective | L0 | CE loss increase | alive |
|---|---|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    with tempfile.TemporaryDirectory() as scratch:
        middle = {kind: coefficients[len(coefficients) // 2] for kind, coefficients in COEFFICIENTS.items()}
        configs = []
        for recipe in recipes(Path(scratch), seed):
            if recipe.objective.sparsity.coefficient == middle[recipe.objective.kind]:
                for rate in GRID:
                    training = recipe.training.model_copy(update={"learning_rate": rate, "log_every": 1})
                    folder = Path(scratch) / f"{recipe.objective.kind}-{rate:g}"
                    configs.append(recipe.model_copy(update={"training": training, "out": folder}))
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
        objectives = {}
        for run in runs:
            losses = [line["loss"] for line in RunFolder.open(run.folder).metrics()]
            tail = losses[-max(1, len(losses) // 5) :]
            objectives[str(run.folder)] = sum(tail) / len(tail)
    lines = []
    for run in runs:
        kind, name = run.config.objective.kind, str(run.folder)
        best = min(objectives[str(r.folder)] for r in runs if r.config.objective.kind == kind)
        rate = f"{run.config.training.learning_rate:g}"
        evaluation = evaluations[name]
        lines.append(
            f"| {kind} | {middle[kind]:g} | {f'**{rate}**' if objectives[name] == best else rate} "
            f"| {objectives[name]:.4f} | {evaluation['l0']:.1f} | {evaluation['ce_increase']:+.3f} "
            f"| {evaluation.alive} |"
        )
    command = "python " + " ".join(["tools/tune_learning_rates.py", *sys.argv[1:]])
    heading = HEADING.format(site=SITE, tokens=TRAINING_TOKENS, heldout=HELDOUT_TOKENS, seed=seed, command=command)
    write_atomic(TARGET, (heading + "\n".join(lines) + "\n").encode())
    print("\n".join(lines))


if __name__ == "__main__":
    main()
