"""Ratios of how much a method has or needs of one thing relative to another: ratios of curves, with paired intervals.

A method's runs, one per value of its knob (its sparsity coefficient, say), are points of a curve. Two curves are
compared only where both were measured. Where the ratio stays on one side of 1 over that whole range, one figure is
given: at 20 levels spread evenly on a logarithmic scale the logarithms of the interpolated values are subtracted, and
the figure is the exponential of the mean difference. Where the curves cross, no one figure is true of them; then the
ratio at both ends and where it is 1 are given. Where the runs do not determine a ratio, a reason stands in its place.

An interval repeats all of this on resampled held-out sequences, the same ones for both methods. Where both
have three seeds or more, it holds the seeds too: the variance of their ratios is added to that over text. With fewer it
covers the choice of held-out text alone, and a ratio then bears out no claim (`Ratio.below`). The number of alive
features, being counted over the whole text, is kept fixed in resamples.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from endwise.analysis.claims import Verdict, all_shown
from endwise.common.statistics import (
    LEAST_SEEDS,
    InterpolationError,
    Interval,
    error_of,
    exp_interval,
    interpolate_at,
    interval_over_seeds,
    interval_with_seeds,
    log_curves,
    log_spaced,
    monotone_points,
    percentile_interval,
    text_error,
)
from endwise.config.method import LOCAL, Knob, Method
from endwise.evaluation.summary import (
    LATER_MSE,
    Floats,
    RunSummary,
    estimate,
    other_text,
    resampled,
    unpaired,
    what_varies,
)

LEVELS = 20
DEFINED_SHARE = 0.95
"""An interval is reported if at least this share of the resamples determine the ratio."""


Ends = tuple[float, float]


@dataclass(frozen=True)
class Ratio:
    """Ratio of how much one method has or needs to how much another does; or why it is unknown."""

    estimate: float | None
    """Geometric mean; None where the curves cross, or determine no ratio."""
    interval: Ends | None = None
    """95 %: over held-out text, and over seeds too where there are `LEAST_SEEDS` or more."""
    over: Ends | None = None
    """The range of the quantity that was held equal."""
    at_ends: Ends | None = None
    """The ratio at both ends of that range."""
    crossings: tuple[float, ...] = ()
    """Levels in that range at which it is 1, in passing from one side to the other."""
    seeds: int = 1
    """Seeds that both methods have, and that determine a ratio each."""
    varied: str = ""
    """Things that these seeds vary."""
    over_text: Ends | None = None
    """95 % over held-out text alone."""
    over_seeds: Ends | None = None
    """95 % over seeds alone, where there are `LEAST_SEEDS` or more."""
    reason: str | None = None
    """Reason why the estimate, or only the interval, is missing."""

    @property
    def holds_seeds(self) -> bool:
        """True if the interval holds what other seeds would change."""
        return self.seeds >= LEAST_SEEDS

    @property
    def below(self) -> Verdict:
        """Judge whether it is below 1: over the whole range, and with the whole of an interval that holds seeds."""
        if self.crossings:
            return "not shown"
        if self.estimate is None or self.interval is None or not self.holds_seeds:
            return "not testable here"
        return "shown" if self.interval[1] < 1 else "not shown"

    @property
    def rests_on(self) -> str:
        """`one seed`, or `3 seeds (initialisation)`."""
        few = {0: "no seed shared by both", 1: "one seed"}
        return few.get(self.seeds, f"{self.seeds} seeds ({self.varied})")

    def to_row(self) -> dict[str, Any]:
        """Flat, for a table."""
        row: dict[str, Any] = {"ratio": self.estimate}
        ends = {"": self.interval, "text.": self.over_text, "seeds.": self.over_seeds, "over.": self.over}
        ends["ratio_at_ends."] = self.at_ends
        for name, pair in ends.items():
            row |= dict(zip((f"{name}low", f"{name}high"), pair or (None, None), strict=True))
        crossings = " ".join(f"{level:.4g}" for level in self.crossings) or None
        return row | {"crossings": crossings, "seeds": self.seeds, "reason": self.reason}

    def to_json(self) -> dict[str, Any]:
        return {
            "ratio": self.estimate,
            "interval": _as_list(self.interval),
            "over": _as_list(self.over),
            "ratio_at_ends": _as_list(self.at_ends),
            "crossings": list(self.crossings),
            "seeds": self.seeds,
            "interval_over_text": _as_list(self.over_text),
            "interval_over_seeds": _as_list(self.over_seeds),
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Measure:
    """A question that `ratio_of` answers: how much of `of` at equal `at`."""

    key: str
    of: str
    at: str

    @property
    def title(self) -> str:
        return f"{NAMES[self.of]} at equal {NAMES[self.at]}"


MEASURES = (
    Measure("features_at_equal_ce", of="l0", at="ce_increase"),
    Measure("alive_at_equal_ce", of="alive", at="ce_increase"),
    Measure("ce_increase_at_equal_l0", of="ce_increase", at="l0"),
    Measure("ce_increase_at_equal_alive", of="ce_increase", at="alive"),
)
NAMES = {"l0": "L0", "alive": "alive features", "ce_increase": "CE increase", LATER_MSE: "downstream MSE"}


def ratio_of(
    runs: Sequence[RunSummary],
    method: Method,
    of: str,
    at: str,
    resamples: int,
    seed: int,
    *,
    reference: Method = LOCAL,
) -> Ratio:
    """Relate how much of `of` the runs of a method have to how much the reference's have, at equal `at`. Both are of
    l0, alive, ce_increase and `LATER_MSE`.

    See the module for how. Runs that differ in their seeds alone are one point, their mean.
    """
    groups = {each: [run for run in runs if run.method == each] for each in (method, reference)}
    members = [run for group in groups.values() for run in group]
    absent = [f"there are no runs of {each.label}" for each, group in groups.items() if not group]
    if reason := absent[0] if absent else other_text(members):
        return Ratio(None, reason=reason)

    by_seed = _by_seed(groups, of, at)
    try:
        curve, other = (_curve(group, each.label, of, at) for each, group in groups.items())
        over = _common_range(curve, other, at)
        mean, crossings = _ratio_of_curves(curve, other, at), _crossings(curve, other, over)
    except InterpolationError as error:
        return Ratio(None, reason=str(error))
    if "alive" in (of, at) and len({run.alive_tokens for run in members}) > 1:
        return Ratio(None, reason="alive features were counted over different numbers of tokens")
    low, high = (float(curve.at(end) / other.at(end)) for end in over)
    result = Ratio(mean, over=over, at_ends=(low, high), seeds=len(by_seed), varied=what_varies(members))
    if crossings:
        return replace(result, estimate=None, crossings=crossings, reason=_crossing_reason(result, crossings, of, at))
    if len(by_seed) >= LEAST_SEEDS:
        spread = interval_over_seeds(list(by_seed))
        result = replace(result, over_seeds=(spread.low, spread.high))
    later = {f"downstream_mse.{site}" for run in members for site in run.downstream_mse if of == LATER_MSE}
    if reason := unpaired(members, {"l0", "ce_increase", "predictions"} | later):
        return replace(result, reason=reason)
    drawn = {id(run): resampled(run, {of, at}, resamples, seed) for run in members}
    draws = _drawn_ratios([[(run.knob, drawn[id(run)]) for run in group] for group in groups.values()], of, at)
    return with_intervals(result, draws, by_seed)


def _crossing_reason(ratio: Ratio, crossings: Sequence[float], of: str, at: str) -> str:
    (low, high), ends = ratio.over or (0.0, 0.0), ratio.at_ends or (0.0, 0.0)
    return (
        f"the curves cross: {100 * ends[0]:.0f} % of the {NAMES[of]} at {NAMES[at]} {low:.3g}, {100 * ends[1]:.0f} % "
        f"at {high:.3g}, equal at {', '.join(f'{level:.3g}' for level in crossings)}"
    )


def ratio_between(runs: Sequence[RunSummary], reference: Sequence[RunSummary], of: str, at: str) -> float:
    """Variant of `ratio_of` for any two curves, and the estimate alone.

    Raises:
        InterpolationError: the runs do not determine it.
    """
    curve, other = (_curve(group, name, of, at) for group, name in ((runs, "one"), (reference, "the other")))
    return _ratio_of_curves(curve, other, at)


def _by_seed(groups: Mapping[Method, Sequence[RunSummary]], of: str, at: str) -> list[float]:
    """The ratio of curves of each seed that both methods have and that determines one."""
    ratios = []
    for seeds in sorted(set.intersection(*({run.seeds for run in group} for group in groups.values()))):
        try:
            own, other = (
                _curve([run for run in group if run.seeds == seeds], method.label, of, at)
                for method, group in groups.items()
            )
            ratios.append(_ratio_of_curves(own, other, at))
        except InterpolationError:
            continue
    return ratios


def downstream_ratio(run: RunSummary, reference: RunSummary, resamples: int, seed: int) -> Ratio:
    """Geometric mean over the later sites of run's downstream MSE / the reference's."""
    sites = [site for site in run.downstream_mse if site in reference.downstream_mse]
    if not sites:
        return Ratio(None, reason="the runs have no later site in common")
    pairs = [(run.downstream_mse[site], reference.downstream_mse[site]) for site in sites]
    if min(min(pair) for pair in pairs) <= 0:
        return Ratio(None, reason="a downstream MSE is zero")
    return _ratio_of_runs(run, reference, pairs, {f"downstream_mse.{site}" for site in sites}, resamples, seed)


def over_pairs(ratios: Sequence[Ratio], varied: str) -> Ratio:
    """The geometric mean of ratios of pairs of runs, one pair a seed, all measured on one text; its error over text is
    the mean of theirs. One that is not known is left out.

    Args:
        varied: what the seeds are of.
    """
    known = [(r.estimate, r.over_text) for r in ratios if r.estimate is not None and r.over_text is not None]
    if not known:
        return ratios[0] if ratios else Ratio(None, reason="no seed has two runs to compare")
    logs = [float(np.log(estimate)) for estimate, _ in known]
    mean = float(np.mean(logs))
    low, high = np.mean([np.log(ends) - log for (_, ends), log in zip(known, logs, strict=True)], axis=0) + mean
    text = exp_interval(Interval(float(low), float(high), mean))
    result = Ratio(text.estimate, seeds=len(known), varied=varied, over_text=(text.low, text.high))
    if len(known) < LEAST_SEEDS:
        return replace(result, interval=result.over_text)
    whole = exp_interval(interval_with_seeds(mean, logs, error_of(Interval(float(low), float(high), mean))))
    seeds = interval_over_seeds(np.exp(logs))
    return replace(result, interval=(whole.low, whole.high), over_seeds=(seeds.low, seeds.high))


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
    if reason := other_text([run, reference]):
        return Ratio(None, reason=reason)
    result = Ratio(float(np.exp(np.mean([np.log(a / b) for a, b in pairs]))))
    if reason := unpaired([run, reference], names):
        return replace(result, reason=reason)
    drawn, drawn_reference = (resampled(one, names, resamples, seed) for one in (run, reference))
    logs = [np.log(drawn[name] / drawn_reference[name]) for name in names]
    return with_intervals(result, np.exp(np.mean(logs, axis=0)), ())


def below(ratios: Iterable[Ratio]) -> Verdict:
    """Judge if all ratios that could be measured are below 1 (`Ratio.below`)."""
    return all_shown(ratio.below for ratio in ratios if ratio.estimate is not None or ratio.crossings)


def percent(ratio: Ratio, *, seeds: bool = True) -> str:
    """`48 % [44, 53]`; `123 % to 81 %` where curves cross; from one or two seeds it says so, if it is to."""
    if ratio.crossings and ratio.at_ends is not None:
        shown = f"{100 * ratio.at_ends[0]:.0f} % to {100 * ratio.at_ends[1]:.0f} %"
    elif ratio.estimate is None:
        return "–"
    else:
        ends = "" if ratio.interval is None else f" [{100 * ratio.interval[0]:.0f}, {100 * ratio.interval[1]:.0f}]"
        shown = f"{100 * ratio.estimate:.0f} %{ends}"
    return shown if ratio.holds_seeds or not seeds else f"{shown}, {ratio.rests_on.partition(' (')[0]}"


def times(value: float) -> str:
    """A ratio with two digits after the point, fewer as it grows."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


