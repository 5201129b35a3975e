"""The paper's dictionary: ReLU features, decoder columns of unit norm."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from endwise.config.dictionary import ARCHITECTURES
from endwise.dictionaries.latents import DenseLatents, Latents, encode_sparse
from endwise.dictionaries.linear import LinearSAE
from endwise.formats import Layout

SPARSE_BELOW = 1 / 32
"""Largest share of active features for which sparse latents cost less than dense ones (docs/performance.md)."""


@ARCHITECTURES.add("standard", "relu")
class ReluSAE(LinearSAE):
    """`c = ReLU(W_eᵀ·x + b_e)`, `x̂ = c·D + b_d`; nothing is subtracted from the input (paper §2, eq. 1-2)."""

    architecture = "standard"
    layout = Layout(rule="ReLU(z)")
    sparse_below = SPARSE_BELOW
    splits = True

    def encode(self, x: Float[Tensor, "*rows d_in"], counted: Bool[Tensor, "*rows"] | None = None) -> Latents:
        """Sparse where few features are active, dense where many are, as early in training; the values are the same.

        The choice is made by counting, so that it depends on the input and the weights alone (on a GPU: `Rooms`).
        """
        x = x.to(self.encoder.dtype)
        sparse = encode_sparse(x, self.encoder, self.b_enc, self.sparse_below)
        latents = sparse or DenseLatents(torch.relu(self.before(x)))
        return latents if (norms := self.penalty_norms()) is None else replace(latents, norms=norms)

    def as_thresholded(self) -> Mapping[str, Tensor]:
        return {**self.export().tensors, "threshold": torch.zeros_like(self.b_enc)}
