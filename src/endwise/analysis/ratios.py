"""How much of one thing a kind has or needs relative to another: ratios of curves, with paired intervals.

A kind's runs, one per sparsity coefficient, are points of a curve. Two curves are compared only where both were
measured: at 20 levels spread evenly over their common range, the logarithms of the interpolated values are
subtracted, and the ratio reported is the exponential of the mean difference. Its interval repeats all of this on
resampled held-out sequences, the same ones for both kinds. Where the runs do not determine a ratio, a reason stands in
its place.

These intervals cover the choice of held-out text. They do not cover the training seed, and the number of alive
features, being counted over the whole text, is kept fixed in them. Where both kinds have three seeds or more, a second
interval covers the seed: of one ratio a seed, Student's t on the logarithms.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from endwise.analysis.run_summary import LABELS, LATER_MSE, Floats, RunSummary, estimate, resampled, unpaired
from endwise.statistics import (
    LEAST_SEEDS,
    InterpolationError,
    interpolate_at,
    interval_over_seeds,
    monotone_points,
    percentile_interval,
)

LEVELS = 20
DEFINED_SHARE = 0.95
"""An interval is reported if at least this share of the resamples determine the ratio."""


@dataclass(frozen=True)
class Ratio:
    """How much of one thing a kind has or needs relative to another kind; or why that cannot be said."""

    estimate: float | None
    interval: tuple[float, float] | None = None
    over: tuple[float, float] | None = None
    """The range of the quantity that was held equal."""
    at_middle: float | None = None
    """The ratio at the reference's middle run alone."""
    middle: float | None = None
    """Where that is."""
    reason: str | None = None
    """Why the estimate, or only the interval, is missing."""
    over_seeds: tuple[float, float] | None = None
    """95 % interval over training seeds, where each kind has three or more; `interval` is over held-out text."""

    @property
    def widest(self) -> tuple[float, float] | None:
        """The wider of the intervals over held-out text and over seeds."""
        known = [ends for ends in (self.interval, self.over_seeds) if ends is not None]
        return max(known, key=lambda ends: ends[1] / max(ends[0], 1e-12), default=None)

    def to_row(self) -> dict[str, Any]:
        """Flat, for a table."""
        text, seeds = self.interval or (None, None), self.over_seeds or (None, None)
        return {
            "ratio": self.estimate,
            "text.low": text[0],
            "text.high": text[1],
            "seeds.low": seeds[0],
            "seeds.high": seeds[1],
            "over.low": None if self.over is None else self.over[0],
            "over.high": None if self.over is None else self.over[1],
            "reason": self.reason,
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "ratio": self.estimate,
            "interval": _as_list(self.interval),
            "over": _as_list(self.over),
            "at_middle": self.at_middle,
            "middle": self.middle,
            "reason": self.reason,
            "interval_over_seeds": _as_list(self.over_seeds),
        }


@dataclass(frozen=True)
class Measure:
    """A question that `ratio_to_local` answers: how much of `of` at equal `at`."""

    key: str
    of: str
    at: str


MEASURES = (
    Measure("features_at_equal_ce", of="l0", at="ce_increase"),
    Measure("alive_at_equal_ce", of="alive", at="ce_increase"),
    Measure("ce_increase_at_equal_l0", of="ce_increase", at="l0"),
    Measure("ce_increase_at_equal_alive", of="ce_increase", at="alive"),
)
NAMES = {"l0": "L0", "alive": "alive features", "ce_increase": "CE increase", LATER_MSE: "downstream MSE"}