@dataclass(frozen=True)
class _Curve:
    """One method's points in order of x, the quantity held equal."""

    name: str
    x: Floats
    y: Floats

    def at(self, x: Floats | float) -> Floats:
        return interpolate_at(self.x, self.y, x)


def _curve(runs: Sequence[RunSummary], name: str, of: str, at: str) -> _Curve:
    """One point per value of the knob, the mean of its seeds.

    Raises:
        InterpolationError: there are several runs of one value and seed; or the points are no trade-off.
    """
    _check_one_each(runs, name)
    points: dict[Knob, list[tuple[float, float]]] = {}
    for run in runs:
        points.setdefault(run.knob, []).append((estimate(run, at), estimate(run, of)))
    means = [np.mean(group, axis=0) for group in points.values()]
    try:
        x, y = monotone_points([point[0] for point in means], [point[1] for point in means])
    except InterpolationError as error:
        raise InterpolationError(f"{name}'s curve of {NAMES[of]} over {NAMES[at]}: {str(error).rstrip('.')}") from None
    # The later MSE grows with the CE increase, as both measure what is lost.
    if LATER_MSE not in (of, at) and y[-1] > y[0]:
        raise InterpolationError(f"{name}'s curve is not a trade-off: its {NAMES[of]} rises with its {NAMES[at]}")
    return _Curve(name, x, y)


