"""Pareto curves of any runs: which can be compared, their fronts, their bands, their ratios.

Runs are compared only where all agrees but the method, its knob (the sparsity coefficient, say), the seeds and the
learning rate (which is tuned for each method): one model, one site, the same text, one length of training, one
dictionary size, one kind of start. Each such set has its own curves and ratios. A curve is of one method: runs whose
objective differs in more than the knob, in a weight say, or in the penalty's power, have another curve.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from endwise.analysis.comparable import HELDOUT_TEXT, Setting, columns_of, comparable, in_order, methods_of
from endwise.analysis.comparison.comparison import Summary, summarise_folders
from endwise.analysis.ratios import DEFINED_SHARE, Ratio
from endwise.analysis.sets import ShownSet
from endwise.common.showing import Listed
from endwise.common.statistics import (
    LEAST_SEEDS,
    Floats,
    InterpolationError,
    interpolate_at,
    interpolate_rows,
    interval_over_seeds,
    log_spaced,
)
from endwise.config.method import Method
from endwise.evaluation.summary import RunSummary, resampled
from endwise.runs.finding import Paths

GRID = 40
"""Points of a band."""
RESAMPLES, SEED = 1000, 12345
AXES = (("l0", "ce_increase"), ("alive", "ce_increase"), ("l0", "kl"))
"""Pairs that are drawn against each other: x, y."""


@dataclass(frozen=True, repr=False)
class Pareto(ShownSet):
    """The runs of one setting, compared."""

    setting: Setting
    runs: tuple[RunSummary, ...]
    """Runs by method, knob, seed and learning rate."""
    summary: Summary
    """Comparison of the runs of one learning rate a method, where it has several."""
    remarks: tuple[str, ...] = ()
    """Sentences that name that rate."""

    @property
    def methods(self) -> list[Method]:
        return methods_of(self.runs)

    def shown_parts(self) -> Iterable[str]:
        from endwise.analysis.pareto.page import card_parts

        return card_parts(self)

    @property
    def is_compared(self) -> bool:
        """True if there are several methods, so that one can be related to another."""
        return len(self.methods) > 1

    @property
    def ratios(self) -> dict[tuple[str, str], Ratio]:
        """Ratios by measure and the method's key; each relative to the baseline."""
        return {(key, of): ratio for key, by in self.summary.ratios.items() for of, ratio in by.items()}


@dataclass(frozen=True)
class BandOf:
    """A 95 % band of a curve."""

    x: Floats
    middle: Floats
    low: Floats
    high: Floats
    over: str
    """`held-out text`, or `3 seeds`."""


def pareto(paths: Paths) -> list[Pareto]:
    """Compare evaluated runs, in as many sets as can be compared.

    Args:
        paths: run folders, or folders that hold some at any depth (a sweep's).

    Raises:
        RunFolderError: there is no run, or one was not measured yet.
        FormatError: what a run holds cannot be read.
    """
    return Listed(_compared(setting, runs) for setting, runs in comparable(paths, together=True).items())


def _compared(setting: Setting, runs: list[RunSummary]) -> Pareto:
    runs.sort(key=lambda run: (*in_order(run), run.learning_rate or 0.0))
    rates = {of: rate for of in methods_of(runs) if (rate := rate_of_most([run for run in runs if run.method == of]))}
    kept = [run for run in runs if run.learning_rate == rates.get(run.method, run.learning_rate)]
    remarks = [
        f"{method.label}: compared at learning rate {rate:g}, which most runs have; others are only shown."
        for method, rate in rates.items()
    ]
    summary = summarise_folders(kept, resamples=RESAMPLES, seed=SEED, model=kept[0].model)
    return Pareto(setting, tuple(runs), summary, tuple(remarks))


def rate_of_most(runs: Sequence[RunSummary]) -> float | None:
    """Find, for one method's runs at several learning rates with the same knob and seed, the rate that has
    more of them than any other: that of a curve, rather than those that were tried for it. None: there are no such
    runs, or no such rate.
    """
    if not has_several_rates(runs):
        return None
    counts = Counter(run.learning_rate for run in runs).most_common(2)
    return None if len(counts) < 2 or counts[0][1] == counts[1][1] else counts[0][0]


def has_several_rates(runs: Sequence[RunSummary]) -> bool:
    """Return whether runs of one method share knob and seed."""
    return len({(run.knob, run.seeds) for run in runs}) < len(runs)


