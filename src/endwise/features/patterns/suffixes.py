"""The shortest suffix of each context that keeps a feature's activation."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from endwise.features.patterns.short_texts import ShortTexts, distinct


@dataclass(frozen=True)
class Suffixes:
    """Distinct suffixes of one length."""

    features: NDArray[np.int64]
    """`[suffixes]`"""
    tokens: NDArray[np.int64]
    """`[suffixes length]`"""
    activations: NDArray[np.float64]
    """Mean over the contexts that they come from, in the whole text."""
    contexts: NDArray[np.int64]
    """Numbers of these."""

    def where(self, some: slice) -> "Suffixes":
        return Suffixes(self.features[some], self.tokens[some], self.activations[some], self.contexts[some])


def shortest_suffixes(
    texts: ShortTexts,
    features: NDArray[np.int64],
    activations: NDArray[np.float32],
    windows: NDArray[np.int64],
    kept: float,
) -> list[Suffixes]:
    """Find for each context the fewest tokens up to its end at which the feature, the model having read these alone,
    has the share `kept` of the activation that it has there in the whole text. Contexts without one give none.

    Args:
        features, activations: of each context, `[contexts]`.
        windows: tokens that end each, `[contexts longest]`; -1 before the beginning.

    Returns:
        By length, 1 and up.
    """
    left = np.arange(len(features))
    found = []
    for length in range(1, windows.shape[1] + 1):
        left = left[windows[left, -length] >= 0]
        values = texts.at_end(windows[left, -length:], features[left])
        serves = values >= kept * activations[left]
        found.append(_merged(features[left[serves]], windows[left[serves], -length:], activations[left[serves]]))
        left = left[~serves]
    return found


def _merged(features: NDArray, tokens: NDArray, activations: NDArray) -> Suffixes:
    """One of each feature's equal suffixes."""
    first, which = distinct(np.column_stack([features, tokens]))
    contexts = np.bincount(which, minlength=len(first))
    sums = np.bincount(which, weights=activations.astype(np.float64), minlength=len(first))
    return Suffixes(features[first], tokens[first], sums / np.maximum(contexts, 1), contexts)
