"""Interpolated modified Kneser-Ney n-gram models over token ids: the baseline a small language model has to beat.

Chen & Goodman (1998, sections 3 and 4.1). With `c` the number of times an n-gram occurs in the highest order, and the
number of distinct tokens that precede it in every lower order (its continuation count), `h` a context and `h'` the
context without its first token,

    p_k(w | h) = (c(hw) − D(c(hw)))⁺ / Σ_v c(hv)  +  Σ_v D(c(hv)) / Σ_v c(hv) · p_{k−1}(w | h'),    p_0 = 1 / vocab.

Where `h` never occurred, p_k(w | h) = p_{k−1}(w | h'). The discount D takes three values, for counts of 1, 2 and from
3 on, estimated per order from the numbers of n-grams with counts 1 to 4.

An n-gram is one integer, its ids side by side in equally many bits, so counting is sorting and finding is bisection.
The corpus is one stream: contexts run across the ends of documents, as they do in a language model's packed windows.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]
Floats = NDArray[np.float64]
KEY_BITS = 64
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)
"""For an order whose counts of counts determine no discounts (a tiny corpus)."""


@dataclass(frozen=True)
class Level:
    """One order: sorted n-grams with their own share of the probability, sorted contexts with what they pass down."""

    grams: Keys
    own: Floats
    contexts: Keys
    passed: Floats


class KneserNey:
    """An n-gram model of the given order; `order=1` is the smoothed unigram model.

    Raises:
        ValueError: the stream is shorter than the order, an id is outside the vocabulary, or n-grams of this order
            over this vocabulary do not fit into 64 bits.
    """

    def __init__(self, tokens: np.ndarray, order: int, vocab: int) -> None:
        self.order, self.vocab, self.bits = order, vocab, max(1, (vocab - 1).bit_length())
        if order < 1 or order * self.bits > KEY_BITS:
            raise ValueError(f"order {order} with {self.bits} bits a token: need 1 to {KEY_BITS // self.bits}.")
        if len(tokens) < order:
            raise ValueError(f"{len(tokens)} tokens hold no n-gram of order {order}.")
        counted = [np.unique(self._keys(tokens, k), return_counts=True) for k in range(1, order + 1)]
        self.levels = []
        for k in range(1, order):
            endings = counted[k][0] & np.uint64((1 << k * self.bits) - 1)
            self.levels.append(self._level(*np.unique(endings, return_counts=True)))
        self.levels.append(self._level(*counted[-1]))

    def stream(self, tokens: np.ndarray) -> Floats:
        """Probability of every token of a stream given the `order - 1` before it (at the start: all there are)."""
        probability = np.full(len(tokens), 1 / self.vocab)
        for k, level in enumerate(self.levels[: len(tokens)], start=1):
            probability[k - 1 :] = self._interpolated(level, self._keys(tokens, k), probability[k - 1 :])
        return probability

    def distribution(self, context: np.ndarray) -> Floats:
        """Probability of every token of the vocabulary after a context of any length, `[vocab]`."""
        context = np.asarray(context)
        probability = np.full(self.vocab, 1 / self.vocab)
        for k, level in enumerate(self.levels[: len(context) + 1], start=1):
            columns = [np.full(self.vocab, token) for token in context[len(context) - k + 1 :]]
            keys = self._packed([*columns, np.arange(self.vocab)])
            probability = self._interpolated(level, keys, probability)
        return probability

    def _keys(self, tokens: np.ndarray, k: int) -> Keys:
        """The key of every k-gram of a stream, in its order: `[tokens - k + 1]`."""
        return self._packed([tokens[first : len(tokens) - k + 1 + first] for first in range(k)])

    def _packed(self, columns: list[np.ndarray]) -> Keys:
        keys = np.zeros(len(columns[0]), dtype=np.uint64)
        for column in columns:
            if len(column) and not 0 <= int(column.min()) <= int(column.max()) < self.vocab:
                raise ValueError(f"ids from {column.min()} to {column.max()}: the vocabulary has {self.vocab}.")
            keys = (keys << np.uint64(self.bits)) | column.astype(np.uint64)
        return keys

    def _level(self, grams: Keys, counts: NDArray[np.int64]) -> Level:
        table = np.array([0.0, *discounts(counts)])
        discount = table[np.minimum(counts, 3)]
        # Sorted n-grams have their contexts side by side.
        contexts, first = np.unique(grams >> np.uint64(self.bits), return_index=True)
        totals = np.add.reduceat(counts, first)
        followers = np.diff([*first, len(grams)])
        own = (counts - discount) / np.repeat(totals, followers)
        return Level(grams, own, contexts, np.add.reduceat(discount, first) / totals)

    def _interpolated(self, level: Level, keys: Keys, lower: Floats) -> Floats:
        own = found(level.grams, level.own, keys, missing=0.0)
        return own + found(level.contexts, level.passed, keys >> np.uint64(self.bits), missing=1.0) * lower


def discounts(counts: NDArray[np.int64]) -> tuple[float, float, float]:
    """D(1), D(2) and D(3 and more) from how many n-grams have counts 1 to 4: `D(i) = i − (i + 1) Y n_{i+1} / n_i`.

    `Y = n_1 / (n_1 + 2 n_2)`. Where an `n_i` is zero or a discount would be negative: `FALLBACK_DISCOUNTS`.
    """
    n = [int((counts == times).sum()) for times in range(1, 5)]
    if min(n) == 0:
        return FALLBACK_DISCOUNTS
    y = n[0] / (n[0] + 2 * n[1])
    one, two, more = (i - (i + 1) * y * n[i] / n[i - 1] for i in (1, 2, 3))
    return (one, two, more) if min(one, two, more) >= 0 else FALLBACK_DISCOUNTS


def found(keys: Keys, values: Floats, wanted: Keys, missing: float) -> Floats:
    """The value beside each wanted key in a sorted table, or `missing` where the table lacks it."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], missing)