def _check_one_each(runs: Sequence[RunSummary], name: str) -> None:
    """Runs that differ in more than their seed are no points of one curve, and have no mean."""
    for (knob, seeds), count in Counter((run.knob, run.seeds) for run in runs).items():
        if count > 1:
            rates = sorted({run.learning_rate or 0.0 for run in runs if run.knob == knob})
            which = f", of the learning rates {', '.join(f'{rate:g}' for rate in rates)}" if len(rates) > 1 else ""
            raise InterpolationError(
                f"{name} has {count} runs of {knob} and seed {seeds[0]}{which}; compare one of each at a time"
            )


def _common_range(curve: _Curve, other: _Curve, at: str) -> Ends:
    low, high = max(curve.x[0], other.x[0]), min(curve.x[-1], other.x[-1])
    if low >= high:
        covered = [f"{one.name} covers {one.x[0]:.3g} to {one.x[-1]:.3g}" for one in (curve, other)]
        raise InterpolationError(f"the runs have no {NAMES[at]} in common: {', '.join(covered)}")
    if low <= 0:
        raise InterpolationError(f"levels are spread on a logarithmic scale, but a {NAMES[at]} is {low:.3g}")
    return float(low), float(high)


def _ratio_of_curves(curve: _Curve, other: _Curve, at: str) -> float:
    """The mean ratio over the common range."""
    grid = log_spaced(*_common_range(curve, other, at), LEVELS)
    return float(np.exp(np.mean(np.log(curve.at(grid)) - np.log(other.at(grid)))))


