"""Evaluated runs, and a comparison of them, as tables on a terminal."""

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from endwise.analysis.comparison.comparison import Summary
from endwise.analysis.ratios import MEASURES, NAMES, percent
from endwise.common.remarks import MARKED, gathered, mark_of, show_remarks
from endwise.common.terminal import Grid, show
from endwise.common.text import model_titles
from endwise.config.method import Knob, Method
from endwise.config.run import RunConfig
from endwise.evaluation.measure import Evaluation
from endwise.evaluation.summary import knob_labels, later_mse, layer_label, remarks_of


def print_evaluations(
    configs: Mapping[Path, RunConfig], evaluations: Mapping[Path, Evaluation], console: Console | None = None
) -> None:
    """One row per run, then the baselines of each site; 95 % intervals over held-out sequences."""
    console = console or Console()
    knobs = ", ".join(dict.fromkeys(Knob.of(config).label for config in configs.values()))
    headings = ("run", "kind", knobs, "L0", "alive", "CE increase [95 %]", "KL", "EV", "later MSE")
    marked = MARKED if any(evaluation.remarks for evaluation in evaluations.values()) else ()
    rows = [
        [*_evaluation_cells(path, configs[path], evaluation), *mark_of(evaluation.remarks, marked)]
        for path, evaluation in evaluations.items()
    ]
    show(Grid((*headings, *marked), rows, words=("kind",)), console)
    models = model_titles(configs[path].model.name for path in evaluations)
    lines = (_baselines(configs[path], evaluation, models) for path, evaluation in evaluations.items())
    for line in dict.fromkeys(lines):
        show(line, console)
    show_remarks(gathered({str(path): evaluation.remarks for path, evaluation in evaluations.items()}), console)


def _evaluation_cells(path: Path, config: RunConfig, evaluation: Evaluation) -> list[str]:
    increase = evaluation.metrics["ce_increase"]
    later = [value.estimate for name, value in evaluation.metrics.items() if name.startswith("downstream_mse.")]
    return [
        str(path),
        Method.of(config).label,
        f"{Knob.of(config).value:g}",
        f"{evaluation['l0']:.1f}",
        f"{evaluation.alive:,}",
        f"{increase.estimate:+.3f} [{increase.low:.3f}, {increase.high:.3f}]",
        f"{evaluation['kl']:.3f}",
        f"{evaluation['explained_variance.per_token']:.3f}",
        f"{sum(later) / len(later):.3g}" if later else "–",
    ]


def print_summary(summary: Summary, console: Console | None = None) -> None:
    """The runs, the ratios to local and the verdicts, on a terminal or into a plain pipe; 80 columns are enough."""
    console = console or Console()
    for table in (_runs_table(summary), _downstream_table(summary), _ratios_table(summary)):
        show(table, console)
    for sentence in summary.verdicts:
        show(f"• {sentence}", console)
    show_remarks(remarks_of(summary.runs), console)


def _baselines(config: RunConfig, evaluation: Evaluation, models: Mapping[str, str]) -> str:
    bounds, model = evaluation.baselines, models[config.model.name]
    return (
        f"{config.site} of {model}, {evaluation.tokens:,} held-out tokens: CE {bounds.clean:.3f} nats per "
        f"token clean, {bounds.mean_ablated:.3f} with the site at its mean, {bounds.zero_ablated:.3f} at zero."
    )


def _runs_table(summary: Summary) -> Grid:
    title = f"{summary.site}, {summary.runs[0].d_sae:,} features, clean CE {summary.clean_ce:.3f} nats per token"
    rows = []
    for run in summary.runs:
        ends, mse = run.intervals.get("ce_increase"), later_mse(run)
        rows.append(
            (
                run.method.label,
                f"{run.knob.value:g}",
                f"{run.l0:.1f}",
                f"{run.alive:,}",
                f"{run.ce_increase:+.3f}" + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else ""),
                f"{run.explained_variance:.3f}",
                "–" if mse is None else f"{mse:.3g}",
                f"{run.seconds:.0f}",
            )
        )
    return Grid(
        ("kind", knob_labels(summary.runs), "L0", "alive", "CE increase [95 %]", "EV", "later MSE", "s"), rows, title
    )


def _downstream_table(summary: Summary) -> Grid:
    sites = list(dict.fromkeys(site for run in summary.runs for site in run.downstream_mse))
    rows = []
    for run in summary.runs:
        values = [f"{run.downstream_mse[site]:.3g}" if site in run.downstream_mse else "–" for site in sites]
        rows.append([run.method.label, f"{run.knob.value:g}", *values])
    title = "MSE of later residual streams, by the block they enter"
    return Grid(("kind", knob_labels(summary.runs), *map(layer_label, sites)), rows, title)


def _ratios_table(summary: Summary) -> Grid:
    rows = [
        [f"{NAMES[measure.of]} at equal {NAMES[measure.at]}"]
        + [percent(summary.ratios[measure.key][method.key]) for method in summary.compared]
        for measure in MEASURES
    ]
    return Grid(
        ("", *(method.label for method in summary.compared)), rows, f"relative to {summary.baseline.label} [95 %]"
    )
