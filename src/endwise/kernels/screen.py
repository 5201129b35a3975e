"""A bf16 product that never misses an active feature, so that the exact one is computed for few.

Where bf16 matrix products are several times as fast as fp32 ones, an encoder's pre-activations are first bounded from
above in bf16; only where the bound is positive is the pre-activation computed in fp32, and only where that is positive
is the feature active. The result is that of the fp32 encoder, to its own rounding.

The bound. Let u = 2⁻⁸ be bf16's unit roundoff, x̃ and w̃ the rounded vectors of width d. By Cauchy-Schwarz
|x̃·w̃ − x·w| ≤ (2u + u²)·‖x‖·‖w‖, and adding the products up in fp32 is wrong by no more than
s·(‖x‖·‖w‖ + |b|) with s = (d + 3)·2⁻²². So x·w + b > 0 only where x̃·w̃ + (2u + u² + s)·‖x‖·‖w‖ + b + s·|b| > 0. These
terms are added by the product itself, through three more columns: (margin·‖x‖, 1, 1) against (‖w‖, b, 2u·|b| + s·|b|),
of which those that widen the margin are raised by 2u, so that rounding all to bf16 cannot lower the sum. A large |b| is
thereby in the margin, where it belongs. Rounding the product's result to bf16 keeps its sign. With (−margin·‖x‖, 1, −1)
it is a bound from below.

Above a threshold t rather than 0, b − t stands in the place of b, and what is added for rounding is s·(|b| + |t|).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from endwise.kernels.interface import Index
from endwise.kernels.scan import places_above

UNIT = 2.0**-8
_SUPPORTED = [
    getattr(torch.cpu, name)
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    if hasattr(torch.cpu, name)  # PyTorch's own, and not part of its promised interface
]
WIDTH_MULTIPLE = 32
"""Tiled products want their inner dimension to be a multiple of this."""


def has_fast_bfloat16(device: torch.device) -> bool:
    """True if the processor multiplies bf16 matrices in hardware: in tiles (AMX), or in vectors (AVX512-BF16)."""
    return device.type == "cpu" and any(supported() for supported in _SUPPORTED)


class Screen:
    """The encoder `x·weightᵀ + bias`, prepared for screening.

    Args:
        above: what a pre-activation must exceed; None: 0.
    """

    def __init__(
        self,
        weight: Float[Tensor, "d_sae d_model"],
        bias: Float[Tensor, " d_sae"],
        above: Float[Tensor, " d_sae"] | Float[Tensor, ""] | None = None,
    ) -> None:
        sums = (weight.shape[1] + 3) * 2.0**-22
        self.margin = 2 * UNIT + UNIT**2 + sums
        shifted, rounded = bias, sums * bias.abs()
        if above is not None:
            shifted, rounded = bias - above, rounded + sums * above.abs()
        slack = 2 * UNIT * shifted.abs() + (1 + 2 * UNIT) * rounded
        self.weight = _widened(weight, weight.norm(dim=1) * (1 + 2 * UNIT), shifted, slack)

    def candidates(self, x: Float[Tensor, "n d_model"]) -> Index:
        """Flat places of `[n d_sae]`, ascending, at which the pre-activation may be above; it is at no other."""
        return places_above(self.bounds(x), x.new_zeros(()))

    def bounds(self, x: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_sae"]:
        """Bound from above, in bf16, pre-activations less what they must exceed; and, rounded to bf16, themselves."""
        return self.widened(x) @ self.weight.T

    def widened(self, x: Float[Tensor, "n d_model"], from_below: bool = False) -> Float[Tensor, "n wide"]:
        """Prepare rows whose product with `weight` bounds pre-activations from above, or from below."""
        norms = x.norm(dim=1) * (self.margin * (1 + 2 * UNIT))
        ones = torch.ones_like(norms)
        return _widened(x, -norms, ones, -ones) if from_below else _widened(x, norms, ones, ones)


def _widened(vectors: Tensor, *columns: Tensor) -> Tensor:
    """The vectors in bf16 with the columns appended, and zeros up to a convenient width."""
    rows, width = vectors.shape
    full = -(-(width + len(columns)) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    result = vectors.new_zeros(rows, full, dtype=torch.bfloat16)
    result[:, :width] = vectors
    for place, column in enumerate(columns, start=width):
        result[:, place] = column
    return result
