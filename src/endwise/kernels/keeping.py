"""Pairs in slots: which are kept, and where, without a shape that depends on values."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad

from endwise.kernels.interface import Found, Pairs, PerPair


class DealtSlots(NamedTuple):
    """So many slots, dealt out to rows: to each what it has, and an even share of what is left over behind that."""

    begins: Int[Tensor, " n"]
    rows: Int[Tensor, " slots"]
    pads: Bool[Tensor, " slots"]

    @classmethod
    def of(cls, counts: Int[Tensor, " n"], room: int) -> "DealtSlots":
        """Deal out `room` slots. Where that is not enough, later rows begin behind the last, or end there."""
        number = torch.arange(room, device=counts.device)
        ends, n = counts.cumsum(0), len(counts)
        spare = (room - ends[-1:]).clamp_min(0)
        begins = ends - counts + torch.arange(n, device=counts.device) * spare // max(1, n)
        rows = torch.searchsorted(begins, number, right=True) - 1
        return cls(begins, rows, number >= (begins + counts)[rows])

    def pairs(self, features: Int[Tensor, " slots"], n_features: int) -> Pairs:
        return Pairs(self.rows, features, self.begins.clamp_max(len(features)), n_features, self.pads)


def kept_of(pairs: Pairs, values: PerPair, kept: Bool[Tensor, " pairs"], room: int) -> Found:
    """Keep some of the pairs, in so many slots."""
    before = pad(kept.cumsum(0), (1, 0))
    ends = pad(pairs.row_starts[1:], (0, 1), value=len(values))
    counts = before[ends] - before[pairs.row_starts]
    slots = DealtSlots.of(counts, room)
    target = (slots.begins - before[pairs.row_starts])[pairs.rows] + before[:-1]
    target = target.where(kept, room).clamp_max(room)  # what is not kept, or has no room, falls behind the end
    features = pairs.features.new_full((room + 1,), pairs.n_features - 1).scatter_(0, target, pairs.features)
    found = values.new_zeros(room + 1).scatter_(0, target, values)
    return Found(slots.pairs(features[:room], pairs.n_features), found[:room])


def largest_of_rows(pairs: Pairs, values: PerPair, k: int) -> Bool[Tensor, " pairs"]:
    """Mark the k largest positive values of each row, of equal ones the first, and NaN, which counts as the largest."""
    # Positive floats are ordered as the integers that their bits spell, and NaN comes behind infinity.
    bits = values.where(values > 0, 0.0).where(values.isnan().logical_not(), torch.nan).view(torch.int32)
    order = ((pairs.rows << 32) - bits).argsort(stable=True)
    places = torch.arange(len(order), device=order.device) - pairs.row_starts[pairs.rows]
    first = torch.zeros_like(order, dtype=torch.bool).scatter_(0, order, places < k)
    return (first & (values > 0)) | values.isnan()
