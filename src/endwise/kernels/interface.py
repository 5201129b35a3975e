"""Interface of the kernels.

A sparse matrix `Z [n d_sae]` (latents) is a list of *pairs*, the (row, feature) places where it is not zero, and one
number per pair. Everything a sparse dictionary needs from it, forward and backward, is one of two operations: a
weighted sum of table rows per bag (a bag: the pairs of one row, or of one feature), and one dot product per pair.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

CHUNK_ELEMENTS = 1 << 20
"""Logits held at once, as elements of `[chunk vocab]`: 4 MiB in fp32, which stays in a processor's cache."""
GPU_CHUNK_ELEMENTS = 1 << 27
"""The same on a GPU, which needs large products to be busy."""
ROWS_PER_WIDTH, ROWS_ENOUGH = 2 / 3, 512
"""Wide hidden states want more rows: each chunk streams the whole unembedding once, and a product of few rows with it
waits for memory."""
ROWS_TOGETHER = 32
"""Vocabulary-major products of other numbers of rows than multiples of this take up to 1.6 times as long on a CPU."""
Index = Int[Tensor, " pairs"]
PerPair = Float[Tensor, " pairs"]


class FeatureOrder(NamedTuple):
    """The same pairs sorted by feature; within a feature, by row."""

    order: Index
    """Place of each pair in the order of rows."""
    rows: Index
    starts: Int[Tensor, " d_sae"]
    """Places where each feature's pairs begin."""


@dataclass(frozen=True)
class Pairs:
    """The places of a matrix `[n d_sae]` that are not zero, in the order of rows; within a row, of features."""

    rows: Index
    features: Index
    row_starts: Int[Tensor, " n"]
    """Places where each row's pairs begin."""
    n_features: int
    pads: Bool[Tensor, " pairs"] | None = None
    """Pairs that stand for nothing, at which every value is 0, so that the number of pairs need not be known: behind
    those of each row, as even as can be. None: there are none."""

    @property
    def n_rows(self) -> int:
        return len(self.row_starts)

    def where(self, kept: Bool[Tensor, " pairs"]) -> "Pairs":
        """Latents that are kept, of the same rows."""
        rows = self.rows[kept]
        starts = torch.searchsorted(rows, torch.arange(self.n_rows, device=rows.device))
        return Pairs(rows, self.features[kept], starts, self.n_features)

    @cached_property
    def by_feature(self) -> FeatureOrder:
        """Sorted once, for both gradients that are sums over a feature's pairs; pads are dealt out to all features."""
        features = self.features
        if self.pads is not None:
            features = (self.pads.cumsum(0) % self.n_features).where(self.pads, features)
        # Keys of 32 bits halve the passes of a card's sort; `bincount` would have the host wait for the greatest one.
        features, order = features.int().sort(stable=True)
        every = torch.arange(self.n_features, dtype=torch.int32, device=order.device)
        return FeatureOrder(order, self.rows[order], torch.searchsorted(features, every))


class Found(NamedTuple):
    """The pairs at which an encoder is active, and its values there."""

    pairs: Pairs
    values: PerPair

    def where(self, kept: Bool[Tensor, " pairs"]) -> "Found":
        """Latents that are kept."""
        return Found(self.pairs.where(kept), self.values[kept])


class DecoderGradients(NamedTuple):
    weights: PerPair
    table: Float[Tensor, "entries width"]


class Room(NamedTuple):
    """Slots for what is found, so that no shape depends on how much that is."""

    candidates: int
    """Places that are looked at."""
    pairs: int


class HeldPairs(NamedTuple):
    """Pairs in slots, of which those that are left over are pads; what there was no room for is missing."""

    found: Found
    needed: Int[Tensor, "2"]
    """Candidates and pairs that there are. Of pairs no more are known than the candidates that had room."""


@dataclass(frozen=True)
class Unembedding:
    """`logits = softcap · tanh(scale · (hidden · weightᵀ + bias) / softcap)`; the cap only if there is one."""

    weight: Float[Tensor, "vocab d_model"]
    bias: Float[Tensor, " vocab"] | None = None
    scale: float = 1.0
    softcap: float | None = None


class Divergence(NamedTuple):
    total: Float[Tensor, ""]
    """fp32 (float64 for hidden states in float64), summed over rows."""
    gradient: Float[Tensor, "n d_model"]
    """Gradient of the total by the spliced hidden states, in their dtype."""


class CrossEntropy(NamedTuple):
    losses: Float[Tensor, " n"]
    """Nats, in fp32 (float64 for hidden states in float64); 0 in rows that do not count."""
    gradient: Float[Tensor, "n d_model"] | None
    """Gradient of each row's loss by its own hidden state, in its dtype."""


