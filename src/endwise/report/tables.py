"""Evaluated runs, and a comparison of them, as tables on a terminal."""

from collections.abc import Mapping
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from endwise.analysis.comparison import Summary
from endwise.analysis.ratios import MEASURES, NAMES, percent
from endwise.analysis.run_summary import KINDS, LABELS, later_mse, layer_label
from endwise.evaluation import Evaluation
from endwise.printable import printable
from endwise.run_config import RunConfig


def print_evaluations(
    configs: Mapping[Path, RunConfig], evaluations: Mapping[Path, Evaluation], console: Console | None = None
) -> None:
    """One row per run, then the baselines of each site; 95 % intervals over held-out sequences."""
    console = console or Console()
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("run", overflow="fold")
    for heading in ("kind", "λ", "L0", "alive", "CE increase [95 %]", "KL", "EV", "later MSE"):
        table.add_column(heading, justify="left" if heading == "kind" else "right", no_wrap=True)
    for path, evaluation in evaluations.items():
        config = configs[path]
        increase = evaluation.metrics["ce_increase"]
        later = [value.estimate for name, value in evaluation.metrics.items() if name.startswith("downstream_mse.")]
        table.add_row(
            Text(printable(path)),
            LABELS[config.objective.kind],
            f"{config.objective.sparsity.coefficient:g}",
            f"{evaluation['l0']:.1f}",
            f"{evaluation.alive:,}",
            Text(f"{increase.estimate:+.3f} [{increase.low:.3f}, {increase.high:.3f}]"),
            f"{evaluation['kl']:.3f}",
            f"{evaluation['explained_variance.per_token']:.3f}",
            f"{sum(later) / len(later):.3g}" if later else "–",
        )
    console.print(table)
    for line in dict.fromkeys(_baselines(configs[path], evaluation) for path, evaluation in evaluations.items()):
        console.print(Text(printable(line)))


def print_summary(summary: Summary, console: Console | None = None) -> None:
    """The runs, the ratios to local and the verdicts, on a terminal or into a plain pipe; 80 columns are enough."""
    console = console or Console()
    console.print(_runs_table(summary))
    console.print(_downstream_table(summary))
    console.print(_ratios_table(summary))
    for sentence in summary.verdicts:
        console.print(printable(f"• {sentence}"), markup=False, highlight=False)


def _baselines(config: RunConfig, evaluation: Evaluation) -> str:
    bounds = evaluation.baselines
    return (
        f"{config.site} of {config.model.name}, {evaluation.tokens:,} held-out tokens: CE {bounds.clean:.3f} nats per "
        f"token clean, {bounds.mean_ablated:.3f} with the site at its mean, {bounds.zero_ablated:.3f} at zero."
    )


def _runs_table(summary: Summary) -> Table:
    title = f"{summary.site}, {summary.runs[0].d_sae:,} features, clean CE {summary.clean_ce:.3f} nats per token"
    table = Table(title=Text(printable(title)), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("kind", no_wrap=True)
    for heading in ("λ", "L0", "alive", "CE increase [95 %]", "EV", "later MSE", "s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in summary.runs:
        ends = run.intervals.get("ce_increase")
        mse = later_mse(run)
        table.add_row(
            LABELS[run.kind],
            f"{run.coefficient:g}",
            f"{run.l0:.1f}",
            f"{run.alive:,}",
            Text(f"{run.ce_increase:+.3f}" + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else "")),
            f"{run.explained_variance:.3f}",
            "–" if mse is None else f"{mse:.3g}",
            f"{run.seconds:.0f}",
        )
    return table


def _downstream_table(summary: Summary) -> Table:
    sites = list(dict.fromkeys(site for run in summary.runs for site in run.downstream_mse))
    title = "MSE of later residual streams, by the block they enter"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("kind", no_wrap=True)
    for heading in ("λ", *map(layer_label, sites)):
        table.add_column(Text(printable(heading)), justify="right", no_wrap=True)
    for run in summary.runs:
        values = [f"{run.downstream_mse[site]:.3g}" if site in run.downstream_mse else "–" for site in sites]
        table.add_row(LABELS[run.kind], f"{run.coefficient:g}", *values)
    return table


def _ratios_table(summary: Summary) -> Table:
    table = Table(title="relative to local [95 %]", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for kind in KINDS[1:]:
        table.add_column(LABELS[kind], justify="right", no_wrap=True)
    for measure in MEASURES:
        cells = [Text(percent(summary.ratios[measure.key][kind])) for kind in KINDS[1:]]
        table.add_row(f"{NAMES[measure.of]} at equal {NAMES[measure.at]}", *cells)
    return table
