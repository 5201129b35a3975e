"""Features that fire together: the features of a random sample of tokens are kept, and counted at the end.

A table of all pairs has d_sae² entries. A sample of tokens has as many as they have active features, whatever d_sae is,
and gives every pair's counts at these tokens exactly; where the text has no more tokens than the sample may have, at
all of them.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from endwise.features.harvest.firings import Firings
from endwise.features.harvest.sums import drawn

SAMPLED_TOKENS = 1 << 17
LEAST_TOGETHER = 2
"""Tokens at which two features must fire together to be named: one may be chance."""
_STREAM = -2
_BLOCK = 1024
"""Features whose pairs are counted at a time."""


class TokenSample:
    """The active features of the tokens that are drawn, one after the other.

    Args:
        share: of the tokens to draw, 0 to 1.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self.tokens: list[Tensor] = []
        """Number of the token in the corpus, once for each feature that fires at it; int64, on the CPU."""
        self.features: list[Tensor] = []

    def add(self, firings: Firings) -> None:
        number = drawn(_STREAM, firings.sequences, firings.positions)
        chosen = ((number >> 11).double() + (1 << 52) < self._share * (1 << 53)).nonzero()[:, 0]
        self.tokens.append((firings.sequences[chosen] * firings.context + firings.positions[chosen]).cpu())
        self.features.append(firings.features[chosen].to(torch.int32).cpu())

    def merge(self, other: "TokenSample") -> None:
        self.tokens += other.tokens
        self.features += other.features

    def tensors(self) -> dict[str, Tensor]:
        self.tokens = [torch.cat([torch.zeros(0, dtype=torch.int64), *self.tokens])]
        self.features = [torch.cat([torch.zeros(0, dtype=torch.int32), *self.features])]
        return {"tokens": self.tokens[0], "features": self.features[0]}


class CoFiring(NamedTuple):
    """Partners of every feature: those that fire with it, by the greatest share; equal ones ascending."""

    features: list[NDArray[np.int32]]
    jaccard: list[NDArray[np.float32]]
    """Sampled tokens at which both fire / at which either does."""


def co_firing(sample: TokenSample, d_sae: int, most: int) -> CoFiring:
    """At most `most` partners of each feature, those with at least `LEAST_TOGETHER` tokens together."""
    tensors = sample.tensors()
    _, rows = np.unique(tensors["tokens"].numpy(), return_inverse=True)
    columns = tensors["features"].numpy()
    shape = (int(rows.max()) + 1 if len(rows) else 0, d_sae)
    active = sparse.csr_matrix((np.ones(len(rows), np.int32), (rows, columns)), shape=shape)
    firings = np.bincount(columns, minlength=d_sae)
    by_feature = active.T.tocsr()
    found = CoFiring([], [])
    for start in range(0, d_sae, _BLOCK):
        counts = (by_feature[start : start + _BLOCK] @ active).tocoo()
        _rank(found, start, min(_BLOCK, d_sae - start), counts, firings, most)
    return found


def _rank(found: CoFiring, start: int, size: int, counts: sparse.coo_matrix, firings: NDArray, most: int) -> None:
    kept = (counts.data >= LEAST_TOGETHER) & (counts.row + start != counts.col)
    row, partner, together = counts.row[kept], counts.col[kept], counts.data[kept]
    jaccard = together / (firings[row + start] + firings[partner] - together)
    order = np.lexsort((partner, -jaccard, row))
    ends = np.searchsorted(row[order], np.arange(size + 1))
    for first, last in zip(ends[:-1], np.minimum(ends[1:], ends[:-1] + most), strict=True):
        found.features.append(partner[order[first:last]].astype(np.int32))
        found.jaccard.append(jaccard[order[first:last]].astype(np.float32))
