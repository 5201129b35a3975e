"""Scores of patterns as predictors of where features fire, and how strongly, on text that they were not made from."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from endwise.common.seeds import numpy_stream
from endwise.common.statistics import Floats
from endwise.features.harvest.firings import Firings
from endwise.features.patterns.trie import Matches

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Predicted:
    """Sums over the tokens that count, `[features]` each."""

    tokens: int
    fired: Counts
    """Tokens at which the feature fires."""
    predicted: Counts
    """Tokens at which a pattern fits."""
    both: Counts
    sums: Floats
    """Σ y, Σ y², Σ x, Σ x², Σ xy of its activation y and the predicted one x, either 0 where there is none,
    `[5 features]`."""

    @property
    def precision(self) -> Floats:
        """Share of the tokens that are predicted at which it fires; NaN where none is predicted."""
        return _ratio(self.both, self.predicted)

    @property
    def recall(self) -> Floats:
        """Share of the tokens at which it fires that are predicted; NaN where it fires at none."""
        return _ratio(self.both, self.fired)

    @property
    def f1(self) -> Floats:
        """2 · both / (fired + predicted), the harmonic mean of precision and recall; 0 where nothing is predicted."""
        return _ratio(2 * self.both, self.fired + self.predicted)

    @property
    def correlation(self) -> Floats:
        """Pearson's, over all tokens, of the activation and the predicted one; 0 where what is predicted is the same
        everywhere, NaN where the activation is.
        """
        y, yy, x, xx, xy = self.sums
        n = max(1, self.tokens)
        variances = np.maximum(yy - y * y / n, 0), np.maximum(xx - x * x / n, 0)
        spread = np.sqrt(variances[0] * variances[1])
        found = np.divide(xy - x * y / n, spread, out=np.zeros(len(y)), where=spread > 0)
        return np.where(variances[0] > 0, found, np.nan)


class PredictedSums:
    """
    Args:
        features: their number.
        of: whose patterns stand for each feature's; None: its own.
    """

    def __init__(self, features: int, of: Counts | None = None) -> None:
        self._stands_for = np.argsort(np.arange(features) if of is None else of)
        self._tokens = 0
        self._counts = np.zeros((3, features), dtype=np.int64)
        self._sums = np.zeros((5, features))

    def add(self, firings: Firings, matches: Matches, counts: NDArray[np.bool_]) -> None:
        """
        Args:
            firings: at the tokens that count.
            matches: of the same tokens, and of others.
            counts: the tokens that count, `[batch pos]` flattened.
        """
        size = len(self._stands_for)
        inside = counts[matches.rows]
        rows, x = matches.rows[inside], matches.activations[inside]
        features = self._stands_for[matches.features[inside]]
        fired, y = firings.features.cpu().numpy(), firings.values.double().cpu().numpy()
        keys = firings.rows.cpu().numpy() * size + fired
        both, at, of = np.intersect1d(keys, rows * size + features, assume_unique=True, return_indices=True)
        self._tokens += int(counts.sum())
        for place, some in enumerate((fired, features, both % size)):
            self._counts[place] += np.bincount(some, minlength=size)
        weighted = ((fired, y), (fired, y * y), (features, x), (features, x * x), (both % size, y[at] * x[of]))
        for place, (some, weights) in enumerate(weighted):
            self._sums[place] += np.bincount(some, weights, minlength=size)

    def result(self) -> Predicted:
        fired, predicted, both = self._counts
        return Predicted(self._tokens, fired, predicted, both, self._sums)


def exchanged(features: NDArray[np.int64], count: int, seed: int) -> Counts:
    """Give each of `count` features another one's number: those named, in a random circle; the others keep theirs."""
    of = np.arange(count)
    mixed = numpy_stream(seed, "shuffled patterns").permutation(features)
    of[mixed] = np.roll(mixed, 1)
    return of


def _ratio(top: Counts, bottom: Counts) -> Floats:
    return np.divide(top, bottom, out=np.full(len(top), np.nan), where=bottom > 0)
