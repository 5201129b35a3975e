"""A sparsity coefficient that follows a target of L0, or of the CE increase, in the course of one run."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from endwise.dictionaries import SAE, at_inference

UNSTEERED = 0.05
"""Share of the steps, at the beginning, in which the coefficient stays where it starts."""
AVERAGED = 0.03
"""Share of the steps over which L0 is averaged; `LEAST_AVERAGED` of them or more."""
LEAST_AVERAGED = 10
CES_AVERAGED = 4
"""Measurements of the CE increase that are averaged: each is of other text, and there are few."""
PROPORTION, INTEGRAL = 1.0, 0.5
"""Shares of the error that enter log λ: at once, and over as many steps as L0 is averaged."""
AHEAD = 3.0
"""I follows the error that is to come if L0 goes on changing for so many times the steps averaged. Otherwise λ would be
raised for as long as L0 falls from thousands, and end far too high. Near the target it looks less far ahead.
"""
FAR = 2.0
"""The error is cut off here: where L0 is e² times too large or small, no more is added than there."""
FARTHEST = 8.0
"""No step counts as further off than this, not even one without an active feature."""
MOST_FASTER = 10.0
"""Bound on how much more is added, in proportion, once the learning rate has fallen and L0 follows more slowly."""
BOUND = 1e4
"""The coefficient stays within so many times where it starts."""
MOST_LEFT = 1.5
"""Largest ratio of what is steered and its target, either way, that is made up for after the last step."""
CLOSE = 0.002
"""Error that is left of it."""
TRIALS = 40
"""Most measurements that this takes; usual are ten."""


class Steering:
    """A proportional-integral controller of the logarithm of λ.

    λ is λ₀ · exp(`PROPORTION` · e + I), where e is the mean of log(L0 / target) over the latest steps, exponentially
    weighted, and I the sum over all steps of `INTEGRAL` · (e + `AHEAD` · min(1, |e|) · e') / (steps averaged), e' being
    the change of e in as many steps. Karvonen (2025, arXiv 2503.17272) steers by I alone, in steps of ±0.001 whatever e
    is, which takes 700 steps to double λ.

    Args:
        target: active features per token, or nats per token.
        steps: of the run.
        warm: steps over which λ rises; it is steered after them, and after `UNSTEERED` of all.
        first: steps before it.
        by_ce: the target is one of the CE increase, which λ raises where it lowers L0: e has the opposite sign. It is
            followed where a step had it measured (`observe`), and averaged over `CES_AVERAGED` measurements.
    """

    def __init__(
        self,
        target: float,
        steps: int,
        warm: int,
        device: torch.device | str,
        first: int = 0,
        *,
        by_ce: bool = False,
    ) -> None:
        self.target, self.by_ce, self._begins = target, by_ce, first + max(warm, round(UNSTEERED * steps))
        self._averaged = CES_AVERAGED if by_ce else max(LEAST_AVERAGED, round(AVERAGED * steps))
        self.state = torch.full((2,), float("nan"), dtype=torch.float64, device=device)
        """e and I; NaN before the first step that is followed."""
        self._measured = self.state[0].clone()

    def observe(self, ce_increase: Tensor) -> None:
        """Have the coming step followed by what was measured before it."""
        self._measured.copy_(ce_increase)

    def error(self, value: Tensor) -> Tensor:
        """Return the logarithm of a value over its target, positive where λ has to rise."""
        found = torch.log(value.double().clamp_min(torch.finfo(torch.float64).tiny) / self.target)
        return -found if self.by_ce else found

    def start(self, factor: float | Tensor) -> None:
        """Begin at another λ / λ₀ than 1."""
        self.state[1] = torch.as_tensor(factor, dtype=torch.float64).clamp(1 / BOUND, BOUND).log()

    def multiply(self, ratio: Tensor) -> None:
        """Multiply λ, once, by a ratio above 0."""
        self.state[1] = (self.state[1].nan_to_num(0.0) + ratio.double().log()).clamp(-math.log(BOUND), math.log(BOUND))

    def factor(self) -> Tensor:
        """Return λ / λ₀ of the coming step."""
        error, total = self.state.nan_to_num(0.0)
        bound = math.log(BOUND)
        return (PROPORTION * error.clamp(-FAR, FAR) + total).clamp(-bound, bound).exp().float()

    def after_step(self, step: int, l0: Tensor, pace: float, counts: Tensor) -> None:
        """Follow the step after `step` others; the device is not waited for.

        Args:
            l0: its mean over the tokens of all processes.
            pace: its learning rate over the largest one.
            counts: whether it changed the weights.
        """
        value = self._measured.clone() if self.by_ce else l0
        self._measured.fill_(math.nan)
        if step < self._begins:
            return
        found = self.error(value).clamp(-FARTHEST, FARTHEST)
        before, total = self.state
        before = torch.where(before.isnan(), found, before)
        change = found - before  # of a mean weighted so, in as many steps as it is over
        error = before + change / self._averaged
        faster = min(MOST_FASTER, 1 / pace) if pace > 0 else MOST_FASTER
        to_come = (error + AHEAD * error.abs().clamp(max=1) * change).clamp(-FAR, FAR)
        total = total.nan_to_num(0.0) + faster * INTEGRAL / self._averaged * to_come
        moved = torch.stack([error, total.clamp(-math.log(BOUND), math.log(BOUND))])
        self.state.copy_(torch.where(counts & moved.isfinite().all(), moved, self.state))


@torch.no_grad()
def settled(sae: SAE, steering: Steering, measure: Callable[[], float], step: float) -> float:
    """Raise or lower what all features must exceed by one amount, such that the target is met; return what was
    measured before. Where that is further from the target than `MOST_LEFT`, nothing is changed: such thresholds would
    be far from those that the weights were trained with.

    Args:
        measure: measures the dictionary as it is, L0 or the CE increase.
        step: that is tried first.
    """
    with at_inference([sae]):
        bars = [each for each in sae.parameters() if each.ndim == 1]
        trained = [each.clone() for each in bars]

        def error(by: float) -> float:
            """Raise the bar by so much from where it was; return `Steering.error`."""
            for each, start in zip(bars, trained, strict=True):
                each.copy_(start)
            sae.raise_bar(by)
            return float(steering.error(torch.tensor(measure())))

        before = measure()
        first = float(steering.error(torch.tensor(before)))
        if CLOSE < abs(first) <= math.log(MOST_LEFT) and not _solved(error, first, step):
            error(0.0)
        return before


def _solved(error: Callable[[float], float], first: float, step: float) -> bool:
    """Find where a falling function, `first` at 0, is within `CLOSE` of 0, and leave off there: steps that double until
    it lies between two of them, then false position, which halves the weight of an end that stays (Illinois). True if
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