def ratio_to_local(
    runs: Sequence[RunSummary],
    kind: str,
    of: str,
    at: str,
    resamples: int,
    seed: int,
    levels: int = LEVELS,
    *,
    reference: str = "local",
) -> Ratio:
    """How much of `of` the runs of `kind` have relative to local's (or another kind's, `reference`) at equal `at`. Both
    are of l0, alive, ce_increase and `LATER_MSE`.

    exp of the mean over `levels` values of `at`, evenly spread over the common range, of the difference of
    log-interpolated curves; and the same at the reference's middle run alone.
    """
    groups = {name: [run for run in runs if run.kind == name] for name in (kind, reference)}
    for name, group in groups.items():
        if not group:
            return Ratio(None, reason=f"there are no runs of {LABELS[name]}")

    def curves(metric: Callable[[RunSummary, str], float]) -> list[_Curve]:
        return [_curve(group, LABELS[name], of, at, metric) for name, group in groups.items()]

    try:
        curve, local = curves(estimate)
        low, high = _common_range(curve, local, at)
        mean, at_middle = _ratio_of_curves(curve, local, at, levels)
    except InterpolationError as error:
        return Ratio(None, reason=str(error))
    members = [run for group in groups.values() for run in group]
    if "alive" in (of, at) and len({run.alive_tokens for run in members}) > 1:
        return Ratio(None, reason="alive features were counted over different numbers of tokens")
    result = Ratio(
        mean,
        over=(low, high),
        at_middle=at_middle,
        middle=None if at_middle is None else local.middle,
        over_seeds=_over_seeds(groups, kind, reference, of, at, levels),
    )
    later = {f"downstream_mse.{site}" for run in members for site in run.downstream_mse} if of == LATER_MSE else set()
    if reason := unpaired(members, {"l0", "ce_increase", "predictions"} | later):
        return replace(result, reason=reason)
    drawn = {id(run): resampled(run, {of, at}, resamples, seed) for run in members}
    draws = np.full(resamples, np.nan)
    for index in range(resamples):
        try:
            curve, local = curves(lambda run, name, index=index: drawn[id(run)][name][index])
            draws[index], _ = _ratio_of_curves(curve, local, at, levels)
        except InterpolationError:
            continue
    return _with_draws(result, draws)


def ratio_between(
    runs: Sequence[RunSummary], reference: Sequence[RunSummary], of: str, at: str, levels: int = LEVELS
) -> float:
    """As `ratio_to_local`, of any two curves, and the estimate alone.

    Raises:
        InterpolationError: the runs do not determine it.
    """
    curve, other = (_curve(group, name, of, at, estimate) for group, name in ((runs, "one"), (reference, "the other")))
    return _ratio_of_curves(curve, other, at, levels)[0]


def _over_seeds(
    groups: Mapping[str, Sequence[RunSummary]], kind: str, reference: str, of: str, at: str, levels: int
) -> tuple[float, float] | None:
    """The ratio's interval over training seeds, one ratio of curves a seed; None where fewer than three seeds of both
    kinds determine it.
    """
    ratios = []
    for seed in sorted(set.intersection(*({run.seed for run in group} for group in groups.values()))):
        try:
            own, local = (
                _curve([run for run in groups[name] if run.seed == seed], LABELS[name], of, at, estimate)
                for name in (kind, reference)
            )
            ratios.append(_ratio_of_curves(own, local, at, levels)[0])
        except InterpolationError:
            continue
    if len(ratios) < LEAST_SEEDS:
        return None
    interval = interval_over_seeds(ratios)
    return interval.low, interval.high


def downstream_ratio(run: RunSummary, reference: RunSummary, resamples: int, seed: int) -> Ratio:
    """Geometric mean over the later sites of run's downstream MSE / the reference's."""
    sites = [site for site in run.downstream_mse if site in reference.downstream_mse]
    if not sites:
        return Ratio(None, reason="the runs have no later site in common")
    pairs = [(run.downstream_mse[site], reference.downstream_mse[site]) for site in sites]
    if min(min(pair) for pair in pairs) <= 0:
        return Ratio(None, reason="a downstream MSE is zero")
    return _ratio_of_runs(run, reference, pairs, {f"downstream_mse.{site}" for site in sites}, resamples, seed)


def l0_ratio(run: RunSummary, reference: RunSummary, resamples: int, seed: int) -> Ratio:
    """Run's L0 / the reference's."""
    if min(run.l0, reference.l0) <= 0:
        return Ratio(None, reason="an L0 is zero")
    return _ratio_of_runs(run, reference, [(run.l0, reference.l0)], {"l0"}, resamples, seed)


def _ratio_of_runs(
    run: RunSummary,
    reference: RunSummary,
    pairs: Sequence[tuple[float, float]],
    names: set[str],
    resamples: int,
    seed: int,
) -> Ratio:
    """Geometric mean of the pairs' ratios, with the interval of the metrics that they are of."""
    result = Ratio(float(np.exp(np.mean([np.log(a / b) for a, b in pairs]))))
    if reason := unpaired([run, reference], names):
        return replace(result, reason=reason)
    drawn, drawn_reference = (resampled(one, names, resamples, seed) for one in (run, reference))
    logs = [np.log(drawn[name] / drawn_reference[name]) for name in names]
    return _with_draws(result, np.exp(np.mean(logs, axis=0)))


