"""KL between two passes' predictions, from hidden states, with its gradient, in one chunked pass.

Per row, with logits z less their maximum, weights e^z and total T = Σ e^z, a probability is e^z / T and its logarithm
z − log T. So KL(P ‖ Q) = Σ P·(z_P − z_Q) + log T_Q − log T_P, where the sum needs one product with unnormalised
weights, and ∂KL/∂z_Q = Q − P. All is done in place, in buffers that the next chunk of rows uses again; and slice by
slice of the vocabulary, so that what follows the products finds its numbers in the processor's cache.
"""

import torch
from torch import Tensor

from endwise.kernels.interface import Divergence, Unembedding
from endwise.kernels.logits import Buffers, capped, kept_rows

SLICE_ELEMENTS = 1 << 17
"""Logits in a slice of a chunk, of each pass: half a MiB in fp32."""


def chunked_kl(clean: Tensor, spliced: Tensor, keep: Tensor, unembedding: Unembedding, rows: int) -> Divergence:
    """See `Kernels.kl`. Logits lie vocabulary-major, `[vocab rows]`: the product that makes them is up to twice as fast
    so on a CPU, and a sum over the vocabulary adds whole rows.

    Args:
        rows: whose logits are held at once.
    """
    weight = unembedding.weight
    gradient = torch.empty_like(spliced)
    rows = max(1, min(rows, len(spliced)))
    buffers = Buffers.of(unembedding, spliced, rows, 2)
    total = torch.zeros((), dtype=buffers.dtype, device=spliced.device)
    for start in range(0, len(spliced), rows):
        part = slice(start, start + rows)
        p, q = _logits(unembedding, kept_rows(clean[part], keep[part]), kept_rows(spliced[part], keep[part]), buffers)
        p, _ = capped(unembedding, p)
        q, slope = capped(unembedding, q)
        counts = keep[part].to(buffers.dtype)
        slices = _slices(p)
        cross, p_total, q_total = _weights(p, q, slices)
        total += ((cross / p_total + q_total.log() - p_total.log()) * counts).sum()
        _difference(p, q, counts / p_total, counts / q_total, slope, slices)
        torch.mm(buffers.rounded(q).T, weight, out=gradient[part])
    return Divergence(total, gradient)


def _logits(unembedding: Unembedding, clean: Tensor, spliced: Tensor, buffers: Buffers) -> tuple[Tensor, Tensor]:
    """Both products, before scale and soft-cap."""
    p = buffers.product(unembedding, clean, 0)
    if not buffers.rounds:
        return p, buffers.product(unembedding, spliced, 1)
    # Half precision rounds logits of 20 by 0.05. As a difference from the clean ones, which both sides then share with
    # their rounding, the spliced ones are as exact as the difference is small.
    change = (spliced.float() - clean.float()).to(spliced.dtype)
    return p, buffers.product(unembedding, change, 1).add_(p)


def _slices(logits: Tensor) -> list[slice]:
    """Slice the vocabulary. A GPU, which keeps nothing in its cache between operations, takes it whole."""
    vocab, rows = logits.shape
    size = vocab if logits.is_cuda else max(1, SLICE_ELEMENTS // rows)
    return [slice(start, start + size) for start in range(0, vocab, size)]


def _weights(p: Tensor, q: Tensor, slices: list[slice]) -> tuple[Tensor, Tensor, Tensor]:
    """Put the weights in the place of the logits; Σ e^z_P·(z_P − z_Q) and the two totals, each `[rows]`."""
    p_top, q_top = p.amax(0), q.amax(0)
    sums = p.new_empty(3, len(slices), p.shape[1])
    scratch = torch.empty_like(p[slices[0]])
    for number, each in enumerate(slices):
        p_part, q_part = p[each].sub_(p_top), q[each].sub_(q_top)
        difference = torch.sub(p_part, q_part, out=scratch[: len(p_part)])
        torch.sum(p_part.exp_(), 0, out=sums[1, number])
        torch.sum(q_part.exp_(), 0, out=sums[2, number])
        # `sum` adds pairwise; a dot product, one after the other, is off by 5e-5 over a vocabulary of 50,000.
        torch.sum(difference.mul_(p_part), 0, out=sums[0, number])
    cross, p_total, q_total = sums.sum(1)
    return cross, p_total, q_total


def _difference(
    p: Tensor, q: Tensor, p_scale: Tensor, q_scale: Tensor, slope: Tensor | float, slices: list[slice]
) -> None:
    """Put Q − P, times the slope, in the place of the spliced weights.

    Rounded alike on both sides (no fused multiply-add), so that equal states have no gradient at all.
    """
    for each in slices:
        difference = q[each].mul_(q_scale).sub_(p[each].mul_(p_scale))
        if isinstance(slope, Tensor):
            difference *= slope[each]
        elif slope != 1.0:
            difference *= slope
