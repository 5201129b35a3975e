"""Means for features that have stopped firing, as options of every dictionary of two matrices.

A feature is dead that has fired on none of the latest `dead_window` training tokens. For them there are

- an auxiliary term (Gao et al. 2024, arXiv 2406.04093, §A.2): the `aux_k` dead features with the largest
  pre-activations reconstruct what the others leave. With t the target of a row, ẑ those pre-activations and D the
  directions, its value per token is

      mean Σ_d (t − ẑ·D)² / mean Σ_d (t − mean t)²,      t = e = a − x̂,

  means over the step's rows that count (in all processes), t without gradient, no bias; where nothing is predicted it
  is about 1;
- its counterpart for objectives that are measured behind the site, where much of e changes nothing. With g = ∂L/∂x̂ the
  gradient of the spliced terms in the same row and u = −g/‖g‖ the direction in which they fall,

      t = max(⟨e, u⟩, 0)·u,

  the part of the residual that the gradient asks for, in the same term: it too is divided by the variance of its t, and
  so does not depend on the scale of the gradient. A row without gradient asks for nothing, and is left out of both
  means; so are all rows, if none has any;
- the pre-activation loss Σ ReLU(θ − z)·‖d‖ / d_in (Anthropic, January 2025), with θ what z must exceed to be active: 0
  without thresholds, in BatchTopK the moving one, in TopK the smallest of the row's k;
- resampling (Bricken et al. 2023): at stated steps dead features become directions of tokens whose loss is large. A
  token is drawn with probability ∝ loss², no token twice; what it reads, less the mean of the tokens shown, becomes the
  feature's encoder, scaled to 0.2 of the mean norm of those of the alive, with the bias that makes its pre-activation 0
  at the mean; what it is to write, less its mean, becomes the direction; other parameters of a feature (thresholds)
  become the mean of those of the alive. Adam's moments of all of them start again from 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from jaxtyping import Bool, Float, Int64
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize, pad

from endwise.common.processes import ALONE, World
from endwise.config.base import Positive
from endwise.config.dictionary import DictionaryConfig
from endwise.dictionaries.base import TokenLosses, TrainingPass
from endwise.dictionaries.latents import SparseLatents
from endwise.dictionaries.sharing import best_places, summed
from endwise.kernels import Pairs

if TYPE_CHECKING:
    from endwise.dictionaries.linear import LinearSAE

SPARSE_BELOW = 1 / 32
"""Largest share of the dead features that predict as sparse latents; above it dense ones cost less."""
NotBelow0 = Annotated[float, Field(ge=0)]
AUX, PRE_ACTIVATION = "dead_aux", "pre_activation"
"""Names of the terms."""


class DeadConfig(DictionaryConfig):
    """Settings of what is done for dead features; by default nothing."""

    dead_window: Positive | None = None
    """Training tokens without firing after which a feature counts as dead; unset: `training.alive_window`, but at most
    a twentieth of `training.tokens`."""
    aux: NotBelow0 = 0.0
    """Weight of the auxiliary term, in which dead features predict what the others leave (Gao et al. 2024: 1/32 of an
    error that is 1 where nothing is reconstructed)."""
    aux_k: Positive | None = None
    """Dead features per token that take part in it, those with the largest pre-activations; unset: half the width."""
    aux_target: Literal["objective", "residual", "gradient"] = "objective"
    """Target of their prediction: `residual`, all that is left; `gradient`, the part of it along −∂loss/∂x̂ of the
    spliced terms; `objective`, the second where there are spliced terms, the first where there are none."""
    aux_negative: bool = False
    """True if they take part with pre-activations below 0 too (SAELens), as most are for ReLU features."""
    revive: NotBelow0 = 0.0
    """Weight of the pre-activation loss, Σ ReLU(θ − z)·‖d‖ / d_in per token, θ what makes a feature active (Anthropic:
    3e-6)."""
    revives: Literal["dead", "all"] = "dead"
    """Features whose pre-activations it raises: the dead ones (SAELens), or all (Anthropic)."""

    resample_at: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    """Shares of the steps after which dead features are resampled (Bricken et al. 2023: 0.125, 0.25, 0.375, 0.5)."""
    resample_tokens: Positive = 8192
    """Latest training tokens among which their new directions are drawn; if more are dead, some wait."""
    resample_scale: Annotated[float, Field(gt=0)] = 0.2
    """Norm of their encoders, as a share of the mean of those of the alive."""

    @property
    def batchwise(self) -> bool:  # type: ignore[pyrefly:bad-override]  by a setting, not the class
        return self.aux > 0


@dataclass(frozen=True)
class DeadFeatures:
    """The terms that a dictionary has for its dead features."""

    config: DeadConfig

    @property
    def weights(self) -> Mapping[str, float]:
        """Weight of each term, by name; without those of weight 0."""
        weights = {AUX: self.config.aux, PRE_ACTIVATION: self.config.revive}
        return {name: weight for name, weight in weights.items() if weight}

    def unsplit(self) -> str | None:
        """See `SAE.unsplit`."""
        return "dictionary.resample_at is set" if self.config.resample_at else None

    def terms(self, sae: "LinearSAE", seen: TrainingPass) -> Mapping[str, Float[Tensor, ""]]:
        """Each term of `weights`, unweighted: a sum over the rows that count."""
        makes = {AUX: self._auxiliary, PRE_ACTIVATION: self._pre_activation}
        return {name: makes[name](sae, seen) for name in self.weights}

    def _auxiliary(self, sae: "LinearSAE", seen: TrainingPass) -> Float[Tensor, ""]:
        dead = seen.dead.nonzero()[:, 0]
        if not sae.world.shards.total(len(dead)):
            return seen.target.new_zeros(())
        asked = self.asked_for(seen)
        variance = variance_of(asked.target, sae.world.replicas)
        z = sae.before(seen.x[asked.rows], dead)
        error = unpredicted(sae, asked.target, z, dead, self.config.aux_k or max(1, sae.d_in // 2), self.config)
        return (error / variance).where(variance > 0, 0.0)

    def asked_for(self, seen: TrainingPass) -> "Asked":
        """Return what dead features are to predict."""
        residual = (seen.target - seen.reconstruction).detach()
        if self.config.aux_target == "residual" or (self.config.aux_target == "objective" and seen.gradient is None):
            return Asked(seen.counted, residual[seen.counted])
        if seen.gradient is None:
            return Asked(torch.zeros_like(seen.counted), residual[:0].view(0, residual.shape[-1]))
        return along_gradient(residual, seen.gradient, seen.counted)

    def _pre_activation(self, sae: "LinearSAE", seen: TrainingPass) -> Float[Tensor, ""]:
        chosen = (seen.dead if self.config.revives == "dead" else torch.ones_like(seen.dead)).nonzero()[:, 0]
        shards = sae.world.shards
        if not shards.total(len(chosen)):
            return seen.target.new_zeros(())
        bar = sae.to_exceed(seen.latents, chosen)
        missing = torch.relu(bar - sae.before(seen.x, chosen)) * sae.decoder_norms()[chosen]
        return summed(missing.sum(-1).where(seen.counted, 0.0).sum() / sae.d_in, shards)

    def wants_losses(self, steps: int) -> Mapping[int, int]:
        """Return how many tokens are to be drawn from, by the steps that are done when features are resampled."""
        return {max(1, round(share * steps)): self.config.resample_tokens for share in self.config.resample_at}

    @torch.no_grad()
    def resample(self, sae: "LinearSAE", seen: TokenLosses) -> Int64[Tensor, " features"]:
        """Make of dead features directions of tokens whose loss is large; return which."""
        odds = seen.losses.double().clamp_min(0).square().cpu().numpy()
        dead = seen.dead.nonzero()[:, 0]
        features = dead[: int((odds > 0).sum())]
        if not len(features) or len(dead) == len(seen.dead):
            return features[:0]
        drawn = seen.generator.choice(len(odds), len(features), replace=False, p=odds / odds.sum())
        tokens = torch.from_numpy(drawn).to(seen.x.device)
        reads, writes = (normalize(each[tokens] - each.mean(0), dim=-1) for each in (seen.x, seen.target))
        for parameter in sae.per_feature():
            parameter[features] = parameter[~seen.dead].mean(0)
        sae.encoder[features] = reads * (self.config.resample_scale * sae.encoder[~seen.dead].norm(dim=-1).mean())
        sae.b_enc[features] = -(sae.encoder[features] @ seen.x.mean(0))
        sae.decoder[features] = writes * sae.decoder[~seen.dead].norm(dim=-1).mean()
        return features


@dataclass(frozen=True)
class Asked:
    """Target of dead features, in the rows where anything is asked for."""

    rows: Bool[Tensor, "*rows"]
    target: Float[Tensor, "n d_out"]


def along_gradient(
    residual: Float[Tensor, "*rows d_out"], gradient: Float[Tensor, "*rows d_out"], counted: Bool[Tensor, "*rows"]
) -> Asked:
    """Return the part of the residual in the direction in which a loss falls: max(⟨e, u⟩, 0)·u with u = −g/‖g‖.

    Rows without gradient are left out.
    """
    rows = counted & (gradient != 0).any(-1)
    down = -gradient[rows].to(residual.dtype)
    down = down / down.abs().amax(-1, keepdim=True)  # so that no square underflows
    down = down / down.norm(dim=-1, keepdim=True)
    return Asked(rows, (residual[rows] * down).sum(-1, keepdim=True).clamp_min(0.0) * down)


def variance_of(target: Float[Tensor, "n d_out"], world: World = ALONE) -> Float[Tensor, ""]:
    """Return mean Σ_d (t − mean t)², over the rows of all processes; 0 where there are none."""
    count = target.new_tensor(len(target))
    total = target.sum(0)
    world.add([count, total])
    squares = (target - total / count.clamp_min(1)).square().sum()
    world.add([squares])
    return squares / count.clamp_min(1)


def unpredicted(
    sae: "LinearSAE",
    target: Float[Tensor, "n d_out"],
    z: Float[Tensor, "n dead"],
    dead: Int64[Tensor, " dead"],
    k: int,
    config: DeadConfig,
) -> Float[Tensor, ""]:
    """Return Σ over rows of Σ_d (t − ẑ·D)².

    Args:
        z: pre-activations of the features `dead`, of which the `k` largest of each row take part.
    """
    n, shards, everywhere = len(z), sae.world.shards, sae.world.shards.gather(len(dead))
    k, own = min(k, sum(everywhere)), min(k, max(everywhere))
    if not n:
        return target.new_zeros(())
    if shards.size > 1:
        missing = own - len(dead)  # here, of those that may be among the k largest
        values = pad(z.detach(), (0, max(0, missing)), value=-torch.inf)
        kept = best_places(values, own, k, shards)[:, : len(dead)]
        own_part = (z if config.aux_negative else torch.relu(z)).where(kept, 0.0) @ sae.directions(dead)
        return (target - summed(own_part, shards)).square().sum()
    chosen = z.detach().topk(k, dim=-1, sorted=False).indices
    if k > SPARSE_BELOW * len(dead):
        kept = torch.zeros_like(z, dtype=torch.bool).scatter_(-1, chosen, True)
        predicted = (z if config.aux_negative else torch.relu(z)).where(kept, 0.0) @ sae.directions(dead)
    else:
        chosen = chosen.sort(dim=-1).values
        values, rows = z.gather(-1, chosen).view(-1), torch.arange(n, device=z.device)
        pairs = Pairs(rows.repeat_interleave(k), dead[chosen.view(-1)], rows * k, sae.d_sae)
        predicted = sae.sums(SparseLatents(values if config.aux_negative else torch.relu(values), pairs, (n,)))
    return (target - predicted).square().sum()
