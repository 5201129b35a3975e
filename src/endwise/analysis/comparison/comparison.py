"""A comparison of the methods at one site: every ratio, the runs that are most alike, and what they show in words."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from endwise.analysis.claims import are_similar
from endwise.analysis.comparable import baseline_of, distinguished, in_order, methods_of
from endwise.analysis.ratios import MEASURES, Ratio, downstream_ratio, over_pairs, percent, ratio_of, times
from endwise.common.errors import ConfigError
from endwise.config.method import LOCAL, PRESET_METHODS, Method
from endwise.evaluation.summary import LATER_MSE, RunSummary, Seeds, estimate, what_varies
from endwise.runs.folder import RunFolder


@dataclass(frozen=True)
class Summary:
    """A comparison of the methods at one site: what `summary.json` and the report are made of. See `summarise`."""

    runs: tuple[RunSummary, ...]
    """Runs by method, knob and seed; each method with a key and a label of its own."""
    clean_ce: float
    mean_ablated_ce: float | None = None
    zero_ablated_ce: float | None = None
    resamples: int = 1000
    seed: int = 12345
    """Seed of the resamples."""
    model: str = ""
    command: str = ""
    seconds: float | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def site(self) -> str:
        return self.runs[0].site

    @property
    def methods(self) -> list[Method]:
        """Methods that have runs."""
        return methods_of(self.runs)

    @property
    def baseline(self) -> Method:
        """Method that the others are related to: local where it is there, otherwise the first."""
        return baseline_of(self.methods)

    @property
    def compared(self) -> list[Method]:
        """Methods related to the baseline; where that is local, all presets, with runs or without."""
        presets = PRESET_METHODS.values() if self.baseline == LOCAL else ()
        return [method for method in dict.fromkeys((*presets, *self.methods)) if method != self.baseline]

    def method(self, key: str) -> Method:
        """Find a method by its key."""
        return next(each for each in (*self.methods, *PRESET_METHODS.values()) if each.key == key)

    @cached_property
    def ratios(self) -> Mapping[str, Mapping[str, Ratio]]:
        """Ratios by the key of `MEASURES`, then by the key of each of `compared`, relative to `baseline`."""
        related = partial(ratio_of, self.runs, resamples=self.resamples, seed=self.seed, reference=self.baseline)
        return {each.key: {of.key: related(of, of=each.of, at=each.at) for of in self.compared} for each in MEASURES}

    @property
    def features_at_equal_ce(self) -> Mapping[str, Ratio]:
        return self.ratios["features_at_equal_ce"]

    @cached_property
    def similar(self) -> tuple[RunSummary, ...]:
        """One run of each method, all of one seed, those whose CE increases are closest to each other."""
        return runs_at_similar(self.runs, "ce_increase")

    @cached_property
    def downstream(self) -> Mapping[str, Ratio]:
        """Ratio of downstream MSE at equal CE increase, by `<key>/<key>`; geometric mean over the later sites."""
        pairs = [(a.method, b.method) for b, a in itertools.combinations(self.similar, 2)]
        return {f"{a.key}/{b.key}": later_error(self.runs, a, b, self.resamples, self.seed) for a, b in pairs}

    @property
    def verdicts(self) -> tuple[str, ...]:
        """Sentences that say what the numbers show, and what they do not."""
        base, ratios = self.baseline.label, self.features_at_equal_ce
        sentences = [_features_verdict(method.label, base, ratios[method.key]) for method in self.compared]
        for pair, ratio in self.downstream.items():
            if pair != "e2e_ds/local":
                method, reference = map(self.method, pair.split("/"))
                sentences.append(_downstream_verdict(method.label, reference.label, ratio))
        return tuple(sentences)

    def to_json(self) -> dict[str, Any]:
        """The content of `summary.json`; JSON types only."""
        shared = ("clean_ce", "mean_ablated_ce", "zero_ablated_ce", "site", "model")
        ratios = {key: {of: ratio.to_json() for of, ratio in group.items()} for key, group in self.ratios.items()}
        return {
            **{name: getattr(self, name) for name in shared},
            "runs": [run.to_json() for run in self.runs],
            "baseline": self.baseline.key,
            **ratios,
            "downstream_mse_ratio": {pair: ratio.to_json() for pair, ratio in self.downstream.items()},
            "runs_at_similar_ce": [run.folder for run in self.similar],
            "verdicts": list(self.verdicts),
            "bootstrap_resamples": self.resamples,
            "command": self.command,
            "seconds": self.seconds,
            "environment": dict(self.environment),
        }


def summarise(runs: Sequence[RunSummary], *, clean_ce: float, **about: Any) -> Summary:
    """Compare runs of one site. Runs of one method and knob that differ in seed count as one point, their mean.

    Args:
        about: further fields of `Summary`.

    Raises:
        ConfigError: no runs, or more than one site.
    """
    sites = sorted({run.site for run in runs})
    if len(sites) != 1:
        raise ConfigError(f"A comparison takes runs at one site; given {', '.join(sites) or 'no runs'}.")
    return Summary(tuple(sorted(distinguished(runs), key=in_order)), clean_ce, **about)


def summarise_folders(runs: Sequence[RunSummary], **about: Any) -> Summary:
    """Variant of `summarise` with the baselines in the first run's folder."""
    baselines = (RunFolder(Path(runs[0].folder)).evaluation() or {}).get("baselines", {})
    ablated = {f"{name}_ce": baselines.get(name) for name in ("mean_ablated", "zero_ablated")}
    return summarise(runs, clean_ce=baselines.get("clean", math.nan), **ablated, **about)


