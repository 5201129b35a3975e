"""Evaluated runs, and a comparison of them, as tables on a terminal."""

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from endwise.analysis.comparison.comparison import Summary
from endwise.analysis.ratios import MEASURES, percent
from endwise.analysis.sets import KNOB, Column, run_table
from endwise.common.remarks import show_remarks
from endwise.common.terminal import Grid, show
from endwise.common.text import minus, model_titles
from endwise.config.run import RunConfig
from endwise.evaluation.measure import Evaluation
from endwise.evaluation.summary import RunSummary, layer_label, remarks_of
from endwise.evaluation.together import JointEvaluation


def print_evaluations(
    configs: Mapping[Path, RunConfig], evaluations: Mapping[Path, Evaluation], console: Console | None = None
) -> None:
    """One row per run, then the baselines of each site; 95 % intervals over held-out sequences."""
    runs = [RunSummary.of(configs[path], evaluation, 0.0, path) for path, evaluation in evaluations.items()]
    columns = ("kind", KNOB, "L0", "alive", "CE increase [95 %]", "KL", "EV", "later MSE")
    marked = ("!", lambda run: f"{len(run.remarks)} below" if run.remarks else "")
    own = [marked] if any(run.remarks for run in runs) else []
    show(Grid(*run_table(runs, ("run", lambda run: run.folder), *columns, *own), words=("kind",)), console)
    models = model_titles(configs[path].model.name for path in evaluations)
    lines = (_baselines(configs[path], evaluation, models) for path, evaluation in evaluations.items())
    for line in dict.fromkeys(lines):
        show(line, console)
    show_remarks(remarks_of(runs), console)


def print_together(
    evaluation: JointEvaluation, alone: Mapping[str, Evaluation], console: Console | None = None
) -> None:
    """Several places: each spliced alone beside itself among the others, then all of them together.

    Args:
        alone: each place's own evaluation.
    """
    forms = {"l0": ".1f", "ce_increase": "+.3f", "explained_variance.per_token": ".3f"}
    rows = []
    for place, among in evaluation.places.items():
        own = [f"{alone[place][name]:{form}}" for name, form in forms.items()]
        rows.append((place, *own, *(f"{among.metrics[n].estimate:{forms[n]}}" for n in forms if n != "ce_increase")))
    show(Grid(("place", "L0", "CE increase", "EV", "L0 among all", "EV among all"), rows), console)
    increase, bounds = evaluation.metrics["ce_increase"], evaluation.baselines
    show(
        minus(
            f"All {len(rows)} together: CE increase {increase.estimate:+.3f} [{increase.low:.3f}, {increase.high:.3f}] "
            f"nats per token, KL {evaluation['kl']:.3f}, L0 {evaluation['l0']:.1f}; CE {bounds.clean:.3f} clean, "
            f"{bounds.mean_ablated:.3f} with all at their means, {bounds.zero_ablated:.3f} at zero."
        ),
        console,
    )
    show_remarks(evaluation.remarks, console)


def _baselines(config: RunConfig, evaluation: Evaluation, models: Mapping[str, str]) -> str:
    bounds, model = evaluation.baselines, models[config.model.name]
    return (
        f"{config.site} of {model}, {evaluation.tokens:,} held-out tokens: CE {bounds.clean:.3f} nats per "
        f"token clean, {bounds.mean_ablated:.3f} with the site at its mean, {bounds.zero_ablated:.3f} at zero."
    )


def print_summary(summary: Summary, console: Console | None = None) -> None:
    """The runs, the ratios to local and the verdicts, on a terminal or into a plain pipe; 80 columns are enough."""
    for table in (_runs_table(summary), _downstream_table(summary), ratio_grid(summary)):
        show(table, console)
    for sentence in summary.verdicts:
        show(f"• {sentence}", console)
    show_remarks(remarks_of(summary.runs), console)


def _runs_table(summary: Summary) -> Grid:
    title = f"{summary.site}, {summary.runs[0].d_sae:,} features, clean CE {summary.clean_ce:.3f} nats per token"
    columns = ("kind", KNOB, "L0", "alive", "CE increase [95 %]", "EV", "later MSE")
    return Grid(*run_table(summary.runs, *columns, ("s", lambda run: f"{run.seconds:.0f}")), title)


def _downstream_table(summary: Summary) -> Grid:
    def mse(site: str) -> Column:
        return layer_label(site), lambda run: f"{run.downstream_mse[site]:.3g}" if site in run.downstream_mse else "–"

    sites = dict.fromkeys(site for run in summary.runs for site in run.downstream_mse)
    title = "MSE of later residual streams, by the block they enter"
    return Grid(*run_table(summary.runs, "kind", KNOB, *map(mse, sites)), title)


def ratio_grid(summary: Summary) -> Grid:
    """Every ratio of the methods that have runs, or why there is none."""
    methods = [method for method in summary.methods if method != summary.baseline]
    rows = []
    for measure in MEASURES:
        cells = [summary.ratios[measure.key][method.key] for method in methods]
        words = [percent(ratio) if ratio.at_ends else f"– ({ratio.reason})" for ratio in cells]
        rows.append([measure.title, *words])
    return Grid(("", *(method.label for method in methods)), rows, f"relative to {summary.baseline.label} [95 %]")
