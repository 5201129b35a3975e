"""A search for the few large numbers of a matrix that looks at few of them twice.

The greatest number of each block of neighbours is found first, which takes one pass as fast as memory; what is wanted
lies in the few blocks whose greatest is large enough, and only these are looked through. The k-th greatest of a row's
blocks is, besides, a bound on its k-th largest number, as near as few blocks hold two of the k largest.

NaN counts as larger than any number, so that it stays in the latents and stops a run, as it would in dense ones.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from endwise.kernels.interface import Index, PerPair

BLOCK, HALF_BLOCK = 32, 64
"""Numbers of a block; of those of two bytes, of which a vector holds more."""
WIDE_BLOCK, WIDE_FROM = 64, 4
"""A larger block, where a row has at least so many times k of them."""
FEW_BLOCKS = 1 / 2
"""Share of the blocks from which on one pass over all numbers costs less than one over these."""
WORD, FEW_WORDS = 8, 1 / 4
"""Booleans that are tested at once, and the share of such words with a true one from which on that gains nothing."""
LONG = 4
"""Rows with more candidates than this multiple of k are looked through apart, so that none makes others so long."""


def places_above(numbers: Float[Tensor, "*axes"], least: Tensor) -> Index:
    """Flat places, ascending, of the numbers above.

    Args:
        least: one number, or one for each column.
    """
    size = HALF_BLOCK if numbers.element_size() == 2 else BLOCK
    if numbers.ndim == 2 and numbers.shape[1] % size == 0 and numbers.is_contiguous():
        blocks = numbers.view(len(numbers), -1, size)
        of_blocks = least.view(-1, size) if least.ndim else None
        some = places_of(_above(blocks.amax(-1), least if of_blocks is None else of_blocks.amin(-1)))
        if len(some) <= FEW_BLOCKS * blocks.shape[0] * blocks.shape[1]:
            inside = blocks.view(-1, size).index_select(0, some)
            own = least if of_blocks is None else of_blocks.index_select(0, some % len(of_blocks))
            return _in_blocks(places_of(_above(inside, own)), some, size)
    return places_of(_above(numbers, least))


def places_of(mask: Bool[Tensor, "*axes"]) -> Index:
    """Flat places, ascending, at which a mask is true."""
    flat = mask.reshape(-1)
    if len(flat) % WORD or flat.storage_offset() % WORD or not len(flat):
        return flat.nonzero()[:, 0]
    words = flat.view(torch.int64).nonzero()[:, 0]
    if len(words) > FEW_WORDS * len(flat) / WORD:
        return flat.nonzero()[:, 0]
    return _in_blocks(flat.view(-1, WORD).index_select(0, words).view(-1).nonzero()[:, 0], words, WORD)


def _in_blocks(places: Index, blocks: Index, size: int) -> Index:
    """Flat places of all numbers, from those among the numbers of some blocks."""
    block = places // size
    return blocks[block] * size + (places - block * size)


def _above(numbers: Tensor, least: Tensor) -> Tensor:
    return (numbers <= least).logical_not_()


class Blocks(NamedTuple):
    """The rows of a matrix, each in blocks of equal size."""

    numbers: Float[Tensor, "n width"]
    maxima: Float[Tensor, "n blocks"]

    @classmethod
    def of(cls, numbers: Float[Tensor, "n width"], k: int) -> "Blocks":
        """Choose blocks for a search for the k largest of each row; of width 1 if no others divide it into k."""
        width = numbers.shape[1]
        sizes = [size for size in (BLOCK,) if width % size == 0 and width >= size * k]
        sizes += [size for size in (WIDE_BLOCK,) if width % size == 0 and width >= WIDE_FROM * size * k]
        if not sizes:
            return cls(numbers, numbers)
        return cls(numbers, numbers.view(len(numbers), -1, sizes[-1]).amax(-1))

    @property
    def size(self) -> int:
        return self.numbers.shape[1] // self.maxima.shape[1]

    def reached_by(self, k: int) -> Float[Tensor, " n"]:
        """Return for each row a number, at least 0, that k of its numbers reach at least, if as many are positive."""
        largest = self.maxima.nan_to_num(nan=torch.inf).topk(min(k, self.maxima.shape[1]), sorted=False).values
        return largest.amin(-1).clamp_min(0.0)

    def _blocks(self, least: Float[Tensor, " n"]) -> Index:
        """Flat places, ascending, of blocks with positive numbers that reach the row's least, or NaN."""
        below = (self.maxima < least[:, None]).logical_or_(self.maxima <= 0)
        return places_of(below.logical_not_())

    def reaching(self, least: Float[Tensor, " n"]) -> Index:
        """Flat places, ascending, of positive numbers that reach the row's least, or NaN."""
        some = self._blocks(least)
        if self.size == 1:
            return some
        inside = self.numbers.view(-1, self.size).index_select(0, some)
        leasts = least[some // self.maxima.shape[1], None]
        return _in_blocks(places_of((inside < leasts).logical_or_(inside <= 0).logical_not_()), some, self.size)

    def greatest(self, least: Float[Tensor, " n"]) -> Index:
        """Flat places, ascending, of the greatest number of each block whose greatest reaches the row's least."""
        some = self._blocks(least)
        return some * self.size + self.numbers.view(-1, self.size).index_select(0, some).argmax(-1)


def kept_per_row(values: Float[Tensor, "n width"], k: int) -> Bool[Tensor, "n width"]:
    """Mark each row's k largest, of equal ones the first, and NaN; if fewer are positive, others may be marked too."""
    smallest = values.topk(min(k, values.shape[1]), dim=-1).values[:, -1:]
    sure = (values > smallest) | values.isnan()
    ties = values == smallest
    return sure | (ties & (ties.cumsum(-1, dtype=torch.int32) <= k - sure.sum(-1, keepdim=True)))


def among_largest(rows: Index, values: PerPair, n_rows: int, k: int) -> Bool[Tensor, " pairs"]:
    """Mark the k largest of each row's values, of equal ones the first, and NaN.

    Args:
        rows: of the values, ascending.
    """
    kept = torch.ones_like(rows, dtype=torch.bool)
    counts = torch.bincount(rows, minlength=n_rows)
    for some in ((counts > k) & (counts <= LONG * k), counts > LONG * k):
        if some.any():
            here = some[rows].nonzero()[:, 0]
            padded, row, column = _padded((some.cumsum(0) - 1)[rows[here]], values[here])
            kept[here] = kept_per_row(padded, k)[row, column]
    return kept


def kth_of_rows(rows: Index, values: PerPair, n_rows: int, k: int) -> Float[Tensor, " n_rows"]:
    """Each row's k-th largest value, NaN the largest; 0 if it has fewer, or that is less.

    Args:
        rows: of the values, ascending.
    """
    result = values.new_zeros(n_rows)
    enough = torch.bincount(rows, minlength=n_rows) >= k
    here = enough[rows]
    if here.any():
        padded, _, _ = _padded((enough.cumsum(0) - 1)[rows[here]], values[here].nan_to_num(nan=torch.inf))
        result[enough] = padded.topk(k, sorted=False).values.amin(-1).clamp_min(0.0)
    return result


def _padded(rows: Index, values: PerPair) -> tuple[Float[Tensor, "some most"], Index, Index]:
    """Values in a matrix, each row's first, with −∞ behind; and their places there.

    Args:
        rows: ascending, with no number left out.
    """
    counts = torch.bincount(rows)
    columns = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    matrix = values.new_full((len(counts), int(counts.max())), -torch.inf)
    matrix[rows, columns] = values
    return matrix, rows, columns
