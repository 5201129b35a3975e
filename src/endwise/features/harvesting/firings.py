"""Where features fire in a batch, as a list of places, whether the latents came dense or sparse."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from endwise.axes import TokenMask
from endwise.dictionaries import Latents
from endwise.dictionaries.latents import SparseLatents
from endwise.errors import DataError


@dataclass(frozen=True)
class Firings:
    """The places at positions that count where a latent is not 0, in the order of tokens, then of features."""

    rows: Int64[Tensor, " firings"]
    """Tokens of the batch, `[batch pos]` flattened."""
    features: Int64[Tensor, " firings"]
    values: Float[Tensor, " firings"]
    numbers: Int64[Tensor, " batch"]
    """Of the sequences, in the corpus."""
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
        if isinstance(latents, SparseLatents):
            kept = counts[latents.pairs.rows]
            rows, features = latents.pairs.rows[kept], latents.pairs.features[kept]
            values = latents.values[kept]
        else:
            dense = latents.dense().flatten(0, -2) * counts[:, None]
            rows, features = dense.nonzero().unbind(1)
            values = dense[rows, features]
        if not ((values > 0) & values.isfinite()).all():
            raise DataError("A latent is NaN, infinite or negative; look for a diverged SAE or model.")
        return cls(rows, features, values.float(), numbers, mask.shape[1], d_sae)

    @cached_property
    def sequences(self) -> Int64[Tensor, " firings"]:
        """In the corpus."""
        return self.numbers[self.rows // self.context]

    @cached_property
    def positions(self) -> Int64[Tensor, " firings"]:
        return self.rows % self.context

    def strongest(self, among: Bool[Tensor, " firings"]) -> Int64[Tensor, " cells"]:
        """Of those in `among`, for each feature and sequence the one with the greatest value; of equal ones the first
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
        if not len(self._places):
            return self.values.new_zeros(len(some), before + 1 + after)
        steps = torch.arange(-before, after + 1, device=some.device)
        wanted = (self.rows[some, None] + steps) * self.d_sae + self.features[some, None]
        found = torch.searchsorted(self._places, wanted).clamp_max(len(self._places) - 1)
        position = self.positions[some, None] + steps
        there = (self._places[found] == wanted) & (position >= 0) & (position < self.context)
        return torch.where(there, self.values[found], 0.0)

    @cached_property
    def _places(self) -> Int64[Tensor, " firings"]:
        """Ascending."""
        return self.rows * self.d_sae + self.features
