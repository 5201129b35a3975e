"""Scores that features of runs have, compared method by method: means with intervals, differences with permutation
tests, verdicts.

Of each seed one run a method is compared, those of the most similar CE increase or L0; of two runs equally many
features. A verdict rests on the mean of the seeds' differences, with an interval that holds features and seeds.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
from scipy import stats

from endwise.analysis.claims import SIMILAR, Claim, Unmeasured
from endwise.analysis.comparable import pairs_of
from endwise.analysis.over_features import SEED, resampled_means, stream
from endwise.analysis.over_seeds import OverSeeds, bracketed, interval_columns, judged, over, over_seeds
from endwise.analysis.sets import RunSet
from endwise.common.seeds import numpy_stream
from endwise.common.statistics import Floats, Interval, percentile_interval
from endwise.config.method import Method
from endwise.evaluation.summary import RunSummary, estimate

LEAST_FEATURES = 10
"""Features that a comparison takes of each run."""
At = Literal["ce_increase", "l0"]
AT: dict[At, str] = {"ce_increase": "CE increase", "l0": "L0"}
PAIRS = (("e2e", "local"), ("e2e_ds", "local"), ("e2e_ds", "e2e"))


@runtime_checkable
class ScoredRun(Protocol):
    """A run whose features have scores. A name with a dot is a control's: `detection.shuffled`."""

    @property
    def summary(self) -> RunSummary: ...
    @property
    def names(self) -> tuple[str, ...]:
        """Names of its scores."""
        ...

    def values(self, name: str) -> Floats:
        """Return a score feature by feature; NaN where one does not have it."""
        ...


def scores(run: ScoredRun, name: str) -> Floats:
    """Return this score of every feature that has it, `[features]`."""
    values = run.values(name)
    return values[~np.isnan(values)]


def mean(run: ScoredRun, name: str) -> Interval | None:
    """Average a score, with its bootstrap interval over features; None where no feature has this score."""
    values = scores(run, name)
    if not len(values):
        return None
    return percentile_interval(resampled_means(values, stream(run.summary)), float(values.mean()))


def beyond(run: ScoredRun, name: str, control: str) -> Interval | None:
    """Subtract its control's from a score, feature by feature; None where too few have both."""
    differences = run.values(name) - run.values(f"{name}.{control}")
    differences = differences[~np.isnan(differences)]
    if len(differences) < LEAST_FEATURES:
        return None
    return percentile_interval(resampled_means(differences, stream(run.summary)), float(differences.mean()))


S = TypeVar("S", bound=ScoredRun)


@dataclass(frozen=True)
class ScoreDifference(Generic[S]):
    """One score of two runs, of one seed and of equally many features."""

    name: str
    at: At
    run: S
    other: S
    features: int
    """Number that each has."""
    difference: Interval
    """Mean of `run` less mean of `other`, with its bootstrap interval over features."""
    draws: Floats
    """The same in each resample of the features."""
    p: float
    """Two-sided, by permutation."""

    @property
    def methods(self) -> tuple[Method, Method]:
        return self.run.summary.method, self.other.summary.method


@dataclass(frozen=True, repr=False)
class ScoredSet(RunSet[S]):
    """The runs of one setting, scored alike."""

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of all scores, controls among them."""
        return tuple(dict.fromkeys(name for run in self.runs for name in run.names))

    @property
    def own_names(self) -> tuple[str, ...]:
        """Names of scores that are no controls."""
        return tuple(name for name in self.names if "." not in name)

    @cached_property
    def differences(self) -> tuple[ScoreDifference[S], ...]:
        """Differences of every pair of methods that a seed has, at either similarity, in every score that is no
        control.
        """
        found = [
            _difference(name, at, of[method], of[other])
            for at in AT
            for of in self.closest_by_seed(at)
            for method, other in pairs_of(PAIRS, self.methods)
            if method in of and other in of
            for name in self.own_names
        ]
        return tuple(each for each in found if each is not None)

    def claim(
        self,
        claim: str,
        published: str | None,
        at: At,
        pair: tuple[Method, Method],
        holds: Callable[[OverSeeds], bool],
        names: Sequence[str] | None = None,
    ) -> Claim:
        """Judge the differences of a pair of methods in some scores; unset: in all that are no controls."""
        chosen = [each for each in self.differences if each.at == at and each.methods == pair]
        chosen = [each for each in chosen if names is None or each.name in names]
        if why := _untestable(chosen, at):
            return Unmeasured(claim, published, why)
        by_name = {name: [each for each in chosen if each.name == name] for name in self.own_names}
        means = {name: mean_difference(of) for name, of in by_name.items() if of}
        measured = "; ".join(_in_words(by_name[name], each) for name, each in means.items())
        return Claim(claim, published, measured, judged(*((each, holds(each)) for each in means.values())))


def _difference(name: str, at: At, run: S, other: S) -> ScoreDifference[S] | None:
    """Compare two runs; None where either has too few features with this score."""
    one, two = run.summary.method, other.summary.method
    generator = numpy_stream(SEED, f"{name} of {one.key} and {two.key} at {at}", run.summary.seed)
    a, b = equal_samples(scores(run, name), scores(other, name), generator)
    if len(a) < LEAST_FEATURES:
        return None
    draws = resampled_means(a, stream(run.summary)) - resampled_means(b, stream(other.summary))
    interval = percentile_interval(draws, float(a.mean() - b.mean()))
    p = permutation_test(a, b, generator, PERMUTATIONS)
    return ScoreDifference(name, at, run, other, len(a), interval, draws, p)


def mean_difference(differences: Sequence[ScoreDifference[Any]]) -> OverSeeds:
    """Average one score's differences over seeds, with an interval that holds features and seeds."""
    return over_seeds(np.stack([[each.difference.estimate, *each.draws] for each in differences]))


