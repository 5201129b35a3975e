"""The kernels in PyTorch's own operations.

`embedding_bag` is a sparse-times-dense product that streams whole table rows; with the pairs sorted by feature it is
also the transposed product. The operation behind the gradient of its weights is one dot product per pair.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from endwise.kernels.cross_entropy import chunked_cross_entropy
from endwise.kernels.interface import CrossEntropy, Divergence, Found, Index, Kernels, Pairs, PerPair, Unembedding
from endwise.kernels.kl import chunked_kl
from endwise.kernels.scan import Blocks, among_largest, kth_of_rows, places_above
from endwise.kernels.screen import Screen, has_fast_bfloat16

PROBE_ROWS, EXCESS = 32, 1.25
"""Rows after which an encoder that is too active for sparse latents is first recognised, and by how much it must be so:
continuing to the end, only to start again the dense way, costs more than a rare wrong guess."""


class EagerKernels(Kernels):
    elements, most_elements = 1 << 23, 1 << 25
    """Pre-activations held at once, as elements of `[rows d_sae]`: 32 MiB in fp32; up to 128 MiB for wide activations,
    whose product is slow with few rows."""

    def is_screened(self, x: Tensor) -> bool:
        """Return whether pre-activations of `x` are first bounded in bf16 (`Screen`)."""
        return x.dtype == torch.float32 and has_fast_bfloat16(x.device)

    def rows_at_once(self, x: Tensor, weight: Tensor) -> int:
        d_sae, width = weight.shape
        return min(len(x), max(PROBE_ROWS, self.elements // d_sae, min(width, self.most_elements // d_sae)))

    def active(self, x: Tensor, weight: Tensor, bias: Tensor, limit: int, above: Tensor | None = None) -> Found | None:
        above = bias.new_zeros(()) if above is None else above
        rows = self.rows_at_once(x, weight)
        active = _screened(weight, bias, above) if self.is_screened(x) else _dense(weight, bias, above, rows)
        return _joined(x, weight, limit, active, rows)

    def largest(self, x: Tensor, weight: Tensor, bias: Tensor, k: int, limit: int) -> Found | None:
        rows = self.rows_at_once(x, weight)
        largest = _screened_largest(weight, bias, k) if self.is_screened(x) else _dense_largest(weight, bias, k, rows)
        return _joined(x, weight, limit, largest, rows)

    def weighted_sums(self, table: Tensor, entries: Index, bag_starts: Tensor, weights: PerPair) -> Tensor:
        if not len(entries):
            return table.new_zeros(len(bag_starts), table.shape[1])
        return embedding_bag(entries, table, bag_starts, mode="sum", per_sample_weights=weights)

    def dot_products(self, table: Tensor, entries: Index, rows: Tensor, pairs: Pairs) -> PerPair:
        return _dot_products(table, entries, rows, pairs.row_starts, pairs.rows)

    def kl(self, clean: Tensor, spliced: Tensor, keep: Tensor, unembedding: Unembedding) -> Divergence:
        return chunked_kl(clean, spliced, keep, unembedding, self.rows_per_chunk(unembedding))

    def cross_entropy(
        self, hidden: Tensor, targets: Tensor, keep: Tensor, unembedding: Unembedding, with_gradient: bool
    ) -> CrossEntropy:
        rows = self.rows_per_chunk(unembedding)
        return chunked_cross_entropy(hidden, targets, keep, unembedding, rows, with_gradient)


Active = Callable[[Tensor], tuple[Index, PerPair]]
"""Function from some rows to the flat places, ascending, of the pre-activations asked for, and their values."""


def _joined(x: Tensor, weight: Tensor, limit: int, active: Active, size: int) -> Found | None:
    """Join what is found in all rows, `size` at a time; None if it is more than the limit."""
    places, values = [x.new_empty(0, dtype=torch.int64)], [x.new_empty(0)]  # there may be no rows at all
    found, start = 0, 0
    while start < len(x):
        rows = x[start : start + (size if start else PROBE_ROWS)]
        where, value = active(rows)
        places.append(where + start * len(weight))
        values.append(value)
        found, start = found + len(where), start + len(rows)
        if found > limit or found * len(x) > EXCESS * limit * start:
            return None
    flat = torch.cat(places)
    row_starts = torch.searchsorted(flat, torch.arange(len(x), device=x.device) * len(weight))
    return Found(Pairs(flat // len(weight), flat % len(weight), row_starts, len(weight)), torch.cat(values))


def _product(weight: Tensor, bias: Tensor, most_rows: int) -> Callable[[Tensor], Tensor]:
    """Pre-activations of some rows, in memory that is used again."""
    buffer = weight.new_empty(most_rows, len(weight))
    return lambda rows: torch.addmm(bias, rows, weight.T, out=buffer[: len(rows)])


def _dense(weight: Tensor, bias: Tensor, above: Tensor, most_rows: int) -> Active:
    product = _product(weight, bias, most_rows)

    def active(rows: Tensor) -> tuple[Index, PerPair]:
        numbers = product(rows)
        where = places_above(numbers, above)
        return where, numbers.view(-1)[where]

    return active


def _dense_largest(weight: Tensor, bias: Tensor, k: int, most_rows: int) -> Active:
    product = _product(weight, bias, most_rows)

    def largest(rows: Tensor) -> tuple[Index, PerPair]:
        blocks = Blocks.of(product(rows), k)
        where = blocks.reaching(blocks.reached_by(k))
        values = blocks.numbers.view(-1)[where]
        kept = among_largest(where // len(weight), values, len(rows), k)
        return where[kept], values[kept]

    return largest


def _screened(weight: Tensor, bias: Tensor, above: Tensor) -> Active:
    screen, exact = Screen(weight, bias, above), _at_places(weight, bias)

    def active(rows: Tensor) -> tuple[Index, PerPair]:
        where = screen.candidates(rows)
        values = exact(rows, where)
        kept = places_above(values, above if above.ndim == 0 else above[where % len(weight)])
        return where[kept], values[kept]

    return active


def _screened_largest(weight: Tensor, bias: Tensor, k: int) -> Active:
    """Find k values a row; where the screen's bounds are large, k exact values in each row bound the k-th largest from
    below; no number whose bound is less can be among the k largest.
    """
    screen, exact = Screen(weight, bias), _at_places(weight, bias)

    def largest(rows: Tensor) -> tuple[Index, PerPair]:
        blocks = Blocks.of(screen.bounds(rows), k)
        probed = blocks.greatest(blocks.reached_by(k))
        least = kth_of_rows(probed // len(weight), exact(rows, probed), len(rows), k)
        where = blocks.reaching(least.to(torch.bfloat16))  # rounding, like that of the bounds, keeps the order
        values = exact(rows, where)
        kept = among_largest(where // len(weight), values, len(rows), k)
        kept &= (values <= 0).logical_not_()
        return where[kept], values[kept]

    return largest


def _at_places(weight: Tensor, bias: Tensor) -> Callable[[Tensor, Index], PerPair]:
    """Pre-activations of some rows at flat places, ascending."""

    def exact(rows: Tensor, where: Index) -> PerPair:
        row_of, features = where // len(weight), where % len(weight)
        starts = torch.searchsorted(row_of, torch.arange(len(rows), device=rows.device))
        return _dot_products(weight, features, rows, starts, row_of) + bias[features]

    return exact


def _dot_products(table: Tensor, entries: Index, rows: Tensor, row_starts: Tensor, row_of: Index) -> PerPair:
    """The gradient of `embedding_bag` by its per-sample weights (mode 0 is "sum", -1 no padding entry)."""
    if not len(entries):
        return table.new_zeros(0)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(rows, table, entries, row_starts, row_of, 0, -1)  # noqa: SLF001
