"""Means and quantiles of cosines over features, and what two runs differ by, with their intervals.

A measure of a kind is the mean over its run's alive features; where the run has twins of other seeds, the mean over
seeds of these means. From three seeds on, its interval holds features and seeds: the variance of the mean over features
(see `over_features`: of every run of its own, one draw after another) and that over seeds are added, so that it is
rather too wide than too narrow, features being another sample in every seed. With fewer seeds it holds features alone.
Kinds are compared seed by seed.

Each cosine across seeds is of two seeds, and so counts in the means of both, which thereby lie nearer to each other
than independent ones would; their variance is that of the jackknife over seeds.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from endwise.analysis.geometry.geometry import Geometry, Similarity, at_common_seeds
from endwise.analysis.over_features import RESAMPLES, resampled_means, resampled_quantiles, stream
from endwise.analysis.over_seeds import OverSeeds, with_error
from endwise.common.statistics import Floats, Interval, Numbers, percentile_interval, text_error
from endwise.config.method import Method
from endwise.evaluation.summary import RunSummary, Seeds

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class MeanSimilarity:
    """A mean over features, by seed."""

    run: RunSummary
    """The one whose twins these are."""
    values: Mapping[Seeds, NDArray]
    """Values by seed, one for each feature."""
    draws: Mapping[Seeds, Floats]
    """Draws by seed: the mean over features in each resample."""
    runs: Mapping[Seeds, RunSummary]
    """Runs whose features these are."""
    of_pairs: bool = False
    """Each seed's is a mean over the others, so that two have one cosine in common."""

    @classmethod
    def of(
        cls,
        run: RunSummary,
        values: Mapping[Seeds, tuple[RunSummary, NDArray]],
        resamples: int = RESAMPLES,
        *,
        of_pairs: bool = False,
    ) -> "MeanSimilarity":
        draws = {seeds: resampled_means(of, stream(own), resamples) for seeds, (own, of) in values.items()}
        runs = {seeds: own for seeds, (own, _) in values.items()}
        return cls(run, {seeds: of for seeds, (_, of) in values.items()}, draws, runs, of_pairs)

    @property
    def by_seed(self) -> dict[Seeds, float]:
        return {seeds: float(numbers.mean(dtype=np.float64)) for seeds, numbers in self.values.items()}

    @property
    def interval(self) -> OverSeeds:
        return mean_over_seeds([*self.by_seed.values()], [*self.draws.values()], of_pairs=self.of_pairs)


@dataclass(frozen=True)
class SimilarityDifference:
    """`a − b`, seed by seed; or why it is unknown."""

    name: str
    a: Method
    b: Method
    interval: OverSeeds | None = None
    """Over features, and over seeds where there are enough."""
    runs: tuple[RunSummary, ...] = ()
    """Runs of `a`, one of each seed that both have."""
    paired: bool = False
    """Both are of the same features, which were then drawn together."""
    reason: str | None = None


def difference(
    name: str, a: MeanSimilarity, b: MeanSimilarity, methods: tuple[Method, Method], *, paired: bool = False
) -> SimilarityDifference:
    """Over the seeds that both have.

    Args:
        paired: both are of the same features of the same runs.
    """
    common = tuple(sorted(a.by_seed.keys() & b.by_seed.keys()))
    if not common:
        return SimilarityDifference(name, *methods, reason="no seed has both")
    by_seed = [a.by_seed[seeds] - b.by_seed[seeds] for seeds in common]
    draws = [a.draws[seeds] - b.draws[seeds] for seeds in common]
    runs = tuple(a.runs[seeds] for seeds in common)
    return SimilarityDifference(name, *methods, mean_over_seeds(by_seed, draws, of_pairs=a.of_pairs), runs, paired)


def mean_over_seeds(by_seed: Numbers, draws: Numbers, *, of_pairs: bool) -> OverSeeds:
    """Average it over seeds, with its interval over features and seeds.

    Args:
        by_seed: `[seeds]`.
        draws: resamples of each, `[seeds, resamples]`.
        of_pairs: each seed's is a mean over the n − 1 others. Then the jackknife's values take their place, which lie
            2 (n − 1) / (n − 2) times as far apart: what leaves with one seed is in the other seeds' means too.
    """
    given, mean = np.asarray(by_seed, np.float64), np.mean(draws, axis=0)
    n, middle = len(given), float(given.mean())
    spread = 2 * (n - 1) / (n - 2) if of_pairs and n > 2 else 1.0
    alone = percentile_interval(mean, middle)
    return with_error(middle + spread * (given - middle), text_error(mean), alone=alone)


def within(found: Geometry, run: RunSummary, among: float | None = None) -> MeanSimilarity | None:
    """Measure a run and its twins; None where none has two alive features.

    Args:
        among: as if only so many others were there (see `Similarity.among`).
    """
    values = {
        one.seeds: (one, _values(found.within[one.folder], among))
        for one in found.twins(run)
        if one.folder in found.within
    }
    return MeanSimilarity.of(run, values) if values else None


def across_seeds(found: Geometry, run: RunSummary, among: float | None = None) -> MeanSimilarity | None:
    """Average, for each twin's features, over the other twins of the greatest cosine there; None without twins."""
    values = {}
    for one in found.twins(run):
        others = [each for other in found.twins(run) if (each := found.between(one, other)) is not None]
        if others:
            values[one.seeds] = (one, np.mean([_values(each, among) for each in others], axis=0))
    return MeanSimilarity.of(run, values, of_pairs=True) if values else None


def _values(of: Similarity, among: float | None) -> Floats:
    return of.cosine.astype(np.float64) if among is None else of.among(among)


def across_kinds(found: Geometry, run: RunSummary, other: RunSummary) -> MeanSimilarity | None:
    """Compare the features of `run` with those of `other`, twin by twin of one seed; None where no seed has both."""
    pairs = at_common_seeds(found.twins(run), found.twins(other))
    values = {one.seeds: (one, each.cosine) for one, two in pairs if (each := found.between(one, two)) is not None}
    return MeanSimilarity.of(run, values) if values else None


def mean_of(similarity: Similarity) -> Interval:
    """Mean of the cosines, with its interval over features."""
    draws = resampled_means(similarity.cosine, stream(similarity.run))
    return percentile_interval(draws, float(similarity.cosine.mean(dtype=np.float64)))


def quantiles(similarity: Similarity) -> list[Interval]:
    """Quantiles of the cosines, at `QUANTILES`, with intervals over features."""
    draws = resampled_quantiles(similarity.cosine, QUANTILES, stream(similarity.run))
    estimates = np.quantile(similarity.cosine.astype(np.float64), QUANTILES)
    return [percentile_interval(draws[:, i], float(estimate)) for i, estimate in enumerate(estimates)]
