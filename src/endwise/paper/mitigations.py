"""Costs of a CE increase: the paper's three ways to train end to end for less, each as a curve.

The ways are fewer training tokens, a smaller dictionary, and a start from a local SAE. Each variant is a short curve of
runs; its CE increase is read off at one L0, the same for all variants, and never beyond what was measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from endwise.analysis.over_seeds import interval_columns
from endwise.analysis.ratios import DEFINED_SHARE, Ratio, with_intervals
from endwise.common.statistics import InterpolationError, Interval, interpolate_at
from endwise.config.objective import Kind
from endwise.config.run import RunConfig
from endwise.evaluation.provenance import check_start
from endwise.evaluation.summary import Floats, RunSummary, Seeds, resampled, what_varies
from endwise.paper.costs import Cost, seconds_per_token
from endwise.runs.folder import RunFolder

Way = Literal["tokens", "dictionary", "start"]
WAYS: dict[Way, str] = {"tokens": "training tokens", "dictionary": "dictionary size", "start": "start from local"}

LEVELS = 200
"""L0s that are looked at for the one that most variants cover."""


@dataclass(frozen=True)
class Variant:
    """Runs of one kind that differ in their sparsity coefficient and their seeds only."""

    kind: Kind
    way: Way
    label: str
    """Change that it makes: `0.5 × tokens`, `3 features per dimension`."""
    runs: tuple[RunSummary, ...]
    started: bool
    """True if it started from a local SAE."""
    tokens: int
    """Training tokens of a run, the local phase it may have begun with counted."""
    seconds: float
    """Time that these take on the machine that the costs were measured on."""


@dataclass(frozen=True)
class CostPoint:
    variant: Variant
    ce_increase: Interval | None
    """Nats per token at the common L0, the geometric mean over seeds; 95 % over held-out text, and over seeds too where
    there are `LEAST_SEEDS` or more."""
    reason: str | None
    """Reason why there is none."""
    by_seed: Mapping[Seeds, float] = field(default_factory=dict)
    """Value of each seed."""
    draws: Mapping[Seeds, Floats] = field(default_factory=dict, repr=False, compare=False)
    """Value of each seed in each resample of the held-out text, which are the same for all variants; NaN where one
    determines none."""

    def relative_to(self, reference: "CostPoint") -> Ratio:
        """This CE increase / the reference's, seed by seed, paired over held-out text."""
        common = [seeds for seeds in self.by_seed if seeds in reference.by_seed]
        if not common:
            return Ratio(None, reason="no seed of both has a CE increase at this L0")
        ratios = [self.by_seed[seeds] / reference.by_seed[seeds] for seeds in common]
        draws = np.exp(np.mean([np.log(self.draws[s] / reference.draws[s]) for s in common], axis=0))
        varied = what_varies([run for run in self.variant.runs if run.seeds in common])
        ratio = Ratio(float(np.exp(np.mean(np.log(ratios)))), seeds=len(common), varied=varied)
        return with_intervals(ratio, draws, ratios)

    def to_row(self) -> dict[str, Any]:
        variant = self.variant
        return {
            "kind": variant.kind,
            "way": WAYS[variant.way],
            "variant": variant.label,
            "training_tokens": variant.tokens,
            **interval_columns("ce_increase", self.ce_increase),
            "seeds": len(self.by_seed),
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Mitigations:
    l0: float
    """Features per token at which the CE increases are compared."""
    points: tuple[CostPoint, ...]

    def of(self, kind: Kind, way: Way) -> list[CostPoint]:
        """List variants in order of their cost."""
        chosen = [point for point in self.points if (point.variant.kind, point.variant.way) == (kind, way)]
        return sorted(chosen, key=lambda point: point.variant.tokens * 1e6 + point.variant.seconds)

    def cheapest(self, kind: Kind, reference: CostPoint, within: float) -> CostPoint | None:
        """The variant that takes the fewest seconds of those that reach the reference's CE increase: the whole interval
        of their ratio lies below `within`.
        """
        good = [p for p in self.points if p.variant.kind == kind and reaches(p, reference, within)]
        return min(good, key=lambda point: point.variant.seconds, default=None)


def reaches(point: CostPoint, reference: CostPoint, within: float) -> bool:
    """Return whether the whole interval of the ratio of their CE increases, which holds seeds, lies below `within`."""
    ratio = point.relative_to(reference)
    return ratio.interval is not None and ratio.holds_seeds and ratio.interval[1] < within


def mitigations(variants: Sequence[Variant], resamples: int, seed: int) -> Mitigations | None:
    """The variants at the L0 that most of them cover; None if no variant has a curve."""
    level = common_l0(variants)
    if level is None:
        return None
    return Mitigations(level, tuple(_point(variant, level, resamples, seed) for variant in variants))


def common_l0(variants: Sequence[Variant]) -> float | None:
    """The middle of the L0s that most variants cover, with each of their seeds."""
    spans = []
    for variant in variants:
        curves = [group for group in _of_seeds(variant.runs).values() if len(group) > 1]
        if curves:
            ends = [(min(run.l0 for run in curve), max(run.l0 for run in curve)) for curve in curves]
            spans.append((max(low for low, _ in ends), min(high for _, high in ends)))
    if not spans:
        return None
    levels = np.geomspace(min(low for low, _ in spans), max(high for _, high in spans), LEVELS)
    covered = np.array([sum(low <= level <= high for low, high in spans) for level in levels])
    best = levels[covered == covered.max()]
    return float(best[len(best) // 2])


def _of_seeds(runs: Sequence[RunSummary]) -> dict[Seeds, list[RunSummary]]:
    groups: dict[Seeds, list[RunSummary]] = {}
    for run in runs:
        groups.setdefault(run.seeds, []).append(run)
    return groups


def ce_at_l0(runs: Sequence[RunSummary], l0: float, resamples: int, seed: int) -> tuple[float, Floats]:
    """The CE increase of one seed's curve at an L0 (log CE linear in L0 between runs); and in each resample of the
    held-out text.

    Raises:
        InterpolationError: the runs do not determine it.
    """
    estimate = float(interpolate_at([run.l0 for run in runs], [run.ce_increase for run in runs], l0))
    drawn = [resampled(run, {"l0", "ce_increase"}, resamples, seed) for run in runs]
    draws = np.full(resamples, np.nan)
    for index in range(resamples):
        x, y = ([each[name][index] for each in drawn] for name in ("l0", "ce_increase"))
        try:
            draws[index] = interpolate_at(x, y, l0)
        except InterpolationError:
            continue
    defined = float(np.mean(~np.isnan(draws)))
    if defined < DEFINED_SHARE:
        raise InterpolationError(f"only {100 * defined:.0f} % of the resamples determine the value at L0 {l0:.0f}")
    return estimate, draws


def _point(variant: Variant, l0: float, resamples: int, seed: int) -> CostPoint:
    found: dict[Seeds, tuple[float, Floats]] = {}
    reason = None
    for seeds, runs in _of_seeds(variant.runs).items():
        try:
            found[seeds] = ce_at_l0(runs, l0, resamples, seed)
        except InterpolationError as error:
            reason = str(error)
    if not found:
        return CostPoint(variant, None, reason)
    by_seed, draws = {s: value for s, (value, _) in found.items()}, {s: drawn for s, (_, drawn) in found.items()}
    estimate = float(np.exp(np.mean(np.log(list(by_seed.values())))))
    mean = with_intervals(Ratio(estimate), np.exp(np.mean(np.log(list(draws.values())), axis=0)), [*by_seed.values()])
    assert mean.interval is not None, "each seed is defined in most resamples"
    return CostPoint(variant, Interval(mean.interval[0], mean.interval[1], estimate), None, by_seed, draws)


def total_cost(config: RunConfig, costs: list[Cost]) -> tuple[int, float]:
    """Training tokens and seconds of a run, and of those that it started from."""
    tokens, seconds = config.training.tokens, config.training.tokens * seconds_per_token(costs, config)
    if config.init_from is not None and (start := RunFolder(config.init_from)).has_run():
        check_start(config)
        before = total_cost(start.config(), costs)
        return tokens + before[0], seconds + before[1]
    return tokens, seconds
