"""An encoder's few large pre-activations on a card: found by bounds in bf16, in Triton, and computed in fp32."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from endwise.kernels.interface import Found, HeldPairs, Kernels, Pairs, PerPair, Room
from endwise.kernels.keeping import DealtSlots, kept_of
from endwise.kernels.screen import Screen
from endwise.kernels.triton_encoder import block_maxima, candidate_bits, places_of_bits

TILE = {"ROWS": 128, "FEATURES": 256, "WIDTH": 64, "num_warps": 8, "enable_fp_fusion": True}
"""The largest tile of bounds that no card spills (`tools/kernel_resources.py`)."""
LIST = {"ROWS": 2, "WORDS": 128, "num_warps": 4}
"""Words of bits that are read at once."""
WORD = 32
"""Bits of a word."""
BLOCK = 32
"""Neighbours of which the greatest is kept."""


class CandidatePlaces(NamedTuple):
    """The places at which a pre-activation may be large enough; it is at no other."""

    bits: Int[Tensor, "n words"]
    counts: Int[Tensor, " n"]
    """Set bits in each row."""
    n_features: int

    @property
    def number(self) -> Tensor:
        return self.counts.sum()


class Bounds:
    """Bounds on the pre-activations `x·weightᵀ + bias − above`, computed where they are asked for.

    Args:
        launch: what starts a kernel.
    """

    tile, listed = TILE, LIST

    def __init__(
        self,
        launch: Callable[..., None],
        x: Float[Tensor, "n d_model"],
        weight: Float[Tensor, "d_sae d_model"],
        bias: Float[Tensor, " d_sae"],
        above: Float[Tensor, " d_sae"] | Float[Tensor, ""] | None = None,
    ) -> None:
        self.launch, self.x, self.screen = launch, x, Screen(weight, bias, above)

    def reached_by(self, k: int) -> Float[Tensor, " n"]:
        """Bound each row's k-th largest pre-activation from below, by 0 or more, if it is positive."""
        blocks = _parts(len(self.screen.weight), BLOCK)
        if k > blocks or not len(self.x):
            return self.x.new_zeros(len(self.x))
        maxima = self.x.new_empty(len(self.x), blocks)
        self._launch(block_maxima, self.screen.widened(self.x, from_below=True), (maxima,), blocks, BLOCK=BLOCK)
        return maxima.topk(k, sorted=False).values.amin(-1).clamp_min(0.0)

    def reaching(self, least: Float[Tensor, " n"] | None = None) -> CandidatePlaces:
        """Find where pre-activations may be positive and reach the row's least, or NaN."""
        (n, _), d_sae = self.x.shape, len(self.screen.weight)
        above = self.x.new_zeros(n)
        if least is not None:
            above = least.nextafter(above).clamp_min(0.0)
        bits = torch.empty(n, _parts(d_sae, WORD), dtype=torch.int32, device=self.x.device)
        counts = torch.empty(n, _parts(d_sae, self.tile["FEATURES"]), dtype=torch.int32, device=self.x.device)
        if n:
            self._launch(candidate_bits, self.screen.widened(self.x), (above, bits, counts), bits.shape[1])
        return CandidatePlaces(bits, counts.sum(1), d_sae)

    def places(self, found: CandidatePlaces, room: int) -> Pairs:
        """List candidates in so many slots."""
        (n, words), slots = found.bits.shape, DealtSlots.of(found.counts, room)
        features = torch.full((room,), found.n_features - 1, device=self.x.device)
        if n:
            grid, listed = (_parts(n, self.listed["ROWS"]),), self.listed
            self.launch(places_of_bits, grid, found.bits, slots.begins, features, n, words, room, **listed)
        return slots.pairs(features, found.n_features)

    def _launch(self, kernel: Any, x: Tensor, others: tuple[Tensor, ...], columns: int, **constants: Any) -> None:
        (n, width), weight = x.shape, self.screen.weight
        grid = _parts(n, self.tile["ROWS"]), _parts(len(weight), self.tile["FEATURES"])
        self.launch(kernel, grid, x, weight, *others, n, len(weight), width, columns, **constants, **self.tile)


@dataclass(frozen=True)
class Search:
    """CandidatePlaces, and how what is asked for is found by their values in fp32."""

    kernels: Kernels
    bounds: Bounds
    candidates: CandidatePlaces
    weight: Float[Tensor, "d_sae d_model"]
    bias: Float[Tensor, " d_sae"]
    kept: Callable[[Pairs, PerPair], Bool[Tensor, " pairs"]]

    def held(self, room: Room) -> HeldPairs:
        """Find it in so many slots."""
        pairs, values, kept = self._computed(room.candidates)
        return HeldPairs(kept_of(pairs, values, kept, room.pairs), torch.stack([self.candidates.number, kept.sum()]))

    def waiting(self, limit: int, worth: int) -> Found | None:
        """Find all of it, for which the host waits; None if it is more than the limit, or candidates more than `worth`
        times that.
        """
        if (number := int(self.candidates.number)) > worth * limit:
            return None
        pairs, values, kept = self._computed(number)
        if (number := int(kept.sum())) > limit:
            return None
        found = kept_of(pairs, values, kept, number)
        return found._replace(pairs=replace(found.pairs, pads=None))

    def _computed(self, room: int) -> tuple[Pairs, PerPair, Bool[Tensor, " pairs"]]:
        pairs = self.bounds.places(self.candidates, room)
        values = self.kernels.dot_products(self.weight, pairs.features, self.bounds.x, pairs)
        values = values + self.bias[pairs.features]
        assert pairs.pads is not None
        return pairs, values, self.kept(pairs, values.where(~pairs.pads, -torch.inf)) & ~pairs.pads


def _parts(whole: int, size: int) -> int:
    return -(-whole // size)
