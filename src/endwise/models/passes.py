"""Records that passes through a model take and give."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from endwise.common.axes import Activation, AnyWidth, Tokens
from endwise.models.sites import Site

Act = Callable[[Tensor], Tensor | None]
"""Hook called with the value at a site; its result, unless None, takes the value's place."""
Patch = Tensor | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Clean:
    """Record of the original model's pass."""

    tokens: Tokens
    activations: dict[Site, AnyWidth]
    """The sites asked for, and what a replay from them needs besides."""
    final: Activation | None
    """The hidden state that enters the unembedding."""

    def rows(self, rows: slice) -> "Clean":
        """The same for some of the sequences; nothing is copied."""
        activations = {site: value[rows] for site, value in self.activations.items()}
        return Clean(self.tokens[rows], activations, None if self.final is None else self.final[rows])


@dataclass(frozen=True)
class Spliced:
    """Record of a pass with reconstructions in place."""

    activations: dict[Site, AnyWidth]
    final: Activation | None
