"""Dictionaries that see their input through a norm, of whatever architecture: `x̂ = back(inner(of(x)))`.

A scale and a whitening are the same for all tokens. They are fitted to the first training text (`SAE.see_first`), and
made part of the weights when the dictionary is saved. What depends on the token cannot be: it is written as SAELens's
`normalize_activations`, and applied wherever the dictionary is used.

Terms at the site compare raw activations, since `reconstruct` gives these. Latents, their penalty, and the terms that
an architecture adds are of the normalised input.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from endwise.common.errors import ConfigError
from endwise.common.processes import World
from endwise.config.dictionary import ARCHITECTURES, DictionaryConfig
from endwise.dictionaries.base import SAE, Exported, TokenLosses, TrainingPass
from endwise.dictionaries.latents import Latents
from endwise.dictionaries.linear import LinearSAE
from endwise.formats import CENTRED, Layout

FITTED = ("scalar", "whitening")
"""Norms that are the same for all tokens."""
FITTED_ON = 32_768
"""Tokens that a scale or a whitening is fitted to."""
STD_FLOOR = 1e-5
"""Added to the standard deviation that an activation is divided by (SAELens)."""
NORM_FLOOR = 1e-12
RIDGE = 1e-3
"""Added to a covariance's eigenvalues, as a share of their mean."""


class Norm(nn.Module):
    """Change of the input that is undone at the output."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    @abstractmethod
    def of(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_in"]:
        """Return the input as the dictionary inside sees it."""

    @abstractmethod
    def back(self, y: Float[Tensor, "*rows d_out"], x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        """Return the output for the raw input `x`, from what the dictionary inside gives."""

    @abstractmethod
    def target(self, y: Float[Tensor, "*rows d_out"], x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        """Undo `back`."""

    @abstractmethod
    def gradient(self, g: Float[Tensor, "*rows d_out"], x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        """Return the gradient at what `back` is given, from that at its result."""

    def row_scale(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows"] | None:
        """See `SAE.row_scale`."""
        return None

    def direction(self, W_dec: Float[Tensor, "d_sae d_out"]) -> Float[Tensor, "d_sae d_out"]:
        """Return what a latent of 1 adds to the site, where that is the same for all tokens."""
        return W_dec

    def decoded(self, y: Float[Tensor, "*rows d_out"]) -> Float[Tensor, "*rows d_out"]:
        """Do as much of `back` as is the same for all tokens."""
        return y

    @abstractmethod
    def exported(self, inside: Exported, layout: Layout) -> Exported:
        """Return the whole function."""


class PerToken(Norm):
    """`layer_norm`: of((x − mean)/(std + 1e-5)), result·std + mean, std with Bessel's correction.
    `constant_norm_rescale`: of(x·√d/‖x‖), result·‖x‖/√d. As SAELens has them.
    """

    def of(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_in"]:
        mean, scale = self._mean(x), self._scale(x)
        return (x - mean) / (scale + STD_FLOOR) if self.kind == "layer_norm" else x / scale.clamp_min(NORM_FLOOR)

    def back(self, y: Float[Tensor, "*rows d_out"], x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        return y * self._scale(x) + self._mean(x)

    def target(self, y: Float[Tensor, "*rows d_out"], x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        return (y - self._mean(x)) / self._scale(x).clamp_min(NORM_FLOOR)

    def gradient(self, g: Float[Tensor, "*rows d_out"], x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        return g * self._scale(x)

    def row_scale(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows"]:
        return self._scale(x.float())[..., 0]

    def exported(self, inside: Exported, layout: Layout) -> Exported:
        return replace(inside, settings={**inside.settings, "normalize": self.kind})

    def _mean(self, x: Tensor) -> Tensor:
        return x.mean(-1, keepdim=True) if self.kind == "layer_norm" else x.new_zeros(())

    def _scale(self, x: Tensor) -> Tensor:
        if self.kind == "layer_norm":
            return x.std(-1, keepdim=True)
        return x.norm(dim=-1, keepdim=True) / math.sqrt(x.shape[-1])


class Centred(Norm):
    """of(x − mean), result + mean, the mean of a token's dimensions: what TransformerLens makes of a residual stream,
    and of what is added to it, as it centres the weights that write there (`center_writing_weights`).
    """

    def of(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_in"]:
        return x - x.mean(-1, keepdim=True)

    def back(self, y: Float[Tensor, "*rows d_out"], x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        return y + x.mean(-1, keepdim=True)

    def target(self, y: Float[Tensor, "*rows d_out"], x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        return y - x.mean(-1, keepdim=True)

    def gradient(self, g: Float[Tensor, "*rows d_out"], x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        return g

    def exported(self, inside: Exported, layout: Layout) -> Exported:
        return replace(inside, settings={**inside.settings, "normalize": self.kind})


class Affine(nn.Module):
    """`(x − mean)·matrix`, fitted to activations: a scale after which their mean norm is √d, or a whitening after which
    their covariance is 1 in all directions (ZCA: the symmetric one, which moves them least; 2511.13981).
    """

    mean: Tensor
    matrix: Tensor
    inverse: Tensor

    def __init__(self, width: int, whitens: bool) -> None:
        super().__init__()
        self.whitens = whitens
        self.register_buffer("mean", torch.zeros(width))
        for name in ("matrix", "inverse"):
            self.register_buffer(name, torch.eye(width) if whitens else torch.ones(()))

    @torch.no_grad()
    def fit(self, x: Float[Tensor, "tokens width"]) -> None:
        x = x.double()
        if not self.whitens:
            factor = math.sqrt(x.shape[1]) / x.norm(dim=1).mean().clamp_min(NORM_FLOOR)
            self.matrix.copy_(factor)
            self.inverse.copy_(1 / factor)
            return
        mean = x.mean(0)
        centred = x - mean
        values, vectors = torch.linalg.eigh(centred.T @ centred / max(1, len(x) - 1))
        roots = (values + RIDGE * values.mean().clamp_min(NORM_FLOOR)).sqrt()
        self.mean.copy_(mean)
        self.matrix.copy_(vectors / roots @ vectors.T)
        self.inverse.copy_(vectors * roots @ vectors.T)

    def of(self, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        return times(x - self.mean, self.matrix)

    def back(self, y: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        return times(y, self.inverse) + self.mean

    def reversed(self) -> "Affine":
        """Return the one that undoes it, each of `matrix` and `inverse` as it was rounded."""
        other = Affine(len(self.mean), self.whitens)
        other.mean = -times(self.mean, self.matrix)
        for name in ("matrix", "inverse"):
            exact = getattr(self, name).double()
            setattr(other, name, (torch.linalg.inv(exact) if self.whitens else 1 / exact).to(self.mean.dtype))
        return other


def times(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply rows by a matrix or by a number, in their own precision."""
    if factor.ndim == 0:
        return x * factor
    with torch.autocast(x.device.type, enabled=False):
        return x @ factor.to(x.dtype)


