"""Bootstrap intervals over sequences, and interpolation between measured points that never guesses.

Tokens of one sequence are not independent, so it is whole sequences that are drawn with replacement. A resample is a
row of counts, `weights[r, s]` = how often resample `r` drew sequence `s`; since every metric is a ratio of sums over
tokens, all resamples of it are one matrix product with the per-sequence sums. Equal (number of sequences, resamples,
seed) give equal counts, which is what pairs the resamples of different runs.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit

from endwise.common.errors import DataError, EndwiseError
from endwise.common.seeds import numpy_stream

Floats = NDArray[np.float64]
Numbers = np.ndarray | Sequence[Any] | float | int
"""Values that numpy turns into an array of float64."""

CONFIDENCE = 0.95
LEAST_SEEDS = 3
"""Number of training seeds that an interval over seeds needs."""


class InterpolationError(EndwiseError, ValueError):
    """Measured points do not determine a value there; the message says why."""


@dataclass(frozen=True)
class Interval:
    """An estimate with both ends of its percentile bootstrap interval, all in the metric's own unit."""

    low: float
    high: float
    estimate: float


def bootstrap_ratio(numerators: Numbers, denominators: Numbers, resamples: int, seed: int) -> Interval:
    """Interval of Σ numerators / Σ denominators, both `[sequences]`, resampled together.

    Serves every token-weighted mean (sums over tokens / numbers of tokens) and the pooled unexplained variance
    (Σ errors / Σ variances). With one sequence there is nothing to resample and the interval has no width.

    Raises:
        DataError: unequal lengths, no sequence, a value that is not finite, or denominators that sum to zero.
    """
    top, bottom = _checked(numerators, denominators)
    draws = resampled_ratio(top, bottom, resamples, seed)
    return percentile_interval(draws, float(top.sum() / bottom.sum()))


def resampled_ratio(numerators: Numbers, denominators: Numbers, resamples: int, seed: int) -> Floats:
    """The ratio of sums in each resample, `[resamples]`; NaN where a resample drew nothing but empty sequences.

    Raises:
        DataError: see `bootstrap_ratio`.
    """
    top, bottom = _checked(numerators, denominators)
    sums = resampling_weights(len(top), resamples, seed) @ np.stack([top, bottom], axis=1)
    return np.divide(sums[:, 0], sums[:, 1], out=np.full(resamples, np.nan), where=sums[:, 1] != 0)


def percentile_interval(draws: Floats, estimate: float) -> Interval:
    """The central 95 % of the resampled values that are defined (not NaN)."""
    tail = (1 - CONFIDENCE) / 2
    kept = draws[~np.isnan(draws)]
    low, high = np.quantile(kept, [tail, 1 - tail]) if len(kept) else (estimate, estimate)
    return Interval(low=float(low), high=float(high), estimate=estimate)


def interval_over_seeds(values: Numbers) -> Interval:
    """Geometric mean of positive values `[seeds]` with its 95 % interval: Student's t on their logarithms.

    Raises:
        DataError: fewer than `LEAST_SEEDS`, or one that is not positive.
    """
    given = np.asarray(values, dtype=np.float64)
    if given.ndim != 1 or len(given) < LEAST_SEEDS or not (np.isfinite(given).all() and (given > 0).all()):
        raise DataError(f"An interval over seeds takes at least {LEAST_SEEDS} positive values; given {_listed(given)}.")
    logs = np.log(given)
    half = student_t((1 + CONFIDENCE) / 2, len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs))
    low, estimate, high = np.exp([logs.mean() - half, logs.mean(), logs.mean() + half])
    return Interval(low=float(low), high=float(high), estimate=float(estimate))


def interval_with_seeds(estimate: float, by_seed: Numbers, text_error: float) -> Interval:
    """The 95 % interval of an estimate that holds both what other seeds and what other held-out text would change.

    The variance is that of the mean over seeds, s²/n, plus that over text, which all seeds were measured on, so that
    more of them do not lessen it. Student's t with the degrees of freedom of Welch and Satterthwaite, those of the
    text's part being without bound. Give logarithms for what is a ratio (`exp_interval`).

    Args:
        by_seed: the same quantity of each seed, `[seeds]`.
        text_error: the estimate's standard error over held-out text.

    Raises:
        DataError: fewer than `LEAST_SEEDS` seeds, or a value that is not finite.
    """
    given = np.asarray(by_seed, dtype=np.float64)
    if given.ndim != 1 or len(given) < LEAST_SEEDS or not np.isfinite([*given, estimate, text_error]).all():
        raise DataError(f"An interval over seeds takes at least {LEAST_SEEDS} finite values; given {_listed(given)}.")
    of_seeds, of_text = given.var(ddof=1) / len(given), text_error**2
    total = of_seeds + of_text
    freedom = (len(given) - 1) * (total / of_seeds) ** 2 if of_seeds > 0 else np.inf
    half = student_t((1 + CONFIDENCE) / 2, freedom) * np.sqrt(total)
    return Interval(low=float(estimate - half), high=float(estimate + half), estimate=estimate)


def normal_interval(estimate: float, error: float) -> Interval:
    """The 95 % interval of what is distributed normally."""
    half = student_t((1 + CONFIDENCE) / 2, np.inf) * error
    return Interval(low=estimate - half, high=estimate + half, estimate=estimate)


