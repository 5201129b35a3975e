"""The value of a knob (the sparsity coefficient, say) that meets a target, found from a few runs.

Along one curve L0 and the CE increase change roughly as powers of the knob, in opposite ways: as the sparsity
coefficient grows, L0 falls and the CE increase rises; with a knob that counts features it is the other way round. So
the search is for the root of log(metric / target) over log knob, by secants: outside the values tried a step is
bounded, between two of them it stays inside. Each next value depends on the runs made so far and on nothing else, so
that a search that was interrupted resumes from the runs that are there.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from endwise.common.errors import EndwiseError
from endwise.config.method import COEFFICIENT, Knob
from endwise.sweeps.sweep_config import SearchConfig, Target

LARGEST_STEP = math.log(8)
"""Between neighbouring trials, in log knob."""
MARGIN = 0.1
"""A step between two trials keeps this share of their distance from both."""
NOISE = 0.02
"""A curve counts as reversed only where the metric goes back by more than this share."""
LEAST = 1e-3
"""A metric below this share of the target counts as this: the CE increase of a near-perfect SAE may be below 0."""


class SearchError(EndwiseError):
    """The runs made do not lead to the target; the message lists them."""


@dataclass(frozen=True)
class Trial:
    """Knob of a run, and the metric that it ended with."""

    at: float
    """The knob's value."""
    value: float


@dataclass(frozen=True)
class Next:
    """The value to try next, and whether what was tried meets the target there."""

    at: float
    found: bool


def next_value(
    trials: Sequence[Trial],
    first: Knob,
    target: Target,
    search: SearchConfig,
    slope: float | None = None,
) -> Next:
    """Find the next value of the knob to try, or the one that meets the target.

    Args:
        first: the knob, where it is tried first.
        slope: of log metric over log knob, for the first step; unset: of the sparsity coefficient −1 for L0 and 1 for
            the CE increase, and the other way round where more of a knob means more active features.

    Raises:
        SearchError: the metric does not change with the knob as it should; or all trials are made, and none is on the
            other side of the target.
    """
    if not trials:
        return Next(first.value, found=False)
    sign = _sign(target, first)
    points = sorted((math.log(trial.at), _log_miss(trial, target)) for trial in trials)
    _check_monotone(points, trials, target, first)
    nearest = min(points, key=lambda point: abs(point[1]))
    best = min(trials, key=lambda trial: miss(trial, target))
    if miss(best, target) <= search.tolerance:
        return Next(best.at, found=True)
    below = [point for point in points if point[1] * sign < 0]
    above = [point for point in points if point[1] * sign > 0]
    exhausted = len(trials) >= search.trials
    if below and above:
        left, right = max(below), min(above)
        root = left[0] - left[1] * (right[0] - left[0]) / (right[1] - left[1])
        margin = MARGIN * (right[0] - left[0])
        bounded = min(max(root, left[0] + margin), right[0] - margin)
        return Next(math.exp(root if exhausted else bounded), found=exhausted)
    if exhausted:
        raise SearchError(
            f"{len(trials)} trials do not reach {target}: {_listed(trials, target)}. Set another "
            f"{first.name} to start from, more search.trials, or another target."
        )
    return Next(math.exp(nearest[0] + _step(points, nearest, sign, slope)), found=False)


def miss(trial: Trial, target: Target) -> float:
    """Measure how far a run is from the target, as a share of it."""
    return abs(trial.value / target.value - 1)


def slope_at(trials: Sequence[Trial], target: Target) -> float | None:
    """Estimate the slope of log metric over log knob, between the two trials that are nearest to the target."""
    points = sorted(((math.log(t.at), _log_miss(t, target)) for t in trials), key=lambda point: abs(point[1]))
    if len(points) < 2 or points[0][0] == points[1][0]:
        return None
    return (points[1][1] - points[0][1]) / (points[1][0] - points[0][0])


def _sign(target: Target, knob: Knob) -> int:
    """Sign of the slope of log metric over log knob."""
    return -1 if (target.metric == "l0") == knob.sparser else 1


def _log_miss(trial: Trial, target: Target) -> float:
    return math.log(max(trial.value / target.value, LEAST))


def _step(points: Sequence[tuple[float, float]], nearest: tuple[float, float], sign: int, slope: float | None) -> float:
    """Step from the nearest point towards a target that lies beyond all of them."""
    others = [point for point in points if point[0] != nearest[0]]
    if others:
        other = min(others, key=lambda point: abs(point[1]))
        slope = (nearest[1] - other[1]) / (nearest[0] - other[0])
    if not slope or slope * sign <= 0:
        slope = float(sign)
    return min(max(-nearest[1] / slope, -LARGEST_STEP), LARGEST_STEP)


def _check_monotone(points: Sequence[tuple[float, float]], trials: Sequence[Trial], target: Target, knob: Knob) -> None:
    sign = _sign(target, knob)
    name = "the coefficient" if knob.name == COEFFICIENT else knob.label
    for (_, before), (_, after) in itertools.pairwise(points):
        if (after - before) * sign < -math.log1p(NOISE):
            way = "fall" if sign < 0 else "rise"
            raise SearchError(
                f"{target.metric} should {way} as {name} grows, but the trials gave "
                f"{_listed(trials, target)}. Make the trials longer (search.tokens), or lower the learning rate."
            )


def _listed(trials: Sequence[Trial], target: Target) -> str:
    ordered = sorted(trials, key=lambda trial: trial.at)
    return ", ".join(f"{target.metric} {trial.value:.4g} at {trial.at:.4g}" for trial in ordered)
