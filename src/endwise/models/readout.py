"""Path from the last hidden state to predictions, in chunks, so that no `[batch pos vocab]` tensor ever exists."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from endwise.common.axes import Activation, TokenMask, Tokens
from endwise.common.showing import Shown
from endwise.kernels import Unembedding, kernels_for


@dataclass(frozen=True, repr=False)
class Comparison(Shown):
    """Clean against spliced predictions, token by token; positions outside the mask hold 0."""

    kl: Float[Tensor, "batch pos"]
    """KL(clean ‖ spliced) of the next-token distributions, nats."""
    statistical_distance: Float[Tensor, "batch pos"]
    """Half the L1 distance between the two distributions, 0 to 1."""
    top1_agreement: Float[Tensor, "batch pos"]
    """1 where both passes rank the same token first."""
    ce_clean: Float[Tensor, "batch pos"]
    """Cross-entropy of the clean prediction against the token that follows, nats; 0 where none follows."""
    ce_spliced: Float[Tensor, "batch pos"]
    predicts: Bool[Tensor, "batch pos"]
    """True where the mask holds and a token follows: the positions that the two cross-entropies are defined at."""


class Readout:
    """The unembedding as the model applies it to its last hidden state."""

    def __init__(
        self,
        weight: Float[Tensor, "vocab d_model"],
        bias: Float[Tensor, " vocab"] | None = None,
        scale: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        self.unembedding = Unembedding(weight.detach(), None if bias is None else bias.detach(), scale, softcap)

    def logits(self, hidden: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows vocab"]:
        """Compute fp32 logits, whatever the weights' dtype: all that follows is a reduction over the vocabulary."""
        u = self.unembedding
        logits = torch.nn.functional.linear(hidden, u.weight, u.bias).float()
        if u.scale != 1.0:
            logits = logits * u.scale
        return logits if u.softcap is None else torch.tanh(logits / u.softcap) * u.softcap

    def kl(self, clean: Activation, spliced: Activation, mask: TokenMask) -> Float[Tensor, ""]:
        """Σ over the mask's tokens of KL(clean ‖ spliced), in nats; differentiable in `spliced` only.

        The direction is that of the reference's code (paper eq. 4 states the reverse in its symbol). Forward and
        gradient are computed in the same chunked pass: with P and Q the two distributions, ∂KL/∂logits = Q − P.
        """
        keep = mask.flatten()
        return _KLFromHidden.apply(spliced.flatten(0, 1), clean.flatten(0, 1), keep, self.unembedding)  # pyright: ignore[reportReturnType]

    def cross_entropy(self, hidden: Activation, tokens: Tokens, mask: TokenMask) -> Float[Tensor, "batch pos"]:
        """Compute the cross-entropy with the token that follows, in nats; 0 where none that counts does.

        Differentiable in `hidden`; the gradient is computed in the same chunked pass, where it is asked for.
        """
        targets, predicts = next_tokens(tokens, mask)
        rows = (hidden.flatten(0, 1), targets.flatten(), predicts.flatten())
        return _CEFromHidden.apply(*rows, self.unembedding).view(mask.shape)  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]

    @torch.no_grad()
    def compare(
        self, clean: Activation, spliced: Sequence[Activation], tokens: Tokens, mask: TokenMask
    ) -> list[Comparison]:
        """Every per-token metric of each spliced pass's predictions, in one chunked pass over the clean one's."""
        following, predicts = next_tokens(tokens, mask)
        targets = following.flatten()
        rows = kernels_for(clean.device).rows_per_chunk(self.unembedding)
        # Small results that are made between the chunks' large ones would keep the allocator from using those again.
        columns = torch.zeros(len(spliced), 5, mask.numel(), device=mask.device)
        for start in range(0, mask.numel(), rows):
            part = slice(start, start + rows)
            target = targets[part, None]
            log_p = self.logits(clean.flatten(0, 1)[part]).log_softmax(-1)
            p, top, ce_clean = log_p.exp(), log_p.argmax(-1), -log_p.gather(-1, target)[:, 0]
            for kept, hidden in zip(columns, spliced, strict=True):
                log_q = self.logits(hidden.flatten(0, 1)[part]).log_softmax(-1)
                kept[3, part] = ce_clean
                kept[4, part] = -log_q.gather(-1, target)[:, 0]
                kept[2, part] = (top == log_q.argmax(-1)).float()
                kept[0, part] = (p * (log_p - log_q)).sum(-1)
                kept[1, part] = (p - log_q.exp_()).abs().sum(-1) / 2
        comparisons = []
        for kept in columns:
            counts = torch.stack([mask, mask, mask, predicts, predicts])
            kl, distance, top1, ce_clean, ce_spliced = kept.view(5, *mask.shape).where(counts, 0.0)
            comparisons.append(Comparison(kl, distance, top1, ce_clean, ce_spliced, predicts))
        return comparisons


def next_tokens(tokens: Tokens, mask: TokenMask) -> tuple[Tokens, TokenMask]:
    """Return what each position is to predict, and the positions that predict a token which counts."""
    predicts = mask.clone()
    predicts[:, -1] = False
    predicts[:, :-1] &= mask[:, 1:]  # a masked token (padding) is no target
    return torch.nn.functional.pad(tokens[:, 1:], (0, 1)), predicts


class _KLFromHidden(torch.autograd.Function):
    """The kernel gives the gradient with the value, so that backward only scales it."""

    @staticmethod
    def forward(ctx: Any, spliced: Tensor, clean: Tensor, keep: Tensor, unembedding: Unembedding) -> Tensor:
        total, gradient = kernels_for(spliced.device).kl(clean, spliced, keep, unembedding)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[pyrefly:bad-override]
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None, None


class _CEFromHidden(torch.autograd.Function):
    """Each row's loss depends on its own hidden state alone, so that backward scales row by row."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, keep: Tensor, unembedding: Unembedding) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        losses, gradient = kernels_for(hidden.device).cross_entropy(hidden, targets, keep, unembedding, wanted)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[pyrefly:bad-override]
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[:, None].to(gradient.dtype), None, None, None
