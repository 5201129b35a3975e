"""Logits of some rows, vocabulary-major, and what a softmax is made of, in buffers that the next rows use again."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from endwise.kernels.interface import Unembedding


class Buffers(NamedTuple):
    logits: Float[Tensor, " elements"]
    weights: Float[Tensor, " elements"]

    def shaped(self, vocab: int, rows: int) -> tuple[Tensor, Tensor]:
        """Both as `[vocab rows]`, for no more rows than they were made for."""
        return self.logits[: vocab * rows].view(vocab, rows), self.weights[: vocab * rows].view(vocab, rows)


class Predictions(NamedTuple):
    logits: Float[Tensor, "vocab rows"]
    """Less their row's maximum."""
    weights: Float[Tensor, "vocab rows"]
    total: Float[Tensor, " rows"]
    slope: Float[Tensor, "vocab rows"] | float
    """Derivative of the logits by the matrix product before scale and soft-cap."""


def product(unembedding: Unembedding, hidden: Tensor, buffers: Buffers | None) -> Float[Tensor, "vocab rows"]:
    """Of the unembedding with hidden states, in at least fp32."""
    weight = unembedding.weight
    out = None if buffers is None else buffers.shaped(len(weight), len(hidden))[0]
    product = torch.mm(weight, hidden.T, out=out)
    return product.float() if buffers is None else product


def predictions(unembedding: Unembedding, logits: Tensor, buffers: Buffers | None) -> Predictions:
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
    return Predictions(logits, weights, weights.sum(0), slope)
