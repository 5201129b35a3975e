"""Sums and draws that come out the same in whatever order, and in however many parts, the text is read."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

FRACTION_BITS = 32
_FRACTION = (1 << FRACTION_BITS) - 1
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
POSITION_BITS = 24
"""A position below 2^24 and a sequence below 2^39 make one number."""


class FixedPointSums:
    """`[n]` sums of numbers, each rounded to a multiple of 2^-32.

    Whole numbers add up exactly, so that the sums do not depend on an order, as those of floating-point numbers do.
    What one call adds to one sum must stay below 2^31.
    """

    def __init__(self, n: int, device: torch.device) -> None:
        self.whole = torch.zeros(n, dtype=torch.int64, device=device)
        self.fraction = torch.zeros_like(self.whole)
        """Fraction in units of 2^-32, from 0 to below 2^32."""

    def add(self, places: Int64[Tensor, " values"], values: Float[Tensor, " values"]) -> None:
        """Add each value to the sum at its place."""
        self.fraction.index_add_(0, places, _fixed(values))
        self._carry()

    def add_all(self, values: Float[Tensor, " n"]) -> None:
        self.fraction += _fixed(values)
        self._carry()

    def merge(self, other: "FixedPointSums") -> None:
        self.whole += other.whole
        self.fraction += other.fraction
        self._carry()

    def tensors(self) -> dict[str, Tensor]:
        return {"whole": self.whole, "fraction": self.fraction}

    def total(self) -> Float[Tensor, " n"]:
        """float64"""
        return self.whole.double() + self.fraction.double() / (1 << FRACTION_BITS)

    def _carry(self) -> None:
        self.whole += self.fraction >> FRACTION_BITS
        self.fraction &= _FRACTION


def _fixed(values: Tensor) -> Tensor:
    return (values.double() * (1 << FRACTION_BITS)).round().to(torch.int64)


def drawn(
    streams: Int64[Tensor, " n"] | int, sequences: Int64[Tensor, " n"], positions: Int64[Tensor, " n"]
) -> Int64[Tensor, " n"]:
    """A number for each token, as if drawn at random, from all of int64; two tokens of one stream never share one.

    It depends on stream, sequence and position alone: of all tokens, those with the greatest numbers are a random
    sample, whoever read them and when. The mixing is that of SplitMix64 (Steele, Lea and Flood 2014), each of whose
    steps can be undone.
    """
    streams = torch.as_tensor(streams, device=sequences.device)  # its product wraps around; a number's would not
    mixed = ((sequences << POSITION_BITS) | positions) + (streams + 1) * _GOLDEN
    mixed = (mixed ^ _shifted(mixed, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    mixed = (mixed ^ _shifted(mixed, 27)) * (0x94D049BB133111EB - (1 << 64))
    return mixed ^ _shifted(mixed, 31)


def _shifted(numbers: Tensor, bits: int) -> Tensor:
    """Shift to the right, with zeros coming in, whatever the sign."""
    return (numbers >> bits) & ((1 << (64 - bits)) - 1)
