"""Plan of how long a study's runs are, so that all fit a budget; decided once, and kept in the study's folder."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from endwise.common.errors import ConfigError
from endwise.common.files import read_json, write_json
from endwise.config.run import RunConfig
from endwise.paper.costs import Cost, seconds_per_token
from endwise.paper.experiments import Experiments, Rates, middle
from endwise.paper.study_config import StudyConfig
from endwise.sweeps.sweep_config import EngineConfig

MEASURING = 0.5
"""Seconds that measuring a held-out token takes, relative to an end-to-end training token."""

_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600}

Recipes = Callable[[Experiments, Rates], list[RunConfig]]

EXPERIMENTS: dict[str, Recipes] = {
    "learning_rates": lambda experiments, _: experiments.learning_rates(),
    "curves": Experiments.curves,
    "seeds": Experiments.seeds,
    "starts": Experiments.starts,
    "sizes": Experiments.sizes,
    "lengths": Experiments.lengths,
}
"""Experiments in the order in which they are carried out; a budget too small for all drops the last ones first."""
INDISPENSABLE = 2
"""Number of them that are carried out whatever the budget."""


@dataclass(frozen=True)
class StudyPlan:
    tokens: int
    """Training tokens of a run."""
    experiments: tuple[str, ...]
    left_out: tuple[str, ...]
    """Experiments left out for the budget."""
    budget: str | None
    study: dict[str, Any]
    """Study as it was when the plan was made."""


def plan(experiments: Experiments, costs: Sequence[Cost], budget: str | None, file: Path) -> StudyPlan:
    """The plan in `file`, or a new one, which is then written there.

    Raises:
        ConfigError: the file holds the plan of another study or budget.
    """
    study = experiments.study.model_dump(mode="json", exclude=set(EngineConfig.model_fields))
    if file.exists():
        made = TypeAdapter(StudyPlan).validate_python(read_json(file))
        if (made.study, made.budget) != (study, budget):
            what = "another study" if made.study != study else f"the budget {made.budget or 'none'}"
            raise ConfigError(f"{file.parent} holds runs of {what}. Choose another folder with --out, or ask for that.")
        return made
    tokens, names = _fitting(experiments, list(costs), budget)
    left_out = tuple(name for name in EXPERIMENTS if name not in names)
    made = StudyPlan(tokens, names, left_out, budget, study)
    write_json(file, vars(made))
    return made


def _fitting(experiments: Experiments, costs: list[Cost], budget: str | None) -> tuple[int, tuple[str, ...]]:
    """The length of a run, and the experiments."""
    names = list(EXPERIMENTS)
    if budget is None:
        return experiments.tokens, tuple(names)
    seconds, least = parse_budget(budget), experiments.study.least_tokens
    while True:
        tokens = _length(experiments, costs, names, seconds)
        if tokens >= least or len(names) <= INDISPENSABLE:
            return max(tokens, least), tuple(names)
        names.pop()


def _length(experiments: Experiments, costs: list[Cost], names: Sequence[str], seconds: float) -> int:
    """The length at which these experiments take so many seconds, if runs that share a pass cost as alone."""
    unit = 10**9
    of_unit, rates = replace(experiments, tokens=unit), experiments.rates(middle)
    recipes = {config.out: config for name in names for config in EXPERIMENTS[name](of_unit, rates)}.values()
    per_token = sum(seconds_per_token(costs, config) * config.training.tokens / unit for config in recipes)
    dearest = max(cost.seconds_per_token for cost in costs)
    measuring = sum(MEASURING * dearest * config.evaluation.tokens for config in recipes)
    return max(0, round((seconds - measuring) / per_token))


def parse_budget(text: str) -> float:
    """Seconds in `90s`, `30m` (or `30min`) or `2h`.

    Raises:
        ConfigError: it reads otherwise.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|min|h)", text.strip())
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"A budget reads 90s, 30m or 2h; given {text!r:.80}.")
    return float(match[1]) * _UNITS[match[2]]


def study_tokens(study: StudyConfig) -> int:
    """The length of a run that the study's file names.

    Raises:
        ConfigError: it names none.
    """
    training = study.recipe.get("training")
    tokens = training.get("tokens") if isinstance(training, dict) else None
    if not isinstance(tokens, int):
        raise ConfigError("The study's recipe.training.tokens, the length of a run without a budget, must be a number.")
    return tokens
