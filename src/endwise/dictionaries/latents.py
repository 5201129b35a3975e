"""A dictionary's activations on some rows, dense or sparse, behind one face.

Sparse latents are values at `Pairs`; decoding them, and both gradients of the two matrices, then cost as much as there
are active features, not as much as there are features.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from endwise.common.errors import ConfigError
from endwise.common.showing import Shown
from endwise.kernels import Found, Kernels, Pairs, Rooms, kernels_for, rooms_in_use
from endwise.kernels.interface import HeldPairs, PerPair, Room

MOSTLY = 3 / 4
"""Share of pairs that are not 0 from which on leaving out the others gains nothing."""


class Latents(Shown, ABC):
    @abstractmethod
    def dense(self) -> Float[Tensor, "*rows d_sae"]:
        """Every feature's value in every row."""

    def pairs(self) -> "SparseLatents | None":
        """The active (row, feature) pairs with their values, where these are kept rather than every feature's."""
        return None

    @abstractmethod
    def penalty(self, p: float = 1.0, mask: Bool[Tensor, "*rows"] | None = None) -> Float[Tensor, "*rows"]:
        """Σ over features of |c·‖d‖|^p, per row, with ‖d‖ = 1 unless directions are free in training; rows outside the
        mask, which may hold NaN or infinity, have 0.
        """

    @abstractmethod
    def l0(self) -> Float[Tensor, "*rows"]:
        """Number of non-zero features, per row."""

    @abstractmethod
    def smallest(self) -> Float[Tensor, "*rows"]:
        """Smallest positive value, per row; infinite where there is none."""

    @abstractmethod
    def fired(self, mask: Bool[Tensor, "*rows"]) -> Bool[Tensor, " d_sae"]:
        """Mark the features that are non-zero anywhere in the mask."""

    @abstractmethod
    def firings(self, mask: Bool[Tensor, "*rows"]) -> Int64[Tensor, " d_sae"]:
        """Count the rows of the mask in which each feature is non-zero."""

    @abstractmethod
    def only(self, features: Bool[Tensor, " d_sae"]) -> "Latents":
        """The same with all other features at 0."""

    @abstractmethod
    def of(self, feature: int) -> Float[Tensor, "*rows"]:
        """One feature's value in every row."""


@dataclass(frozen=True, repr=False)
class DenseLatents(Latents):
    values: Float[Tensor, "*rows d_sae"]
    norms: Float[Tensor, " d_sae"] | None = field(default=None, kw_only=True)
    """Factors of values in the penalty: norms of their directions; None: 1."""

    def dense(self) -> Float[Tensor, "*rows d_sae"]:
        return self.values

    def penalty(self, p: float = 1.0, mask: Bool[Tensor, "*rows"] | None = None) -> Float[Tensor, "*rows"]:
        half = self.values.dtype in (torch.bfloat16, torch.float16)
        sizes = self.values if self.norms is None else self.values * self.norms
        magnitudes = _magnitudes(sizes, p, None if mask is None else mask[..., None])
        sums = magnitudes.sum(-1, dtype=torch.float32 if half else None)
        return sums if mask is None else sums.where(mask, 0.0)

    def l0(self) -> Float[Tensor, "*rows"]:
        # Not a sum of booleans: on a CPU that would first make integers of them all, of twice the latents' size.
        exact = torch.promote_types(self.values.dtype, torch.float32)
        return torch.linalg.vector_norm(self.values.detach(), ord=0, dim=-1, dtype=exact).float()

    def smallest(self) -> Float[Tensor, "*rows"]:
        return self.values.where(self.values > 0, torch.inf).amin(-1)

    def fired(self, mask: Bool[Tensor, "*rows"]) -> Bool[Tensor, " d_sae"]:
        return self._active(mask).any(0)

    def firings(self, mask: Bool[Tensor, "*rows"]) -> Int64[Tensor, " d_sae"]:
        return self._active(mask).sum(0)

    def only(self, features: Bool[Tensor, " d_sae"]) -> "DenseLatents":
        return DenseLatents(self.values.where(features, 0.0))

    def of(self, feature: int) -> Float[Tensor, "*rows"]:
        return self.values[..., feature]

    def _active(self, mask: Bool[Tensor, "*rows"]) -> Bool[Tensor, "flat d_sae"]:
        return ((self.values.detach() != 0) & mask[..., None]).flatten(0, -2)


