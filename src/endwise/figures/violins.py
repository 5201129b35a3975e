"""Distributions side by side: outlines of their density, with every value inside."""

from collections.abc import Sequence

import numpy as np

from endwise.common.seeds import numpy_stream
from endwise.common.statistics import Floats, Interval
from endwise.config.method import Method
from endwise.figures.charts import Mark, Series

HALF_WIDTH = 0.26
"""Half the width of a violin at its widest; neighbours stand 1 apart."""
NARROWEST = 0.01
"""Bandwidth of the density where values hardly differ."""
POINTS = 48
"""Points on either side of an outline."""
OUTLINED = 15
"""Values from which on there is an outline: that of fewer would show the bandwidth, not them."""


def density(values: Floats, at: Floats) -> Floats:
    """Gaussian kernel density of `values [n]` at `[points]`, with Scott's bandwidth, σ n^(−1/5)."""
    width = max(float(values.std(ddof=1)) * len(values) ** -0.2 if len(values) > 1 else 0.0, NARROWEST)
    return np.exp(-0.5 * ((at[:, None] - values) / width) ** 2).mean(1) / (width * np.sqrt(2 * np.pi))


def violin(
    method: Method, place: float, values: Floats, hovers: Sequence[str], mean: Interval | None = None, note: str = ""
) -> list[Series]:
    """A violin about x = `place` from the least value to the greatest, its values, and their mean with its interval;
    of few values without its outline.

    Args:
        hovers: the text of each value.
        note: text shown over the mean.
    """
    if not len(values):
        return []
    ys = np.linspace(values.min(), values.max(), POINTS)
    scale = HALF_WIDTH / density(values, ys).max()
    halves = scale * density(values, ys)
    right = [Mark(place + float(half), float(y)) for half, y in zip(halves, ys, strict=True)]
    left = [Mark(place - float(half), float(y)) for half, y in zip(halves[::-1], ys[::-1], strict=True)]
    outline = [Series(method, (*right, *left, right[0]), marked=False)] if len(values) >= OUTLINED else []
    offsets = numpy_stream(0, "violin").uniform(-0.8, 0.8, len(values)) * scale * density(values, values)
    points = tuple(
        Mark(place + float(offset), float(value), hover)
        for offset, value, hover in zip(offsets, values, hovers, strict=True)
    )
    series = [*outline, Series(method, points, joined=False)]
    if mean is not None:
        ends = (mean.low, mean.high)
        series.append(Series(method, (Mark(place, mean.estimate, note, y_ends=ends),), "mean", joined=False, rank=1))
    return series
