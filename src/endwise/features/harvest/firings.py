"""Places where features fire in a batch, as a list of places, whether the latents came dense or sparse."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from endwise.common.axes import TokenMask
from endwise.common.errors import DataError
from endwise.dictionaries import Latents


@dataclass(frozen=True)
class Firings:
    """The places at positions that count where a latent is not 0, in the order of tokens, then of features."""

    rows: Int64[Tensor, " firings"]
    """Tokens of the batch, `[batch pos]` flattened."""
    features: Int64[Tensor, " firings"]
    values: Float[Tensor, " firings"]
    numbers: Int64[Tensor, " batch"]
    """Numbers of the sequences in the corpus."""
    context: int
    """Positions per sequence."""
    d_sae: int

    @classmethod
    def of(cls, latents: Latents, mask: TokenMask, numbers: Int64[Tensor, " batch"], d_sae: int) -> "Firings":
        """
        Raises:
            DataError: a latent is NaN, infinite or negative.
        """
        counts = mask.flatten()
        if (sparse := latents.pairs()) is not None:
            kept = counts[sparse.places.rows]
            rows, features = sparse.places.rows[kept], sparse.places.features[kept]
            values = sparse.values[kept]
        else:
            dense = latents.dense().flatten(0, -2).where(counts[:, None], 0.0)
            rows, features = dense.nonzero().unbind(1)
            values = dense[rows, features]
        if not ((values > 0) & values.isfinite()).all():
            raise DataError("A latent is NaN, infinite or negative; look for a diverged SAE or model.")
        return cls(rows, features, values.float(), numbers, mask.shape[1], d_sae)

    @cached_property
    def sequences(self) -> Int64[Tensor, " firings"]:
        """Sequence numbers in the corpus."""
        return self.numbers[self.rows // self.context]

    @cached_property
    def positions(self) -> Int64[Tensor, " firings"]:
        return self.rows % self.context

    def strongest(self, among: Bool[Tensor, " firings"]) -> Int64[Tensor, " cells"]:
        """Find in `among`, for each feature and sequence, the one with the greatest value; of equal ones the first
        in the text.
        """
        chosen = among.nonzero()[:, 0]
        cells = self.rows[chosen] // self.context * self.d_sae + self.features[chosen]
        order = self.values[chosen].argsort(descending=True, stable=True)
        order = order[cells[order].argsort(stable=True)]
        cells = cells[order]
        first = torch.ones_like(cells, dtype=torch.bool)
        first[1:] = cells[1:] != cells[:-1]
        return chosen[order[first]]

    def windows(self, some: Int64[Tensor, " some"], before: int, after: int) -> Float[Tensor, "some window"]:
        """The feature's latents from `before` positions before each to `after` after it; 0 beyond its sequence."""
        order, places = self._by_feature
        size = len(self.numbers) * self.context
        row, position = self.rows[some], self.positions[some]
        here = self.features[some] * size + row
        first = torch.searchsorted(places, here - position.clamp_max(before))
        last = torch.searchsorted(places, here + (self.context - 1 - position).clamp_max(after), right=True)
        count = last - first
        window = torch.repeat_interleave(count)
        within = torch.arange(len(window), device=some.device) - (count.cumsum(0) - count)[window]
        found = order[first[window] + within]
        values = self.values.new_zeros(len(some), before + 1 + after)
        values[window, self.rows[found] - row[window] + before] = self.values[found]
        return values

    @cached_property
    def _by_feature(self) -> tuple[Int64[Tensor, " firings"], Int64[Tensor, " firings"]]:
        """The firings sorted by feature, then row: their numbers, and feature and row in one number, ascending."""
        order = self.features.argsort(stable=True)
        return order, (self.features * (len(self.numbers) * self.context) + self.rows)[order]