def rows_per_chunk(vocab: int, width: int, on_gpu: bool) -> int:
    """Return how many rows' logits are held at once."""
    elements = GPU_CHUNK_ELEMENTS if on_gpu else CHUNK_ELEMENTS
    wanted = max(min(width * ROWS_PER_WIDTH, ROWS_ENOUGH), elements / vocab)
    return ROWS_TOGETHER * max(1, round(wanted / ROWS_TOGETHER))


class Kernels(ABC):
    def rows_per_chunk(self, unembedding: Unembedding) -> int:
        """Return how many rows' logits `kl`, and other reductions over the vocabulary, hold at once."""
        return rows_per_chunk(*unembedding.weight.shape, on_gpu=unembedding.weight.is_cuda)

    @abstractmethod
    def active(
        self,
        x: Float[Tensor, "n d_model"],
        weight: Float[Tensor, "d_sae d_model"],
        bias: Float[Tensor, " d_sae"],
        limit: int,
        above: Float[Tensor, " d_sae"] | Float[Tensor, ""] | None = None,
    ) -> Found | None:
        """Find where `x·weightᵀ + bias` is above `above` or NaN, with the values there; None if more than `limit`.

        Args:
            above: one number, or one for each feature; None: 0.
        """

    @abstractmethod
    def largest(
        self,
        x: Float[Tensor, "n d_model"],
        weight: Float[Tensor, "d_sae d_model"],
        bias: Float[Tensor, " d_sae"],
        k: int,
        limit: int,
    ) -> Found | None:
        """The k largest positive ones of each row of `x·weightᵀ + bias`, of equal ones the first, with every NaN, which
        counts as the largest; None if they are at more than `limit` places.
        """

    holds = False
    """True if pairs can be held in slots (`active_held`, `largest_held`)."""

    def active_held(
        self,
        x: Float[Tensor, "n d_model"],
        weight: Float[Tensor, "d_sae d_model"],
        bias: Float[Tensor, " d_sae"],
        room: Room,
        above: Float[Tensor, " d_sae"] | Float[Tensor, ""] | None = None,
    ) -> HeldPairs | None:
        """Variant of `active` in so many slots, without a host wait; None: not of such tensors."""
        return None

    def largest_held(
        self,
        x: Float[Tensor, "n d_model"],
        weight: Float[Tensor, "d_sae d_model"],
        bias: Float[Tensor, " d_sae"],
        k: int,
        room: Room,
    ) -> HeldPairs | None:
        """Variant of `largest` in so many slots, without a host wait; None: not of such tensors."""
        return None

    @abstractmethod
    def weighted_sums(
        self,
        table: Float[Tensor, "entries width"],
        entries: Index,
        bag_starts: Int[Tensor, " bags"],
        weights: PerPair,
    ) -> Float[Tensor, "bags width"]:
        """Σ over a bag's pairs of `weights · table[entries]`; bags lie one after another. An empty bag gives 0."""

    @abstractmethod
    def dot_products(
        self,
        table: Float[Tensor, "entries width"],
        entries: Index,
        rows: Float[Tensor, "n width"],
        pairs: Pairs,
    ) -> PerPair:
        """`table[entries] · rows[pairs.rows]`, one number per pair."""

    def decoder_gradients(
        self,
        table: Float[Tensor, "entries width"],
        pairs: Pairs,
        weights: PerPair,
        upstream: Float[Tensor, "n width"],
    ) -> DecoderGradients:
        """Gradients of each row's weighted sum of `table[features]`, by the weights and by the table.

        Args:
            upstream: the gradient by the sums.
        """
        products = self.dot_products(table, pairs.features, upstream, pairs)
        order, rows, starts = pairs.by_feature
        return DecoderGradients(products, self.weighted_sums(upstream, rows, starts, weights[order]))

    def feature_sums(self, numbers: PerPair, pairs: Pairs) -> Float[Tensor, " d_sae"]:
        """Σ of `numbers` over each feature's pairs."""
        return numbers.new_zeros(pairs.n_features).index_add_(0, pairs.features, numbers)

    @abstractmethod
    def kl(
        self,
        clean: Float[Tensor, "n d_model"],
        spliced: Float[Tensor, "n d_model"],
        keep: Bool[Tensor, " n"],
        unembedding: Unembedding,
    ) -> Divergence:
        """Σ over the rows in `keep` of KL(clean ‖ spliced) between the next-token distributions that two final hidden
        states predict, with its gradient; `[n vocab]` never exists as a whole.
        """

    @abstractmethod
    def cross_entropy(
        self,
        hidden: Float[Tensor, "n d_model"],
        targets: Int[Tensor, " n"],
        keep: Bool[Tensor, " n"],
        unembedding: Unembedding,
        with_gradient: bool,
    ) -> CrossEntropy:
        """−log softmax(logits)[target] of the rows in `keep`; `[n vocab]` never exists as a whole."""
