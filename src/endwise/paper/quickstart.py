"""The paper's comparison on the embedded model, in minutes: three kinds of SAE, a few coefficients each, one report."""

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from endwise.analysis.comparison.comparison import Summary, summarise_folders
from endwise.analysis.comparison.page import write_report
from endwise.analysis.comparison.printed import print_summary
from endwise.common.errors import RunFolderError
from endwise.common.files import expanded, there_is, write_json
from endwise.common.terminal import show
from endwise.config.objective import LABELS
from endwise.config.run import RunConfig
from endwise.evaluation.evaluate import write_evaluation
from endwise.evaluation.measure import Evaluation, measure
from endwise.evaluation.summary import RunSummary
from endwise.models.loading import load_model
from endwise.runs.folder import RunFolder, environment
from endwise.tokens import corpora_for
from endwise.training.members import Run
from endwise.training.train import train_together

SITE = "blocks.3.hook_resid_pre"
RATIO = 12
TRAINING_TOKENS = 200_000
HELDOUT_TOKENS = 60_000
BATCH = 2

COEFFICIENTS: dict[str, tuple[float, ...]] = {
    "local": (0.5, 1.0, 2.0),
    "e2e": (0.25, 0.5, 1.0),
    "e2e_ds": (1.0, 2.0, 4.0),
}
LEARNING_RATES = {"local": 3.2e-2, "e2e": 1.6e-2, "e2e_ds": 1.6e-2}
"""Each the best of one grid, tuned alike for the three kinds (docs/results/learning_rates.md)."""
DOWNSTREAM_MSE = 1.0


def recipes(out: Path, seed: int) -> list[RunConfig]:
    return [
        recipe(out / f"{kind}-{coefficient:g}", kind, coefficient, seed)
        for kind, coefficients in COEFFICIENTS.items()
        for coefficient in coefficients
    ]


def recipe(out: Path, kind: str, coefficient: float, seed: int) -> RunConfig:
    objective = {"kind": kind, "sparsity": {"coefficient": coefficient}}
    if kind == "e2e_ds":
        objective["downstream_mse"] = DOWNSTREAM_MSE
    return RunConfig.build(
        {
            "site": SITE,
            "dictionary": {"ratio": RATIO},
            "objective": objective,
            "training": {
                "tokens": TRAINING_TOKENS,
                "batch": BATCH,
                "learning_rate": LEARNING_RATES[kind],
                "alive_window": HELDOUT_TOKENS,
            },
            "evaluation": {"tokens": HELDOUT_TOKENS},
            "seed": seed,
            "out": out,
        }
    )


def quickstart(out: Path | str = Path("runs/quickstart"), *, seed: int = 0, display: bool = True) -> Summary:
    """Trains, evaluates and compares; writes the runs, `summary.json` and `report.html` into `out`.

    Raises:
        RunFolderError: `out` holds something already.
    """
    out = expanded(out)
    if there_is(out) and (not out.is_dir() or any(out.iterdir())):
        raise RunFolderError(f"{out} is not an empty folder. Remove it, or choose another with --out.")
    console = Console(quiet=not display)
    started = time.monotonic()
    configs = recipes(out, seed)
    model = load_model("embedded")
    corpora = corpora_for(model, configs[0].data, training_tokens=TRAINING_TOKENS, evaluation_tokens=HELDOUT_TOKENS)
    show(f"Training {len(configs)} SAEs at {SITE} of the embedded model, on {TRAINING_TOKENS:,} tokens each.", console)
    runs: list[Run] = []
    for kind, coefficients in COEFFICIENTS.items():
        show(f"{LABELS[kind]}: {len(coefficients)} sparsity coefficients, together", console)
        group = [config for config in configs if config.objective.kind == kind]
        runs += train_together(group, model=model, corpora=corpora, display=display)
    show(f"Measuring them on {HELDOUT_TOKENS:,} held-out tokens.", console)
    saes = {str(run.folder): (model.site(run.config.site), run.sae) for run in runs}
    evaluations = measure(model, saes, corpora.heldout, configs[0].evaluation)
    for run in runs:
        write_evaluation(RunFolder.open(run.folder), run.config, evaluations[str(run.folder)])
    summary = compare(runs, evaluations, seconds=time.monotonic() - started)
    write_json(out / "summary.json", summary.to_json())
    write_report(summary, out / "report.html")
    if display:
        print_summary(summary, console)
    show(f"{time.monotonic() - started:.0f} seconds. The report: {out / 'report.html'}", console)
    return summary


def compare(runs: Sequence[Run], evaluations: Mapping[str, Evaluation], seconds: float) -> Summary:
    """The runs' comparison, with what made it."""
    config = runs[0].config
    return summarise_folders(
        [RunSummary.of(run.config, evaluations[str(run.folder)], run.seconds, run.folder) for run in runs],
        resamples=config.evaluation.bootstrap,
        seed=config.evaluation.seed,
        model=config.model.name,
        command=shlex.join(["endwise", *sys.argv[1:]]),
        seconds=seconds,
        environment=environment(),
    )
