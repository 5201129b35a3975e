"""Features that another seed finds again, and whether these carry more of the model's function than others.

A feature *recurs* in another seed's dictionary at a threshold if its greatest cosine there reaches it. Its *recurrence*
is the share of the other seeds in which it does; a feature is *stable* if that is half or more.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from endwise.analysis.correlations import spearman
from endwise.analysis.geometry.geometry import Geometry, Importance
from endwise.analysis.geometry.similarity import mean_over_seeds
from endwise.analysis.over_features import RESAMPLES, counts, resampled_means, resampled_spearman, stream
from endwise.analysis.over_seeds import OverSeeds
from endwise.common.statistics import Floats, Interval, percentile_interval
from endwise.evaluation.summary import RunSummary

THRESHOLD = 0.7
"""At which a feature counts as found again, unless another is given."""
THRESHOLDS = tuple(round(0.02 * i, 2) for i in range(51))
STABLE = 0.5


@dataclass(frozen=True)
class Stability:
    """Cosines of the features of one run, seen from its twins."""

    run: RunSummary
    features: NDArray[np.int64]
    cosines: Floats
    """The greatest in each other seed, `[n seeds]`."""

    def recurrence(self, threshold: float) -> Floats:
        """`[n]`, 0 to 1."""
        return (self.cosines >= threshold).mean(axis=1)

    def stable(self, threshold: float) -> NDArray[np.bool_]:
        return self.recurrence(threshold) >= STABLE

    @property
    def mean_cosine(self) -> Floats:
        """Over the other seeds, `[n]`."""
        return self.cosines.mean(axis=1)


@dataclass(frozen=True)
class Recurrence:
    """Share of a kind's dictionary that recurs, over thresholds; mean over its seeds."""

    run: RunSummary
    """The one whose twins these are."""
    runs: tuple[RunSummary, ...]
    """These, one of each seed."""
    share: tuple[OverSeeds, ...]
    """Mean over features of their recurrence at each of `THRESHOLDS`."""


@dataclass(frozen=True)
class StableFunction:
    """Share of the function that the stable features of one run carry. Importance is its absolute value, since a
    feature that hurts the prediction does something too.
    """

    run: RunSummary
    threshold: float
    correlation: Interval | None
    """Spearman's, of a feature's mean cosine over the other seeds with its importance; None where one does not vary."""
    of_features: Interval
    """Share of the alive features that are stable."""
    of_importance: Interval
    """Share of the sum of importance that the stable features have."""


def stability(found: Geometry, run: RunSummary) -> Stability | None:
    """Measure stability; None for a run without twins."""
    others = [each for other in found.twins(run) if (each := found.between(run, other)) is not None]
    if not others:
        return None
    cosines = np.stack([each.cosine for each in others], axis=1).astype(np.float64)
    return Stability(run, others[0].features, cosines)


def recurrence(found: Geometry, run: RunSummary) -> Recurrence | None:
    """Over all seeds of a run's; None if it has one."""
    own = [each for one in found.twins(run) if (each := stability(found, one)) is not None]
    if not own:
        return None
    shares = [np.stack([each.recurrence(threshold) for threshold in THRESHOLDS], axis=1) for each in own]
    draws = np.stack([resampled_means(of, stream(each.run)) for of, each in zip(shares, own, strict=True)])
    means = np.stack([of.mean(axis=0) for of in shares])
    intervals = [mean_over_seeds(means[:, i], draws[:, :, i], of_pairs=True) for i in range(len(THRESHOLDS))]
    return Recurrence(run, tuple(each.run for each in own), tuple(intervals))


def stable_function(of: Stability, importance: Importance, threshold: float = THRESHOLD) -> StableFunction | None:
    """
    Args:
        importance: of every feature of the dictionary, alive or not, `[d_sae]`; the sign does not matter.

    Returns: None if no alive feature has any importance.
    """
    weight = np.abs(importance[of.features]).astype(np.float64)
    if not weight.sum():
        return None
    stable, cosine = of.stable(threshold).astype(np.float64), of.mean_cosine
    sums = np.concatenate(
        [drawn @ np.stack([stable, stable * weight, weight], axis=1) for drawn in counts(len(weight), stream(of.run))]
    )
    shares = np.divide(sums[:, 1], sums[:, 2], out=np.full(RESAMPLES, np.nan), where=sums[:, 2] > 0)
    correlation = float(spearman(cosine, weight)[0])
    return StableFunction(
        run=of.run,
        threshold=threshold,
        correlation=None
        if np.isnan(correlation)
        else percentile_interval(resampled_spearman(cosine, weight, stream(of.run)), correlation),
        of_features=percentile_interval(sums[:, 0] / len(weight), float(stable.mean())),
        of_importance=percentile_interval(shares, float((stable * weight).sum() / weight.sum())),
    )


def stable_functions(found: Geometry, threshold: float = THRESHOLD) -> list[StableFunction]:
    """Measure every run that has twins and whose features' importance is known."""
    made = []
    for run in found.runs:
        own = stability(found, run) if run.folder in found.importance else None
        if own is not None and (of := stable_function(own, found.importance[run.folder], threshold)) is not None:
            made.append(of)
    return made
