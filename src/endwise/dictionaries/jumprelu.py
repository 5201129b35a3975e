"""Features above thresholds that are learned (JumpReLU), and what penalises how many of them are active.

Steps have no gradient that a threshold could follow, so that one is put in their place, as if each step were a ramp of
width ε: with K(u) = 1 for |u| < ½ and 0 elsewhere, and f = z·H(z − θ),

    ∂f/∂θ = −(θ/ε)·K((z − θ)/ε),    ∂H/∂θ = −(1/ε)·K((z − θ)/ε),

and ∂f/∂z = H, ∂H/∂z = 0 (Rajamanoharan et al. 2024, arXiv 2407.14435); or to z as to θ with the opposite sign
(Anthropic, January 2025).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from endwise.common.processes import ALONE, World
from endwise.config.dictionary import ARCHITECTURES, DictionaryConfig, KnobRule
from endwise.dictionaries.base import Exported
from endwise.dictionaries.latents import (
    DenseLatents,
    Latents,
    NearlySparseLatents,
    SparseLatents,
    encode_sparse,
    feature_sums,
    per_pair,
)
from endwise.dictionaries.linear import LinearConfig, LinearSAE
from endwise.formats import Layout
from endwise.kernels import Pairs

SPARSE_BELOW = 1 / 32
"""Largest share of features at or near their thresholds for which sparse latents are kept, as of ReLU ones."""
FIRST_TOKENS = 8192
"""Tokens over which the typical pre-activation is measured."""
CHUNK_ELEMENTS = 1 << 23
"""Pre-activations held at once there."""
Penalty = Literal["l0", "quadratic", "tanh", "tanh_quadratic"]
Above0 = Annotated[float, Field(gt=0)]
NotBelow0 = Annotated[float, Field(ge=0)]


class JumpReLUConfig(LinearConfig):
    """Features above thresholds that are learned.

    Thresholds and bandwidth are in units of the typical pre-activation: the root mean square of all features'
    pre-activations over the first training tokens, so that they fit inputs of any scale.
    """

    knobs: ClassVar[Mapping[str, KnobRule]] = {"target_l0": KnobRule("target L0")}
    counting: ClassVar[tuple[str, ...]] = ("target_l0",)
    powers: ClassVar[bool] = False
    architecture: str = "jumprelu"
    penalty: Penalty = "l0"
    """Per token, times λ: `l0` Σ H; `quadratic` (2/L0*)·(Σ H − L0*)²; `tanh` Σ tanh(s·f·‖d‖); `tanh_quadratic`
    Σ p·(1 + p/r) with p a feature's mean of tanh(s·f·‖d‖) over all tokens of a step."""
    target_l0: Above0 | None = None
    """L0*, for `quadratic` alone."""
    tanh_scale: Above0 = 4.0
    """s."""
    rare: Above0 = 0.01
    """r, the mean from which on `tanh_quadratic` grows with its square."""
    threshold_init: NotBelow0 = 0.1
    """θ at the start, in units of the typical pre-activation."""
    bandwidth: Above0 = 0.5
    """ε, the width around a threshold in which pre-activations move it, in units of the typical pre-activation."""
    straight_through: Literal["threshold", "both"] = "threshold"
    """Target of the step's gradient: to θ alone (DeepMind), or to pre-activations too (Anthropic)."""

    @model_validator(mode="after")
    def _target_as_needed(self) -> "JumpReLUConfig":
        if (self.penalty == "quadratic") != (self.target_l0 is not None):
            raise ValueError(
                f"penalty is {self.penalty} and target_l0 is {self.target_l0}: give target_l0, the number of active "
                "features wanted, with penalty quadratic and with no other"
            )
        return self

    @property
    def batchwise(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]  by the penalty, not the class
        return self.penalty == "tanh_quadratic" or super().batchwise


