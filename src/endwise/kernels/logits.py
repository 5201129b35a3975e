"""Logits of some rows, vocabulary-major, in buffers that the next rows use again."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from endwise.kernels.interface import Unembedding


@dataclass(frozen=True)
class Buffers:
    """Fresh blocks of this size would be mapped by the operating system, and paged in again, chunk after chunk."""

    logits: tuple[Float[Tensor, " elements"], ...]
    """Buffers in at least fp32."""
    half: Float[Tensor, " elements"] | None
    """Buffer in the hidden states' own dtype, where that is narrower."""

    @classmethod
    def of(cls, unembedding: Unembedding, hidden: Tensor, rows: int, passes: int) -> "Buffers":
        """
        Args:
            rows: the most that they must hold.
            passes: whose logits are held at once.
        """
        elements = rows * len(unembedding.weight)
        rounds = hidden.dtype not in (torch.float32, torch.float64)
        dtype = torch.float32 if rounds else hidden.dtype
        logits = tuple(hidden.new_empty(elements, dtype=dtype) for _ in range(passes))
        return cls(logits, hidden.new_empty(elements) if rounds else None)

    @property
    def dtype(self) -> torch.dtype:
        return self.logits[0].dtype

    @property
    def rounds(self) -> bool:
        """True if the products are computed in less than fp32."""
        return self.half is not None

    def product(self, unembedding: Unembedding, hidden: Tensor, number: int) -> Float[Tensor, "vocab rows"]:
        """Multiply the unembedding with hidden states, in the pass's buffer."""
        shape = len(unembedding.weight), len(hidden)
        out = _shaped(self.logits[number], *shape)
        if self.half is None:
            return torch.mm(unembedding.weight, hidden.T, out=out)
        return out.copy_(torch.mm(unembedding.weight, hidden.T, out=_shaped(self.half, *shape)))

    def rounded(self, logits: Float[Tensor, "vocab rows"]) -> Float[Tensor, "vocab rows"]:
        """Round to the hidden states' dtype."""
        return logits if self.half is None else _shaped(self.half, *logits.shape).copy_(logits)


def kept_rows(hidden: Float[Tensor, "n d_model"], keep: Bool[Tensor, " n"]) -> Float[Tensor, "n d_model"]:
    """The hidden states with zeros in the other rows, which may hold NaN or infinity; 0 times either is NaN."""
    return hidden.where(keep[:, None], 0.0)


def _shaped(buffer: Tensor, vocab: int, rows: int) -> Tensor:
    return buffer[: vocab * rows].view(vocab, rows)


class Capped(NamedTuple):
    logits: Float[Tensor, "vocab rows"]
    slope: Float[Tensor, "vocab rows"] | float
    """Derivative of the logits by the matrix product before scale and soft-cap."""


def capped(unembedding: Unembedding, product: Float[Tensor, "vocab rows"]) -> Capped:
    """Logits from the product, which is overwritten."""
    if unembedding.bias is not None:
        product += unembedding.bias[:, None]
    slope: Tensor | float = unembedding.scale
    if unembedding.scale != 1.0:
        product *= unembedding.scale
    if unembedding.softcap is not None:
        product.div_(unembedding.softcap).tanh_()
        slope = (1 - product.square()).mul_(unembedding.scale)
        product *= unembedding.softcap
    return Capped(product, slope)