def latents_of(values: Latents | Tensor, d_sae: int) -> Latents:
    """Take a tensor as latents, `[*rows d_sae]`.

    Raises:
        ConfigError: it has no value for each feature.
    """
    if isinstance(values, Latents):
        return values
    if values.shape[-1:] != (d_sae,):
        raise ConfigError(
            f"Latents have a value for each of the {d_sae:,} features on their last axis; given the shape "
            f"{list(values.shape)}. Encode with this SAE."
        )
    return DenseLatents(values)


@dataclass(frozen=True, repr=False)
class SparseLatents(Latents):
    """Latents whose listed values are not 0 (but see `NearlySparseLatents`)."""

    values: PerPair
    places: Pairs
    shape: tuple[int, ...]
    """Shape of the rows, less the axis of features."""
    norms: Float[Tensor, " d_sae"] | None = field(default=None, kw_only=True)
    """Norms as in dense latents."""

    def dense(self) -> Float[Tensor, "*rows d_sae"]:
        flat = self.places.rows * self.places.n_features + self.places.features
        zeros = self.values.new_zeros(self.places.n_rows * self.places.n_features)
        return zeros.index_add(0, flat, self.values).view(*self.shape, self.places.n_features)

    def pairs(self) -> "SparseLatents":
        return self

    def penalty(self, p: float = 1.0, mask: Bool[Tensor, "*rows"] | None = None) -> Float[Tensor, "*rows"]:
        sums = self.values.new_zeros(self.places.n_rows)
        sizes = self.values if self.norms is None else self.values * per_pair(self.norms, self.places)
        magnitudes = _magnitudes(sizes, p, None if mask is None else mask.flatten()[self.places.rows])
        sums = sums.index_add(0, self.places.rows, magnitudes).view(self.shape)
        return sums if mask is None else sums.where(mask, 0.0)

    def l0(self) -> Float[Tensor, "*rows"]:
        return torch.bincount(self.places.rows, minlength=self.places.n_rows).float().view(self.shape)

    def smallest(self) -> Float[Tensor, "*rows"]:
        positive = self.values.where(self.values > 0, torch.inf)
        none = positive.new_full((self.places.n_rows,), torch.inf)
        return none.scatter_reduce(0, self.places.rows, positive, "amin").view(self.shape)

    def fired(self, mask: Bool[Tensor, "*rows"]) -> Bool[Tensor, " d_sae"]:
        return self.firings(mask) > 0

    def firings(self, mask: Bool[Tensor, "*rows"]) -> Int64[Tensor, " d_sae"]:
        kept = self.places.features[mask.flatten()[self.places.rows]]
        return torch.bincount(kept, minlength=self.places.n_features)

    def only(self, features: Bool[Tensor, " d_sae"]) -> "SparseLatents":
        return self.where(features[self.places.features])

    def where(self, kept: Bool[Tensor, " pairs"]) -> "SparseLatents":
        """Keep some of the pairs."""
        return SparseLatents(self.values[kept], self.places.where(kept), self.shape)

    def of(self, feature: int) -> Float[Tensor, "*rows"]:
        own = self.values.where(self.places.features == feature, 0.0)
        return self.values.new_zeros(self.places.n_rows).index_add(0, self.places.rows, own).view(self.shape)


@dataclass(frozen=True, repr=False)
class NearlySparseLatents(SparseLatents):
    """Sparse latents in training, of which some are 0: features that are not active learn too, and pads are there so
    that no shape depends on values.
    """

    def l0(self) -> Float[Tensor, "*rows"]:
        active = (self.values.detach() != 0).float()
        return active.new_zeros(self.places.n_rows).index_add_(0, self.places.rows, active).view(self.shape)

    def firings(self, mask: Bool[Tensor, "*rows"]) -> Int64[Tensor, " d_sae"]:
        active = (mask.flatten()[self.places.rows] & (self.values.detach() != 0)).long()
        return active.new_zeros(self.places.n_features).index_add_(0, self.places.features, active)

    def where(self, kept: Bool[Tensor, " pairs"]) -> "SparseLatents":
        """Keep some of the pairs; the others are 0."""
        return NearlySparseLatents(self.values.where(kept, 0.0), self.places, self.shape)


