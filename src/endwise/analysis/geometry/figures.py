"""The geometry of dictionaries as figures: cosines by kind (paper, figure 3), their mean over what a run measured
(figure 7), and how much recurs over thresholds.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from endwise.analysis.comparable import methods_of
from endwise.analysis.geometry.geometry import Geometry
from endwise.analysis.geometry.similarity import MeanSimilarity, across_kinds, across_seeds, mean_of, within
from endwise.analysis.geometry.stability import THRESHOLDS
from endwise.analysis.geometry.tables import recurrences
from endwise.analysis.pareto.page import AXIS, described, value
from endwise.common.statistics import LEAST_SEEDS
from endwise.common.text import minus
from endwise.config.method import Method
from endwise.evaluation.summary import RunSummary
from endwise.figures.charts import Axis, Band, Chart, Mark, Panel, Series

BINS = (10, 50)
"""Fewest and most of a histogram; between them the square root of the number of features."""
SIMILAR = 0.25
"""CE increases further apart than this share of their mean are remarked on; the paper's are 2 to 30 % apart."""
COSINE = Axis("greatest cosine")
SHARE = Axis("share of alive features, %", from_zero=True)


def own_cosines(found: Geometry, name: str) -> Chart:
    """Figure 3, left and middle: within a dictionary, and across seeds."""
    parts = {
        "within the dictionary": [(run, within(found, run)) for run in found.similar],
        "across seeds": [(run, across_seeds(found, run)) for run in found.seeded],
    }
    caption = (
        "Alive features by the cosine of their decoder direction with the nearest other of the same dictionary; and "
        f"with the nearest in a dictionary of another seed, mean over these. {chosen(found.similar)}"
    )
    if found.seeded and found.seeded != found.similar:
        caption += chosen(found.seeded, "of several seeds ")
    return Chart(name, "How near the nearest feature is", caption, _panels(parts))


def kind_cosines(found: Geometry, name: str) -> Chart:
    """Figure 3, right: between kinds."""
    parts = {
        f"nearest in {to.method.label}": [(run, across_kinds(found, run, to)) for run in found.similar if run is not to]
        for to in found.similar
    }
    caption = (
        "Alive features by the cosine of their decoder direction with the nearest in another kind's dictionary. "
        f"{chosen(found.similar)}"
    )
    return Chart(name, "How near the nearest feature of another kind is", caption, _panels(parts))


def chosen(runs: Sequence[RunSummary], where: str = "") -> str:
    """Say which runs a comparison at similar CE increase is of."""
    if not runs:
        return ""
    listed = ", ".join(
        f"{run.method.label} {run.knob} ({minus(f'{run.ce_increase:+.3f}')}, {run.alive:,} alive)" for run in runs
    )
    increases = [run.ce_increase for run in runs]
    spread = (max(increases) - min(increases)) / max(abs(float(np.mean(increases))), 1e-9)
    warning = "" if spread <= SIMILAR else f"These differ by {100 * spread:.0f} %: part of a difference may be theirs. "
    return f"Runs {where}of seed {runs[0].seed} closest in CE increase: {listed}. {warning}"


def trade_offs(found: Geometry, name: str) -> Chart:
    """Figure 7: the mean within a dictionary against L0, CE increase and alive features."""
    y = Axis("mean greatest cosine within")
    panels = []
    for metric in ("l0", "ce_increase", "alive"):
        series = [Series(of, tuple(_marks(found, of, metric)), joined=False) for of in methods_of(found.runs)]
        panels.append(Panel("", AXIS[metric], y, tuple(each for each in series if each.marks)))
    caption = "Each mark is one SAE; lower is more orthogonal. Bars, of one run each: 95 % over features, and for CE "
    caption += "and L0 over text."
    return Chart(name, "Orthogonality, and what it goes with", caption, tuple(panels))


def threshold_curves(found: Geometry, name: str) -> Chart | None:
    """Draw how much of a dictionary another seed finds again, over the threshold; None without twins."""
    every = recurrences(found)
    by_method = {run.method: of for run in found.seeded for of in every if run in found.twins(of.run)}
    series = []
    for method, of in by_method.items():
        # Student's t knows neither 0 nor 100 %.
        ends = [(100 * max(0.0, share.low), 100 * min(1.0, share.high)) for share in of.share]
        low, high = zip(*ends, strict=True)
        marks = tuple(Mark(at, 100 * share.estimate) for at, share in zip(THRESHOLDS, of.share, strict=True))
        held = "features and seeds" if len(of.runs) >= LEAST_SEEDS else "features"
        series.append(Series(method, marks, marked=False, band=Band(THRESHOLDS, low, high, held)))
    if not series:
        return None
    seeds = ", ".join(f"{method.label} {len(of.runs)}" for method, of in by_method.items())
    caption = (
        "Mean over features, seeds and other seeds of whether the greatest cosine there reaches the threshold. "
        f"Seeds: {seeds}. {chosen(found.seeded)}"
    )
    panel = Panel(
        "", Axis("threshold on the greatest cosine"), Axis("features found again, %", from_zero=True), tuple(series)
    )
    return Chart(name, "What another seed finds again", caption, (panel,))


def _panels(parts: Mapping[str, Sequence[tuple[RunSummary, MeanSimilarity | None]]]) -> tuple[Panel, ...]:
    """Draw for each title a histogram of every measure that there is, all in the same bins."""
    known = {
        title: [(run, np.concatenate([*of.values.values()])) for run, of in each if of is not None]
        for title, each in parts.items()
    }
    sizes = [len(values) for each in known.values() for _, values in each]
    if not sizes:
        return ()
    lowest = min(float(values.min()) for each in known.values() for _, values in each)
    edges = np.linspace(min(0.0, lowest), 1.0, int(np.clip(np.sqrt(min(sizes)), *BINS)) + 1)
    return tuple(
        Panel(
            title, COSINE, SHARE, tuple(Series(run.method, _histogram(run, v, edges), marked=False) for run, v in each)
        )
        for title, each in known.items()
        if each
    )


def _histogram(run: RunSummary, values: NDArray, edges: NDArray) -> tuple[Mark, ...]:
    shares = 100 * np.histogram(values, edges)[0] / len(values)
    return tuple(
        Mark(
            float((low + high) / 2),
            float(share),
            f"{run.method.label}\n{share:.1f} % from {low:.2f} to {high:.2f}",
        )
        for share, low, high in zip(shares, edges[:-1], edges[1:], strict=True)
    )


def _marks(found: Geometry, method: Method, metric: str) -> Iterator[Mark]:
    for run in found.runs:
        if run.method == method and run.folder in found.within:
            mean = mean_of(found.within[run.folder])
            words = f"{described(run)}\nmean greatest cosine within {mean.estimate:.3f}"
            x_ends = run.intervals.get(metric)
            yield Mark(value(run, metric), mean.estimate, words, x_ends, (mean.low, mean.high))