def later_error(runs: Sequence[RunSummary], method: Method, reference: Method, resamples: int, seed: int) -> Ratio:
    """Relate a method's downstream MSE to another's at equal CE increase, as ratios of curves are. Where a curve
    determines none, of each seed the two runs whose CE increases are closest to each other (as in the paper's figure
    2), if these are similar.
    """
    of_curves = ratio_of(runs, method, LATER_MSE, "ce_increase", resamples, seed, reference=reference)
    if of_curves.at_ends is not None:
        return of_curves
    two = [run for run in runs if run.method in (method, reference)]
    pairs = [{run.method: run for run in pair} for pair in similar_by_seed(two, "ce_increase").values()]
    alike = [pair for pair in pairs if len(pair) == 2 and are_similar(pair.values())]
    if not alike:
        return of_curves
    ratios = [downstream_ratio(pair[method], pair[reference], resamples, seed) for pair in alike]
    return over_pairs(ratios, what_varies([run for pair in alike for run in pair.values()]))


def runs_at_similar(runs: Sequence[RunSummary], metric: str) -> tuple[RunSummary, ...]:
    """One run of each method, all of one seed: the choice whose ce_increase or l0 (`metric`) differs least, relative to
    its mean. Of the seeds that have the most methods.
    """
    by_seed = similar_by_seed(runs, metric).values()
    most = max(len(choice) for choice in by_seed)
    return min((choice for choice in by_seed if len(choice) == most), key=partial(_spread, metric=metric))


def similar_by_seed(runs: Sequence[RunSummary], metric: str) -> dict[Seeds, tuple[RunSummary, ...]]:
    """Variant of `runs_at_similar` for every seed."""
    chosen, methods = {}, methods_of(runs)
    for seeds in sorted({run.seeds for run in runs}):
        groups = [[run for run in runs if (run.seeds, run.method) == (seeds, method)] for method in methods]
        choices = itertools.product(*(group for group in groups if group))
        chosen[seeds] = min(choices, key=partial(_spread, metric=metric))
    return chosen


def _spread(choice: Sequence[RunSummary], metric: str) -> float:
    values = [estimate(run, metric) for run in choice]
    return (max(values) - min(values)) / max(abs(float(np.mean(values))), 1e-9)


def _features_verdict(name: str, base: str, ratio: Ratio) -> str:
    if ratio.crossings:
        return f"No single ratio of {name}'s features to {base}'s at {base}'s CE increase: {ratio.reason}."
    if ratio.estimate is None:
        return f"These runs do not determine how many features {name} needs at {base}'s CE increase: {ratio.reason}."
    fact = f"{percent(ratio, seeds=False)} of {base}'s features per token at the same CE increase"
    if ratio.interval is None:
        return f"{name} needs {fact}; no interval: {ratio.reason}."
    if not ratio.holds_seeds:
        return f"{name} needs {fact}, by {ratio.rests_on}; {_OTHER_SEEDS}."
    if ratio.interval[0] <= 1 <= ratio.interval[1]:
        return f"{name} is not shown to need fewer features than {base}: {fact}; the interval includes 100 %."
    more = "" if ratio.interval[1] < 1 else f" more features than {base}, not fewer:"
    return f"{name} needs{more} {fact}, over {ratio.rests_on}."


_OTHER_SEEDS = "the interval is over held-out text alone and does not cover other seeds"


def _downstream_verdict(name: str, other: str, ratio: Ratio) -> str:
    if ratio.crossings:
        return f"No single ratio of {name}'s downstream MSE to {other}'s: {ratio.reason}."
    if ratio.estimate is None:
        return f"These runs do not determine how {name} and {other} compare downstream: {ratio.reason}."
    ends = "" if ratio.interval is None else f" [{times(ratio.interval[0])}, {times(ratio.interval[1])}]"
    where = "at their closest CE increases" if ratio.over is None else "at the same CE increase"
    fact = f"its downstream MSE is {times(ratio.estimate)} times{ends} {other}'s {where}"
    if ratio.interval is None:
        return f"{name} against {other}: {fact}; no interval: {ratio.reason}."
    if not ratio.holds_seeds:
        return f"{name} against {other}: {fact}, by {ratio.rests_on}; {_OTHER_SEEDS}."
    if ratio.interval[0] <= 1 <= ratio.interval[1]:
        return f"{name} and {other} are not shown to differ downstream: for {name}, {fact}."
    closely = "more" if ratio.estimate < 1 else "less"
    return f"{name} follows the original activations {closely} closely than {other}: {fact}, over {ratio.rests_on}."
