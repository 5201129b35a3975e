"""On how few features the function rests: shares by rank, the count that carries a share, and their intervals."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from endwise.analysis.correlations import LEAST, interval_of, resampled_points
from endwise.features.importance import Faithfulness, FeatureImportance
from endwise.statistics import CONFIDENCE, Interval, percentile_interval, resampling_weights, student_t

Floats = NDArray[np.float64]

RESAMPLES, SEED = 1000, 12345
CARRIED = 0.9
"""Share, of what the whole SAE carries, for which features are counted."""
HALF = 0.5
"""Share of the summed importance for which features are counted."""


def cumulative_share(importance: Floats) -> Floats:
    """Share of Σ|importance| in the n most important features, for n = 1, 2, ...; those without any come last."""
    magnitudes = np.sort(np.abs(importance))[::-1]
    total = magnitudes.sum()
    return np.cumsum(magnitudes) / total if total > 0 else np.zeros_like(magnitudes)


def count_with(share: float, importance: Floats) -> float:
    """How many of the most important features hold a share of Σ|importance|; the last one counts in part. NaN if the
    sum is 0.
    """
    shares = np.concatenate([[0.0], cumulative_share(importance)])
    return float(np.interp(share, shares, np.arange(len(shares)))) if shares[-1] > 0 else float("nan")


def half_ratio(one: FeatureImportance, other: FeatureImportance) -> Interval:
    """Features of `one` with half of its importance, divided by those of `other`.

    The interval is a delete-a-block jackknife of the logarithm over the blocks of held-out sequences, which both share,
    with Student's t. A bootstrap would not do: it draws sequences twice, and so adds noise to small importances, whose
    magnitudes then count as importance.
    """

    def log_count(importance: FeatureImportance, kept: NDArray[np.bool_]) -> float:
        return float(np.log(count_with(HALF, importance.second_blocks[kept].sum(0))))

    def log_ratio(kept: NDArray[np.bool_]) -> float:
        return log_count(one, kept) - log_count(other, kept)

    blocks = len(one.ce_blocks)
    estimate = log_ratio(np.ones(blocks, dtype=bool))
    without = np.array([log_ratio(np.arange(blocks) != block) for block in range(blocks)])
    error = np.sqrt((blocks - 1) * np.mean(np.square(without - without.mean())))
    half = student_t((1 + CONFIDENCE) / 2, blocks - 1) * error
    low, middle, high = np.exp([estimate - half, estimate, estimate + half])
    return Interval(low=float(low), high=float(high), estimate=float(middle))


def shares(curve: Faithfulness, ce: Floats, weights: Floats | None = None) -> Floats:
    """(CE_baseline − CE_n) / (CE_baseline − CE_clean), the baseline with the site at its mean; NaN where there is no
    such difference.

    Args:
        ce: `[points sequences]`, `curve.ce` or `curve.random_ce`.
        weights: `[resamples sequences]`, how often each resample draws each sequence; unset: each once.

    Returns:
        `[resamples points]`, or `[points]`.
    """
    once = np.ones((1, len(curve.predictions))) if weights is None else weights
    base, clean = once @ curve.mean_ablated, once @ curve.clean
    carried, whole = base[:, None] - once @ ce.T, (base - clean)[:, None]
    found = np.divide(carried, whole, out=np.full(carried.shape, np.nan), where=whole != 0)
    return found[0] if weights is None else found


def share_draws(curve: Faithfulness, ce: Floats) -> Floats:
    """The shares in each resample of the sequences, `[RESAMPLES points]`; runs of equal text share their resamples."""
    return shares(curve, ce, resampling_weights(len(curve.predictions), RESAMPLES, SEED))


def count_carrying(kept: NDArray[np.int64], share: Floats, part: float = CARRIED) -> Floats:
    """The least number of features that carries `part` of what all of them carry, on curves of `kept` and `share`.

    Between two measured points the share is linear in log n. NaN where all together carry nothing.

    Args:
        share: `[curves points]`.

    Returns:
        `[curves]`.
    """
    whole, curves = share[:, -1], np.arange(len(share))
    reached = np.argmax(share >= part * whole[:, None], axis=1)
    before = np.maximum(reached - 1, 0)
    below, above = share[curves, before], share[curves, reached]
    logs = np.log(np.maximum(kept, 1))
    rise = np.where(reached == before, 1.0, above - below)
    count = np.exp(logs[before] + (logs[reached] - logs[before]) * (part * whole - below) / rise)
    count = np.where(kept[reached] <= 1, kept[reached], count)
    return np.where((whole > 0) & np.isfinite(share).all(axis=1), count, np.nan)


def _carrying(curve: Faithfulness) -> tuple[float, Floats]:
    """The count of the curve itself, and that of each resample, `[RESAMPLES]`."""
    estimate = count_carrying(curve.kept, shares(curve, curve.ce)[None])
    return float(estimate[0]), count_carrying(curve.kept, share_draws(curve, curve.ce))


def carrying(curve: Faithfulness) -> Interval:
    """How many of the most important features carry `CARRIED` of what the SAE carries; 95 % over sequences."""
    estimate, draws = _carrying(curve)
    return percentile_interval(draws, estimate)


def carrying_ratio(one: Faithfulness, other: Faithfulness) -> Interval:
    """`carrying` of one divided by that of another on the same sequences, which are resampled together. NaN where the
    other needs no feature at all.
    """
    (a, a_draws), (b, b_draws) = _carrying(one), _carrying(other)
    draws = np.divide(a_draws, b_draws, out=np.full_like(a_draws, np.nan), where=b_draws > 0)
    return percentile_interval(draws, a / b if b > 0 else float("nan"))


def correlation(x: Floats, y: Floats, of: Callable[[Floats, Floats, Floats], Floats]) -> Interval | None:
    """With a 95 % bootstrap interval over pairs; None for fewer than `LEAST`, or where one side does not vary.

    Args:
        of: `pearson` or `spearman`.
    """
    if len(x) < LEAST:
        return None
    values = of(x, y, resampled_points(len(x), RESAMPLES, SEED))
    return None if np.isnan(values[0]) else interval_of(values)
