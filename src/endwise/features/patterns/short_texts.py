"""Activations at the last token of short texts, each of which the model reads by itself."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from endwise.features.patterns.watching import Watched

TOKENS_AT_ONCE = 1 << 14
VALUES_AT_ONCE = 1 << 24
"""Activations, of all features, that are held at a time."""


@dataclass(frozen=True)
class ShortTexts:
    watched: Watched
    before: tuple[int, ...]
    """Tokens that stand before every text."""

    def at_end(self, tokens: NDArray[np.int64], features: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read each distinct text once.

        Args:
            tokens: the texts, `[asked length]`.
            features: whose activation is asked at the end of each, `[asked]`.

        Returns:
            `[asked]`; 0 at a token that does not count.
        """
        values = np.zeros(len(tokens), dtype=np.float32)
        first, text_of = distinct(tokens)
        order = np.argsort(text_of, kind="stable")
        starts = np.searchsorted(text_of[order], np.arange(len(first) + 1))
        length = tokens.shape[1] + len(self.before)
        size = max(1, min(TOKENS_AT_ONCE // length, VALUES_AT_ONCE // self.watched.count))
        for begin in range(0, len(first), size):
            texts = tokens[first[begin : begin + size]]
            some = order[starts[begin] : starts[begin + len(texts)]]
            active = self._active(texts)
            values[some] = active[
                torch.from_numpy(text_of[some] - begin).to(active.device),
                torch.from_numpy(features[some]).to(active.device),
            ].cpu()
        return values

    def _active(self, texts: NDArray[np.int64]) -> torch.Tensor:
        """All activations at the ends, `[texts watched]`."""
        before = np.broadcast_to(np.array(self.before, dtype=np.int64), (len(texts), len(self.before)))
        tokens = torch.from_numpy(np.concatenate([before, texts], 1)).to(self.watched.model.device)
        read, counts = self.watched.read(tokens, torch.ones_like(tokens, dtype=torch.bool))
        return self.watched.values(read[:, -1]).where(counts[:, -1:], 0.0)


def distinct(rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows `[n columns]` of numbers from 0 on that differ: where each stands first, `[distinct]`, and which of them
    each row is, `[n]`.
    """
    which = np.zeros(len(rows), dtype=np.int64)
    first = np.zeros(min(1, len(rows)), dtype=np.int64)
    for column in rows.T:
        key = which * (int(column.max(initial=0)) + 1) + column
        _, first, which = np.unique(key, return_index=True, return_inverse=True)
    return first, which