@ARCHITECTURES.add("jumprelu")
class JumpReLUSAE(LinearSAE):
    """`f = z·H(z − θ)` with `z = W_eᵀ·x + b_e`, `x̂ = f·D + b_d`; θ ≥ 0, one for each feature, in float32."""

    architecture = "jumprelu"
    Config = JumpReLUConfig
    layout = Layout(tensors={"threshold": ("d_sae",)}, rule="z where z > θ")
    sparse_below = SPARSE_BELOW
    splits = True
    first_tokens = FIRST_TOKENS

    def __init__(self, d_in: int, d_sae: int, d_out: int | None = None, **settings: Any) -> None:
        super().__init__(d_in, d_sae, d_out, **settings)
        self.config = JumpReLUConfig(size=d_sae)
        self.threshold = nn.Parameter(torch.zeros(d_sae))
        self.register_buffer("unit", torch.ones(()))
        self.unit: Tensor
        """The typical pre-activation: of what `bandwidth` and `threshold_init` are multiples."""
        self.starts = False
        """True while thresholds are still to be set."""

    @classmethod
    def build(cls, config: JumpReLUConfig, d_in: int, seed: int, d_out: int | None = None) -> "JumpReLUSAE":
        sae = super().build(config, d_in, seed, d_out)
        assert isinstance(sae, JumpReLUSAE)
        sae.config, sae.starts = config, True
        sae.threshold.data.fill_(config.threshold_init)
        return sae

    def see_first(self, x: Float[Tensor, "tokens d_in"], target: Float[Tensor, "tokens d_out"]) -> None:
        chunks = x.split(max(1, CHUNK_ELEMENTS // self.d_sae))
        total = torch.stack([self.before(rows).square().sum(dtype=torch.float64) for rows in chunks]).sum()
        self.world.shards.add([total])
        self.unit.copy_((total / (len(x) * self.d_sae * self.world.shards.size)).sqrt())
        if self.starts:
            self.threshold.fill_(self.config.threshold_init * float(self.unit))
        super().see_first(x, target)

    def take_threshold(self, threshold: float) -> None:
        self.threshold.data.fill_(threshold)

    def encode(self, x: Float[Tensor, "*rows d_in"], counted: Bool[Tensor, "*rows"] | None = None) -> Latents:
        """Sparse where few features are active, as `ReluSAE` does; in training also those just under their thresholds
        count for that, at 0, since their gradients move these.
        """
        x = x.to(self.encoder.dtype)
        if not self.training:
            return self._sparse(x, self.threshold, None) or DenseLatents(_above(self.before(x), self.threshold))
        bandwidth = self.config.bandwidth * self.unit
        if (near := self._sparse(x, self.threshold - bandwidth / 2, bandwidth)) is not None:
            return near
        values, gates = self._jump(self.before(x), bandwidth, None)
        return DenseJumps(values, gates=self._gates(gates))

    def _sparse(self, x: Tensor, edge: Tensor, bandwidth: Tensor | None) -> SparseLatents | None:
        """The features above an edge of each, if they are few; with a bandwidth, with the gates of those."""
        found = encode_sparse(x, self.encoder, self.b_enc, self.sparse_below, edge)
        if found is None or bandwidth is None:
            return found
        near = found.values
        if found.places.pads is not None:  # which no threshold is to feel
            near = near.where(~found.places.pads, -torch.inf)
        values, gates = self._jump(near, bandwidth, found.places)
        return SparseJumps(values, found.places, found.shape, gates=self._gates(gates))

    def _gates(self, values: Tensor) -> "Gates":
        return Gates(values, self.config, self.penalty_norms(), self.world.replicas)

    def _jump(self, z: Tensor, bandwidth: Tensor, pairs: Pairs | None) -> tuple[Tensor, Tensor]:
        both = self.config.straight_through == "both"
        result: Any = _Jump.apply(z, self.threshold, bandwidth, both, pairs)
        return result

    @property
    def sums_as_it_learns(self) -> bool:
        return self.config.penalty == "tanh_quadratic" or super().sums_as_it_learns

    def unsplit(self) -> str | None:
        of_sums = "dictionary.penalty is quadratic" if self.config.penalty == "quadratic" else None
        return super().unsplit() or of_sums

    def thresholds(self) -> Float[Tensor, " d_sae"]:
        return self.threshold

    @torch.no_grad()
    def raise_bar(self, by: float) -> None:
        self.threshold.add_(by).clamp_(min=0)

    @torch.no_grad()
    def after_step(self) -> None:
        self.threshold.clamp_(min=0)

    def to_train(self, config: DictionaryConfig) -> "JumpReLUSAE":
        sae = super().to_train(config)
        assert isinstance(sae, JumpReLUSAE) and isinstance(config, JumpReLUConfig)
        sae.config, sae.starts = config, False
        return sae

    def rescale(self, factors: Float[Tensor, " d_sae"]) -> None:
        super().rescale(factors)
        self.threshold.mul_(factors)

    def export(self) -> Exported:
        own = super().export()
        return Exported({**own.tensors, "threshold": self.threshold})

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """SAELens takes the ReLU too outside training, so that a threshold below 0 is one of 0."""
        super().fill(tensors)
        self.threshold.copy_(tensors["threshold"].clamp(min=0))


def _above(z: Tensor, threshold: Tensor) -> Tensor:
    """z where it is above the threshold or NaN, which must be seen."""
    return z.where((z <= threshold).logical_not_(), 0.0)


class _Jump(Function):
    """`z·H(z − θ)` and `H(z − θ)`, with the gradients above. z is `[*rows d_sae]`, or one number a pair."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, threshold: Tensor, bandwidth: Tensor, both: bool, pairs: Pairs | None
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z, threshold, bandwidth)
        ctx.both, ctx.pairs = both, pairs
        gates = (z <= _each(threshold, pairs)).logical_not_()
        return z.where(gates, 0.0), gates.to(z.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_values: Tensor | None, of_gates: Tensor | None) -> Any:  # type: ignore[pyrefly:bad-override]
        z, threshold, bandwidth = ctx.saved_tensors
        each = _each(threshold, ctx.pairs)
        near = (z - each).abs() < bandwidth / 2
        through = None if of_gates is None else of_gates.to(threshold.dtype)
        if of_values is not None:
            along = of_values * each
            through = along if through is None else along + through
        if through is None:
            return None, None, None, None, None
        through = (through / bandwidth).where(near, 0.0)
        d_z = None if of_values is None else of_values.where((z <= each).logical_not_(), 0.0)
        if ctx.both:
            d_z = through if d_z is None else d_z + through
        d_threshold = None
        if ctx.needs_input_grad[1]:
            d_threshold = -_summed(through, ctx.pairs).to(threshold.dtype)
        return None if d_z is None else d_z.to(z.dtype), d_threshold, None, None, None


def _each(numbers: Float[Tensor, " d_sae"], pairs: Pairs | None) -> Tensor:
    """One number a pair, of its feature; without pairs, what is stretched over rows."""
    return numbers if pairs is None else per_pair(numbers, pairs)


def _summed(numbers: Tensor, pairs: Pairs | None) -> Float[Tensor, " d_sae"]:
    """Sums over rows."""
    return numbers.flatten(0, -2).sum(0) if pairs is None else feature_sums(numbers, pairs)


@dataclass(frozen=True)
class Gates:
    """Parts of the penalty of JumpReLU latents, beside their values."""

    values: Tensor
    """H, 0 or 1, in the places of the latents' values."""
    config: JumpReLUConfig
    norms: Float[Tensor, " d_sae"] | None
    """L2 norms of the directions; None: all are 1."""
    world: World = ALONE
    """The processes whose tokens are those of the step."""

    @property
    def counts(self) -> bool:
        return self.config.penalty in ("l0", "quadratic")

    def terms(self, latents: Tensor, pairs: Pairs | None, mask: Tensor | None) -> Tensor:
        """Return what the penalty sums over features: H, or tanh(s·f·‖d‖); 0 where rows do not count.

        Args:
            mask: by place, or such that it is stretched over features.
        """
        if self.counts:
            return self.values if mask is None else self.values.where(mask, 0.0)
        latents = latents if mask is None else latents.where(mask, 0.0)
        sizes = latents if self.norms is None else latents * _each(self.norms, pairs)
        return torch.tanh(self.config.tanh_scale * sizes)

    def of_rows(self, sums: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
        """Each row's penalty, from its sum of terms."""
        if self.config.target_l0 is None:
            return sums
        return 2 / self.config.target_l0 * (sums - self.config.target_l0).square()

    def of_pass(self, sums: Float[Tensor, " d_sae"], mask: Bool[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
        """The penalty that all rows of all processes share, from the features' sums of terms in this one."""
        total, own = sums.detach().clone(), mask.sum()
        count = own.clone()
        self.world.add([total, count])
        means = (sums + (total - sums.detach())) / count.clamp_min(1)
        shared = (means * (1 + means / self.config.rare)).sum()
        if self.world.size > 1:
            # Its rows are a part of those that have this penalty, but its terms move that of all.
            shared = shared.detach() + (shared - shared.detach()) * (count.to(shared.dtype) / own.clamp_min(1))
        return shared * mask


@dataclass(frozen=True)
class DenseJumps(DenseLatents):
    """JumpReLU latents in training."""

    gates: Gates = field(kw_only=True)

    def penalty(self, p: float = 1.0, mask: Bool[Tensor, "*rows"] | None = None) -> Float[Tensor, "*rows"]:
        """The penalty of `JumpReLUConfig.penalty`, per row, which knows no p."""
        whole = self.values.new_ones(self.values.shape[:-1], dtype=torch.bool) if mask is None else mask
        terms = self.gates.terms(self.values, None, whole[..., None])
        exact = torch.promote_types(terms.dtype, torch.float32)
        if self.gates.config.penalty == "tanh_quadratic":
            return self.gates.of_pass(terms.flatten(0, -2).sum(0, dtype=exact), whole)
        return self.gates.of_rows(terms.sum(-1, dtype=exact)).where(whole, 0.0)


@dataclass(frozen=True)
class SparseJumps(NearlySparseLatents):
    """JumpReLU latents in training. Pairs just under their thresholds are among them, with the value 0."""

    gates: Gates = field(kw_only=True)

    def penalty(self, p: float = 1.0, mask: Bool[Tensor, "*rows"] | None = None) -> Float[Tensor, "*rows"]:
        """The penalty of `JumpReLUConfig.penalty`, per row, which knows no p."""
        whole = self.values.new_ones(self.shape, dtype=torch.bool) if mask is None else mask
        terms = self.gates.terms(self.values, self.places, whole.flatten()[self.places.rows])
        if self.gates.config.penalty == "tanh_quadratic":
            return self.gates.of_pass(_summed(terms, self.places), whole)
        sums = terms.new_zeros(self.places.n_rows).index_add(0, self.places.rows, terms).view(self.shape)
        return self.gates.of_rows(sums).where(whole, 0.0)
