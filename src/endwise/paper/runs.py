"""A study's runs: costs timed, lengths planned, learning rates tuned, then every experiment carried out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from endwise.analysis.ratios import ratio_between
from endwise.common.errors import EndwiseError
from endwise.common.statistics import InterpolationError
from endwise.common.terminal import show
from endwise.config.objective import Kind
from endwise.config.run import RunConfig
from endwise.evaluation.summary import RunSummary
from endwise.paper.costs import Cost, costs
from endwise.paper.experiments import Experiments, Rates
from endwise.paper.plan import EXPERIMENTS, StudyPlan, parse_budget, plan, study_tokens
from endwise.paper.study_config import StudyConfig
from endwise.sweeps.engines import Engine
from endwise.sweeps.points import Point
from endwise.sweeps.sweep import sweep_points
from endwise.sweeps.sweep_config import SearchConfig
from endwise.sweeps.tasks import folder_of, is_finished

CLOSE = 1.02
"""Factor within which learning rates that need like numbers of features count as equal: the smallest is taken."""


@dataclass(frozen=True)
class StudyRuns:
    """A study's runs, made as far as they could be."""

    experiments: Experiments
    plan: StudyPlan
    rates: Rates
    costs: list[Cost]
    failures: Mapping[Path, str]
    """Reasons why a run is not there."""

    def finished(self, experiment: str) -> list[RunConfig]:
        """The finished runs of an experiment."""
        if experiment not in self.plan.experiments:
            return []
        return [each for each in EXPERIMENTS[experiment](self.experiments, self.rates) if is_finished(each)]


def make_runs(study: StudyConfig, out: Path, budget: str | None, engine: Engine, display: bool) -> StudyRuns:
    """Carry out a study's experiments; what is in `out` already is not done again.

    Raises:
        ConfigError: the study breaks a rule, or `out` holds another one.
        EndwiseError: no learning rate of a kind is fit.
        Interrupted: the user asked to stop; what runs is saved.
    """
    console = Console(quiet=not display)
    experiments = Experiments(study, study_tokens(study), out / "runs")
    check(experiments)
    if budget is not None:
        parse_budget(budget)
    show("timing each kind of SAE", console)
    measured = costs(experiments, out / "costs.json")
    made = plan(experiments, measured, budget, out / "plan.json")
    experiments = replace(experiments, tokens=made.tokens)
    failures: dict[Path, str] = {}
    rates: Rates = {}
    for name in made.experiments:
        recipes = EXPERIMENTS[name](experiments, rates)
        show(f"{name.replace('_', ' ')}: {len(recipes)} runs of about {made.tokens:,} tokens", console)
        points = [Point(recipe) for recipe in recipes]
        swept = sweep_points(points, out, engine, SearchConfig(), study.batch_of_runs, display)
        failures |= {folder_of(point.config): why for point, why in swept.failures.items()}
        if name == "learning_rates":
            tried = [RunSummary.read(folder_of(each)) for each in recipes if is_finished(each)]
            rates = {site: best_rates(study, [run for run in tried if run.site == site]) for site in study.sites}
    return StudyRuns(experiments, made, rates, measured, failures)


def check(experiments: Experiments) -> None:
    """Make every recipe once, so that a rule that one of them breaks is reported before anything long.

    Raises:
        ConfigError: see `RunConfig`.
    """
    rates = experiments.rates(lambda tried: tried[0])
    for recipes in EXPERIMENTS.values():
        recipes(experiments, rates)


def best_rates(study: StudyConfig, runs: Sequence[RunSummary]) -> dict[Kind, float]:
    """Find each kind's learning rate with the fewest features per token at equal CE increase, of runs at a site.

    Rates are thus compared as kinds are, by curves. One run a rate would not do: L0 × CE increase, say, falls along one
    kind's curve and rises along another's, so that it favours rates for where on the curve they end. Nor would the
    loss, which is flat around its best rate, where L0 still falls.

    Raises:
        EndwiseError: no run of a kind has ended below the study's `highest_ce_increase`.
    """
    highest = study.highest_ce_increase or math.inf
    chosen: dict[Kind, float] = {}
    for kind in study.kinds:
        curves: dict[float, list[RunSummary]] = {}
        for run in runs:
            if run.kind == kind and run.learning_rate is not None and 0 < run.ce_increase <= highest:
                curves.setdefault(run.learning_rate, []).append(run)
        if not curves:
            raise EndwiseError(
                f"No learning rate of {kind} ended with a CE increase between 0 and {highest:g} nats per token. Give "
                f"others (kinds.{kind}.learning_rates), or train longer (--budget)."
            )
        rates = sorted(curves)
        needed = features_needed([curves[rate] for rate in rates])
        chosen[kind] = min(rate for rate, n in zip(rates, needed, strict=True) if n <= CLOSE * min(needed))
    return chosen


def features_needed(curves: Sequence[Sequence[RunSummary]]) -> list[float]:
    """L0 at equal CE increase relative to the curve in the middle, each from its neighbour's on that side, with which
    it has more CE increases in common; infinity beyond a pair of neighbours that have none, or no curve.
    """
    middle = len(curves) // 2
    needed = [math.inf] * len(curves)
    needed[middle] = 1.0
    for side in (range(middle + 1, len(curves)), range(middle - 1, -1, -1)):
        neighbour = middle
        for at in side:
            try:
                ratio = ratio_between(curves[at], curves[neighbour], "l0", "ce_increase")
            except InterpolationError:
                break
            needed[at], neighbour = needed[neighbour] * ratio, at
    return needed
