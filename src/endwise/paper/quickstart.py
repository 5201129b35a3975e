"""The paper's comparison and the recommended recipe on the embedded model, in minutes, with one report."""

import itertools
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
from endwise.config.method import Knob, Method
from endwise.config.run import RunConfig
from endwise.evaluation.evaluate import write_evaluation
from endwise.evaluation.measure import Evaluation, measure
from endwise.evaluation.summary import RunSummary
from endwise.models.loading import load_model
from endwise.runs.folder import RunFolder, environment
from endwise.sweeps.points import points_of
from endwise.sweeps.sweep_config import read_sweep
from endwise.tokens import corpora_for
from endwise.training.members import Run
from endwise.training.train import train_together

SUMMARY = "summary.json"
SWEEP = "embedded-kinds"
"""Sweep that ships, of what is trained."""


def recipes(out: Path, seed: int, overrides: Sequence[str] = ()) -> list[RunConfig]:
    """List the sweep's recipes in its order, each with a folder of its own in `out`."""
    points = points_of(read_sweep(SWEEP, [*overrides, f"seed={seed}"]))
    configs = [config for point in points for config in point.config.recipes]
    return [config.model_copy(update={"out": out / _name(config)}) for config in configs]


def _name(config: RunConfig) -> str:
    return f"{Method.of(config).key}-{Knob.of(config).tag}"


def quickstart(
    out: Path | str = Path("runs/quickstart"), *, seed: int = 0, overrides: Sequence[str] = (), display: bool = True
) -> Summary:
    """Train, evaluate and compare; write the runs, `summary.json` and `report.html` into `out`.

    Args:
        seed: of every SAE's first weights.
        overrides: `key=value` of the recipe, for all runs.

    Raises:
        ConfigError: an override breaks a rule.
        RunFolderError: `out` holds something already.
    """
    out = expanded(out)
    configs = recipes(out, seed, overrides)
    if there_is(out) and (not out.is_dir() or any(out.iterdir())):
        raise RunFolderError(f"{out} is not an empty folder. Remove it, or choose another with --out.")
    console = Console(quiet=not display)
    started = time.monotonic()
    first = configs[0]
    trained, measured = first.training.tokens, first.evaluation.tokens
    model = load_model(**first.model.model_dump())
    corpora = corpora_for(model, first.data, training_tokens=trained, evaluation_tokens=first.evaluation.needed)
    show(f"Training {len(configs)} SAEs at {first.site} of the embedded model, on {trained:,} tokens each.", console)
    runs: list[Run] = []
    for method, group in itertools.groupby(configs, Method.of):
        together = list(group)
        show(f"{method.label}: {len(together)} of different sparsity, together", console)
        runs += train_together(together, model=model, corpora=corpora, display=display)
    show(f"Measuring them on {measured:,} held-out tokens.", console)
    saes = {str(run.folder): (model.site(run.config.site), run.sae) for run in runs}
    evaluations = measure(model, saes, corpora.heldout, first.evaluation)
    for run in runs:
        write_evaluation(RunFolder.open(run.folder), run.config, evaluations[str(run.folder)])
    summary = compare(runs, evaluations, seconds=time.monotonic() - started)
    write_json(out / SUMMARY, summary.to_json())
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