def _magnitudes(values: Tensor, p: float, counts: Tensor | None) -> Tensor:
    """|c|^p with gradient 0 at 0, where for p < 1 the true one is infinite: an inactive feature has none to follow.

    Args:
        counts: true where the sum is read. Elsewhere the gradient, 0 times that of a power, must not come to be NaN;
            that of |c| is finite everywhere.
    """
    magnitudes = values.abs()
    if p == 1.0:
        return magnitudes
    active = magnitudes != 0 if counts is None else (magnitudes != 0) & counts
    return torch.where(active, torch.where(active, magnitudes, 1.0).pow(p), 0.0)


def encode_sparse(
    x: Float[Tensor, "*rows d_model"],
    weight: Float[Tensor, "d_sae d_model"],
    bias: Float[Tensor, " d_sae"],
    share: float,
    above: Float[Tensor, " d_sae"] | Float[Tensor, ""] | None = None,
) -> SparseLatents | None:
    """`z = x·weightᵀ + bias` where it is above a threshold, as sparse latents; None if that is at more than `share` of
    all places, or in a training step on a GPU where there is no room for it (`found_on`).

    Args:
        above: one threshold, or one for each feature, at least 0; None: 0, which is ReLU. None gets a gradient.
    """
    rows = x.detach().reshape(-1, x.shape[-1])
    limit = int(share * len(rows) * len(weight))
    least = None if above is None else above.detach()
    kernels, encoder = kernels_for(x.device), (rows, weight.detach(), bias.detach())
    now, held = partial(kernels.active, *encoder, limit, least), partial(kernels.active_held, *encoder, above=least)
    found = found_on(kernels, x, limit, now, held)
    return None if found is None else sparse_values(x, weight, bias, found)


def found_on(
    kernels: Kernels,
    x: Tensor,
    limit: int,
    now: Callable[[], Found | None],
    held: Callable[[Room], HeldPairs | None],
) -> Found | None:
    """Find pairs in the way that suits the device; None where latents are to be dense.

    They are counted (`now`), for which the host of a GPU waits. In a training step it does not: there they are `held`
    in the room that there is, if the kernels can; otherwise latents are dense.
    """
    rooms = rooms_for(kernels, x)
    return now() if rooms is None else rooms.find(limit, held)


def rooms_for(kernels: Kernels, x: Tensor) -> Rooms | None:
    """Return the room for what is found in `x`; None: it is counted, on a CPU and outside training steps."""
    return rooms_in_use() if kernels.holds or x.is_cuda else None


def sparse_values(
    x: Float[Tensor, "*rows d_model"],
    weight: Float[Tensor, "d_sae d_model"],
    bias: Float[Tensor, " d_sae"],
    found: Found,
) -> SparseLatents:
    """`x·weightᵀ + bias` at the places that were found, as sparse latents with gradients to all three."""
    values: Any = _ActiveValues.apply(x.reshape(-1, x.shape[-1]), weight, bias, found)
    pads, shape = found.pairs.pads, tuple(x.shape[:-1])
    if pads is None:
        return SparseLatents(values, found.pairs, shape)
    return NearlySparseLatents(values.masked_fill(pads, 0.0), found.pairs, shape)  # which have no gradient


def kept_values(
    x: Float[Tensor, "*rows d_model"],
    weight: Float[Tensor, "d_sae d_model"],
    bias: Float[Tensor, " d_sae"],
    found: Found,
    kept: Bool[Tensor, " pairs"],
) -> SparseLatents:
    """Variant of `sparse_values` with some of the places alone; in slots the others are 0."""
    if found.pairs.pads is None:
        return sparse_values(x, weight, bias, found.where(kept))
    return sparse_values(x, weight, bias, found).where(kept)


def decode_sparse(
    latents: SparseLatents,
    weight: Float[Tensor, "d_sae d_model"],
    bias: Float[Tensor, " d_model"] | None = None,
    norms: Float[Tensor, " d_sae"] | None = None,
) -> Float[Tensor, "*rows d_model"]:
    """Σ over active features of c · weight / norms, plus the bias.

    Args:
        norms: the L2 norms of the weight's rows, if each is to be used with unit norm; the gradient knows about it.
    """
    sums: Any = _WeightedRows.apply(latents.values, weight, latents.places, norms)
    return (sums if bias is None else sums + bias).view(*latents.shape, weight.shape[1])


