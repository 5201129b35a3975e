"""Figures of what reconstructions keep: at their own site and in the later layers, in length and in direction."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from endwise.analysis.comparable import methods_of
from endwise.analysis.directions.norms import BINS, Norms
from endwise.analysis.directions.text_at_site import Where
from endwise.analysis.pareto.page import AXIS, OTHER_SEEDS, described, mark
from endwise.config.method import Method
from endwise.evaluation.summary import RunSummary, layer_label
from endwise.figures.charts import Axis, Chart, Mark, Panel, Series

TEXT = "Bars are 95 % intervals over held-out text, each of one run."
LATER = {
    "downstream_mse": Axis("mean squared error per dimension", log=True),
    "downstream_cosine": Axis("cosine, spliced and original"),
}
"""Measures at every later residual stream."""


def downstream(similar: Mapping[str, Sequence[RunSummary]], name: str = "downstream") -> Chart:
    """Figures 2 and 6: for each site the error and the cosine of its runs at similar CE increase."""
    panels = [panel for site, runs in similar.items() for panel in _later(runs, site)]
    caption = (
        "Later residual streams of the runs of each kind, of one seed, whose CE increases are closest to each other, "
        f"spliced against original. {TEXT}"
    )
    return Chart(name, "Error in the later layers, at similar CE increase", caption, tuple(panels))


def downstream_of_all(runs: Sequence[RunSummary], site: str, name: str) -> Chart:
    """The same of every run, whatever its CE increase."""
    caption = f"Later residual streams, spliced against original, of every SAE at {site}; one line per run. {TEXT}"
    return Chart(name, "Error in the later layers, of every run", caption, tuple(_later(runs, site)))


def _later(runs: Sequence[RunSummary], site: str) -> list[Panel]:
    later = list(dict.fromkeys(name for run in runs for name in run.downstream_mse))
    x = Axis("later residual stream, by the block it enters", categories=tuple(map(layer_label, later)))
    panels = []
    for metric, y in LATER.items():
        series = [Series(run.method, _marks(run, metric, later)) for run in runs]
        if any(each.marks for each in series):  # cosines are younger than errors
            panels.append(Panel(site, x, y, tuple(each for each in series if each.marks)))
    return panels


def _marks(run: RunSummary, metric: str, later: Sequence[str]) -> tuple[Mark, ...]:
    return tuple(
        Mark(float(later.index(name)), number, described(run), y_ends=run.intervals.get(f"{metric}.{name}"))
        for name, number in getattr(run, metric).items()
    )


def explained_variance(runs: Sequence[RunSummary], site: str, name: str = "explained_variance") -> Chart:
    """Figure 12, at the SAE's own site: raw, and after LayerNorm without its affine part."""
    forms = {"per_token": "raw", "per_token_layernorm": "after LayerNorm"}
    y = Axis("explained variance, per token")
    panels = [
        Panel(words, AXIS["l0"], y, _by_method(runs, f"explained_variance.{form}")) for form, words in forms.items()
    ]
    caption = f"Mean over tokens of 1 − ‖â − a‖² / ‖a − mean‖² at {site}. {TEXT}"
    return Chart(name, "How much of the activation is reconstructed", caption, tuple(panels))


def _by_method(runs: Sequence[RunSummary], y: str) -> tuple[Series, ...]:
    """A curve of the first seed of each method, and the runs of its other seeds as dots."""
    series = []
    for method in methods_of(runs):
        own = of_method(runs, method)
        first = min((run.seed for run in own), default=0)
        line = tuple(mark(run, "l0", y) for run in own if run.seed == first)
        dots = tuple(mark(run, "l0", y) for run in own if run.seed != first)
        series += [Series(method, line), Series(method, dots, OTHER_SEEDS, joined=False, rank=1)]
    return tuple(each for each in series if each.marks)


def of_method(runs: Iterable[RunSummary], method: Method) -> list[RunSummary]:
    """Select a method's runs in the order of L0."""
    return sorted((run for run in runs if run.method == method), key=lambda run: run.l0)


def norms(measured: Mapping[str, Norms], similar: Sequence[RunSummary], site: str, name: str = "norms") -> Chart:
    """Figure 10: a panel for each method, and one for its document starts, where there are any."""
    x, y = Axis("length of the activation, ‖a‖", log=True), Axis("length of the reconstruction, ‖â‖", log=True)
    drawn = [run for run in similar if run.folder in measured]

    groups: tuple[tuple[Where, str], ...] = (
        *(("others", "other positions"), ("position_0", "position 0")),
        ("starts", "document starts"),
    )

    def panel(run: RunSummary, title: str, ranks: range) -> Panel:
        series = [
            Series(run.method, _lengths(measured[run.folder], *groups[rank]), groups[rank][1], joined=False, rank=rank)
            for rank in ranks
        ]
        return Panel(title, x, y, tuple(each for each in series if each.marks), diagonal=True)

    panels = [panel(run, run.method.label, range(2)) for run in drawn]
    if any(measured[run.folder].sample["starts"] for run in drawn):
        panels += [panel(run, f"{run.method.label}, document starts", range(2, 3)) for run in drawn]
    caption = f"Length (L2) of the reconstruction over that of the activation at {site}, one dot per held-out token."
    return Chart(name, "How long reconstructions are", caption, tuple(panels))


def _lengths(norms: Norms, group: Where, words: str) -> tuple[Mark, ...]:
    return tuple(Mark(a, b, words) for a, b in norms.sample[group])


def cosines(measured: Mapping[str, Norms], similar: Sequence[RunSummary], site: str, name: str = "cosines") -> Chart:
    """Figure 11, from the lowest cosine of any."""
    centres = (np.arange(BINS) + 0.5) * 2 / BINS - 1
    drawn = [run for run in similar if run.folder in measured]
    counts = {run.method: np.array(measured[run.folder].histogram, dtype=float) for run in drawn}
    filled = np.flatnonzero(sum(counts.values(), np.zeros(BINS)))
    first = max(0, int(filled[0]) - 1) if len(filled) else 0
    series = []
    for method, each in counts.items():
        shares = 100 * each / max(each.sum(), 1)
        marks = [Mark(float(x), float(y), f"{method.label}: {y:.1f} %") for x, y in zip(centres, shares, strict=True)]
        series.append(Series(method, tuple(marks[first:])))
    y = Axis(f"share of tokens, % per {2 / BINS:g}", from_zero=True)
    panel = Panel(site, Axis("cosine between a and â"), y, tuple(series))
    caption = (
        "Held-out tokens by the cosine between the activation and its reconstruction; position 0 and document starts "
        "left out."
    )
    return Chart(name, "Which way reconstructions point", caption, (panel,))