def _drawn_ratios(groups: Sequence[Sequence[tuple[Knob, Mapping[str, Floats]]]], of: str, at: str) -> Floats:
    """`_ratio_of_curves` in each resample, `[resamples]`; NaN where the curves, or their range in common, are none."""
    sides = []
    for group in groups:
        points: dict[Knob, list[Mapping[str, Floats]]] = {}
        for knob, drawn in group:
            points.setdefault(knob, []).append(drawn)
        x, y = (np.stack([np.mean([one[name] for one in each], 0) for each in points.values()], 1) for name in (at, of))
        x, log_y, fit = log_curves(x, y)
        sides.append((x, log_y, fit if LATER_MSE in (of, at) else fit & (log_y[:, -1] <= log_y[:, 0])))
    (x, log_y, fit), (other_x, other_y, other_fit) = sides
    low, high = np.maximum(x[:, 0], other_x[:, 0]), np.minimum(x[:, -1], other_x[:, -1])
    draws = np.full(len(x), np.nan)
    for row in np.flatnonzero(fit & other_fit & (low > 0) & (low < high)):
        grid = log_spaced(low[row], high[row], LEVELS)
        draws[row] = np.mean(np.interp(grid, x[row], log_y[row]) - np.interp(grid, other_x[row], other_y[row]))
    return np.exp(draws)


def _crossings(curve: _Curve, other: _Curve, over: Ends) -> tuple[float, ...]:
    """Find where the curves change sides. Between neighbouring points of either the difference of their logarithms is
    linear, so that none is missed.
    """
    knots = np.unique([*over, *(x for x in (*curve.x, *other.x) if over[0] < x < over[1])])
    gaps = np.log(curve.at(knots)) - np.log(other.at(knots))
    apart = np.flatnonzero(gaps)  # where they only touch, they do not change sides
    x, gaps = knots[apart], gaps[apart]
    changes = np.flatnonzero(np.sign(gaps[1:]) != np.sign(gaps[:-1]))
    return tuple(float(x[i] + (x[i + 1] - x[i]) * gaps[i] / (gaps[i] - gaps[i + 1])) for i in changes)


def with_intervals(ratio: Ratio, draws: Floats, by_seed: Sequence[float]) -> Ratio:
    """
    Args:
        draws: the ratio in each resample of the held-out text, NaN where one determines none.
        by_seed: the ratio of each seed.
    """
    assert ratio.estimate is not None
    defined = float(np.mean(~np.isnan(draws)))
    if defined < DEFINED_SHARE:
        return replace(ratio, reason=f"only {100 * defined:.0f} % of the resamples determine the ratio")
    text = percentile_interval(draws, ratio.estimate)
    whole = text
    if len(by_seed) >= LEAST_SEEDS:
        logs = interval_with_seeds(float(np.log(ratio.estimate)), np.log(by_seed), text_error(np.log(draws)))
        whole = exp_interval(logs)
    return replace(ratio, over_text=(text.low, text.high), interval=(whole.low, whole.high))


def _as_list(ends: Ends | None) -> list[float] | None:
    return None if ends is None else list(ends)
