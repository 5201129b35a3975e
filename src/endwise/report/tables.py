"""Evaluated runs, and a comparison of them, as tables on a terminal."""

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from endwise.analysis.comparison import Summary
from endwise.analysis.ratios import MEASURES, NAMES, percent
from endwise.analysis.run_summary import KINDS, LABELS, later_mse, layer_label, remarks_of
from endwise.evaluation import Evaluation
from endwise.printable import model_titles
from endwise.remarks import gathered
from endwise.report.sets import MARKED, mark_of, show_remarks
from endwise.run_config import RunConfig
from endwise.terminal import Grid, show


def print_evaluations(
    configs: Mapping[Path, RunConfig], evaluations: Mapping[Path, Evaluation], console: Console | None = None
) -> None:
    """One row per run, then the baselines of each site; 95 % intervals over held-out sequences."""
    console = console or Console()
    headings = ("run", "kind", "λ", "L0", "alive", "CE increase [95 %]", "KL", "EV", "later MSE")
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
        LABELS[config.objective.kind],
        f"{config.objective.sparsity.coefficient:g}",
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
                LABELS[run.kind],
                f"{run.coefficient:g}",
                f"{run.l0:.1f}",
                f"{run.alive:,}",
                f"{run.ce_increase:+.3f}" + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else ""),
                f"{run.explained_variance:.3f}",
                "–" if mse is None else f"{mse:.3g}",
                f"{run.seconds:.0f}",
            )
        )
    return Grid(("kind", "λ", "L0", "alive", "CE increase [95 %]", "EV", "later MSE", "s"), rows, title)


def _downstream_table(summary: Summary) -> Grid:
    sites = list(dict.fromkeys(site for run in summary.runs for site in run.downstream_mse))
    rows = []
    for run in summary.runs:
        values = [f"{run.downstream_mse[site]:.3g}" if site in run.downstream_mse else "–" for site in sites]
        rows.append([LABELS[run.kind], f"{run.coefficient:g}", *values])
    title = "MSE of later residual streams, by the block they enter"
    return Grid(("kind", "λ", *map(layer_label, sites)), rows, title)


def _ratios_table(summary: Summary) -> Grid:
    rows = [
        [f"{NAMES[measure.of]} at equal {NAMES[measure.at]}"]
        + [percent(summary.ratios[measure.key][kind]) for kind in KINDS[1:]]
        for measure in MEASURES
    ]
    return Grid(("", *(LABELS[kind] for kind in KINDS[1:])), rows, "relative to local [95 %]")
