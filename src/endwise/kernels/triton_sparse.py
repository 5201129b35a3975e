"""Three kernels in Triton for sparse latents: weighted sums of table rows per bag, and one dot product per pair.

A card's time is spent on reading a row of the table for every pair. Programs take a strip of 512 bytes of each row, and
the grid goes through one strip before the next: of 65,536 rows a strip is 32 MiB, which fits into an H100's level-2
cache, so that each strip is read from memory once, and from the cache for every pair. A decoder's two gradients read
the same rows, those of the gradient by the reconstructions, and are computed together, in the order of features.

Bags differ: one feature is active in every row, thousands in three. The list of pairs is cut into chunks of a fixed
size; a chunk that lies within one bag is added up by a program of its own, and the bag's program adds these sums, one
after the other, to those of fewer than two chunks of pairs, before and after them.

All is added up in fp32, without atomics, in an order that follows from the pairs alone: two runs on one kind of card
agree in their bits.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from endwise.kernels.eager import EagerKernels
from endwise.kernels.interface import DecoderGradients, Index, Pairs, PerPair

OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
STRIP_BYTES, TILE_BYTES = 512, 8192
"""Bytes of a table's row that one program sees, and of all that it gathers at once."""


@triton.jit
def _add_pairs(
    total, table, entries, weights, own, dots, begin, end, columns, inside, width,
    DOTS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Add the pairs from `begin` to `end` to `total [PAIRS WIDTH]`, whose sum over `PAIRS` is that of the bag."""
    for start in range(begin, end, PAIRS):
        pairs = start + tl.arange(0, PAIRS)
        here = pairs < end
        places = tl.load(entries + pairs, here, 0)[:, None] * width + columns[None, :]
        rows = tl.load(table + places, here[:, None] & inside[None, :], 0.0).to(tl.float32)
        total += tl.load(weights + pairs, here, 0.0).to(tl.float32)[:, None] * rows
        if DOTS:
            tl.store(dots + pairs, tl.sum(rows * own[None, :], 1), here)
    return total


@triton.jit
def _own_row(table, dots, bag, columns, inside, n_pairs, width, DOTS: tl.constexpr):
    """Row that belongs to a bag, and where the strip's dot products with it lie."""
    own = tl.load(table + bag * width + columns, inside & DOTS, 0.0).to(tl.float32)
    return own, dots + tl.program_id(1) * n_pairs.to(tl.int64)


@triton.jit(do_not_specialize=["n_pairs", "n_bags"])
def chunk_sums(
    table, entries, weights, starts, own_table, dots, sums, bags, n_pairs, n_bags, width,
    CHUNK: tl.constexpr, DOTS: tl.constexpr, PAIRS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Sums over the chunks that lie within a bag, `[chunks width]`; `bags` are those of the chunks' first pairs."""
    chunk = tl.program_id(0).to(tl.int64)
    bag = tl.load(bags + chunk)
    begin, end = chunk * CHUNK, (chunk + 1) * CHUNK
    if tl.load(starts + bag + 1, bag + 1 < n_bags, n_pairs) >= end:
        columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        inside = columns < width
        own, dots = _own_row(own_table, dots, bag, columns, inside, n_pairs, width, DOTS)
        total = tl.zeros((PAIRS, WIDTH), tl.float32)
        total = _add_pairs(total, table, entries, weights, own, dots, begin, end, columns, inside, width, DOTS, PAIRS)
        tl.store(sums + chunk * width + columns, tl.sum(total, 0), inside)


@triton.jit(do_not_specialize=["n_pairs", "n_bags"])
def bag_sums(
    table, entries, weights, starts, own_table, dots, sums, out, n_pairs, n_bags, width,
    CHUNK: tl.constexpr, DOTS: tl.constexpr, PAIRS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Sums over bags, `[bags width]`: of the pairs, and where whole chunks lie within the bag, of their sums."""
    bag = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = columns < width
    begin, end = tl.load(starts + bag), tl.load(starts + bag + 1, bag + 1 < n_bags, n_pairs)
    first, last = (begin + CHUNK - 1) // CHUNK, end // CHUNK
    head = tl.where(first < last, first * CHUNK, end)
    tail = tl.where(first < last, last * CHUNK, end)
    own, dots = _own_row(own_table, dots, bag, columns, inside, n_pairs, width, DOTS)
    total = tl.zeros((PAIRS, WIDTH), tl.float32)
    total = _add_pairs(total, table, entries, weights, own, dots, begin, head, columns, inside, width, DOTS, PAIRS)
    for start in range(first, last, PAIRS):
        chunks = start + tl.arange(0, PAIRS)
        places = chunks[:, None] * width + columns[None, :]
        total += tl.load(sums + places, (chunks < last)[:, None] & inside[None, :], 0.0)
    total = _add_pairs(total, table, entries, weights, own, dots, tail, end, columns, inside, width, DOTS, PAIRS)
    tl.store(out + bag * width + columns, tl.sum(total, 0).to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["n_pairs"])
def pair_dots(
    table, entries, rows, row_of, dots, n_pairs, width, PAIRS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Dot product of each pair's two rows over a strip; `dots` is `[strips pairs]`."""
    pairs = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    here = pairs < n_pairs
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    mask = here[:, None] & (columns < width)[None, :]
    a = tl.load(table + tl.load(entries + pairs, here, 0)[:, None] * width + columns[None, :], mask, 0.0)
    b = tl.load(rows + tl.load(row_of + pairs, here, 0)[:, None] * width + columns[None, :], mask, 0.0)
    place = dots + tl.program_id(1) * n_pairs.to(tl.int64) + pairs
    tl.store(place, tl.sum(a.to(tl.float32) * b.to(tl.float32), 1), here)


class SparseInTriton(EagerKernels):
    """Both operations on pairs, and the decoder's two gradients in one pass."""

    launch: Callable[..., None]
    chunk = 256
    """Pairs of a chunk, a power of two."""

    def weighted_sums(self, table: Tensor, entries: Index, bag_starts: Tensor, weights: PerPair) -> Tensor:
        if table.dtype == torch.float64:
            return super().weighted_sums(table, entries, bag_starts, weights)
        return self._sums(table, entries, bag_starts, weights, None)[0]

    def dot_products(self, table: Tensor, entries: Index, rows: Tensor, pairs: Pairs) -> PerPair:
        if table.dtype == torch.float64:
            return super().dot_products(table, entries, rows, pairs)
        tile, strips = self._tiling(table)
        dots = table.new_empty(strips, len(entries), dtype=torch.float32)
        if len(entries):
            inputs = (each.contiguous() for each in (table, entries, rows, pairs.rows))
            grid = triton.cdiv(len(entries), tile["PAIRS"]), strips
            self.launch(pair_dots, grid, *inputs, dots, len(entries), table.shape[1], **tile)
        return dots.sum(0).to(table.dtype)

    def decoder_gradients(self, table: Tensor, pairs: Pairs, weights: PerPair, upstream: Tensor) -> DecoderGradients:
        if table.dtype == torch.float64:
            return super().decoder_gradients(table, pairs, weights, upstream)
        order, rows, starts = pairs.by_feature
        d_table, dots = self._sums(upstream, rows, starts, weights[order], table)
        sorted_values = dots.sum(0).to(table.dtype)
        return DecoderGradients(torch.empty_like(sorted_values).scatter_(0, order, sorted_values), d_table)

    def feature_sums(self, numbers: PerPair, pairs: Pairs) -> Tensor:
        order, _, starts = pairs.by_feature
        return self.weighted_sums(numbers[:, None], order, starts, torch.ones_like(numbers))[:, 0]

    def _sums(
        self, table: Tensor, entries: Index, starts: Tensor, weights: PerPair, own: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Sums over bags, and by strip the dot products of `table[entries]` with each bag's row of `own`."""
        n_pairs, n_bags, width = len(entries), len(starts), table.shape[1]
        tile, strips = self._tiling(table)
        dots = table.new_empty(strips if own is not None else 0, n_pairs, dtype=torch.float32)
        sums = table.new_empty(n_pairs // self.chunk, width, dtype=torch.float32)
        out = table.new_empty(n_bags, width)
        inputs = [each.contiguous() for each in (table, entries, weights, starts, table if own is None else own)]
        constants = {"CHUNK": self.chunk, "DOTS": own is not None, **tile}
        if len(sums):
            firsts = torch.arange(len(sums), device=starts.device) * self.chunk
            bags = torch.searchsorted(inputs[3], firsts, right=True) - 1
            arguments = *inputs, dots, sums, bags, n_pairs, n_bags, width
            self.launch(chunk_sums, (len(sums), strips), *arguments, **constants)
        if n_bags:
            arguments = *inputs, dots, sums, out, n_pairs, n_bags, width
            self.launch(bag_sums, (n_bags, strips), *arguments, **constants)
        return out, dots

    def _tiling(self, table: Tensor) -> tuple[dict[str, int], int]:
        """Numbers of pairs and of columns at once, and of strips."""
        width = min(STRIP_BYTES // table.itemsize, triton.next_power_of_2(table.shape[1]))
        pairs = min(self.chunk, TILE_BYTES // (table.itemsize * width))
        return {"PAIRS": pairs, "WIDTH": width, **OPTIONS}, triton.cdiv(table.shape[1], width)
