"""A sparsity coefficient that follows L0: it is steered to a number of active features in the course of one run."""

import math

import torch
from torch import Tensor

UNSTEERED = 0.05
"""Share of the steps, at the beginning, in which the coefficient stays where it starts."""
AVERAGED = 0.03
"""Share of the steps over which L0 is averaged; `LEAST_AVERAGED` of them or more."""
LEAST_AVERAGED = 10
PROPORTION, INTEGRAL = 1.0, 0.5
"""Shares of the error that enter log λ: at once, and over as many steps as L0 is averaged."""
FAR = 2.0
"""The error is cut off here: where L0 is e² times too large or small, no more is added than there."""
MOST_FASTER = 10.0
"""Bound on how much more is added, in proportion, once the learning rate has fallen and L0 follows more slowly."""
BOUND = 1e4
"""The coefficient stays within so many times where it starts."""


class Steering:
    """A proportional-integral controller of the logarithm of λ.

    λ is λ₀ · exp(`PROPORTION` · e + I), where e is the mean of log(L0 / target) over the latest steps, exponentially
    weighted, and I the sum over all steps of `INTEGRAL` · e / (steps averaged). Karvonen (2025, arXiv 2503.17272)
    steers by I alone, in steps of ±0.001 whatever e is, which takes 700 steps to double λ.

    Args:
        target: active features per token.
        steps: of the run.
        warm: steps over which λ rises; it is steered after them, and after `UNSTEERED` of all.
    """

    def __init__(self, target: float, steps: int, warm: int, device: torch.device | str) -> None:
        self._target, self._begins = target, max(warm, round(UNSTEERED * steps))
        self._averaged = max(LEAST_AVERAGED, round(AVERAGED * steps))
        self.state = torch.full((2,), float("nan"), dtype=torch.float64, device=device)
        """e and I; NaN before the first step that is followed."""

    def start(self, factor: float) -> None:
        """Begin at another λ / λ₀ than 1."""
        self.state[1] = math.log(min(max(factor, 1 / BOUND), BOUND))

    def factor(self) -> Tensor:
        """Return λ / λ₀ of the coming step."""
        error, total = self.state.nan_to_num(0.0)
        bound = math.log(BOUND)
        return (PROPORTION * error + total).clamp(-bound, bound).exp().float()

    def after_step(self, step: int, l0: Tensor, pace: float, counts: Tensor) -> None:
        """Follow the step after `step` others; the device is not waited for.

        Args:
            l0: its mean over the tokens of all processes.
            pace: its learning rate over the largest one.
            counts: whether it changed the weights.
        """
        if step < self._begins:
            return
        found = torch.log(l0.double() / self._target).clamp(-FAR, FAR)
        error, total = self.state
        error = torch.where(error.isnan(), found, error + (found - error) / self._averaged)
        faster = min(MOST_FASTER, 1 / pace) if pace > 0 else MOST_FASTER
        total = total.nan_to_num(0.0) + faster * INTEGRAL / self._averaged * error
        moved = torch.stack([error, total.clamp(-math.log(BOUND), math.log(BOUND))])
        self.state.copy_(torch.where(counts & moved.isfinite().all(), moved, self.state))