def per_pair(numbers: Float[Tensor, " d_sae"], pairs: Pairs) -> PerPair:
    """Each pair's feature's number."""
    return _PerPair.apply(numbers, pairs)  # pyright: ignore[reportReturnType]


def feature_sums(numbers: PerPair, pairs: Pairs) -> Float[Tensor, " d_sae"]:
    """Σ over each feature's pairs."""
    return _FeatureSums.apply(numbers, pairs)  # pyright: ignore[reportReturnType]


class _PerPair(Function):
    """PyTorch's own gradient of an index adds with atomics on a card, in whatever order they arrive."""

    @staticmethod
    def forward(ctx: Any, numbers: Tensor, pairs: Pairs) -> Tensor:
        ctx.pairs = pairs
        return numbers.index_select(0, pairs.features)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # type: ignore[pyrefly:bad-override]
        return feature_sums(upstream, ctx.pairs), None


class _FeatureSums(Function):
    @staticmethod
    def forward(ctx: Any, numbers: Tensor, pairs: Pairs) -> Tensor:
        ctx.pairs = pairs
        return kernels_for(numbers.device).feature_sums(numbers, pairs)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # type: ignore[pyrefly:bad-override]
        return per_pair(upstream, ctx.pairs), None


class _ActiveValues(Function):
    """The encoder's values at its active pairs, known already, as a function of its input and weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, _bias: Tensor, found: Found) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.pairs = found.pairs
        return found.values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:  # type: ignore[pyrefly:bad-override]
        x, weight = ctx.saved_tensors
        upstream, pairs = _without_zeros(upstream, ctx.pairs)
        kernels = kernels_for(x.device)
        d_x = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_x = kernels.weighted_sums(weight, pairs.features, pairs.row_starts, upstream)
        if ctx.needs_input_grad[1]:
            order, rows, starts = pairs.by_feature
            d_weight = kernels.weighted_sums(x, rows, starts, upstream[order])
        if ctx.needs_input_grad[2]:
            d_bias = kernels.feature_sums(upstream, pairs)
        return d_x, d_weight, d_bias, None


class _WeightedRows(Function):
    """Per row, Σ over its pairs of value · weight[feature] / norm[feature].

    With s = value / norm and G the gradient of the result: d value = (weight·G) / norm, and as the norm is that of the
    weight's own row, d weight = Σ s·G − weight · (Σ s·(weight·G)) / norm², both sums over the feature's pairs.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, pairs: Pairs, norms: Tensor | None) -> Tensor:
        scaled = values if norms is None else values / norms[pairs.features]
        ctx.save_for_backward(scaled, weight, norms)
        ctx.pairs = pairs
        some, own = _without_zeros(scaled, pairs)
        ctx.summed = own
        return kernels_for(weight.device).weighted_sums(weight, own.features, own.row_starts, some)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor | None, None, None]:  # type: ignore[pyrefly:bad-override]
        scaled, weight, norms = ctx.saved_tensors
        pairs: Pairs = ctx.pairs
        kernels = kernels_for(weight.device)
        upstream = upstream.contiguous()
        d_weight = None
        if ctx.needs_input_grad[1] and ctx.summed is pairs:
            products, d_weight = kernels.decoder_gradients(weight, pairs, scaled, upstream)
        else:
            products = kernels.dot_products(weight, pairs.features, upstream, pairs)
            if ctx.needs_input_grad[1]:
                order, rows, starts = ctx.summed.by_feature
                d_weight = kernels.weighted_sums(upstream, rows, starts, scaled[scaled != 0][order])
        if d_weight is not None and norms is not None:
            along = kernels.feature_sums(scaled * products, pairs) / norms.square()
            d_weight.addcmul_(weight, along[:, None], value=-1)
        return products if norms is None else products / norms[pairs.features], d_weight, None, None


def _without_zeros(numbers: PerPair, pairs: Pairs) -> tuple[Float[Tensor, " some"], Pairs]:
    """Leave out pairs that add nothing to a sum, where they are many, as of latents just under their thresholds; not
    where no shape may depend on values.
    """
    if pairs.pads is not None:
        return numbers, pairs
    there = numbers != 0
    places = there.nonzero()[:, 0]
    return (numbers, pairs) if len(places) > MOSTLY * len(numbers) else (numbers[places], pairs.where(there))
