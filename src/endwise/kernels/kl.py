"""KL between two passes' predictions, from hidden states, with its gradient, in one chunked pass.

Per row, with logits z less their maximum, weights e^z and total T = Σ e^z, a probability is e^z / T and its logarithm
z − log T. So KL(P ‖ Q) = Σ P·(z_P − z_Q) + log T_Q − log T_P, where the sum needs one product with unnormalised
weights, and ∂KL/∂z_Q = Q − P. The two buffers of each pass are reused from chunk to chunk.
"""

import torch
from torch import Tensor

from endwise.kernels.interface import Divergence, Unembedding
from endwise.kernels.logits import Buffers, predictions, product


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
    buffers = [Buffers(*(spliced.new_empty(rows * len(weight)) for _ in "zw")) if plain else None for _ in "pq"]
    total = torch.zeros((), dtype=spliced.dtype if plain else torch.float32, device=spliced.device)
    for start in range(0, len(spliced), rows):
        part = slice(start, start + rows)
        p_product = product(unembedding, clean[part], buffers[0])
        if plain:
            q_product = product(unembedding, spliced[part], buffers[1])
        else:
            # Half precision rounds logits of 20 by 0.05. As a difference from the clean ones, which both sides then
            # share with their rounding, the spliced ones are as exact as the difference is small.
            change = (spliced[part].float() - clean[part].float()).to(spliced.dtype)
            q_product = p_product + product(unembedding, change, None)
        p = predictions(unembedding, p_product, buffers[0])
        q = predictions(unembedding, q_product, buffers[1])
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
