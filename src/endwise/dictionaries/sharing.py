"""Sums over the processes that hold a dictionary's features, and the choice of the largest of all of them."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import pad

from endwise.common.processes import World
from endwise.kernels import Found


class _Sum(Function):
    @staticmethod
    def forward(_ctx: Any, own: Tensor, shards: World) -> Tensor:
        total = own.detach().to(torch.promote_types(own.dtype, torch.float32), copy=True)
        shards.add([total])
        return total.to(own.dtype)

    @staticmethod
    def backward(_ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # type: ignore[pyrefly:bad-override]
        return upstream, None


def summed(own: Tensor, shards: World) -> Tensor:
    """Sum what each shard has. All of them compute the same loss of it, so that its gradient is that of each part."""
    return own if shards.size == 1 else _Sum.apply(own, shards)


def best_of_shards(values: Float[Tensor, "n own"], k: int, shards: World) -> Bool[Tensor, "n own"]:
    """Mark those of each row's `own` largest here, in the order of features, that are among the k largest of all.

    Of equal ones the first are, shard by shard. NaN is marked, and so may 0 be. Some shards may have found theirs in a
    dense product of half precision.
    """
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    everyone = shards.stack(values).nan_to_num(nan=torch.inf, posinf=torch.inf)
    competing = everyone.movedim(0, -2).flatten(-2)
    last = competing.topk(min(k, competing.shape[-1]), sorted=True).values[:, -1:]
    ties = (everyone == last).sum(-1)
    free = k - (everyone > last).sum((0, -1)) - ties[: shards.rank].sum(0)
    tied = values == last
    return (values > last) | (tied & (tied.cumsum(-1) <= free[:, None])) | values.isnan()


def best_pairs(found: Found, own: int, k: int, shards: World) -> Bool[Tensor, " pairs"]:
    """Mark the pairs that are among their row's k largest of all shards, of each row's `own` largest here or fewer."""
    rows = found.pairs.rows
    place = torch.arange(len(rows), device=rows.device) - found.pairs.row_starts[rows]
    place.clamp_(max=own)  # behind them lie pads, and more of NaN
    values = found.values.new_zeros(found.pairs.n_rows, own + 1)
    values[rows, place] = found.values
    best = pad(best_of_shards(values[:, :own], k, shards), (0, 1))
    return best[rows, place] | found.values.isnan()


def best_places(values: Float[Tensor, "n d_sae"], own: int, k: int, shards: World) -> Bool[Tensor, "n d_sae"]:
    """Mark the places of each row's k largest values of all shards, at most `own` of them here."""
    features = values.topk(own, sorted=False).indices.sort(-1).values
    best = best_of_shards(values.gather(-1, features), k, shards)
    return torch.zeros_like(values, dtype=torch.bool).scatter_(-1, features, best)
