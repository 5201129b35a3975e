"""A study's runs: costs timed, lengths planned, learning rates tuned, then every experiment carried out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from endwise.errors import EndwiseError
from endwise.reproduction.costs import Cost, costs
from endwise.reproduction.experiments import Experiments, Rates
from endwise.reproduction.plan import EXPERIMENTS, Plan, parse_budget, plan, study_tokens
from endwise.reproduction.study_config import StudyConfig
from endwise.run_config import Kind, RunConfig
from endwise.run_folder import RunFolder
from endwise.sweeps.engines import Engine
from endwise.sweeps.points import Point
from endwise.sweeps.sweep import sweep_points
from endwise.sweeps.sweep_config import SearchConfig
from endwise.sweeps.tasks import folder_of, is_finished

CLOSE = 1.02
"""Of learning rates whose figures differ by less than this factor the smallest is taken."""


@dataclass(frozen=True)
class StudyRuns:
    """A study's runs, made as far as they could be."""

    experiments: Experiments
    plan: Plan
    rates: Rates
    costs: list[Cost]
    failures: Mapping[Path, str]
    """Why a run is not there."""

    def finished(self, experiment: str) -> list[RunConfig]:
        """The finished runs of an experiment."""
        if experiment not in self.plan.experiments:
            return []
        return [each for each in EXPERIMENTS[experiment](self.experiments, self.rates) if is_finished(each)]


def make_runs(study: StudyConfig, out: Path, budget: str | None, engine: Engine, display: bool) -> StudyRuns:
    """Carries out a study's experiments; what is in `out` already is not done again.

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
    console.print("timing each kind of SAE")
    measured = costs(experiments, out / "costs.json")
    made = plan(experiments, measured, budget, out / "plan.json")
    experiments = replace(experiments, tokens=made.tokens)
    failures: dict[Path, str] = {}
    rates: dict[Kind, float] = {}
    for name in made.experiments:
        recipes = EXPERIMENTS[name](experiments, rates)
        console.print(f"{name.replace('_', ' ')}: {len(recipes)} runs of about {made.tokens:,} tokens", highlight=False)
        points = [Point(recipe) for recipe in recipes]
        swept = sweep_points(points, out, engine, SearchConfig(), study.batch_of_runs, display)
        failures |= {folder_of(point.config): why for point, why in swept.failures.items()}
        if name == "learning_rates":
            rates = best_rates(study, recipes)
    return StudyRuns(experiments, made, rates, measured, failures)


def check(experiments: Experiments) -> None:
    """Makes every recipe once, so that a rule that one of them breaks is told of before anything long.

    Raises:
        ConfigError: see `RunConfig`.
    """
    study = experiments.study
    rates: Rates = {kind: study.kind(kind, study.site).learning_rates[0] for kind in study.kinds}
    for recipes in EXPERIMENTS.values():
        recipes(experiments, rates)


def best_rates(study: StudyConfig, recipes: Sequence[RunConfig]) -> dict[Kind, float]:
    """For each kind the rate with the lowest L0 × CE increase.

    What is compared between kinds is L0 at equal CE increase, and along one kind's curve the product changes little:
    to halve L0 about doubles the CE increase. The loss is no such measure: it is flat around its best rate, where L0
    still falls with the rate.

    Raises:
        EndwiseError: no run of a kind has ended below the study's `highest_ce_increase`.
    """
    highest = study.highest_ce_increase or math.inf
    chosen: dict[Kind, float] = {}
    for kind in study.kinds:
        products: dict[float, float] = {}
        for recipe in recipes:
            if recipe.objective.kind == kind and is_finished(recipe):
                evaluation = RunFolder(folder_of(recipe)).evaluation() or {}
                if 0 < evaluation["ce_increase"] <= highest:
                    products[recipe.training.learning_rate] = evaluation["l0"] * evaluation["ce_increase"]
        if not products:
            raise EndwiseError(
                f"No learning rate of {kind} ended with a CE increase between 0 and {highest:g} nats per token. Give "
                f"others (kinds.{kind}.learning_rates), or train longer (--budget)."
            )
        lowest = min(products.values())
        chosen[kind] = min(rate for rate, product in products.items() if product <= CLOSE * lowest)
    return chosen
