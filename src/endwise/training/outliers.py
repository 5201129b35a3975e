"""Positions of outlying norm, attention sinks, which losses, k and metrics leave out (`data.leave_out_norms`)."""

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from endwise.common.axes import TokenMask
from endwise.common.errors import ConfigError
from endwise.common.processes import World
from endwise.common.remarks import MANY_LEFT_OUT
from endwise.models.language_model import Clean
from endwise.models.sites import Place
from endwise.training.joint import AnyTrainee
from endwise.training.trainee import LEFT_OUT

MEASURED_ON = 16_384
"""Tokens of training text over which the median norm is taken."""


@dataclass(frozen=True)
class Outliers:
    """Tokens left out at a place, measured before the first step."""

    place: str
    multiple: float
    """`data.leave_out_norms`."""
    median_norm: float
    """Median norm of what is read, over tokens that count."""
    limit: float
    """The multiple of it: `SAE.norm_limit`, by which everything goes from then on."""
    share: float
    """Share of those tokens that are above the limit."""
    tokens: int

    @classmethod
    def of(cls, place: Place, multiple: float, norms: Tensor) -> "Outliers":
        """
        Args:
            norms: L2 norms of what is read at tokens that count, `[tokens]`.

        Raises:
            ConfigError: half of them are 0, or not finite, so that no multiple says which are outlying.
        """
        median = float(norms.float().median())
        if not 0 < median < math.inf:
            raise ConfigError(
                f"data.leave_out_norms is {multiple:g}, multiples of the median norm of what is read at {place.name}; "
                f"but that is {median:g} on {len(norms):,} training tokens. Unset it, or choose another site."
            )
        limit = multiple * median
        return cls(place.name, multiple, median, limit, float((norms > limit).float().mean()), len(norms))

    @property
    def many(self) -> bool:
        """True if they are more than attention sinks are."""
        return self.share > MANY_LEFT_OUT

    @property
    def record(self) -> dict[str, object]:
        """Return it as JSON has it."""
        return {"left_out_norms": asdict(self)}

    def __str__(self) -> str:
        return (
            f"data.leave_out_norms {self.multiple:g} leaves out {self.share:.2%} of the training tokens at "
            f"{self.place}: those whose norm is above {self.limit:.4g} (median {self.median_norm:.4g}, {self.tokens:,} "
            "tokens)."
        )


class CountedTokens:
    """A step's tokens that count for one trainee: those of the batch, less those that its dictionaries leave out.

    How many these are is known once the clean pass of all of the step, in every process, is done. Until then gradients
    are per token of the batch.
    """

    def __init__(self, trainee: AnyTrainee) -> None:
        self._trainee = trainee
        self._limited = any(part.sae.norm_limit is not None for part in trainee.parts)
        self._left_out = torch.zeros((), dtype=torch.int64, device=trainee.device)

    def of_these(self, clean: Clean, mask: TokenMask) -> TokenMask:
        """The positions that count, of those of some of the step's sequences.

        Dictionaries that are spliced jointly have one mask, since they have one loss: a position that one of them
        leaves out counts for none.
        """
        counted = mask
        for part in self._trainee.parts:
            counted = part.sae.within_limit(clean.activations[part.place.reads], counted)
        if self._limited:
            self._left_out += (mask & ~counted).sum()
        return counted

    def add_up(self, world: World) -> None:
        """Add up over the processes."""
        if self._limited:
            world.add([self._left_out])

    def settle(self, tokens_in_step: Tensor) -> Tensor:
        """Make gradients those per token that counts, and return how many these are.

        Args:
            tokens_in_step: those that count in the batch of all processes.
        """
        if not self._limited:
            return tokens_in_step
        counted = tokens_in_step - self._left_out
        for part in self._trainee.parts:
            part.see(LEFT_OUT, self._left_out / tokens_in_step)
            for parameter in part.sae.parameters():
                if parameter.grad is not None:
                    parameter.grad *= tokens_in_step.double() / counted.clamp_min(1)
        return counted