def _in_words(of: Sequence[ScoreDifference[Any]], mean: OverSeeds) -> str:
    """The mean of one score's differences over seeds, and how many features it is of."""
    features = f"{', '.join(map(str, dict.fromkeys(each.features for each in of)))} features each"
    tests = f"p {', '.join(f'{each.p:.2g}' for each in of)}"
    where = over("features", [each.run.summary for each in of])
    return f"{of[0].name} {mean.text('{:+.3f}'.format)} {where}, {tests}, {features}"


def _untestable(chosen: Sequence[ScoreDifference[Any]], at: At) -> str | None:
    """Say why differences cannot bear a verdict, if they cannot."""
    if not chosen:
        return f"no seed has both kinds with {LEAST_FEATURES} scored features"
    for each in chosen:
        values = [estimate(side.summary, at) for side in (each.run, each.other)]
        if not 0 < max(values) <= SIMILAR * min(values):
            return f"the closest {AT[at]}s are {values[0]:.3g} and {values[1]:.3g}, further apart than {SIMILAR:g} ×"
        for side in (each.run, each.other):
            above = beyond(side, each.name, "shuffled") if f"{each.name}.shuffled" in side.names else None
            if above is not None and above.low <= 0:
                return (
                    f"explanations of {side.summary.method.label} score no better than another feature's "
                    f"({each.name} {bracketed(above, '+.3f')}): they hold nothing that could be compared"
                )
    return None


def columns_of_scored(run: ScoredRun) -> dict[str, Any]:
    """Name a run in a table on disk."""
    summary = run.summary
    row = {"run": summary.folder, "site": summary.site, "kind": summary.method.key, "seed": summary.seed}
    row |= {"data_seed": summary.data_seed, **summary.knob.columns}
    return {**row, "ce_increase": summary.ce_increase, "l0": summary.l0}


def mean_rows(found: Iterable[ScoredSet[S]], more: Callable[[S, str], dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per run and score: the mean over features with its interval, and what `more` says of it."""
    rows = []
    for run in (run for one in found for run in one.runs):
        for name in run.names:
            if (average := mean(run, name)) is not None:
                row = {**columns_of_scored(run), "score": name, "features": len(scores(run, name))}
                rows.append({**row, **interval_columns("mean", average), **more(run, name)})
    return rows


def difference_rows(found: Iterable[ScoredSet[Any]]) -> list[dict[str, Any]]:
    """Table 4: one row per pair of methods, seed, similarity and score."""
    rows = []
    for one in found:
        for each in one.differences:
            run, other = each.run.summary, each.other.summary
            row = {"site": one.setting.site, "at": each.at, "seed": run.seed, "data_seed": run.data_seed}
            row |= {"kind": run.method.key, "other": other.method.key, "score": each.name, "features": each.features}
            row |= {**interval_columns("difference", each.difference), "p": each.p}
            rows.append(row | {"run": run.folder, "other_run": other.folder})
    return rows


PERMUTATIONS = 9_999
_CHUNK = 1 << 21
"""Values that are permuted at a time."""


def permutation_test(a: Floats, b: Floats, generator: np.random.Generator, permutations: int = PERMUTATIONS) -> float:
    """Two-sided p of mean a − mean b, values `[n]` and `[m]`, at least 2 each, if which side a value is on were chance.

    p = (1 + how often the difference of values dealt at random is at least as far from 0 as it was) / (1 +
    permutations), which is never 0 and valid at any number of them (Phipson and Smyth 2010). Where there are no more
    deals than `permutations`, it is the share of all of them.
    """
    scale = max(np.abs(a).max(), np.abs(b).max())  # relative to which scipy then calls sums in another order equal
    found = stats.permutation_test(
        (a, b),
        lambda one, other, axis: scale + np.abs(one.mean(axis) - other.mean(axis)),
        alternative="greater",
        n_resamples=permutations,
        batch=max(1, _CHUNK // (len(a) + len(b))),
        rng=generator,
    )
    return float(found.pvalue)


def equal_samples(a: Floats, b: Floats, generator: np.random.Generator) -> tuple[Floats, Floats]:
    """Draw samples of equal size: from the longer, as many as the shorter has, without replacement."""
    count = min(len(a), len(b))
    if len(a) == len(b):
        return a, b
    first, second = (each if len(each) == count else generator.choice(each, count, replace=False) for each in (a, b))
    return first, second
