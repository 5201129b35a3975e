"""Cross-entropy of given targets, from hidden states, with its gradient, in one chunked pass.

With logits z less their row's maximum and T = Σ e^z, the cross-entropy of target y is log T − z_y, and its gradient by
the logits Q − 1_y, Q = e^z / T.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from endwise.kernels.interface import CrossEntropy, Unembedding
from endwise.kernels.logits import Buffers, capped, kept_rows


def chunked_cross_entropy(
    hidden: Float[Tensor, "n d_model"],
    targets: Int[Tensor, " n"],
    keep: Bool[Tensor, " n"],
    unembedding: Unembedding,
    rows: int,
    with_gradient: bool,
) -> CrossEntropy:
    """See `Kernels.cross_entropy`.

    Args:
        rows: whose logits are held at once, vocabulary-major as in `kl`.
    """
    weight, rows = unembedding.weight, max(1, min(rows, len(hidden)))
    buffers = Buffers.of(unembedding, hidden, rows, 1)
    losses = torch.zeros(len(hidden), dtype=buffers.dtype, device=hidden.device)
    gradient = torch.empty_like(hidden) if with_gradient else None
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        logits, slope = capped(unembedding, buffers.product(unembedding, kept_rows(hidden[part], keep[part]), 0))
        counts, target = keep[part].to(buffers.dtype), targets[part][None]
        of_target = logits.sub_(logits.amax(0)).gather(0, target)[0]
        weights = logits.exp_()
        total = weights.sum(0)
        losses[part] = (total.log() - of_target) * counts
        if gradient is None:
            continue
        d_logits = weights.mul_(counts / total).scatter_add_(0, target, -counts[None])
        if not isinstance(slope, float) or slope != 1.0:
            d_logits *= slope
        torch.mm(buffers.rounded(d_logits).T, weight, out=gradient[part])
    return CrossEntropy(losses, gradient)
