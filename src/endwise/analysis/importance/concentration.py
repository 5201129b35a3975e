"""Concentration of the function on few features: shares by rank, the count that carries a share, their intervals."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from endwise.analysis.correlations import LEAST, interval_of, resampled_points
from endwise.analysis.importance.faithfulness import CARRIED
from endwise.analysis.over_seeds import RATIO, OverSeeds, over_seeds, with_error
from endwise.common.statistics import CONFIDENCE, Floats, Interval, resampling_weights, student_t
from endwise.features.importance_table import Faithfulness, FeatureImportance

RESAMPLES, SEED = 1000, 12345
HALF = 0.5
"""Share of the summed importance for which features are counted."""


def cumulative_share(importance: Floats) -> Floats:
    """Share of Σ|importance| in the n most important features, for n = 1, 2, ...; those without any come last."""
    magnitudes = np.sort(np.abs(importance))[::-1]
    total = magnitudes.sum()
    return np.cumsum(magnitudes) / total if total > 0 else np.zeros_like(magnitudes)


def count_with(share: float, importance: Floats) -> float:
    """Count the most important features that hold a share of Σ|importance|; the last one counts in part. NaN if the
    sum is 0.
    """
    shares = np.concatenate([[0.0], cumulative_share(importance)])
    return float(np.interp(share, shares, np.arange(len(shares)))) if shares[-1] > 0 else float("nan")


def half_ratio(pairs: Sequence[tuple[FeatureImportance, FeatureImportance]]) -> OverSeeds:
    """Features of the first with half of its importance, divided by those of the second; of each seed a pair.

    Over text, the error is a delete-a-block jackknife's of the logarithm over the blocks of held-out sequences, which
    all share, with Student's t where there are too few seeds. A bootstrap would not do: it draws sequences twice, and
    so adds noise to small importances, whose magnitudes then count as importance.
    """

    def log_count(importance: FeatureImportance, kept: NDArray[np.bool_]) -> float:
        return float(np.log(count_with(HALF, importance.second_blocks[kept].sum(0))))

    def log_ratios(kept: NDArray[np.bool_]) -> Floats:
        return np.array([log_count(one, kept) - log_count(other, kept) for one, other in pairs])

    blocks = len(pairs[0][0].ce_blocks)
    by_seed = log_ratios(np.ones(blocks, dtype=bool))
    without = np.array([log_ratios(np.arange(blocks) != block).mean() for block in range(blocks)])
    error = float(np.sqrt((blocks - 1) * np.mean(np.square(without - without.mean()))))
    mean, half = float(by_seed.mean()), student_t((1 + CONFIDENCE) / 2, blocks - 1) * error
    return with_error(by_seed, error, RATIO, alone=Interval(low=mean - half, high=mean + half, estimate=mean))


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


def count_carrying(kept: NDArray[np.int64], share: Floats) -> Floats:
    """The least number of features that carries `CARRIED` of what all of them carry, on curves of `kept` and `share`.

    Between two measured points the share is linear in log n. NaN where all together carry nothing.

    Args:
        share: `[curves points]`.

    Returns:
        `[curves]`.
    """
    whole, curves = share[:, -1], np.arange(len(share))
    reached = np.argmax(share >= CARRIED * whole[:, None], axis=1)
    before = np.maximum(reached - 1, 0)
    below, above = share[curves, before], share[curves, reached]
    logs = np.log(np.maximum(kept, 1))
    rise = np.where(reached == before, 1.0, above - below)
    count = np.exp(logs[before] + (logs[reached] - logs[before]) * (CARRIED * whole - below) / rise)
    count = np.where(kept[reached] <= 1, kept[reached], count)
    return np.where((whole > 0) & np.isfinite(share).all(axis=1), count, np.nan)


def _carrying(curve: Faithfulness) -> Floats:
    """The count of the curve itself, then that of each resample, `[1 + RESAMPLES]`."""
    kept, ce = curve.by_importance
    return count_carrying(kept, np.concatenate([shares(curve, ce)[None], share_draws(curve, ce)]))


def carrying(curve: Faithfulness) -> Interval:
    """Count the most important features that carry `CARRIED` of what the SAE carries; 95 % over sequences."""
    return interval_of(_carrying(curve))


def measured_about(curve: Faithfulness) -> tuple[int, int] | None:
    """The measured counts between which `carrying` lies; None where the SAE carries nothing."""
    kept, ce = curve.by_importance
    share = shares(curve, ce)
    if not share[-1] > 0:
        return None
    reached = int(np.argmax(share >= CARRIED * share[-1]))
    return int(kept[max(0, reached - 1)]), int(kept[reached])


def carrying_ratio(pairs: Sequence[tuple[Faithfulness, Faithfulness]]) -> OverSeeds:
    """`carrying` of one divided by that of another, of each seed a pair, all on the same sequences, which are resampled
    together. NaN where one needs no feature at all.
    """
    counts = np.array([[_carrying(curve) for curve in pair] for pair in pairs])
    known = (counts > 0).all(axis=1)
    return over_seeds(np.divide(counts[:, 0], counts[:, 1], out=np.full(known.shape, np.nan), where=known), RATIO)


def correlation(x: Floats, y: Floats, of: Callable[[Floats, Floats, Floats], Floats]) -> Interval | None:
    """Correlate, with a 95 % bootstrap interval over pairs; None for fewer than `LEAST`, or where a side is constant.

    Args:
        of: `pearson` or `spearman`.
    """
    values = correlation_draws(x, y, of)
    return None if values is None else interval_of(values)


def correlation_draws(
    x: Floats, y: Floats, of: Callable[[Floats, Floats, Floats], Floats], seed: int = SEED
) -> Floats | None:
    """The correlation, then that of each resample of the pairs, `[1 + RESAMPLES]`."""
    if len(x) < LEAST:
        return None
    values = of(x, y, resampled_points(len(x), RESAMPLES, seed))
    return None if np.isnan(values[0]) else values
