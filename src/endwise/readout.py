"""From the last hidden state to predictions, in chunks, so that no `[batch pos vocab]` tensor ever exists."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from endwise.axes import Activation, TokenMask, Tokens

CHUNK_ELEMENTS = 1 << 20
"""Logits held at once, as elements of `[chunk vocab]`: 4 MiB in fp32, which stays in a processor's cache."""
GPU_CHUNK_ELEMENTS = 1 << 27
"""The same on a GPU, which needs large products to be busy."""


@dataclass(frozen=True)
class Comparison:
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
    """The unembedding: `logits = softcap · tanh(scale · (hidden · Wᵀ + b) / softcap)`; the cap only if there is one."""

    def __init__(
        self,
        weight: Float[Tensor, "vocab d_model"],
        bias: Float[Tensor, " vocab"] | None = None,
        scale: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        self.weight = weight.detach()
        self.bias = None if bias is None else bias.detach()
        self.scale = scale
        self.softcap = softcap

    def logits(self, hidden: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows vocab"]:
        """In fp32 whatever the weights are stored in: everything that follows is a reduction over the vocabulary."""
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def kl(self, clean: Activation, spliced: Activation, mask: TokenMask) -> Float[Tensor, ""]:
        """Σ over the mask's tokens of KL(clean ‖ spliced), in nats; differentiable in `spliced` only.

        The direction is that of the reference's code (paper eq. 4 states the reverse in its symbol). Forward and
        gradient are computed in the same chunked pass: with P and Q the two distributions, ∂KL/∂logits = Q − P.
        """
        keep = mask.flatten()
        return _KLFromHidden.apply(spliced.flatten(0, 1), clean.flatten(0, 1), keep, self)  # pyright: ignore[reportReturnType]

    @torch.no_grad()
    def compare(
        self, clean: Activation, spliced: Sequence[Activation], tokens: Tokens, mask: TokenMask
    ) -> list[Comparison]:
        """Every per-token metric of each spliced pass's predictions, in one chunked pass over the clean one's."""
        targets = torch.nn.functional.pad(tokens[:, 1:], (0, 1)).flatten()
        predicts = mask.clone()
        predicts[:, -1] = False
        predicts[:, :-1] &= mask[:, 1:]  # a masked token (padding) is no target
        columns: list[list[list[Tensor]]] = [[[] for _ in range(5)] for _ in spliced]
        for start in range(0, mask.numel(), self.chunk):
            part = slice(start, start + self.chunk)
            target = targets[part, None]
            log_p = self.logits(clean.flatten(0, 1)[part]).log_softmax(-1)
            p, top, ce_clean = log_p.exp(), log_p.argmax(-1), -log_p.gather(-1, target)[:, 0]
            for kept, hidden in zip(columns, spliced, strict=True):
                log_q = self.logits(hidden.flatten(0, 1)[part]).log_softmax(-1)
                kept[3].append(ce_clean)
                kept[4].append(-log_q.gather(-1, target)[:, 0])
                kept[2].append((top == log_q.argmax(-1)).float())
                kept[0].append((p * (log_p - log_q)).sum(-1))
                kept[1].append((p - log_q.exp_()).abs().sum(-1) / 2)
        comparisons = []
        for kept in columns:
            kl, distance, top1, ce_clean, ce_spliced = (torch.cat(column).view(mask.shape) for column in kept)
            comparisons.append(
                Comparison(
                    kl * mask, distance * mask, top1 * mask, ce_clean * predicts, ce_spliced * predicts, predicts
                )
            )
        return comparisons

    @property
    def chunk(self) -> int:
        """Rows per chunk."""
        return max(32, (GPU_CHUNK_ELEMENTS if self.weight.is_cuda else CHUNK_ELEMENTS) // self.weight.shape[0])


class _Chunk(NamedTuple):
    """One pass's predictions for some rows: probability = weights / total, log-probability = logits − log total."""

    logits: Float[Tensor, "rows vocab"]
    """Less their row's maximum."""
    weights: Float[Tensor, "rows vocab"]
    total: Float[Tensor, " rows"]
    slope: Float[Tensor, "rows vocab"] | float
    """Derivative of the logits by the matrix product before scale and soft-cap."""


def _chunk(readout: Readout, hidden: Tensor, buffers: tuple[Tensor, Tensor] | None) -> _Chunk:
    """Works in `buffers` where dtype and width allow, so that a pass over many chunks allocates once."""
    logits = torch.mm(hidden, readout.weight.T, out=buffers and buffers[0][: len(hidden)])
    if readout.bias is not None:
        logits += readout.bias
    logits = logits.float()
    slope: Tensor | float = readout.scale
    if readout.scale != 1.0:
        logits *= readout.scale
    if readout.softcap is not None:
        logits.div_(readout.softcap).tanh_()
        slope = (1 - logits.square()).mul_(readout.scale)
        logits *= readout.softcap
    logits -= logits.amax(-1, keepdim=True)
    weights = torch.exp(logits, out=buffers and buffers[1][: len(hidden)])
    return _Chunk(logits, weights, weights.sum(-1), slope)


class _KLFromHidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spliced: Tensor, clean: Tensor, keep: Tensor, readout: Readout) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=spliced.device)
        gradient = torch.empty_like(spliced)
        rows, vocab = min(readout.chunk, len(spliced)), len(readout.weight)
        exact = spliced.dtype == torch.float32  # or else the fp32 copy of the logits is the buffer
        buffers = [(spliced.new_empty(rows, vocab), spliced.new_empty(rows, vocab)) if exact else None for _ in "pq"]
        for start in range(0, len(spliced), rows):
            part = slice(start, start + rows)
            p = _chunk(readout, clean[part].detach(), buffers[0])
            q = _chunk(readout, spliced[part].detach(), buffers[1])
            counts = keep[part].to(p.total.dtype)
            # Σ P (log P − log Q), with both normalisers taken out of the sum
            cross = torch.bmm(p.weights[:, None], p.logits.sub_(q.logits)[..., None])[:, 0, 0]
            total += ((cross / p.total + q.total.log() - p.total.log()) * counts).sum()
            d_logits = q.weights.mul_((counts / q.total)[:, None]).sub_(p.weights.mul_((counts / p.total)[:, None]))
            if not isinstance(q.slope, float) or q.slope != 1.0:
                d_logits *= q.slope
            gradient[part] = d_logits.to(readout.weight.dtype) @ readout.weight
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None, None
