"""A comparison of the kinds at one site: every ratio, the runs that are most alike, and what they show in sentences."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from endwise.analysis.claims import are_similar
from endwise.analysis.ratios import MEASURES, Ratio, downstream_ratio, over_pairs, percent, ratio_to_local, times
from endwise.common.errors import ConfigError
from endwise.config.objective import KINDS, LABELS
from endwise.evaluation.summary import LATER_MSE, RunSummary, Seeds, estimate, what_varies


@dataclass(frozen=True)
class Summary:
    """A comparison of the kinds at one site: what `summary.json` and the report are made of."""

    site: str
    clean_ce: float
    mean_ablated_ce: float | None
    zero_ablated_ce: float | None
    runs: tuple[RunSummary, ...]
    ratios: Mapping[str, Mapping[str, Ratio]]
    """By the key of `MEASURES`, then by kind; each relative to local."""
    similar: tuple[RunSummary, ...]
    """One run of each kind, all of one seed, those whose CE increases are closest to each other."""
    downstream: Mapping[str, Ratio]
    """Ratio of downstream MSE at equal CE increase, by `<kind>/<kind>`; geometric mean over the later sites."""
    resamples: int
    model: str = ""
    command: str = ""
    seconds: float | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def features_at_equal_ce(self) -> Mapping[str, Ratio]:
        return self.ratios["features_at_equal_ce"]

    @property
    def verdicts(self) -> tuple[str, ...]:
        """What the numbers show, and what they do not, in plain sentences."""
        return verdicts(self)

    def to_json(self) -> dict[str, Any]:
        """The content of `summary.json`; JSON types only."""
        ratios = {key: {kind: ratio.to_json() for kind, ratio in group.items()} for key, group in self.ratios.items()}
        return {
            "clean_ce": self.clean_ce,
            "mean_ablated_ce": self.mean_ablated_ce,
            "zero_ablated_ce": self.zero_ablated_ce,
            "site": self.site,
            "model": self.model,
            "runs": [run.to_json() for run in self.runs],
            **ratios,
            "downstream_mse_ratio": {pair: ratio.to_json() for pair, ratio in self.downstream.items()},
            "runs_at_similar_ce": [run.folder for run in self.similar],
            "verdicts": list(self.verdicts),
            "bootstrap_resamples": self.resamples,
            "command": self.command,
            "seconds": self.seconds,
            "environment": dict(self.environment),
        }


def summarise(
    runs: Sequence[RunSummary],
    *,
    clean_ce: float,
    mean_ablated_ce: float | None = None,
    zero_ablated_ce: float | None = None,
    resamples: int = 1000,
    seed: int = 12345,
    model: str = "",
    command: str = "",
    seconds: float | None = None,
    environment: Mapping[str, Any] | None = None,
) -> Summary:
    """Compares runs of one site. Runs of one kind and coefficient that differ in seed count as one point, their mean.

    Raises:
        ConfigError: no runs, a kind that endwise does not know, or more than one site.
    """
    sites = sorted({run.site for run in runs})
    if len(sites) != 1:
        raise ConfigError(f"A comparison is of runs at one site; given {', '.join(sites) or 'no runs'}.")
    unknown = sorted({run.kind for run in runs} - set(KINDS))
    if unknown:
        raise ConfigError(f"A run's kind is one of {', '.join(KINDS)}; given {', '.join(unknown)}.")
    ordered = tuple(sorted(runs, key=lambda run: (KINDS.index(run.kind), run.coefficient, run.seeds)))
    ratios = {
        m.key: {kind: ratio_to_local(ordered, kind, m.of, m.at, resamples, seed) for kind in KINDS[1:]}
        for m in MEASURES
    }
    similar = runs_at_similar(ordered, "ce_increase")
    pairs = [(a.kind, b.kind) for b, a in itertools.combinations(similar, 2)]
    downstream = {f"{a}/{b}": later_error(ordered, a, b, resamples, seed) for a, b in pairs}
    return Summary(
        site=sites[0],
        clean_ce=clean_ce,
        mean_ablated_ce=mean_ablated_ce,
        zero_ablated_ce=zero_ablated_ce,
        runs=ordered,
        ratios=ratios,
        similar=similar,
        downstream=downstream,
        resamples=resamples,
        model=model,
        command=command,
        seconds=seconds,
        environment=environment or {},
    )


def later_error(runs: Sequence[RunSummary], kind: str, reference: str, resamples: int, seed: int) -> Ratio:
    """A kind's downstream MSE relative to another's at equal CE increase, as ratios of curves are. Where a curve
    determines none, of each seed the two runs whose CE increases are closest to each other (as in the paper's figure
    2), if these are similar.
    """
    of_curves = ratio_to_local(runs, kind, LATER_MSE, "ce_increase", resamples, seed, reference=reference)
    if of_curves.at_ends is not None:
        return of_curves
    two = [run for run in runs if run.kind in (kind, reference)]
    pairs = [{run.kind: run for run in pair} for pair in similar_by_seed(two, "ce_increase").values()]
    alike = [pair for pair in pairs if len(pair) == 2 and are_similar(pair.values())]
    if not alike:
        return of_curves
    ratios = [downstream_ratio(pair[kind], pair[reference], resamples, seed) for pair in alike]
    return over_pairs(ratios, what_varies([run for pair in alike for run in pair.values()]))


def runs_at_similar(runs: Sequence[RunSummary], metric: str) -> tuple[RunSummary, ...]:
    """One run of each kind, all of one seed: the choice whose ce_increase or l0 (`metric`) differs least, relative to
    its mean. Of the seeds that have the most kinds.
    """
    by_seed = similar_by_seed(runs, metric).values()
    most = max(len(choice) for choice in by_seed)
    return min((choice for choice in by_seed if len(choice) == most), key=partial(_spread, metric=metric))


def similar_by_seed(runs: Sequence[RunSummary], metric: str) -> dict[Seeds, tuple[RunSummary, ...]]:
    """As `runs_at_similar`, of every seed."""
    chosen = {}
    for seeds in sorted({run.seeds for run in runs}):
        groups = [[run for run in runs if (run.seeds, run.kind) == (seeds, kind)] for kind in KINDS]
        choices = itertools.product(*(group for group in groups if group))
        chosen[seeds] = min(choices, key=partial(_spread, metric=metric))
    return chosen


def _spread(choice: Sequence[RunSummary], metric: str) -> float:
    values = [estimate(run, metric) for run in choice]
    return (max(values) - min(values)) / max(abs(float(np.mean(values))), 1e-9)


def verdicts(summary: Summary) -> tuple[str, ...]:
    """What the numbers show, and what they do not, in plain sentences."""
    sentences = [_features_verdict(kind, ratio) for kind, ratio in summary.features_at_equal_ce.items()]
    for pair, ratio in summary.downstream.items():
        if pair != "e2e_ds/local":
            kind, reference = pair.split("/")
            sentences.append(_downstream_verdict(kind, reference, ratio))
    return tuple(sentences)


def _features_verdict(kind: str, ratio: Ratio) -> str:
    name = LABELS[kind]
    if ratio.crossings:
        return f"No one figure says how many of local's features {name} needs at local's CE increase: {ratio.reason}."
    if ratio.estimate is None:
        return f"How many features {name} needs at local's CE increase cannot be said from these runs: {ratio.reason}."
    fact = f"{percent(ratio, seeds=False)} of local's features per token at the same CE increase"
    if ratio.interval is None:
        return f"{name} needs {fact}; how sure that is, is not known: {ratio.reason}."
    if not ratio.holds_seeds:
        return f"{name} needs {fact}, by {ratio.rests_on}; {_OTHER_SEEDS}."
    if ratio.interval[0] <= 1 <= ratio.interval[1]:
        return f"That {name} needs fewer features than local is not shown: {fact}, and the interval includes 100 %."
    more = "" if ratio.interval[1] < 1 else " more features than local, not fewer:"
    return f"{name} needs{more} {fact}, over {ratio.rests_on}."


_OTHER_SEEDS = "the interval is over held-out text alone, and what other seeds would give is not in it"


def _downstream_verdict(kind: str, reference: str, ratio: Ratio) -> str:
    name, other = LABELS[kind], LABELS[reference]
    if ratio.crossings:
        return f"No one figure says how {name} and {other} compare downstream: {ratio.reason}."
    if ratio.estimate is None:
        return f"How {name} and {other} compare downstream cannot be said: {ratio.reason}."
    ends = "" if ratio.interval is None else f" [{times(ratio.interval[0])}, {times(ratio.interval[1])}]"
    where = "at their closest CE increases" if ratio.over is None else "at the same CE increase"
    fact = f"its downstream MSE is {times(ratio.estimate)} times{ends} {other}'s {where}"
    if ratio.interval is None:
        return f"{name} against {other}: {fact}; how sure that is, is not known: {ratio.reason}."
    if not ratio.holds_seeds:
        return f"{name} against {other}: {fact}, by {ratio.rests_on}; {_OTHER_SEEDS}."
    if ratio.interval[0] <= 1 <= ratio.interval[1]:
        return f"That {name} and {other} differ downstream is not shown: of {name}, {fact}."
    closely = "more" if ratio.estimate < 1 else "less"
    return f"{name} follows the original activations {closely} closely than {other}: {fact}, over {ratio.rests_on}."
