"""Correlations with bootstrap intervals, all resamples at once.

A resample is a row of counts, how often it drew each point. Spearman's correlation of the points drawn, repeated as
often as they were, is Pearson's of their average ranks, and these follow from the counts and one sorting.
"""

import numpy as np

from endwise.common.errors import DataError
from endwise.common.statistics import Floats, Interval, percentile_interval, resampling_weights

LEAST = 4
"""Points of a correlation."""


def pearson(x: Floats, y: Floats, weights: Floats | None = None) -> Floats:
    """Pearson's correlation; NaN where x or y is constant.

    Args: as for `spearman`.
    """
    weights = np.ones((1, len(x))) if weights is None else weights
    return _pearson(x[None], y[None], weights)


def spearman(x: Floats, y: Floats, weights: Floats | None = None) -> Floats:
    """Spearman's rank correlation, ties ranked by their mean; NaN where x or y is constant.

    Args:
        x, y: `[points]`, finite.
        weights: how often each point counts, `[resamples points]`; None: once, in a single resample.
    """
    weights = np.ones((1, len(x))) if weights is None else weights
    return _pearson(_ranks(x, weights), _ranks(y, weights), weights)


def partial_spearman(x: Floats, y: Floats, given: Floats, weights: Floats | None = None) -> Floats:
    """The same of what x and y keep when the ranks of `given` are known (first-order partial correlation)."""
    weights = np.ones((1, len(x))) if weights is None else weights
    a, b, c = (_ranks(each, weights) for each in (x, y, given))
    xy, xz, yz = _pearson(a, b, weights), _pearson(a, c, weights), _pearson(b, c, weights)
    left = np.sqrt(np.maximum((1 - xz**2) * (1 - yz**2), 0))
    return np.divide(xy - xz * yz, left, out=np.full_like(xy, np.nan), where=left > 0)


def resampled_points(points: int, resamples: int, seed: int) -> Floats:
    """All points once, and then the resamples: `[1 + resamples, points]`.

    Raises:
        DataError: fewer than `LEAST` points.
    """
    if points < LEAST:
        raise DataError(f"A correlation takes at least {LEAST} points; given {points}. Measure more of them.")
    return np.concatenate([np.ones((1, points)), resampling_weights(points, resamples, seed)])


def interval_of(values: Floats) -> Interval:
    """Make the interval of values for the weights of `resampled_points`."""
    return percentile_interval(values[1:], float(values[0]))


def _ranks(values: Floats, weights: Floats) -> Floats:
    """Average ranks in each resample, `[resamples points]`."""
    distinct, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(len(distinct)))
    counts = np.add.reduceat(weights[:, order], starts, axis=1)
    return (counts.cumsum(1) - counts / 2 + 0.5)[:, group]


def _pearson(x: Floats, y: Floats, weights: Floats) -> Floats:
    total = weights.sum(1, keepdims=True)
    x, y = (each - (weights * each).sum(1, keepdims=True) / total for each in (x, y))
    spread = np.sqrt((weights * x * x).sum(1) * (weights * y * y).sum(1))
    return np.divide((weights * x * y).sum(1), spread, out=np.full(len(weights), np.nan), where=spread > 0)
