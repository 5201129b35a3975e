"""The k largest features of every token (Makhzani & Frey 2013; Gao et al. 2024, arXiv 2406.04093)."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from endwise.common.errors import ConfigError, FormatError
from endwise.config.dictionary import ARCHITECTURES
from endwise.dictionaries.base import Exported
from endwise.dictionaries.latents import DenseLatents, Latents, kept_values, sparse_values
from endwise.dictionaries.linear import LinearSAE
from endwise.dictionaries.selection import (
    SPARSE_BELOW,
    Annealed,
    Encoder,
    TopKConfig,
    top_per_row,
)
from endwise.dictionaries.sharing import best_pairs, best_places
from endwise.formats import Layout
from endwise.kernels import kept_per_row

SAME_NORM = 1e-4
"""Difference of norms, as a share of them, that says nothing."""
RESCALED = "rescale_acts_by_decoder_norm"
"""SAELens's setting: latents, and what is chosen by, are pre-activations times the norms of the directions. A format
folds it into the weights that it reads."""


class PerTokenConfig(TopKConfig):
    """The k largest features of every token."""

    architecture: str = "topk"


@ARCHITECTURES.add("topk")
class TopKSAE(LinearSAE):
    """`c` = the k largest of `ReLU(W_eᵀ·x + b_e)`, the others 0; `x̂ = c·D + b_d`.

    Where fewer than k are positive, these alone are active. Of equal ones the first are. Nothing is subtracted from the
    input. They are chosen by their size, whatever the norms of their directions, which are 1 unless `decoder_norm` is
    `free`.
    """

    architecture = "topk"
    Config = PerTokenConfig
    layout = Layout(settings=frozenset({"k"}), rule="the {k} largest of ReLU(z)")
    sparse_below = SPARSE_BELOW
    splits = True

    def __init__(self, d_in: int, d_sae: int, d_out: int | None = None, *, k: Annealed, **settings: Any) -> None:
        super().__init__(d_in, d_sae, d_out, **settings)
        self.k, self.k_now = k, k.at(0.0)

    @classmethod
    def own(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {"k": Annealed.of(settings)}

    def begin_step(self, done: float) -> None:
        self.k_now = self.k.at(done)

    def encode(self, x: Float[Tensor, "*rows d_in"], counted: Bool[Tensor, "*rows"] | None = None) -> Latents:
        """Sparse where k is small (on a GPU: `Rooms`)."""
        x, k = x.to(self.encoder.dtype), round(self.k_now if self.training else self.k.k)
        flat = x.reshape(-1, self.d_in).detach()
        encoder = Encoder(flat, self.encoder.detach(), self.b_enc.detach(), self.sparse_below)
        shards, own = self.world.shards, min(k, self.d_sae)
        if (found := top_per_row(encoder, own)) is not None:
            if shards.size == 1:
                return sparse_values(x, self.encoder, self.b_enc, found)
            return kept_values(x, self.encoder, self.b_enc, found, best_pairs(found, own, k, shards))
        values = torch.relu(self.before(x))
        rows = values.detach().view(-1, self.d_sae)
        kept = kept_per_row(rows, own) if shards.size == 1 else best_places(rows, own, k, shards)
        return DenseLatents(values.where(kept.view(values.shape), 0.0))

    def to_exceed(self, latents: Latents, features: Int64[Tensor, " some"]) -> Float[Tensor, "*rows 1"]:
        """The smallest that is active in the row; 0 where fewer than k are."""
        smallest = latents.smallest().detach()
        return smallest.where(latents.l0() >= round(self.k_now), 0.0)[..., None]

    def export(self) -> Exported:
        return Exported(super().export().tensors, {"k": self.k.k, RESCALED: False})

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], cfg: Mapping[str, Any]) -> "LinearSAE":
        if type(k := cfg.get("k")) is not int or not 0 < k <= cfg["d_sae"]:
            raise FormatError(f"k must be a whole number from 1 to {cfg['d_sae']}, the features, not {k!r:.80}.")
        return super().from_tensors(tensors, cfg)

    def section(self) -> dict[str, Any]:
        return {**super().section(), "k": self.k.k, "decoder_norm": "unit" if self._norms_alike() else "free"}

    def _norms_alike(self) -> bool:
        """Return whether unit norms would choose the same features."""
        norms = self.decoder_norms().detach()
        return float(norms.max() - norms.min()) <= SAME_NORM * float(norms.max())

    def to_train(self, config: Any) -> "LinearSAE":
        """Variant of `LinearSAE.to_train` with the k of the recipe.

        Raises:
            ConfigError: directions differ in norm, so that unit norms would change what is chosen.
        """
        norms = self.decoder_norms().detach()
        if config.decoder_norm == "unit" and not self._norms_alike():
            raise ConfigError(
                f"its directions have norms from {float(norms.min()):.6g} to {float(norms.max()):.6g}; with unit norms "
                "other features would be among the k largest. Set dictionary.decoder_norm=free."
            )
        sae = super().to_train(config)
        assert isinstance(sae, TopKSAE)
        sae.k = Annealed.of(config.model_dump())
        return sae
