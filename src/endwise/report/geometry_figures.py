"""The geometry of dictionaries as figures: cosines by kind (paper, figure 3), their mean over what a run measured
(figure 7), and how much recurs over thresholds.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from endwise.analysis.comparison import KINDS, LABELS, RunSummary
from endwise.analysis.geometry import Geometry
from endwise.analysis.geometry_tables import recurrences
from endwise.analysis.similarity import across_kinds, across_seeds, mean_of, within
from endwise.analysis.stability import THRESHOLDS
from endwise.report.charts import Axis, Band, Chart, Mark, Panel, Series
from endwise.report.pareto import AXIS, described, value

BINS = 50
"""Of a histogram, from the lowest value or 0 to 1."""
COSINE = Axis("greatest cosine")
SHARE = Axis("share of alive features, %", from_zero=True)


def histograms(found: Geometry, name: str) -> Chart:
    """Figure 3: one panel each for within, across seeds, and towards each kind."""
    panels = [
        Panel("within the dictionary", COSINE, SHARE, _series((run, _within(found, run), "") for run in found.similar)),
        Panel("across seeds", COSINE, SHARE, _series((run, _seeds(found, run), "") for run in found.seeded)),
    ]
    for to in found.similar:
        others = [run for run in found.similar if run is not to]
        of_others = _series((run, _kinds(found, run, to), "") for run in others)
        panels.append(Panel(f"nearest in {LABELS[to.kind]}", COSINE, SHARE, of_others))
    caption = (
        "Alive features by the cosine of their decoder direction with the nearest other: of the same dictionary; of "
        "the same kind's with another seed; of another kind's. "
        f"{chosen(found.similar)}{chosen(found.seeded, 'across seeds: ') if found.seeded != found.similar else ''}"
    )
    shown = tuple(panel for panel in panels if panel.series)
    return Chart(name, "How near the nearest feature is", caption, shown)


def chosen(runs: Sequence[RunSummary], where: str = "") -> str:
    """Which runs a comparison at similar CE increase is of."""
    if not runs:
        return ""
    listed = ", ".join(
        f"{LABELS[run.kind]} λ {run.coefficient:g} ({run.ce_increase:+.3f}, {run.alive:,} alive)" for run in runs
    )
    return f"Runs {where}closest in CE increase: {listed}. "


def trade_offs(found: Geometry, name: str) -> Chart:
    """Figure 7: the mean within a dictionary against L0, CE increase and alive features."""
    y = Axis("mean greatest cosine within")
    panels = []
    for metric in ("l0", "ce_increase", "alive"):
        series = [Series(kind, tuple(_marks(found, kind, metric)), joined=False) for kind in KINDS]
        panels.append(Panel("", AXIS[metric], y, tuple(each for each in series if each.marks)))
    caption = "Each mark is one SAE; lower is more orthogonal. Bars: 95 % over features, and for CE and L0 over text."
    return Chart(name, "Orthogonality, and what it goes with", caption, tuple(panels))


def threshold_curves(found: Geometry, name: str) -> Chart | None:
    """How much of a dictionary is found again with another seed, over what counts as found; None without twins."""
    every = recurrences(found)
    of_kind = {run.kind: of for run in found.seeded for of in every if run in found.twins(of.run)}
    series = []
    for kind, of in of_kind.items():
        low, high = (tuple(100 * getattr(share, end) for share in of.share) for end in ("low", "high"))
        marks = tuple(Mark(at, 100 * share.estimate) for at, share in zip(THRESHOLDS, of.share, strict=True))
        series.append(Series(kind, marks, marked=False, band=Band(THRESHOLDS, low, high, "features")))
    if not series:
        return None
    seeds = ", ".join(f"{LABELS[kind]} {of.seeds}" for kind, of in of_kind.items())
    caption = (
        "Mean over features, seeds and other seeds of whether the greatest cosine there reaches the threshold. "
        f"Seeds: {seeds}. {chosen(found.seeded)}"
    )
    panel = Panel(
        "", Axis("threshold on the greatest cosine"), Axis("features found again, %", from_zero=True), tuple(series)
    )
    return Chart(name, "What another seed finds again", caption, (panel,))


def _within(found: Geometry, run: RunSummary) -> NDArray | None:
    measure = within(found, run)
    return None if measure is None else measure.all_values


def _seeds(found: Geometry, run: RunSummary) -> NDArray | None:
    measure = across_seeds(found, run)
    return None if measure is None else measure.all_values


def _kinds(found: Geometry, run: RunSummary, to: RunSummary) -> NDArray | None:
    measure = across_kinds(found, run, to)
    return None if measure is None else measure.all_values


def _series(measured: Iterable[tuple[RunSummary, NDArray | None, str]]) -> tuple[Series, ...]:
    return tuple(
        Series(run.kind, tuple(_histogram(run, values)), label, marked=False)
        for run, values, label in measured
        if values is not None
    )


def _histogram(run: RunSummary, values: NDArray) -> Iterator[Mark]:
    shares, edges = np.histogram(values, bins=BINS, range=(min(0.0, float(values.min())), 1.0))
    for share, low, high in zip(100 * shares / len(values), edges[:-1], edges[1:], strict=True):
        words = f"{LABELS[run.kind]}\n{share:.1f} % from {low:.2f} to {high:.2f}"
        yield Mark(float((low + high) / 2), float(share), words)


def _marks(found: Geometry, kind: str, metric: str) -> Iterator[Mark]:
    for run in found.runs:
        if run.kind == kind and run.folder in found.within:
            mean = mean_of(found.within[run.folder])
            words = f"{described(run)}\nmean greatest cosine within {mean.estimate:.3f}"
            x_ends = run.intervals.get(metric)
            yield Mark(value(run, metric), mean.estimate, words, x_ends, (mean.low, mean.high))
