"""Interpretability of features, method by method: means with intervals, differences with permutation tests, verdicts.

Runs are compared where their recipes may be (see `pareto`) and their explanations were made and scored alike. Of each
seed one run a method is compared, those of the most similar CE increase or L0; of two runs equally many features. A
verdict rests on the mean of the seeds' differences, with an interval that holds features and seeds.
"""

import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from endwise.analysis.claims import SIMILAR, Claim
from endwise.analysis.comparable import pairs_of, runs_in, with_settings
from endwise.analysis.over_features import SEED, resampled_means, stream
from endwise.analysis.over_seeds import OverSeeds, bracketed, interval_columns, judged, over, over_seeds
from endwise.analysis.sets import RunSet, in_sets
from endwise.common.errors import RunFolderError
from endwise.common.files import expanded
from endwise.common.seeds import numpy_stream
from endwise.common.statistics import Floats, Interval, percentile_interval
from endwise.config.method import LOCAL, PRESET_METHODS, Method
from endwise.evaluation.summary import RunSummary, estimate
from endwise.features.explanations import Explanations, read_explanations

MARGIN = 0.05
"""Difference in balanced accuracy within which two means count as equal."""
LEAST_FEATURES = 10
"""Features that a comparison takes of each run."""
At = Literal["ce_increase", "l0"]
AT: dict[At, str] = {"ce_increase": "CE increase", "l0": "L0"}
PAIRS = (("e2e", "local"), ("e2e_ds", "local"), ("e2e_ds", "e2e"))


@dataclass(frozen=True)
class ExplainedRun:
    """A run and its explanations."""

    summary: RunSummary
    explanations: Explanations

    def scores(self, name: str) -> Floats:
        """Return this score of every feature that has it, `[features]`."""
        values = (each.value(name) for each in self.explanations.rows)
        return np.array([value for value in values if value is not None], dtype=np.float64)

    def mean(self, name: str) -> Interval | None:
        """With its bootstrap interval over features; None where no feature has this score."""
        values = self.scores(name)
        if not len(values):
            return None
        return percentile_interval(resampled_means(values, stream(self.summary)), float(values.mean()))

    def beyond(self, name: str, control: str) -> Interval | None:
        """By how much a score is above its control's, feature by feature; None where too few have both."""
        pairs = [(each.value(name), each.value(f"{name}.{control}")) for each in self.explanations.rows]
        differences = np.array([own - other for own, other in pairs if own is not None and other is not None])
        if len(differences) < LEAST_FEATURES:
            return None
        return percentile_interval(resampled_means(differences, stream(self.summary)), float(differences.mean()))


@dataclass(frozen=True)
class ScoreDifference:
    """One score of two runs, of one seed and of equally many features."""

    name: str
    at: At
    run: ExplainedRun
    other: ExplainedRun
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


@dataclass(frozen=True)
class Interpretability(RunSet[ExplainedRun]):
    """The runs of one setting, explained alike."""

    @property
    def about(self) -> dict[str, Any]:
        """The settings of their explanations."""
        return dict(self.runs[0].explanations.about["settings"])

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of all scores, controls among them."""
        return tuple(dict.fromkeys(name for run in self.runs for name in run.explanations.names))

    @property
    def own_names(self) -> tuple[str, ...]:
        """Names of scores with a feature's own explanation."""
        return tuple(name for name in self.names if "." not in name)

    @cached_property
    def differences(self) -> tuple[ScoreDifference, ...]:
        """Differences of every pair of methods that a seed has, at either similarity, in every score with the features'
        own explanations.
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

    @cached_property
    def claims(self) -> tuple[Claim, ...]:
        """Verdicts on the paper's §3.3: what its figure 9 and table 4 say of e2e+ds and local."""
        return (
            self._claim(
                "At similar CE increase, features of e2e+ds are not less interpretable than local's",
                "e2e+ds − local, by simulation: +0.08 (p .006), +0.10 (p below .001), +0.02 (p .41), layers 2, 6, 10",
                "ce_increase",
                lambda each: each.low > -MARGIN,
            ),
            self._claim(
                "At similar CE increase, features of e2e+ds are more interpretable than local's",
                "so at layers 2 and 6, not at 10",
                "ce_increase",
                lambda each: each.low > 0,
            ),
            self._claim(
                "At similar L0, features of e2e+ds and of local are equally interpretable",
                "no difference at any layer",
                "l0",
                lambda each: each.low > -MARGIN and each.high < MARGIN,
            ),
        )

    def _claim(self, claim: str, published: str, at: At, holds: Any) -> Claim:
        pair = (PRESET_METHODS["e2e_ds"], LOCAL)
        chosen = [each for each in self.differences if each.at == at and each.methods == pair]
        if why := _untestable(chosen, at):
            return Claim(claim, published, why, "not testable here")
        by_name = {name: [each for each in chosen if each.name == name] for name in self.own_names}
        means = {name: _over_seeds(of) for name, of in by_name.items() if of}
        told = "; ".join(_told(by_name[name], mean) for name, mean in means.items())
        return Claim(claim, published, told, judged(*((mean, holds(mean)) for mean in means.values())))


