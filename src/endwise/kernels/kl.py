"""KL between two passes' predictions, from hidden states, with its gradient, in one chunked pass.

Per row, with logits z less their maximum, weights e^z and total T = Σ e^z, a probability is e^z / T and its logarithm
z − log T. So KL(P ‖ Q) = Σ P·(z_P − z_Q) + log T_Q − log T_P, where the sum needs one product with unnormalised
weights, and ∂KL/∂z_Q = Q − P. The two buffers of each pass are reused from chunk to chunk.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from endwise.kernels.interface import Divergence, Unembedding


def chunked_kl(clean: Tensor, spliced: Tensor, keep: Tensor, unembedding: Unembedding, rows: int) -> Divergence:
    """See `Kernels.kl`. Logits lie vocabulary-major, `[vocab rows]`: the product that makes them is up to twice as fast
    so on a CPU, and a sum over the vocabulary adds whole rows.

    Args:
        rows: whose logits are held at once.
    """
    weight = unembedding.weight
    gradient = torch.empty_like(spliced)
    rows = min(rows, len(spliced))
    plain = spliced.dtype in (torch.float32, torch.float64)  # or else the fp32 copy of the logits is the buffer
    buffers = [_Buffers(*(spliced.new_empty(rows * len(weight)) for _ in "zw")) if plain else None for _ in "pq"]
    total = torch.zeros((), dtype=spliced.dtype if plain else torch.float32, device=spliced.device)
    for start in range(0, len(spliced), rows):
        part = slice(start, start + rows)
        p_product = _product(unembedding, clean[part], buffers[0])
        if plain:
            q_product = _product(unembedding, spliced[part], buffers[1])
        else:
            # Half precision rounds logits of 20 by 0.05. As a difference from the clean ones, which both sides then
            # share with their rounding, the spliced ones are as exact as the difference is small.
            change = (spliced[part].float() - clean[part].float()).to(spliced.dtype)
            q_product = p_product + _product(unembedding, change, None)
        p = _predictions(unembedding, p_product, buffers[0])
        q = _predictions(unembedding, q_product, buffers[1])
        counts = keep[part].to(p.total.dtype)
        # `sum` adds pairwise; a dot product, one after the other, is off by 5e-5 over a vocabulary of 50,000.
        cross = p.logits.sub_(q.logits).mul_(p.weights).sum(0)
        total += ((cross / p.total + q.total.log() - p.total.log()) * counts).sum()
        # Rounded alike on both sides (no fused multiply-add), so that equal states have no gradient at all.
        d_logits = q.weights.mul_(counts / q.total).sub_(p.weights.mul_(counts / p.total))
        if not isinstance(q.slope, float) or q.slope != 1.0:
            d_logits *= q.slope
        if plain:
            torch.mm(d_logits.T, weight, out=gradient[part])
        else:
            gradient[part] = d_logits.to(weight.dtype).T @ weight
    return Divergence(total, gradient)


class _Buffers(NamedTuple):
    logits: Float[Tensor, " elements"]
    weights: Float[Tensor, " elements"]

    def shaped(self, vocab: int, rows: int) -> tuple[Tensor, Tensor]:
        """Both as `[vocab rows]`, for no more rows than they were made for."""
        return self.logits[: vocab * rows].view(vocab, rows), self.weights[: vocab * rows].view(vocab, rows)


class _Predictions(NamedTuple):
    logits: Float[Tensor, "vocab rows"]
    """Less their row's maximum."""
    weights: Float[Tensor, "vocab rows"]
    total: Float[Tensor, " rows"]
    slope: Float[Tensor, "vocab rows"] | float
    """Derivative of the logits by the matrix product before scale and soft-cap."""


def _product(unembedding: Unembedding, hidden: Tensor, buffers: _Buffers | None) -> Float[Tensor, "vocab rows"]:
    """Of the unembedding with hidden states, in at least fp32."""
    weight = unembedding.weight
    out = None if buffers is None else buffers.shaped(len(weight), len(hidden))[0]
    product = torch.mm(weight, hidden.T, out=out)
    return product.float() if buffers is None else product


def _predictions(unembedding: Unembedding, logits: Tensor, buffers: _Buffers | None) -> _Predictions:
    """From the product, which is overwritten."""
    if unembedding.bias is not None:
        logits += unembedding.bias[:, None]
    slope: Tensor | float = unembedding.scale
    if unembedding.scale != 1.0:
        logits *= unembedding.scale
    if unembedding.softcap is not None:
        logits.div_(unembedding.softcap).tanh_()
        slope = (1 - logits.square()).mul_(unembedding.scale)
        logits *= unembedding.softcap
    logits -= logits.amax(0)
    weights = torch.exp(logits, out=None if buffers is None else buffers.shaped(*logits.shape)[1])
    return _Predictions(logits, weights, weights.sum(0), slope)
