"""Size of an activation at a site, which a squared error there can be divided by."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from endwise.common.axes import Activation
from endwise.common.errors import DataError
from endwise.models.sites import Site

KEPT = "error_scales"
"""Name of what a checkpoint keeps of them."""
OUTLYING = 10.0
"""A position is outlying if its norm is more than so many times the median."""


class ErrorScale:
    """The denominators of relative squared errors at one site, measured once.

    At an ordinary position the mean squared error is divided by the variance, the mean over positions and dimensions of
    (x − mean x)²: the mean of these ratios is the fraction of variance unexplained. At an outlying one (`OUTLYING`; an
    attention sink) it is divided by the position's own mean square, so that it weighs as much as any other.
    """

    def __init__(self, site: Site, device: torch.device | str = "cpu") -> None:
        self.site = site
        self.state = torch.full((2,), float("nan"), device=device)
        """The variance of ordinary positions, and the mean square from which one is outlying; NaN: not measured."""

    def measure(self, activations: Tensor) -> None:
        """Measure on activations, `[tokens width]`.

        Raises:
            DataError: they are alike at all positions.
        """
        squares = activations.double().square().mean(-1)
        limit = squares.median() * OUTLYING**2
        ordinary = activations.double()[squares <= limit]
        variance = ordinary.var(0, correction=0).mean()
        if not variance > 0:
            raise DataError(
                f"objective.errors is relative, but the activations at {self.site} are alike at all of "
                f"{len(activations):,} positions, so that they have no variance to divide by. Set it to absolute."
            )
        self.state.copy_(torch.stack([variance, limit]))

    def __call__(self, truth: Activation) -> Tensor:
        """Return the denominator at each position."""
        squares = truth.float().square().mean(-1)
        variance, limit = self.state.to(squares.dtype)
        return squares.where(squares > limit, variance)

    @property
    def record(self) -> dict[str, Any]:
        variance, limit = self.state.tolist()
        return {"variance": variance, "outlying_from_norm_per_dimension": limit**0.5}


def scale_tensors(scales: Sequence[ErrorScale]) -> dict[str, Tensor]:
    """Name what a checkpoint keeps: each site's once, in the order of computation."""
    by_site = {scale.site: scale.state for scale in scales}
    return {KEPT: torch.stack([by_site[site] for site in sorted(by_site)])} if by_site else {}


def restore_scales(scales: Sequence[ErrorScale], tensors: Mapping[str, Tensor]) -> None:
    """Put back what `scale_tensors` named."""
    sites = sorted({scale.site for scale in scales})
    for scale in scales:
        scale.state.copy_(tensors[KEPT][sites.index(scale.site)])
