"""Means and quantiles of cosines over features, and what two runs differ by, with their intervals.

A measure of a kind is the mean over its run's alive features; where the run has twins of other seeds, the mean over
seeds of these means. Its interval is over features (see `over_features`): of every run of its own, one draw after
another. It does not cover the training seed. Where there are three seeds or more of both, a difference has a second
interval that does: one difference a seed, Student's t.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from endwise.analysis.geometry import Geometry, Similarity, at_common_seeds
from endwise.analysis.over_features import RESAMPLES, resampled_means, resampled_quantiles, stream
from endwise.analysis.run_summary import RunSummary
from endwise.statistics import CONFIDENCE, LEAST_SEEDS, Interval, percentile_interval, student_t

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Measure:
    """A mean over features, by seed."""

    run: RunSummary
    """The one whose twins these are."""
    values: Mapping[int, NDArray]
    """By seed, one value a feature."""
    draws: Floats
    """The mean over seeds of the mean over features, in each resample."""

    @classmethod
    def of(
        cls, run: RunSummary, values: Mapping[int, tuple[RunSummary, NDArray]], resamples: int = RESAMPLES
    ) -> "Measure":
        draws = [resampled_means(numbers, stream(own), resamples) for own, numbers in values.values()]
        return cls(run, {seed: numbers for seed, (_, numbers) in values.items()}, np.mean(draws, axis=0))

    @property
    def by_seed(self) -> dict[int, float]:
        return {seed: float(numbers.mean(dtype=np.float64)) for seed, numbers in self.values.items()}

    @property
    def interval(self) -> Interval:
        return percentile_interval(self.draws, float(np.mean(list(self.by_seed.values()))))

    @property
    def all_values(self) -> NDArray:
        """Of all seeds' features, one after another."""
        return np.concatenate(list(self.values.values()))


@dataclass(frozen=True)
class Difference:
    """`a − b`; or why that cannot be said."""

    name: str
    a: str
    b: str
    interval: Interval | None = None
    """Over features."""
    over_seeds: Interval | None = None
    paired: bool = False
    """Both are of the same features, which were then drawn together."""
    reason: str | None = None

    @property
    def ends(self) -> tuple[tuple[float, float], ...]:
        """Of every interval there is."""
        return tuple((each.low, each.high) for each in (self.interval, self.over_seeds) if each is not None)


def difference(name: str, a: Measure, b: Measure, labels: tuple[str, str], *, paired: bool = False) -> Difference:
    """Over the seeds that both have; over all, each its own, where they have none in common.

    Args:
        paired: both are of the same features of the same runs.
    """
    drawn = a.draws - b.draws
    estimate = a.interval.estimate - b.interval.estimate
    common = sorted(a.by_seed.keys() & b.by_seed.keys())
    over_seeds = None
    if len(common) >= LEAST_SEEDS:
        over_seeds = mean_over_seeds([a.by_seed[seed] - b.by_seed[seed] for seed in common])
    return Difference(name, *labels, percentile_interval(drawn, estimate), over_seeds, paired)


def mean_over_seeds(values: Sequence[float]) -> Interval:
    """The mean with its 95 % interval of Student's t."""
    given = np.asarray(values, dtype=np.float64)
    half = student_t((1 + CONFIDENCE) / 2, len(given) - 1) * given.std(ddof=1) / np.sqrt(len(given))
    mean = float(given.mean())
    return Interval(low=float(mean - half), high=float(mean + half), estimate=mean)


def within(found: Geometry, run: RunSummary, among: float | None = None) -> Measure | None:
    """Of a run and its twins; None where none has two alive features.

    Args:
        among: as if only so many others were there (see `Similarity.among`).
    """
    values = {
        one.seed: (one, _values(found.within[one.folder], among))
        for one in found.twins(run)
        if one.folder in found.within
    }
    return Measure.of(run, values) if values else None


def across_seeds(found: Geometry, run: RunSummary, among: float | None = None) -> Measure | None:
    """Of each twin's features the mean over the other twins of the greatest cosine there; None without twins."""
    values = {}
    for one in found.twins(run):
        others = [each for other in found.twins(run) if (each := found.between(one, other)) is not None]
        if others:
            values[one.seed] = (one, np.mean([_values(each, among) for each in others], axis=0))
    return Measure.of(run, values) if values else None


def _values(of: Similarity, among: float | None) -> Floats:
    return of.cosine.astype(np.float64) if among is None else of.among(among)


def alive_of(found: Geometry, run: RunSummary) -> float:
    """Mean over the twins of their alive features."""
    return float(np.mean([one.alive for one in found.twins(run)]))


def across_kinds(found: Geometry, run: RunSummary, other: RunSummary) -> Measure | None:
    """Of the features of `run`, in `other`: twin by twin of one seed, or the two runs themselves."""
    pairs = at_common_seeds(found.twins(run), found.twins(other)) or [(run, other)]
    values = {one.seed: (one, each.cosine) for one, two in pairs if (each := found.between(one, two)) is not None}
    return Measure.of(run, values) if values else None


def mean_of(similarity: Similarity) -> Interval:
    """Of the cosines, with its interval over features."""
    draws = resampled_means(similarity.cosine, stream(similarity.run))
    return percentile_interval(draws, float(similarity.cosine.mean(dtype=np.float64)))


def quantiles(similarity: Similarity) -> list[Interval]:
    """Of the cosines, at `QUANTILES`, with intervals over features."""
    draws = resampled_quantiles(similarity.cosine, QUANTILES, stream(similarity.run))
    estimates = np.quantile(similarity.cosine.astype(np.float64), QUANTILES)
    return [percentile_interval(draws[:, i], float(estimate)) for i, estimate in enumerate(estimates)]