def exp_interval(interval: Interval) -> Interval:
    """Turn the interval of a logarithm into that of the number."""
    return Interval(*(float(np.exp(end)) for end in (interval.low, interval.high, interval.estimate)))


def text_error(draws: Floats) -> float:
    """Standard error over held-out text: the spread of the resampled values that are defined (not NaN)."""
    return float(np.nanstd(draws, ddof=1))


def error_of(interval: Interval) -> float:
    """The standard error that a 95 % interval amounts to, were it a normal distribution's."""
    return (interval.high - interval.low) / (2 * student_t((1 + CONFIDENCE) / 2, np.inf))


def student_t(share: float, freedom: float | int) -> float:
    """The quantile of Student's t; of the normal distribution for unbounded degrees of freedom."""
    return float(ndtri(share) if np.isinf(freedom) else stdtrit(freedom, share))


@lru_cache(maxsize=2)
def resampling_weights(sequences: int, resamples: int, seed: int) -> Floats:
    """Count how often each resample draws each sequence: `[resamples, sequences]`, rows of that sum. Read-only."""
    generator = numpy_stream(seed, "bootstrap")
    counts = generator.multinomial(sequences, np.full(sequences, 1 / sequences), size=resamples).astype(np.float64)
    counts.flags.writeable = False
    return counts


def interpolate_at(x: Numbers, y: Numbers, target: Numbers) -> Floats:
    """y at `target`, with log y linear in x between neighbouring points, whatever order the points come in.

    Raises:
        InterpolationError: fewer than two points; a value that is not finite, or a y that is not positive; two points
            at one x; y not strictly monotone in x; a target outside the measured range.
    """
    x, y = monotone_points(x, y)
    wanted = np.asarray(target, dtype=np.float64)
    if not (np.all(wanted >= x[0]) and np.all(wanted <= x[-1])):
        raise InterpolationError(
            f"{_listed(np.atleast_1d(wanted))} lies outside the measured range {x[0]:.4g} to {x[-1]:.4g}; "
            "measure runs beyond it rather than extrapolate."
        )
    return np.asarray(np.exp(np.interp(wanted, x, np.log(y))))


def interpolate_rows(x: Floats, y: Floats, targets: Floats) -> Floats:
    """`interpolate_at` of each row of two or more points, `[rows points]`: `[rows targets]`, NaN where that raises."""
    x, log_y, fit = log_curves(x, y)
    values = np.full((len(x), len(targets)), np.nan)
    for row in np.flatnonzero(fit):
        values[row] = np.exp(np.interp(targets, x[row], log_y[row], left=np.nan, right=np.nan))
    return values


def log_curves(x: Floats, y: Floats) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """Return each row's points in order of x, `[rows points]`, with log y, and which rows `monotone_points` takes."""
    order = np.argsort(x, axis=1, kind="stable")
    x, y = np.take_along_axis(x, order, axis=1), np.take_along_axis(y, order, axis=1)
    steps = np.diff(y, axis=1)
    fit = (np.isfinite(x) & np.isfinite(y) & (y > 0)).all(1) & (np.diff(x, axis=1) > 0).all(1)
    fit &= (steps > 0).all(1) | (steps < 0).all(1)
    return x, np.log(y, out=np.full_like(y, np.nan), where=y > 0), np.asarray(fit)


def log_spaced(low: float, high: float, count: int) -> Floats:
    """Evenly spread on a logarithmic scale, both ends exactly."""
    grid = np.geomspace(low, high, count)
    grid[0], grid[-1] = low, high
    return grid


def monotone_points(x: Numbers, y: Numbers) -> tuple[Floats, Floats]:
    """The points in order of x, once they are known to be fit for interpolation.

    Raises:
        InterpolationError: see `interpolate_at`.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise InterpolationError(f"x and y must be two lists of one length; given shapes {x.shape} and {y.shape}.")
    if len(x) < 2:
        raise InterpolationError(f"a curve needs at least two points; there {'is one' if len(x) else 'are none'}.")
    values = x.tolist(), y.tolist()  # of a few points, Python's own floats are looked through sooner than arrays
    if not (all(map(isfinite, itertools.chain(*values))) and min(values[1]) > 0):
        raise InterpolationError(f"x must be finite and y positive; x is {_listed(x)} and y {_listed(y)}.")
    points = sorted(zip(*values, strict=True), key=itemgetter(0))
    x, y = np.array([point[0] for point in points]), np.array([point[1] for point in points])
    steps = [(right[0] - left[0], right[1] - left[1]) for left, right in itertools.pairwise(points)]
    if not all(dx > 0 for dx, _ in steps) or not (all(dy > 0 for _, dy in steps) or all(dy < 0 for _, dy in steps)):
        raise InterpolationError(f"the points are not strictly monotone: at {_listed(x)} the values are {_listed(y)}.")
    return x, y


def _checked(numerators: Numbers, denominators: Numbers) -> tuple[Floats, Floats]:
    top, bottom = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if top.ndim != 1 or top.shape != bottom.shape or not len(top):
        raise DataError(f"A bootstrap needs one sum per sequence, on both sides; given {top.shape} and {bottom.shape}.")
    if not (np.isfinite(top).all() and np.isfinite(bottom).all()):
        raise DataError("A metric is NaN or infinite on some held-out sequence; look for a diverged SAE or model.")
    if bottom.sum() == 0:
        raise DataError("A metric is undefined: what it divides by sums to zero (no unmasked token, or no variance).")
    return top, bottom


def _listed(values: Floats) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
