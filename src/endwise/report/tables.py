"""Evaluated runs as a table on a terminal."""

from collections.abc import Mapping
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from endwise.comparison import LABELS
from endwise.evaluation import Evaluation
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
            Text(str(path)),
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
        console.print(Text(line))


def _baselines(config: RunConfig, evaluation: Evaluation) -> str:
    bounds = evaluation.baselines
    return (
        f"{config.site} of {config.model.name}, {evaluation.tokens:,} held-out tokens: CE {bounds.clean:.3f} nats per "
        f"token clean, {bounds.mean_ablated:.3f} with the site at its mean, {bounds.zero_ablated:.3f} at zero."
    )