def percent(ratio: Ratio) -> str:
    """`48 % [44, 53]`, with the wider interval."""
    if ratio.estimate is None:
        return "–"
    ends = "" if ratio.widest is None else f" [{100 * ratio.widest[0]:.0f}, {100 * ratio.widest[1]:.0f}]"
    return f"{100 * ratio.estimate:.0f} %{ends}"


def times(value: float) -> str:
    """A ratio with two digits after the point, fewer as it grows."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


@dataclass(frozen=True)
class _Curve:
    """One kind's points in order of x, the quantity held equal."""

    name: str
    x: Floats
    y: Floats

    @property
    def middle(self) -> float:
        return float(self.x[len(self.x) // 2])


def _curve(
    runs: Sequence[RunSummary], name: str, of: str, at: str, metric: Callable[[RunSummary, str], float]
) -> _Curve:
    """One point per coefficient, the mean of its seeds.

    Raises:
        InterpolationError: there are several runs of one coefficient and seed; or the points are no trade-off.
    """
    _check_one_each(runs, name)
    points: dict[float, list[tuple[float, float]]] = {}
    for run in runs:
        points.setdefault(run.coefficient, []).append((metric(run, at), metric(run, of)))
    means = [np.mean(group, axis=0) for group in points.values()]
    try:
        x, y = monotone_points([point[0] for point in means], [point[1] for point in means])
    except InterpolationError as error:
        raise InterpolationError(f"{name}'s curve of {NAMES[of]} over {NAMES[at]}: {str(error).rstrip('.')}") from None
    if LATER_MSE in (of, at):  # which grows with the CE increase, as both measure what is lost
        return _Curve(name, x, y)
    if y[-1] > y[0]:
        raise InterpolationError(f"{name}'s curve is no trade-off: its {NAMES[of]} rises with its {NAMES[at]}")
    return _Curve(name, x, y)


def _check_one_each(runs: Sequence[RunSummary], name: str) -> None:
    """Runs that differ in more than their seed are no points of one curve, and have no mean."""
    for (coefficient, seed), count in Counter((run.coefficient, run.seed) for run in runs).items():
        if count > 1:
            rates = sorted({run.learning_rate or 0.0 for run in runs if run.coefficient == coefficient})
            which = f", of the learning rates {', '.join(f'{rate:g}' for rate in rates)}" if len(rates) > 1 else ""
            raise InterpolationError(
                f"{name} has {count} runs of λ {coefficient:g} and seed {seed}{which}; compare one of each at a time"
            )


def _common_range(curve: _Curve, other: _Curve, at: str) -> tuple[float, float]:
    low, high = max(curve.x[0], other.x[0]), min(curve.x[-1], other.x[-1])
    if low >= high:
        covered = [f"{one.name} covers {one.x[0]:.3g} to {one.x[-1]:.3g}" for one in (curve, other)]
        raise InterpolationError(f"the runs have no {NAMES[at]} in common: {', '.join(covered)}")
    if low <= 0:
        raise InterpolationError(f"levels are spread on a logarithmic scale, but a {NAMES[at]} is {low:.3g}")
    return float(low), float(high)


def _grid(low: float, high: float, levels: int) -> Floats:
    """Levels spread evenly on a logarithmic scale, both ends exactly."""
    grid = np.geomspace(low, high, levels)
    grid[0], grid[-1] = low, high
    return grid


def _ratio_of_curves(curve: _Curve, other: _Curve, at: str, levels: int) -> tuple[float, float | None]:
    """The mean ratio over the common range, and the ratio at the other's middle point (None where out of range)."""
    grid = _grid(*_common_range(curve, other, at), levels)
    gaps = np.log(interpolate_at(curve.x, curve.y, grid)) - np.log(interpolate_at(other.x, other.y, grid))
    at_middle = None
    if curve.x[0] <= other.middle <= curve.x[-1]:
        at_middle = float(
            interpolate_at(curve.x, curve.y, other.middle) / interpolate_at(other.x, other.y, other.middle)
        )
    return float(np.exp(gaps.mean())), at_middle


def _with_draws(ratio: Ratio, draws: Floats) -> Ratio:
    assert ratio.estimate is not None
    defined = float(np.mean(~np.isnan(draws)))
    if defined < DEFINED_SHARE:
        return replace(ratio, reason=f"only {100 * defined:.0f} % of the resamples determine the ratio")
    interval = percentile_interval(draws, ratio.estimate)
    return replace(ratio, interval=(interval.low, interval.high))


def _as_list(ends: tuple[float, float] | None) -> list[float] | None:
    return None if ends is None else list(ends)