class Fitted(Norm):
    """`scalar` and `whitening`, of what is read and, of a transcoder, of what is written by itself."""

    def __init__(self, kind: str, d_in: int, d_out: int) -> None:
        super().__init__(kind)
        self.read, self.written = (Affine(width, kind == "whitening") for width in (d_in, d_out))

    def fit(self, x: Float[Tensor, "tokens d_in"], target: Float[Tensor, "tokens d_out"]) -> None:
        self.read.fit(x)
        self.written.fit(target)

    def of(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_in"]:
        return self.read.of(x)

    def decoded(self, y: Float[Tensor, "*rows d_out"]) -> Float[Tensor, "*rows d_out"]:
        return self.written.back(y)

    def back(self, y: Float[Tensor, "*rows d_out"], x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        return self.decoded(y)

    def target(self, y: Float[Tensor, "*rows d_out"], x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        return self.written.of(y)

    def gradient(self, g: Float[Tensor, "*rows d_out"], x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        return times(g, self.written.inverse.mT if self.written.whitens else self.written.inverse)

    def direction(self, W_dec: Float[Tensor, "d_sae d_out"]) -> Float[Tensor, "d_sae d_out"]:
        return times(W_dec, self.written.inverse)

    def reversed(self) -> "Fitted":
        """Return what takes the inside's activations for raw ones, and raw ones for the inside's."""
        other = Fitted(self.kind, len(self.read.mean), len(self.written.mean))
        other.read, other.written = self.read.reversed(), self.written.reversed()
        return other

    def exported(self, inside: Exported, layout: Layout) -> Exported:
        """Fold the norm. With A and m what is read goes through, B⁻¹ and n what is written, and S the skip connection:
        W_enc ← A·W_enc, each bias b ← b − m·A·W_enc, W_dec ← W_dec·B, b_dec ← b_dec·B + n, Sᵀ ← A·Sᵀ·B.
        """
        tensors, read, out = dict(inside.tensors), self.read, self.written.inverse
        shifted = times(read.mean, read.matrix)
        for bias, exponent in layout.biases.items():
            shift = shifted @ tensors["W_enc"]
            tensors[bias] = tensors[bias] - (shift if exponent is None else shift * tensors[exponent].exp())
        tensors["W_enc"] = times(tensors["W_enc"].mT, read.matrix.mT if read.whitens else read.matrix).mT
        tensors["W_dec"] = times(tensors["W_dec"], out)
        tensors["b_dec"] = self.written.back(tensors["b_dec"])
        if "W_skip" in tensors:
            through = times(tensors["W_skip"].mT, out)
            tensors["b_dec"] = tensors["b_dec"] - shifted @ through
            tensors["W_skip"] = times(through.mT, read.matrix.mT if read.whitens else read.matrix)
        return replace(inside, tensors=tensors)


class NormedSAE(SAE):
    """A dictionary behind a norm. What it is called, and what trains it, are those of the one inside.

    Args:
        raw: what is inside is of raw activations until the norm is fitted, and then the same function behind it.
    """

    def __init__(self, inner: SAE, kind: str, *, raw: bool = False) -> None:
        super().__init__(inner.d_in, inner.d_sae, inner.d_out)
        self.inner, self.raw = inner, raw
        fitted = kind in FITTED
        of_token = Centred if kind == CENTRED else PerToken
        self.norm: Norm = Fitted(kind, inner.d_in, inner.d_out) if fitted else of_token(kind)
        self.first_tokens = max(inner.first_tokens, FITTED_ON) if fitted else inner.first_tokens
        self.last_tokens, self.sparse_below = inner.last_tokens, inner.sparse_below
        self.dead_window, self.wants_gradient = inner.dead_window, inner.wants_gradient  # type: ignore[pyrefly:read-only]
        self.architecture = inner.architecture  # type: ignore[pyrefly:read-only]  of its kind, not of a class

    @property
    def b_enc(self) -> nn.Parameter:  # type: ignore[pyrefly:bad-override]
        return self.inner.b_enc

    @property
    def b_dec(self) -> nn.Parameter:  # type: ignore[pyrefly:bad-override]
        return self.inner.b_dec

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:
        return self.inner.W_enc

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_out"]:
        return self.norm.direction(self.inner.W_dec)

    def encode(self, x: Float[Tensor, "*rows d_in"], counted: Bool[Tensor, "*rows"] | None = None) -> Latents:
        return self.inner.encode(self._seen(x), counted)

    def decode(self, latents: Latents | Tensor) -> Float[Tensor, "*rows d_out"]:
        """Sum directions and bias as `W_dec` has them; what a norm undoes for each token, `reconstruct` undoes."""
        return self.norm.decoded(self.inner.decode(latents))

    def reconstruct(self, latents: Latents, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        return self.norm.back(self.inner.reconstruct(latents, self._seen(x)), x.to(self.b_dec.dtype))

    def nested(self, latents: Latents, x: Float[Tensor, "*rows d_in"]) -> Sequence[Float[Tensor, "*rows d_out"]]:
        raw = x.to(self.b_dec.dtype)
        return [self.norm.back(each, raw) for each in self.inner.nested(latents, self._seen(x))]

    def spliced(self, latents: Latents, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        return self.norm.back(self.inner.spliced(latents, self._seen(x)), x.to(self.b_dec.dtype))

    def row_scale(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows"] | None:
        return self.norm.row_scale(x)

    def _seen(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_in"]:
        return self.norm.of(x.to(self.b_dec.dtype))

    def section(self) -> dict[str, Any]:
        return {**self.inner.section(), "normalize": self.norm.kind}

    def join(self, world: World) -> None:
        super().join(world)
        self.inner.join(world)

    def unsplit(self) -> str | None:
        raw = f"dictionary.normalize is {self.norm.kind} and init_from has none" if self.raw else None
        return self.inner.unsplit() or raw

    def part_for(self, world: World) -> "NormedSAE":
        own = NormedSAE(self.inner.part_for(world), self.norm.kind)
        own.norm, own.norm_limit = self.norm, self.norm_limit
        return own

    @contextmanager
    def aside(self) -> Iterator[None]:
        with self.inner.aside():
            yield

    @property
    def sums_as_it_learns(self) -> bool:
        return self.inner.sums_as_it_learns

    def begin_step(self, done: float) -> None:
        self.inner.begin_step(done)

    @property
    def own_weights(self) -> Mapping[str, float]:
        return self.inner.own_weights

    def own_terms(self, seen: TrainingPass) -> Mapping[str, Float[Tensor, ""]]:
        x = seen.x.to(self.b_dec.dtype)
        given = {name: getattr(seen, name) for name in ("gradient", "at_site")}
        gradients: dict[str, Any] = {name: self.norm.gradient(g, x) for name, g in given.items() if g is not None}
        target, reconstruction = (self.norm.target(each, x) for each in (seen.target, seen.reconstruction))
        return self.inner.own_terms(
            replace(seen, x=self.norm.of(x), target=target, reconstruction=reconstruction, **gradients)
        )

    def see_first(self, x: Float[Tensor, "tokens d_in"], target: Float[Tensor, "tokens d_out"]) -> None:
        if isinstance(self.norm, Fitted):
            self.norm.fit(x, target)
            if self.raw:
                _move_behind(self.norm, self.inner)
                self.raw = False
        self._show(x, target, self.inner.first_tokens, self.inner.see_first)

    def wants_losses(self, steps: int) -> Mapping[int, int]:
        return self.inner.wants_losses(steps)

    def see_losses(self, seen: TokenLosses) -> Int64[Tensor, " features"]:
        return self.inner.see_losses(replace(seen, x=self._seen(seen.x), target=self.norm.target(seen.target, seen.x)))

    def per_feature(self) -> Sequence[nn.Parameter]:
        return self.inner.per_feature()

    def raise_bar(self, by: float) -> None:
        self.inner.raise_bar(by)

    def see_last(self, x: Float[Tensor, "tokens d_in"], target: Float[Tensor, "tokens d_out"]) -> None:
        self._show(x, target, self.inner.last_tokens, self.inner.see_last)

    def _show(self, x: Tensor, target: Tensor, tokens: int, see: Any) -> None:
        if tokens:
            x, target = x[:tokens], target[:tokens]
            see(self._seen(x), self.norm.target(target, x))

    def step_statistics(self) -> Sequence[Tensor]:
        return self.inner.step_statistics()

    def after_step(self) -> None:
        self.inner.after_step()

    def export(self) -> Exported:
        inside = self.inner.export()
        return self.norm.exported(inside, ARCHITECTURES[inside.architecture or self.architecture].layout)

    @classmethod
    def build(cls, config: Any, d_in: int, seed: int) -> SAE:
        return normed(ARCHITECTURES[config.architecture].build(config, d_in, seed), config)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], cfg: Mapping[str, Any]) -> SAE:
        raise NotImplementedError("A file is read as what is inside, and `SAE.load` puts its norm before that.")


def normed(sae: SAE, config: DictionaryConfig) -> SAE:
    """Return a dictionary behind the norm of its recipe, if there is one."""
    kind = getattr(config, "normalize", "none")
    return sae if kind == "none" else NormedSAE(sae, kind)


def taken_over(sae: SAE, config: DictionaryConfig, seed: int) -> SAE:
    """Make of a finished dictionary what a recipe trains on (`SAE.continuing`), behind the norm that the recipe has: of
    one without a norm, a scale or a whitening that is fitted before the first step keeps the function.

    Args:
        seed: of what is drawn in training.

    Raises:
        ConfigError: the recipe has another norm of each token.
    """
    has, wants = sae.norm.kind if isinstance(sae, NormedSAE) else "none", getattr(config, "normalize", "none")
    raw = has == "none" and wants in FITTED and issubclass(ARCHITECTURES[config.architecture], LinearSAE)
    if has != wants and not raw:
        raise ConfigError(
            f"its input has the norm {has!r}, and dictionary.normalize is {wants!r}: it would be another function. Set "
            f"dictionary.normalize={has}."
        )
    inner = sae.inner if isinstance(sae, NormedSAE) else sae
    taken = ARCHITECTURES[config.architecture].continuing(inner, config)
    taken.seed = seed
    return NormedSAE(taken, wants, raw=raw) if raw else normed(taken, config)


@torch.no_grad()
def _move_behind(norm: Fitted, inner: SAE) -> None:
    """Make the dictionary, which is of raw activations, the same function of those behind the norm."""
    assert isinstance(inner, LinearSAE)
    undone, inside = norm.reversed(), inner.export()
    inner.refill(undone.exported(inside, ARCHITECTURES[inside.architecture or inner.architecture].layout).tensors)
    inner.replaces = tuple(_behind(undone, source) for source in inner.replaces)


def _behind(norm: Fitted, inner: SAE) -> NormedSAE:
    sae = NormedSAE(inner, norm.kind)
    sae.norm = norm
    return sae