def interpretability(paths: Iterable[str | Path]) -> list[Interpretability]:
    """Compares explained runs, in as many sets as can be compared.

    Args:
        paths: evaluated run folders, or folders that hold some at any depth; below a folder, runs that were not
            explained are passed over.

    Raises:
        RunFolderError: there is no run, one that is named was not measured or not explained.
        FormatError: what a run holds cannot be read.
    """
    named = [expanded(path) for path in paths]
    folders = runs_in(named)
    read = {folder: read_explanations(folder) for folder in folders}
    explained = {folder: found for folder, found in read.items() if found is not None}
    missing = [folder for folder in folders if folder not in explained and folder in named]
    if missing or not explained:
        which = missing[0] if missing else named[0]
        raise RunFolderError(
            f"{which} was not explained yet. Explain it: endwise explain {shlex.quote(str(which))} --endpoint URL "
            "--model NAME"
        )
    runs = [
        (setting, ExplainedRun(summary, explained[Path(summary.folder)]))
        for summary, setting in with_settings(list(explained))
    ]
    return [Interpretability(*each) for each in in_sets(runs, _conditions)]


def _conditions(run: ExplainedRun) -> str:
    """Name what must agree for scores to be compared: models, prompts, texts, numbers of items; not the endpoint."""
    about = run.explanations.about
    return json.dumps([about.get(name) for name in ("settings", "prompts", "corpus")], sort_keys=True)


def _difference(name: str, at: At, run: ExplainedRun, other: ExplainedRun) -> ScoreDifference | None:
    """None where either has too few features with this score."""
    one, two = run.summary.method, other.summary.method
    generator = numpy_stream(SEED, f"{name} of {one.key} and {two.key} at {at}", run.summary.seed)
    a, b = equal_samples(run.scores(name), other.scores(name), generator)
    if len(a) < LEAST_FEATURES:
        return None
    draws = resampled_means(a, stream(run.summary)) - resampled_means(b, stream(other.summary))
    interval = percentile_interval(draws, float(a.mean() - b.mean()))
    return ScoreDifference(name, at, run, other, len(a), interval, draws, permutation_test(a, b, generator))


def _over_seeds(differences: Sequence[ScoreDifference]) -> OverSeeds:
    return over_seeds(np.stack([[each.difference.estimate, *each.draws] for each in differences]))


def _told(of: Sequence[ScoreDifference], mean: OverSeeds) -> str:
    """The mean of one score's differences over seeds, and how many features it is of."""
    features = f"{', '.join(map(str, dict.fromkeys(each.features for each in of)))} features each"
    tests = f"p {', '.join(f'{each.p:.2g}' for each in of)}"
    where = over("features", [each.run.summary for each in of])
    return f"{of[0].name} {mean.told('{:+.3f}'.format)} {where}, {tests}, {features}"


