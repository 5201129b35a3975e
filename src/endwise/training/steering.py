"""A sparsity coefficient that follows L0: it is steered to a number of active features in the course of one run."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from endwise.dictionaries import SAE, at_inference

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
SETTLED_ON = 16_384
"""Tokens of training text by which L0 is brought to its target after the last step."""
MOST_LEFT = 1.25
"""Largest ratio of L0 and its target, either way, that is made up for then."""
CLOSE = 0.002
"""Error that is left of it."""
TRIALS = 40
"""Most measurements of L0 that this takes; usual are ten."""
ROWS = 1024
"""Tokens at a time there."""


class Steering:
    """A proportional-integral controller of the logarithm of λ.

    λ is λ₀ · exp(`PROPORTION` · e + I), where e is the mean of log(L0 / target) over the latest steps, exponentially
    weighted, and I the sum over all steps of `INTEGRAL` · e / (steps averaged). Karvonen (2025, arXiv 2503.17272)
    steers by I alone, in steps of ±0.001 whatever e is, which takes 700 steps to double λ.

    Args:
        target: active features per token.
        steps: of the run.
        warm: steps over which λ rises; it is steered after them, and after `UNSTEERED` of all.
        first: steps before it.
    """

    def __init__(self, target: float, steps: int, warm: int, device: torch.device | str, first: int = 0) -> None:
        self.target, self._begins = target, first + max(warm, round(UNSTEERED * steps))
        self._averaged = max(LEAST_AVERAGED, round(AVERAGED * steps))
        self.state = torch.full((2,), float("nan"), dtype=torch.float64, device=device)
        """e and I; NaN before the first step that is followed."""

    def start(self, factor: float | Tensor) -> None:
        """Begin at another λ / λ₀ than 1."""
        self.state[1] = torch.as_tensor(factor, dtype=torch.float64).clamp(1 / BOUND, BOUND).log()

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
        found = torch.log(l0.double() / self.target).clamp(-FAR, FAR)
        error, total = self.state
        error = torch.where(error.isnan(), found, error + (found - error) / self._averaged)
        faster = min(MOST_FASTER, 1 / pace) if pace > 0 else MOST_FASTER
        total = total.nan_to_num(0.0) + faster * INTEGRAL / self._averaged * error
        moved = torch.stack([error, total.clamp(-math.log(BOUND), math.log(BOUND))])
        self.state.copy_(torch.where(counts & moved.isfinite().all(), moved, self.state))


@torch.no_grad()
def settled(sae: SAE, x: Float[Tensor, "tokens d_in"], target: float) -> float:
    """Raise or lower what all features must exceed by one amount, such that on average `target` of them are active;
    return L0 as it was. Where that is further from the target than `MOST_LEFT`, nothing is changed: such thresholds
    would be far from those that the weights were trained with.
    """
    with at_inference([sae]):
        bars = [each for each in sae.parameters() if each.ndim == 1]
        trained = [each.clone() for each in bars]

        def error(by: float) -> float:
            """Log of L0 over its target with the bar raised by so much."""
            for each, start in zip(bars, trained, strict=True):
                each.copy_(start)
            sae.raise_bar(by)
            active = sum(float(sae.encode(rows).l0().sum()) for rows in x.split(ROWS))
            return math.log(max(active, 1) / (len(x) * target))

        first = error(0.0)
        start = 1e-3 * float(x.square().mean().sqrt())
        if CLOSE < abs(first) <= math.log(MOST_LEFT) and not _solved(error, first, start):
            error(0.0)
        return math.exp(first) * target


def _solved(error: Callable[[float], float], first: float, step: float) -> bool:
    """Find where a falling function, `first` at 0, is within `CLOSE` of 0, and leave off there: steps that double until
    it lies between two of them, then false position, which halves the weight of an end that stays (Illinois). Tell if
    it was found.
    """
    low, low_error, high, high_error = 0.0, first, math.copysign(step, first), math.nan
    for _ in range(TRIALS):
        by = high if math.isnan(high_error) else low + (high - low) * low_error / (low_error - high_error)
        found = error(by)
        if abs(found) <= CLOSE:
            return True
        if math.isnan(high_error) and found * first > 0:
            low, low_error, high = by, found, 2 * by
        elif found * low_error > 0:
            low, low_error, high_error = by, found, high_error / 2
        else:
            high, high_error, low_error = by, found, low_error if math.isnan(high_error) else low_error / 2
    return False
