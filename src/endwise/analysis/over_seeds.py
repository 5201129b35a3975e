"""A quantity of several seeds: their mean, one interval that holds what varies, and what may be concluded from it.

The variance over seeds is added to that over what was resampled in each (held-out text, features, directions). From
fewer than `LEAST_SEEDS` seeds an interval holds the latter alone, and bears no verdict.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from endwise.analysis.claims import Verdict, shown_if_all
from endwise.analysis.ratios import DEFINED_SHARE
from endwise.common.statistics import (
    LEAST_SEEDS,
    Floats,
    Interval,
    Numbers,
    interval_with_seeds,
    normal_interval,
    percentile_interval,
    text_error,
)
from endwise.common.text import minus
from endwise.evaluation.summary import RunSummary, what_varies


@dataclass(frozen=True)
class Scale:
    """Scale on which means are taken and variances added, and the way back."""

    to: Callable[[Floats], Floats]
    back: Callable[[float], float]


PLAIN = Scale(lambda values: values, float)
RATIO = Scale(lambda values: np.log(np.where(values > 0, values, np.nan)), lambda value: float(np.exp(value)))
CORRELATION = Scale(
    lambda values: np.arctanh(np.clip(values, -1 + 1e-9, 1 - 1e-9)), lambda value: float(np.tanh(value))
)
"""Fisher's z; a perfect correlation counts as very nearly so."""


@dataclass(frozen=True)
class OverSeeds(Interval):
    """The mean over seeds, with a 95 % interval; NaN where it is not defined."""

    seeds: int

    @property
    def holds_seeds(self) -> bool:
        """True if the interval holds what other seeds would change."""
        return self.seeds >= LEAST_SEEDS

    @property
    def testable(self) -> bool:
        return self.holds_seeds and bool(np.isfinite([self.low, self.high, self.estimate]).all())

    def text(self, form: Callable[[float], str] = "{:.3f}".format, unit: str = "") -> str:
        """`0.123 [0.100, 0.146]`, a unit after the estimate; says where there is no interval."""
        if not np.isfinite(self.estimate):
            return "not defined"
        ends = f"[{form(self.low)}, {form(self.high)}]" if np.isfinite([self.low, self.high]).all() else "(no interval)"
        return minus(f"{form(self.estimate)}{unit} {ends}")


def over_seeds(values: Floats, scale: Scale = PLAIN) -> OverSeeds:
    """
    Args:
        values: `[seeds, 1 + resamples]`: of each seed the quantity itself, then that of each resample. What one column
            drew is the same for all seeds, or has nothing to do with another's.
    """
    scaled = scale.to(np.asarray(values, dtype=np.float64))
    mean = scaled.mean(axis=0)
    draws = mean[1:]
    if not np.isfinite(mean[0]) or np.isfinite(draws).mean() < DEFINED_SHARE:
        return OverSeeds(np.nan, np.nan, scale.back(float(mean[0])), len(values))
    return with_error(scaled[:, 0], text_error(draws), scale, alone=percentile_interval(draws, float(mean[0])))


def with_error(by_seed: Numbers, error: float, scale: Scale = PLAIN, *, alone: Interval | None = None) -> OverSeeds:
    """
    Args:
        by_seed: the quantity of each seed, on the scale.
        error: standard error of their mean, on the scale, for all that other seeds do not change.
        alone: the interval for that alone; unset: the normal distribution's.
    """
    given = np.asarray(by_seed, dtype=np.float64)
    mean = float(given.mean())
    if len(given) >= LEAST_SEEDS and np.isfinite([*given, error]).all():
        found = interval_with_seeds(mean, given, error)
    else:
        found = alone or normal_interval(mean, error)
    return OverSeeds(*(scale.back(end) for end in (found.low, found.high, found.estimate)), seeds=len(given))


def bracketed(each: Interval | None, form: str = ".3f") -> str:
    """`0.123 [0.100, 0.146]`, in the form given; `–` where there is none. As words: `OverSeeds.text`."""
    if each is None:
        return "–"
    if isinstance(each, OverSeeds):
        return each.text(f"{{:{form}}}".format)
    return minus(f"{each.estimate:{form}} [{each.low:{form}}, {each.high:{form}}]")


def interval_columns(name: str, each: Interval | None) -> dict[str, float | None]:
    """The estimate and its ends as columns of a table; nothing where one is not defined."""
    ends = (None, None, None) if each is None else (each.estimate, each.low, each.high)
    finite = [end if end is not None and np.isfinite(end) else None for end in ends]
    return dict(zip((name, f"{name}.low", f"{name}.high"), finite, strict=True))


def judged(*parts: tuple[OverSeeds, bool]) -> Verdict:
    """Shown where every part holds; of each, whether it does. Without three seeds of each there is no verdict."""
    if not all(part.testable for part, _ in parts):
        return "not testable here"
    return shown_if_all([holds for _, holds in parts])


def rests_on(runs: Sequence[RunSummary]) -> str:
    """`one seed`, or `3 seeds (initialisation and order of the text)`."""
    count = len({run.seeds for run in runs})
    return "one seed" if count < 2 else f"{'two' if count == 2 else count} seeds ({what_varies(runs)})"


def over(what: str, runs: Sequence[RunSummary]) -> str:
    """Say what an interval holds: `over features and 3 seeds (initialisation)`, or `over features alone, one seed`."""
    holds = len({run.seeds for run in runs}) >= LEAST_SEEDS
    return f"over {what} and {rests_on(runs)}" if holds else f"over {what} alone, {rests_on(runs)}"