def front(runs: Sequence[RunSummary], x: str, y: str) -> set[str]:
    """Folders of the runs that no other is at least as good as in both numbers and better in one; less is better."""
    points = [(run.folder, float(getattr(run, x)), float(getattr(run, y))) for run in runs]
    return {folder for folder, a, b in points if not any(c <= a and d <= b and (c < a or d < b) for _, c, d in points)}


def band(runs: Sequence[RunSummary], x: str, y: str) -> BandOf | None:
    """The band of one method's curve: over seeds where three or more have a curve, otherwise over held-out text (of the
    first seed). None where the points determine no curve, or have no sums to resample.
    """
    seeds = sorted({run.seeds for run in runs})
    by_seed = [[run for run in runs if run.seeds == seed] for seed in seeds]
    curves = [curve for group in by_seed if (curve := _points(group, x, y)) is not None]
    if len(curves) >= LEAST_SEEDS:
        return _over_seeds(curves)
    return _over_text(by_seed[0], x, y) if by_seed else None


def _points(runs: Sequence[RunSummary], x: str, y: str) -> tuple[Floats, Floats] | None:
    """A curve's points, if they are one."""
    if len({run.knob for run in runs}) < len(runs):
        return None
    across, up = (np.array([float(getattr(run, name)) for run in runs]) for name in (x, y))
    try:
        interpolate_at(across, up, across[0] if len(across) else 0.0)
    except InterpolationError:
        return None
    return across, up


def _over_seeds(curves: Sequence[tuple[Floats, Floats]]) -> BandOf | None:
    low, high = max(x.min() for x, _ in curves), min(x.max() for x, _ in curves)
    if low >= high:
        return None
    grid = log_spaced(low, high, GRID)
    values = np.array([interpolate_at(x, y, grid) for x, y in curves])
    intervals = [interval_over_seeds(column) for column in values.T]
    ends = [np.array([getattr(each, name) for each in intervals]) for name in ("estimate", "low", "high")]
    return BandOf(grid, *ends, over=f"{len(curves)} seeds")


def _over_text(runs: Sequence[RunSummary], x: str, y: str) -> BandOf | None:
    curve = _points(runs, x, y)
    if curve is None or any(run.sums is None or not {x, y} - {"alive"} <= run.sums.keys() for run in runs):
        return None
    grid = log_spaced(curve[0].min(), curve[0].max(), GRID)
    drawn = [resampled(run, {x, y}, RESAMPLES, SEED) for run in runs]
    across, up = (np.stack([each[name] for each in drawn], axis=1) for name in (x, y))
    values = interpolate_rows(across, up, grid)
    kept = np.isfinite(values).mean(axis=0) >= DEFINED_SHARE
    if not kept.any():
        return None
    low, high = np.nanquantile(values[:, kept], [0.025, 0.975], axis=0)
    return BandOf(grid[kept], interpolate_at(*curve, grid[kept]), low, high, over=HELDOUT_TEXT)


def point_rows(found: Sequence[Pareto]) -> list[dict[str, Any]]:
    """One row a run, with the fronts that it lies on."""
    rows = []
    for one in found:
        fronts = {f"front.{y}_over_{x}": front(one.runs, x, y) for x, y in AXES}
        for run in one.runs:
            row = {"kind": run.method.key, "method": run.method.label, **run.knob.columns, "seed": run.seed}
            row |= {name: getattr(run, name) for name in ("learning_rate", "l0", "alive", "ce_increase", "kl")}
            for name in ("l0", "ce_increase", "kl"):
                if name in run.intervals:
                    row |= dict(zip((f"{name}.low", f"{name}.high"), run.intervals[name], strict=True))
            row |= {name: run.folder in members for name, members in fronts.items()}
            rows.append(run.known({**columns_of(one.setting), **row, "run": run.folder}))
    return rows


def ratio_rows(found: Sequence[Pareto]) -> list[dict[str, Any]]:
    """One row for each measure of each method, relative to the set's baseline."""
    return [{**columns_of(one.setting), **row} for one in found for row in rows_of_ratios(one.summary)]


def rows_of_ratios(summary: Summary) -> list[dict[str, Any]]:
    """The same of one comparison."""
    base = summary.baseline.label
    return [
        {"measure": measure, "kind": key} | ratio.to_row() | {"method": summary.method(key).label, "relative_to": base}
        for measure, by_method in summary.ratios.items()
        for key, ratio in by_method.items()
    ]
