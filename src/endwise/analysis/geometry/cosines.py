"""The nearest of many directions by cosine, tile by tile, so that no table of all pairs is ever held."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

MEMORY = 512 << 20
"""Bytes that a search may hold beside the directions themselves and its result."""
SIDE = 4096
"""Rows of a tile at most: larger ones are multiplied no faster."""
_PER_PAIR = 16
"""Bytes a tile takes at most for each of its pairs: the product, its transpose, and what the reductions make."""
_UNIT = 1e-4
"""Tolerance of a unit direction's norm."""

Directions = Float[Tensor, "n d_model"]
Others = Float[Tensor, "m _"]
"""Directions of the same width; others are refused in words."""


@dataclass(frozen=True)
class Nearest:
    """The k others of each direction with the greatest cosines, the greatest first."""

    cosine: Float[Tensor, "n k"]
    index: Int64[Tensor, "n k"]
    """Number of the other; of several at one cosine, any."""

    @property
    def best(self) -> Float[Tensor, " n"]:
        return self.cosine[:, 0]


def nearest_within(directions: Directions, *, k: int = 1, memory: int = MEMORY) -> Nearest:
    """Find for each direction the nearest others of the same dictionary; itself is none of them.

    Each product of two tiles serves the rows of both, which halves the work.

    Args:
        directions: rows of unit length in float32, on any device.
        k: how many others; fewer where there are fewer.
        memory: bytes, beside the directions and the result.

    Raises:
        ValueError: rows that are not of unit length, fewer than two of them, or k below 1.
    """
    _check(directions, k)
    count = len(directions)
    if count < 2:
        raise ValueError(f"A nearest neighbour needs two directions or more; given {count}.")
    best = _Best(directions, min(k, count - 1))
    side = _side(memory)
    for i in range(0, count, side):
        rows = slice(i, min(i + side, count))
        for j in range(i, count, side):
            columns = slice(j, min(j + side, count))
            tile = directions[rows] @ directions[columns].T
            if i == j:
                tile.fill_diagonal_(-torch.inf)
            best.update(rows, tile, j)
            if i != j:
                best.update(columns, tile.T.contiguous(), i)
    return best.result()


def nearest_across(a: Directions, b: Others, *, k: int = 1, memory: int = MEMORY) -> tuple[Nearest, Nearest]:
    """Find for each of `a` the nearest of `b`, and for each of `b` the nearest of `a`, both from one product.

    Args: as for `nearest_within`.

    Raises:
        ValueError: as `nearest_within`, but one direction of each is enough; or directions of two widths.
    """
    _check(a, k)
    _check(b, k)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"Directions must have one width; given {a.shape[1]} and {b.shape[1]}.")
    if not len(a) or not len(b):
        raise ValueError(f"Nearest directions need at least one on both sides; given {len(a)} and {len(b)}.")
    of_a, of_b = _Best(a, min(k, len(b))), _Best(b, min(k, len(a)))
    side = _side(memory)
    for i in range(0, len(a), side):
        rows = slice(i, min(i + side, len(a)))
        for j in range(0, len(b), side):
            columns = slice(j, min(j + side, len(b)))
            tile = a[rows] @ b[columns].T
            of_a.update(rows, tile, j)
            of_b.update(columns, tile.T.contiguous(), i)
    return of_a.result(), of_b.result()


class _Best:
    """The k greatest of every row so far."""

    def __init__(self, directions: Tensor, k: int) -> None:
        shape, device = (len(directions), k), directions.device
        self.k = k
        self.cosine = torch.full(shape, -torch.inf, device=device)
        self.index = torch.full(shape, -1, dtype=torch.int64, device=device)

    def update(self, rows: slice, tile: Tensor, offset: int) -> None:
        """Take in the cosines of `rows` with the others from `offset` on, `[rows, columns]`."""
        if self.k == 1:
            found = tile.max(1, keepdim=True)
            better = found.values > self.cosine[rows]
            self.cosine[rows] = torch.where(better, found.values, self.cosine[rows])
            self.index[rows] = torch.where(better, found.indices + offset, self.index[rows])
            return
        found = tile.topk(min(self.k, tile.shape[1]), dim=1)
        cosine = torch.cat([self.cosine[rows], found.values], 1)
        index = torch.cat([self.index[rows], found.indices + offset], 1)
        self.cosine[rows], order = cosine.topk(self.k, dim=1)
        self.index[rows] = index.gather(1, order)

    def result(self) -> Nearest:
        return Nearest(self.cosine.clamp_(-1.0, 1.0), self.index)


def _side(memory: int) -> int:
    return max(1, min(SIDE, math.isqrt(memory // _PER_PAIR)))


def _check(directions: Tensor, k: int) -> None:
    if k < 1:
        raise ValueError(f"k must be 1 or more; given {k}.")
    norms = torch.linalg.vector_norm(directions, dim=1)
    if directions.dtype != torch.float32 or bool(((norms - 1).abs() > _UNIT).any()):
        raise ValueError("Directions must be rows of unit length in float32.")
