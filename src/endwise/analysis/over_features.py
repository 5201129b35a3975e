"""Bootstrap intervals over features: what another draw of as many features, from the same run, would have given.

The features of a run are drawn with replacement, each run's from a stream of its own. Numbers of one run's features
(its cosines with two other dictionaries, say) share their draws and so are paired; numbers of two runs are not.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from endwise.analysis.correlations import spearman
from endwise.common.seeds import numpy_stream
from endwise.common.statistics import Floats
from endwise.evaluation.summary import RunSummary

RESAMPLES, SEED = 1000, 12345
_CHUNK = 4 << 20
"""Counts that are held at a time."""


def stream(run: RunSummary) -> np.random.Generator:
    """The run's own, wherever its folder lies and whichever runs it is compared with."""
    name = f"features of {run.method.key} {run.knob.value!r} {run.learning_rate!r} {run.data_seed}"
    return numpy_stream(SEED, name, run.seed)


def counts(features: int, generator: np.random.Generator, resamples: int = RESAMPLES) -> Iterator[Floats]:
    """Count how often each resample draws each feature, `[some resamples, features]` at a time."""
    size = max(1, _CHUNK // features)
    for start in range(0, resamples, size):
        rows = min(size, resamples - start)
        drawn = generator.integers(features, size=(rows, features)) + features * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * features).reshape(rows, features).astype(np.float64)


def resampled_means(values: NDArray, generator: np.random.Generator, resamples: int = RESAMPLES) -> Floats:
    """The mean over features in each resample: `[resamples]` of values `[features]`, `[resamples, m]` of
    `[features, m]`.
    """
    values = values.astype(np.float64)
    return np.concatenate([drawn @ values for drawn in counts(len(values), generator, resamples)]) / len(values)


def resampled_quantiles(
    values: NDArray, shares: Sequence[float], generator: np.random.Generator, resamples: int = RESAMPLES
) -> Floats:
    """`np.quantile` of each resample, `[resamples, shares]`."""
    order = np.argsort(values)
    ordered = values[order].astype(np.float64)
    places = (len(ordered) - 1) * np.asarray(shares)
    lower = np.floor(places).astype(np.int64)
    upper, weight = np.minimum(lower + 1, len(ordered) - 1), places - lower
    draws = []
    for drawn in counts(len(ordered), generator, resamples):
        first = len(ordered) * np.arange(len(drawn))[:, None]  # of each row, and what the rows before it draw
        reached = np.cumsum(drawn[:, order], axis=1) + first  # how many of the resample are at most the value there
        low, high = (
            ordered[np.searchsorted(reached.ravel(), place + first, side="right") - first] for place in (lower, upper)
        )
        draws.append(low + weight * (high - low))
    return np.concatenate(draws)


def resampled_spearman(x: Floats, y: Floats, generator: np.random.Generator, resamples: int = RESAMPLES) -> Floats:
    """Spearman's correlation in each resample, ranked again; NaN where one does not vary."""
    return np.concatenate([spearman(x, y, drawn) for drawn in counts(len(x), generator, resamples)])
