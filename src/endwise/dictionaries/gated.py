"""Features that one map turns on and another one sizes (Rajamanoharan et al. 2024, arXiv 2404.16014)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import linear

from endwise.config.dictionary import ARCHITECTURES, DictionaryConfig
from endwise.dictionaries.base import Exported, TrainingPass
from endwise.dictionaries.latents import DenseLatents, Latents, NearlySparseLatents, SparseLatents, encode_sparse
from endwise.dictionaries.linear import LinearConfig, LinearSAE
from endwise.formats import Layout

SPARSE_BELOW = 1 / 32
"""Largest share of features whose gates are open for which sparse latents are kept, as of ReLU ones."""
SMALLEST = 1e-30
"""Squared distances below it are none."""
NEAREST = 1e-4
"""Share of the norm of what is reconstructed that a reconstruction is taken to be off at least."""


class GatedConfig(LinearConfig):
    """Features that one map turns on and another one sizes."""

    architecture: str = "gated"
    gate_reconstruction: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the term that has the gates reconstruct too, relative to the objective."""


@ARCHITECTURES.add("gated")
class GatedSAE(LinearSAE):
    """`f = H(π)·ReLU(e^r·(x·W) + b_mag)`, `π = x·W + b_gate`, `x̂ = f·D + b_d`.

    `b_enc` is the gates' bias `b_gate`, and the pre-activations of `before` are π: they decide what is active. The
    penalty is that of ReLU(π), times the norms of directions where these are free. H passes no gradient, so that gates
    learn from the penalty and from a term of their own, `gate_reconstruction`: with x̃ = ReLU(π)·D + b_d, D and b_d
    frozen, per token

        μ·‖x̃ − t‖²,    t = x̂ − g/2μ,    μ = ‖g‖ / 2‖x̂ − x‖,

    where g is the gradient of all of the objective's reconstruction terms at x̂, and μ and t are constants. To the
    reconstruction that the gates make, the objective is L(x̂) + g·(x̃ − x̂) + μ‖x̃ − x̂‖², which is this term plus a
    constant: its slope is the objective's own, and its curvature puts the minimum as far from x̂ as x lies. For local
    MSE that is no approximation, t = x, and the term is the MSE of x̃, as in the paper. For end-to-end objectives, whose
    exact counterpart would need a second spliced pass, t lies where the later layers ask x̂ to go.
    """

    architecture = "gated"
    Config = GatedConfig
    layout = Layout(
        tensors={"b_gate": ("d_sae",), "b_mag": ("d_sae",), "r_mag": ("d_sae",)},
        biases={"b_gate": None, "b_mag": "r_mag"},
        rule="ReLU(e^r_mag·z + b_mag) where z + b_gate > 0",
    )
    sparse_below = SPARSE_BELOW
    wants_gradient = True

    def __init__(
        self, d_in: int, d_sae: int, d_out: int | None = None, *, gate_reconstruction: float = 1.0, **settings: Any
    ) -> None:
        super().__init__(d_in, d_sae, d_out, **settings)
        self.gate_reconstruction = gate_reconstruction
        self.b_mag = nn.Parameter(self.b_enc.detach().clone())
        self.r_mag = nn.Parameter(torch.zeros(d_sae))

    @classmethod
    def own(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        name = "gate_reconstruction"
        return {name: settings[name]} if name in settings else {}

    @property
    def b_gate(self) -> Float[Tensor, " d_sae"]:
        return self.b_enc

    def encode(self, x: Float[Tensor, "*rows d_in"], counted: Bool[Tensor, "*rows"] | None = None) -> Latents:
        """Sparse where few gates are open, as `ReluSAE` does; in training, features of open gates whose magnitude is 0
        or below are among them, at 0.
        """
        x = x.to(self.encoder.dtype)
        if not self.training:
            return self._finished(x)
        sparse = encode_sparse(x, self.encoder, self.b_gate.detach(), self.sparse_below)
        if sparse is not None:
            at = sparse.places.features
            shared = sparse.values - self.b_gate.detach().index_select(0, at)
            values, gates = self._gated(shared, *(each.index_select(0, at) for each in self._numbers()))
            of_gates = SparseLatents(gates, sparse.places, sparse.shape, norms=self.penalty_norms())
            return SparseGated(values, sparse.places, sparse.shape, gates=of_gates)
        values, gates = self._gated(linear(x, self.encoder), *self._numbers())
        return DenseGated(values, gates=DenseLatents(gates, norms=self.penalty_norms()))

    def _numbers(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.b_gate, self.r_mag.exp(), self.b_mag

    def _gated(self, shared: Tensor, b_gate: Tensor, scale: Tensor, b_mag: Tensor) -> tuple[Tensor, Tensor]:
        """f and ReLU(π), from what both maps share, x·W."""
        gate = shared + b_gate
        closed = gate <= 0  # not where it is NaN, which must be seen
        values = torch.relu(shared * scale + b_mag).masked_fill(closed, 0.0)
        return values.to(shared.dtype), torch.relu(gate).to(shared.dtype)

    def _finished(self, x: Tensor) -> Latents:
        """Encode as thresholded features (`as_thresholded`): those whose x·W is above both −b_gate and −b_mag/e^r."""
        b_gate, scale, b_mag = self._numbers()
        least = torch.maximum(-b_gate, -b_mag / scale)
        sparse = encode_sparse(x, self.encoder, -least, self.sparse_below)
        if sparse is None:
            return DenseLatents(self._gated(linear(x, self.encoder), b_gate, scale, b_mag)[0])
        at = sparse.places.features
        values = sparse.values * scale[at] + (b_mag - b_gate * scale).clamp_min(0)[at]
        return SparseLatents(values, sparse.places, sparse.shape)

    @property
    def auxiliary_weights(self) -> Mapping[str, float]:
        return {"gate_reconstruction": self.gate_reconstruction} if self.gate_reconstruction else {}

    def auxiliary(self, seen: TrainingPass) -> Mapping[str, Float[Tensor, ""]]:
        """Sum over rows of the term above, in the unit of the objective."""
        assert isinstance(seen.latents, DenseGated | SparseGated)
        exact, counted = self.b_dec.dtype, seen.counted[..., None]
        with torch.no_grad():
            slope = seen.gradients.to(exact).where(counted, 0.0)
            error = (seen.target - seen.reconstruction).to(exact).where(counted, 0.0)
            least = (NEAREST * seen.target.to(exact).where(counted, 0.0)).square().sum(-1, keepdim=True)
            distance = error.square().sum(-1, keepdim=True).maximum(least).clamp_min(SMALLEST).sqrt()
            steepness = slope.square().sum(-1, keepdim=True).clamp_min(SMALLEST).sqrt()
            curvature = steepness / (2 * distance)
            wanted = seen.reconstruction.to(exact) - slope * (distance / steepness)
            frozen = [each.detach() for each in (self.decoder, self.b_dec)]
        made = self.decode_by(seen.latents.gates, *frozen)
        if self.W_skip is not None:
            made = made + linear(seen.x.to(self.W_skip.dtype), self.W_skip.detach())
        each = (curvature * (made - wanted).square()).sum(-1)
        return {"gate_reconstruction": each.where(seen.counted, 0.0).sum()}

    def to_train(self, config: DictionaryConfig) -> "LinearSAE":
        sae = super().to_train(config)
        assert isinstance(sae, GatedSAE) and isinstance(config, GatedConfig)
        sae.gate_reconstruction = config.gate_reconstruction
        return sae

    def rescale(self, factors: Float[Tensor, " d_sae"]) -> None:
        super().rescale(factors)
        self.b_mag.mul_(factors)

    def export(self) -> Exported:
        own = dict(super().export().tensors)
        own["b_gate"] = own.pop("b_enc")
        return Exported({**own, "b_mag": self.b_mag, "r_mag": self.r_mag})

    def as_thresholded(self) -> Mapping[str, Tensor]:
        """A magnitude is positive and its gate open where it is above max(0, b_mag − e^r·b_gate)."""
        b_gate, scale, b_mag = self._numbers()
        own = {name: tensor for name, tensor in super().export().tensors.items() if name != "b_enc"}
        own |= {"W_enc": self.W_enc * scale, "b_enc": b_mag, "threshold": (b_mag - scale * b_gate).clamp_min(0)}
        return own

    def take_threshold(self, threshold: float) -> None:
        self.b_gate.data.copy_(self.b_mag - threshold)

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over a gated dictionary's weights, or those of features above thresholds θ, whose gates are open where
        b_enc − θ brings the pre-activation above 0.
        """
        super().fill(tensors)
        if "b_gate" not in tensors:
            tensors = {**tensors, "b_mag": tensors["b_enc"], "r_mag": torch.zeros_like(self.r_mag)}
            tensors["b_gate"] = tensors["b_enc"] - tensors["threshold"]
        for name in ("b_gate", "b_mag", "r_mag"):
            getattr(self, name).copy_(tensors[name])


@dataclass(frozen=True)
class DenseGated(DenseLatents):
    """Gated latents in training."""

    gates: DenseLatents = field(kw_only=True)
    """ReLU(π)."""

    def penalty(self, p: float = 1.0, mask: Bool[Tensor, "*rows"] | None = None) -> Float[Tensor, "*rows"]:
        """Return the penalty of the gates."""
        return self.gates.penalty(p, mask)


@dataclass(frozen=True)
class SparseGated(NearlySparseLatents):
    """Gated latents in training, where the gates are open."""

    gates: SparseLatents = field(kw_only=True)
    """ReLU(π)."""

    def penalty(self, p: float = 1.0, mask: Bool[Tensor, "*rows"] | None = None) -> Float[Tensor, "*rows"]:
        """Return the penalty of the gates."""
        return self.gates.penalty(p, mask)
