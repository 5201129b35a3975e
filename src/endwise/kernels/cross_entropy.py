"""Cross-entropy of given targets, from hidden states, with its gradient, in one chunked pass.

With logits z less their row's maximum and T = Σ e^z, the cross-entropy of target y is log T − z_y, and its gradient by
the logits Q − 1_y, Q = e^z / T.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from endwise.kernels.interface import Unembedding
from endwise.kernels.logits import Buffers, predictions, product


class CrossEntropy(NamedTuple):
    losses: Float[Tensor, " n"]
    """Nats, in fp32 (float64 for hidden states in float64); 0 in rows that do not count."""
    gradient: Float[Tensor, "n d_model"] | None
    """Of each row's loss by its own hidden state, in its dtype."""


def chunked_cross_entropy(
    hidden: Float[Tensor, "n d_model"],
    targets: Int[Tensor, " n"],
    keep: Bool[Tensor, " n"],
    unembedding: Unembedding,
    rows: int,
    with_gradient: bool,
) -> CrossEntropy:
    """−log softmax(logits)[target] of the rows in `keep`; `[n vocab]` never exists as a whole.

    Args:
        rows: whose logits are held at once, vocabulary-major as in `kl`.
    """
    weight, rows = unembedding.weight, min(rows, len(hidden))
    plain = hidden.dtype in (torch.float32, torch.float64)
    buffers = Buffers(*(hidden.new_empty(rows * len(weight)) for _ in "zw")) if plain else None
    losses = torch.zeros(len(hidden), dtype=hidden.dtype if plain else torch.float32, device=hidden.device)
    gradient = torch.empty_like(hidden) if with_gradient else None
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        q = predictions(unembedding, product(unembedding, hidden[part], buffers), buffers)
        counts, target = keep[part].to(q.total.dtype), targets[part][None]
        losses[part] = (q.total.log() - q.logits.gather(0, target)[0]) * counts
        if gradient is None:
            continue
        d_logits = q.weights.mul_(counts / q.total).scatter_add_(0, target, -counts[None])
        if not isinstance(q.slope, float) or q.slope != 1.0:
            d_logits *= q.slope
        gradient[part] = d_logits.to(weight.dtype).T @ weight
    return CrossEntropy(losses, gradient)
