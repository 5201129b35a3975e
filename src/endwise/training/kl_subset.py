"""KL of some of the positions, which costs as many fewer products with the unembedding."""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from jaxtyping import Int64
from pydantic import Field
from torch import Tensor

from endwise.common.axes import TokenMask, Tokens
from endwise.config.objective import TERMS, TermConfig
from endwise.models.language_model import Clean, Spliced
from endwise.models.readout import Readout
from endwise.models.splicing import Scalar
from endwise.training.objectives import SplicedTerm


class KLSubsetConfig(TermConfig):
    stride: Annotated[int, Field(ge=2)] = 4
    """One of so many neighbouring positions is compared."""


@TERMS.add("kl_subset")
@dataclass(frozen=True)
class KLSubset(SplicedTerm):
    """Estimate of KL(original ‖ spliced) over all tokens: `stride` times its sum over every `stride`-th position,
    counted from an offset that is drawn for each sequence and step.

    Every position is in with probability 1/`stride`, so that value and gradient are without bias, whatever the mask;
    the gradient at a position's reconstruction varies about `stride` − 1 times as much as it is large, squared. The
    tail runs on all positions, and products with the unembedding are `stride` times fewer.
    """

    name = "kl_subset"
    unit = "nats per token"
    final = True
    Settings: ClassVar[type[TermConfig]] = KLSubsetConfig
    coefficient: float  # pyrefly: ignore[bad-override]
    stride: int
    step: int = 0
    """Steps before the one that it is for."""

    @property
    def predicted(self) -> float:
        return 1 / self.stride

    def at(self, step: int) -> "KLSubset":
        return replace(self, step=step)

    def total(self, readout: Readout, clean: Clean, spliced: Spliced, mask: TokenMask) -> Scalar:
        if clean.final is None or spliced.final is None:
            raise ValueError("the KL term needs the final hidden state of both passes")
        first = offsets(clean.tokens, self.step, self.stride)[:, None]
        places = first + torch.arange(0, mask.shape[1], self.stride, device=mask.device)
        inside = places < mask.shape[1]
        places = places.where(inside, 0)
        rows = torch.arange(len(mask), device=mask.device)[:, None]
        chosen = inside & mask[rows, places]
        return self.stride * readout.kl(clean.final[rows, places], spliced.final[rows, places], chosen)


def offsets(tokens: Tokens, step: int, stride: int) -> Int64[Tensor, " batch"]:
    """Draw a number below `stride` for each sequence, from its tokens and the step alone: it depends neither on how a
    batch is cut and shared out nor on what else is drawn, and a resumed run draws it again.
    """
    places = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    mixed = _mixed((tokens.long() + 1) * _mixed(places)).sum(-1) + step
    return (_mixed(_mixed(mixed)) >> 1 & _SIGNLESS) % stride


_SIGNLESS = (1 << 62) - 1


def _mixed(numbers: Int64[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
    """Spread the differences of whole numbers over all bits; products wrap (multipliers of splitmix64, less signs)."""
    for factor in (0x3F58476D1CE4E5B9, 0x14D049BB133111EB):
        numbers = (numbers ^ (numbers >> 31 & _SIGNLESS)) * factor
    return numbers ^ (numbers >> 33 & _SIGNLESS)
