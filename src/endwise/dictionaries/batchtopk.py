"""The k·B largest features of a step's B tokens (Bussmann et al. 2024, arXiv 2412.06410)."""

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from endwise.config.dictionary import ARCHITECTURES
from endwise.dictionaries.base import Exported
from endwise.dictionaries.latents import DenseLatents, Latents, encode_sparse, kept_values
from endwise.dictionaries.linear import LinearSAE
from endwise.dictionaries.selection import (
    SPARSE_BELOW,
    AboveBound,
    Annealed,
    Encoder,
    TopKConfig,
    candidates_of_step,
    cut_of,
    threshold_for,
)
from endwise.formats import Layout

FITTED_ON = 32_768
"""Tokens that the threshold is set by at the end."""


class BatchTopKConfig(TopKConfig):
    """The k·B largest features of a step's B tokens."""

    architecture: str = "batchtopk"
    threshold_rate: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Rate of the moving average of the smallest value kept, by which features are chosen outside training until the
    threshold is set at the end."""

    @property
    def batchwise(self) -> bool:
        return True


@ARCHITECTURES.add("batchtopk")
class BatchTopKSAE(LinearSAE):
    """`c` = the k·B largest of `ReLU(W_eᵀ·x + b_e)` among the B tokens of a step that count, the others 0.

    Tokens of all processes compete; those that do not count (padding) do not, and have what exceeds the smallest value
    kept. Where fewer are positive, these alone are active. Of equal ones the first are.

    Outside training features are active above a threshold θ, in a file a JumpReLU dictionary's: the moving average of
    the smallest value kept, a ← (1 − r)·a + r·s and θ = a / (1 − (1 − r)ⁿ) after n steps, so that it does not start
    from 0; and at the end of training the θ at which k features are active on average over the latest training tokens.
    """

    architecture = "batchtopk"
    Config = BatchTopKConfig
    layout = Layout(tensors={"threshold": ("d_sae",)}, settings=frozenset({"k"}))
    sparse_below = SPARSE_BELOW
    splits = True
    last_tokens = FITTED_ON

    average: Tensor
    """a."""
    weight: Tensor
    """1 − (1 − r)ⁿ."""
    fitted: Tensor
    """θ as it was set at the end; −1: it is not."""

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        d_out: int | None = None,
        *,
        k: Annealed,
        threshold_rate: float = 0.01,
        **settings: Any,
    ) -> None:
        super().__init__(d_in, d_sae, d_out, **settings)
        self.k, self.k_now, self.threshold_rate = k, k.at(0.0), threshold_rate
        for name, value in (("average", 0.0), ("weight", 0.0), ("fitted", -1.0)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64))
        self._smallest: Tensor | None = None
        """The smallest value that the step kept; infinite, if none."""

    @classmethod
    def own(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {"k": Annealed.of(settings), "threshold_rate": settings.get("threshold_rate", 0.01)}

    @property
    def threshold(self) -> Float[Tensor, ""]:
        """θ; 0 before the first step."""
        average = self.average / self.weight.clamp_min(torch.finfo(torch.float64).tiny)
        return self.fitted.where(self.fitted >= 0, average).to(self.encoder.dtype)

    def thresholds(self) -> Float[Tensor, " d_sae"]:
        return self.threshold.expand(self.d_sae)

    def begin_step(self, done: float) -> None:
        self.k_now = self.k.at(done)

    def encode(self, x: Float[Tensor, "*rows d_in"], counted: Bool[Tensor, "*rows"] | None = None) -> Latents:
        """Sparse where k is small (on a GPU: `Rooms`)."""
        x = x.to(self.encoder.dtype)
        if self.training:
            return self._largest(x, None if counted is None else counted.flatten())
        sparse = encode_sparse(x, self.encoder, self.b_enc, self.sparse_below, self.threshold)
        if sparse is not None:
            return sparse
        before = self.before(x)
        return DenseLatents(before.where((before <= self.threshold).logical_not(), 0.0))

    def _largest(self, x: Float[Tensor, "*rows d_in"], counted: Bool[Tensor, " n"] | None) -> Latents:
        """Choose among the tokens of a step."""
        flat = x.detach().reshape(-1, self.d_in)
        competing = torch.tensor(len(flat), device=x.device) if counted is None else counted.sum()
        self.world.replicas.add([competing])
        count = (competing.double() * self.k_now).round().long()
        encoder = Encoder(flat, self.encoder.detach(), self.b_enc.detach(), self.sparse_below)
        own = self.k_now / self.world.shards.size
        total = self.world.replicas.total(len(flat))  # by all, as any may be dense
        if (some := candidates_of_step(encoder, counted, own, count, self.world)) is not None:
            found = some.found
            kept = self._kept(found.values, None if counted is None else counted[found.pairs.rows], count, some)
            return kept_values(x, self.encoder, self.b_enc, found, kept)
        values = torch.relu(self.before(x))
        rows = None if counted is None else counted[:, None].expand(-1, self.d_sae).flatten()
        most = min(values.numel(), round(self.k_now * total))
        kept = self._kept(values.detach().view(-1), rows, count, most).view(values.shape)
        return DenseLatents(values.where(kept, 0.0))

    def _kept(
        self,
        values: Float[Tensor, " places"],
        counted: Bool[Tensor, " places"] | None,
        count: Tensor,
        among: AboveBound | int,
    ) -> Bool[Tensor, " places"]:
        """Mark the `count` largest of those that count, and of the others what exceeds the smallest of these.

        Args:
            among: the candidates whose values they are; or, of every place's, how many can be marked at most.
        """
        largest = competing = values if counted is None else values.where(counted, 0.0)
        if isinstance(among, int):
            largest = competing.where(~competing.isnan(), 0.0).topk(among, sorted=False).values
        cut = cut_of(largest.float() if largest.dtype.itemsize < 4 else largest, count, self.world)
        if not isinstance(among, int):
            among.check(cut)
        if self.counts:
            self._smallest = cut.smallest
        cut = cut.within(values.dtype)
        return cut.kept(competing) | (values > cut.smallest) if counted is not None else cut.kept(values)

    def after_step(self) -> None:
        if self._smallest is not None:
            there = self._smallest.isfinite()
            rate = self.threshold_rate * there.double()
            self.average.lerp_(self._smallest.where(there, 0.0).double(), rate)
            self.weight.lerp_(torch.ones_like(self.weight), rate)
            self.fitted.fill_(-1.0)
            self._smallest = None

    def see_last(self, x: Float[Tensor, "tokens d_in"], target: Float[Tensor, "tokens d_out"]) -> None:
        self.fitted.copy_(threshold_for(Encoder(x, self.encoder, self.b_enc), float(self.k.k), self.world.shards))

    def export(self) -> Exported:
        threshold = self.threshold.expand(self.d_sae).contiguous()
        return Exported({**super().export().tensors, "threshold": threshold}, architecture="jumprelu")

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        super().fill(tensors)
        self.fitted.copy_(tensors["threshold"].mean())

    def take_threshold(self, threshold: float) -> None:
        self.fitted.fill_(threshold)

    def to_train(self, config: Any) -> "LinearSAE":
        sae = super().to_train(config)
        assert isinstance(sae, BatchTopKSAE)
        sae.k, sae.threshold_rate = Annealed.of(config.model_dump()), config.threshold_rate
        return sae

    def rescale(self, factors: Float[Tensor, " d_sae"]) -> None:
        """Variant of `LinearSAE.rescale`; the threshold, which all features share, goes with the mean factor."""
        super().rescale(factors)
        self.fitted.mul_(factors.double().mean().where(self.fitted >= 0, 1.0))
