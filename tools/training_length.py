"""Saving over local by training tokens: `python tools/training_length.py --tokens 200000 1000000`.

The paper trains for 400 million tokens, the quickstart for 200 thousand. Each kind is trained at the quickstart's three
sparsity coefficients for every number of tokens, at two learning rates around its best of learning_rates.md, since
longer runs may want lower ones. Judged as in the quickstart: L0 relative to local's at equal CE increase, both kinds at
the rate at which their own L0 × CE increase (geometric mean over the coefficients) is lowest on held-out text that is
not reported.

Runs lie in `--out` and are taken up where they were left; the table of whatever is finished is printed at the end.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from endwise import SAE, RunConfig, corpora_for, load_model, measure, train_together
from endwise.analysis.ratios import percent, ratio_of
from endwise.config.method import Method
from endwise.evaluation.summary import RunSummary
from endwise.paper.quickstart import recipes
from endwise.runs.folder import RunFolder

RATES = {"local": (1.6e-2, 3.2e-2), "e2e": (8e-3, 1.6e-2), "e2e_ds": (8e-3, 1.6e-2)}
HELDOUT_TOKENS = 100_000


def configurations(out: Path, kind: str, tokens: int, rates: Sequence[float]) -> list[RunConfig]:
    bases = [config for config in recipes(out, seed=0) if Method.of(config).key == kind]
    return [_configuration(base, out, tokens, rate) for rate in rates for base in bases]


def _configuration(base: RunConfig, out: Path, tokens: int, rate: float) -> RunConfig:
    training = base.training.model_copy(update={"learning_rate": rate, "tokens": tokens, "checkpoint_every": 200})
    evaluation = base.evaluation.model_copy(update={"tokens": HELDOUT_TOKENS})
    folder = out / f"{tokens}-{base.objective.kind}-{rate:g}-{base.objective.coefficient:g}"
    return base.model_copy(update={"training": training, "evaluation": evaluation, "out": folder})


def train(out: Path, kinds: list[str], tokens: int, rates: Sequence[float] | None) -> None:
    for kind in kinds:
        configs = configurations(out, kind, tokens, rates or RATES[kind])
        started = all(RunFolder(folder).config_file.exists() for config in configs if (folder := config.out))
        train_together(configs, resume=started, display=sys.stderr.isatty())


def finished(out: Path) -> list[RunConfig]:
    folders = [RunFolder(file.parent) for file in sorted(out.glob("*/config.yaml"))]
    return [folder.config() for folder in folders if _is_finished(folder)]


def _is_finished(folder: RunFolder) -> bool:
    lines = folder.metrics() if folder.metrics_file.exists() else []
    training = folder.config().training
    return bool(lines) and "heldout" in lines[-1] and 2 * lines[-1]["tokens"] > training.tokens


def summaries(configs: list[RunConfig], skip: int) -> list[tuple[RunConfig, RunSummary]]:
    """Measured on the held-out text after its first `skip` tokens."""
    model = load_model("embedded")
    first, wanted = configs[0], skip + HELDOUT_TOKENS
    corpora = corpora_for(model, first.data, training_tokens=first.training.tokens, evaluation_tokens=wanted)
    saes = {str(config.out): (model.site(config.site), SAE.load(config.out)) for config in configs if config.out}
    evaluations = measure(model, saes, corpora.heldout, first.evaluation.model_copy(update={"skip": skip}))
    return [(config, RunSummary.of(config, evaluations[str(config.out)], 0.0, str(config.out))) for config in configs]


def cost(runs: list[RunSummary]) -> float:
    return float(np.exp(np.mean([np.log(run.l0 * run.ce_increase) for run in runs])))


def rows(configs: list[RunConfig]) -> Iterator[str]:
    whole, elsewhere = (whole_curves(summaries(configs, skip)) for skip in (0, HELDOUT_TOKENS))
    costs = {key: cost(curve) for key, curve in elsewhere.items()}
    for key, curve in whole.items():
        tokens, kind, rate = key
        rivals = {other: costs[other] for other in whole if other[:2] == (tokens, kind)}
        mark = "**" if rivals[key] == min(rivals.values()) else ""
        local = min((each for each in whole if each[:2] == (tokens, 0)), key=lambda each: costs[each], default=None)
        ratio = ""
        if kind and local is not None:
            ratio = percent(ratio_of([*whole[local], *curve], curve[0].method, "l0", "ce_increase", 1000, 12345))
        points = " | ".join(f"{run.l0:.1f} → {run.ce_increase:+.3f}" for run in sorted(curve, key=lambda run: run.knob))
        yield f"| {tokens:,} | {curve[0].method.key} | {mark}{rate:g}{mark} | {points} | {costs[key]:.1f} | {ratio} |"


def whole_curves(runs: list[tuple[RunConfig, RunSummary]]) -> dict[tuple[int, int, float], list[RunSummary]]:
    """By tokens, place of the kind and rate, the curves of which all runs are there."""

    def settings(run: tuple[RunConfig, RunSummary]) -> tuple[int, int, float]:
        config = run[0]
        return config.training.tokens, list(RATES).index(config.objective.name), config.training.learning_rate

    curves = {key: [run for _, run in group] for key, group in groupby(sorted(runs, key=settings), key=settings)}
    return {key: curve for key, curve in curves.items() if len(curve) == 3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/training_length"))
    parser.add_argument("--tokens", type=int, nargs="*", default=[])
    parser.add_argument("--kinds", nargs="+", choices=list(RATES), default=list(RATES))
    parser.add_argument("--rates", type=float, nargs="+", help="instead of the two of each kind")
    arguments = parser.parse_args()
    for tokens in arguments.tokens:
        train(arguments.out, arguments.kinds, tokens, arguments.rates)
    for row in rows(finished(arguments.out)):
        print(row)


if __name__ == "__main__":
    main()
