"""The paper's experiments from first to last: rates tuned, runs made, everything measured, one report."""

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from endwise.errors import EndwiseError
from endwise.printable import printable
from endwise.reproduction.costs import Cost, costs
from endwise.reproduction.experiments import Experiments, Rates
from endwise.reproduction.plan import EXPERIMENTS, Plan, plan, study_tokens
from endwise.reproduction.study_config import StudyConfig, find_study
from endwise.run_config import Kind, RunConfig
from endwise.run_folder import RunFolder
from endwise.sweeps.engines import Engine, InProcess
from endwise.sweeps.points import Point
from endwise.sweeps.sweep import sweep_points
from endwise.sweeps.sweep_config import SearchConfig
from endwise.sweeps.tasks import folder_of, is_finished

CLOSE = 1.02
"""Of learning rates whose figures differ by less than this factor the smallest is taken."""


@dataclass(frozen=True)
class Reproduction:
    """A study's runs, made as far as they could be."""

    experiments: Experiments
    plan: Plan
    rates: Rates
    costs: list[Cost]
    failures: dict[Path, str]

    def runs(self, experiment: str) -> list[RunConfig]:
        """The finished runs of an experiment."""
        if experiment not in self.plan.experiments:
            return []
        return [each for each in EXPERIMENTS[experiment](self.experiments, self.rates) if is_finished(each)]


def reproduce(
    study: StudyConfig | str = "embedded",
    out: Path | str = Path("runs/paper-embedded"),
    *,
    budget: str | None = None,
    engine: Engine | None = None,
    display: bool = True,
) -> Reproduction:
    """Carries out a study's experiments. Begun again with the same `out`, it goes on from where it was.

    Raises:
        ConfigError: the study breaks a rule, or `out` holds another one.
        Interrupted: the user asked to stop; what runs is saved.
    """
    study = study if isinstance(study, StudyConfig) else find_study(study)
    out = Path(out)
    console = Console(quiet=not display)
    experiments = Experiments(study, study_tokens(study), out / "runs")
    experiments.curves(dict.fromkeys(study.kinds, 1e-3))  # whose recipes are thereby checked before anything long
    console.print("Timing each kind of SAE.")
    measured = costs(experiments, out / "costs.json")
    made = plan(experiments, measured, budget, out / "plan.json")
    experiments = replace(experiments, tokens=made.tokens)
    failures: dict[Path, str] = {}
    rates: dict[Kind, float] = {}
    with closing(engine or InProcess()) as used:
        for name in made.experiments:
            recipes = EXPERIMENTS[name](experiments, rates)
            console.print(printable(f"{name.replace('_', ' ')}: {len(recipes)} runs"), markup=False)
            swept = sweep_points(
                [Point(recipe) for recipe in recipes],
                out,
                used,
                SearchConfig(),
                study.batch_of_runs,
                display,
            )
            failures |= {folder_of(point.config): why for point, why in swept.failures.items()}
            if name == "learning_rates":
                rates = best_rates(study, recipes)
    return Reproduction(experiments, made, rates, measured, failures)


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