def _untestable(chosen: Sequence[ScoreDifference], at: At) -> str | None:
    """Say why differences cannot bear a verdict, if they cannot."""
    if not chosen:
        return f"no seed has both kinds with {LEAST_FEATURES} scored features"
    for each in chosen:
        values = [estimate(side.summary, at) for side in (each.run, each.other)]
        if not 0 < max(values) <= SIMILAR * min(values):
            return f"the closest {AT[at]}s are {values[0]:.3g} and {values[1]:.3g}, further apart than {SIMILAR:g} ×"
        for side in (each.run, each.other):
            beyond = side.beyond(each.name, "shuffled")
            if beyond is not None and beyond.low <= 0:
                return (
                    f"explanations of {side.summary.method.label} score no better than another feature's "
                    f"({each.name} {bracketed(beyond, '+.3f')}): they hold nothing that could be compared"
                )
    return None


def feature_rows(found: Sequence[Interpretability]) -> list[dict[str, Any]]:
    """One row per run and explained feature: the explanation and every score."""
    rows = []
    for run in _runs(found):
        for each in run.explanations.rows:
            row = {**_columns(run), "feature": each.feature, "explanation": each.text}
            for name in run.explanations.names:
                score = each.scores.get(name)
                row |= {name: None if score is None else score.value}
                row |= {f"{name}.failed": None if score is None else score.failed}
            rows.append(row)
    return rows


def mean_rows(found: Sequence[Interpretability]) -> list[dict[str, Any]]:
    """One row per run and score: the mean over features with its interval, and how many items had no answer."""
    rows = []
    for run in _runs(found):
        for name in run.explanations.names:
            if (mean := run.mean(name)) is not None:
                scores = [each.scores[name] for each in run.explanations.rows if name in each.scores]
                row = {**_columns(run), "score": name, "features": len(run.scores(name))}
                row |= {**interval_columns("mean", mean), "answered": sum(each.answered for each in scores)}
                rows.append(row | {"failed": sum(each.failed for each in scores)})
    return rows


def difference_rows(found: Sequence[Interpretability]) -> list[dict[str, Any]]:
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


def _runs(found: Sequence[Interpretability]) -> list[ExplainedRun]:
    return [run for one in found for run in one.runs]


def _columns(run: ExplainedRun) -> dict[str, Any]:
    summary = run.summary
    row = {"run": summary.folder, "site": summary.site, "kind": summary.method.key, "seed": summary.seed}
    row |= {"data_seed": summary.data_seed, **summary.knob.columns}
    return {**row, "ce_increase": summary.ce_increase, "l0": summary.l0}


PERMUTATIONS = 9_999
_CHUNK = 1 << 21
"""Values that are permuted at a time."""


def permutation_test(a: Floats, b: Floats, generator: np.random.Generator, permutations: int = PERMUTATIONS) -> float:
    """Two-sided p of mean a − mean b, values `[n]` and `[m]`, if which side a value is on were chance.

    The values are dealt again to the two sides, `permutations` times; p = (1 + how often the difference is at least as
    far from 0 as it was) / (1 + permutations), which is never 0 and valid at any number of them (Phipson and Smyth
    2010).
    """
    both = np.concatenate([a, b]).astype(np.float64)
    seen = abs(a.mean() - b.mean())
    slack = 1e-9 * (np.abs(both).max(initial=0.0) + 1e-300)  # sums in another order
    rows = max(1, _CHUNK // len(both))
    as_far = 0
    for start in range(0, permutations, rows):
        dealt = np.tile(both, (min(rows, permutations - start), 1))
        generator.permuted(dealt, axis=1, out=dealt)
        left = dealt[:, : len(a)].mean(1)
        right = dealt[:, len(a) :].mean(1)
        as_far += int((np.abs(left - right) >= seen - slack).sum())
    return (1 + as_far) / (1 + permutations)


def equal_samples(a: Floats, b: Floats, generator: np.random.Generator) -> tuple[Floats, Floats]:
    """As many of each: of the longer, as many as the shorter has, drawn without replacement."""
    count = min(len(a), len(b))
    if len(a) == len(b):
        return a, b
    first, second = (each if len(each) == count else generator.choice(each, count, replace=False) for each in (a, b))
    return first, second
