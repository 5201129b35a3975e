"""From a sweep's file to its points: one recipe each, with a folder named by what the recipe holds."""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from endwise.config import read_yaml, with_values
from endwise.errors import ConfigError
from endwise.recipes import find_recipe
from endwise.run_config import RunConfig
from endwise.sweeps.sweep_config import SweepConfig, Target

KIND, COEFFICIENT, TARGET = "objective.kind", "objective.sparsity.coefficient", "target"
LARGEST = 100_000
"""Points of a sweep."""

UNUSED_WEIGHTS = {
    "local": ("kl", "downstream_mse", "downstream_sites"),
    "e2e": ("local_mse", "downstream_mse", "downstream_sites"),
    "e2e_ds": ("local_mse",),
}
"""Weights of the objective that a kind's preset does without."""


@dataclass(frozen=True)
class Point:
    """A recipe, complete but for its coefficient where a target is to be met."""

    config: RunConfig
    target: Target | None = None

    @property
    def key(self) -> str:
        """Equal for equal points, whatever file they come from."""
        config = self.config if self.target is None else with_coefficient(self.config, 0.0)
        return f"{fingerprint(config)} {self.target or ''}"


def points_of(sweep: SweepConfig) -> list[Point]:
    """Every point of every grid, each once.

    Raises:
        ConfigError: a recipe or a grid breaks a rule; the message names the point.
    """
    base = read_yaml(find_recipe(sweep.recipe)) if isinstance(sweep.recipe, str) else sweep.recipe
    if "out" in base or "out" in sweep.settings:
        raise ConfigError("A sweep names its folders itself: take `out` out of the recipe, and set the sweep's own.")
    base = with_values(base, sweep.settings)
    points: dict[str, Point] = {}
    for number, grid in enumerate(sweep.grids, 1):
        for choice in _choices(grid, f"grid {number}"):
            point = _point(base, choice, f"grid {number}")
            points.setdefault(point.key, point)
    return list(points.values())


def _choices(grid: Mapping[str, Any], name: str) -> Iterator[dict[str, Any]]:
    axes = {key: _values(key, value, name) for key, value in grid.items()}
    if (size := int(np.prod([len(values) for values in axes.values()], dtype=object))) > LARGEST:
        raise ConfigError(f"{name} has {size:,} points; at most {LARGEST:,} can be swept. Take values out of it.")
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def _values(key: str, given: Any, name: str) -> list[Any]:
    """The values that a grid gives a key."""
    if isinstance(given, dict) and "log_range" in given:
        return _log_range(given, f"{name}: {key}")
    if isinstance(given, list | tuple):
        if not given:
            raise ConfigError(f"{name}: {key} is an empty list. Give it at least one value, or leave it out.")
        return list(given)
    return [given]


def _log_range(given: Mapping[str, Any], where: str) -> list[float]:
    rule = "log_range takes [from, to, how many], both ends above 0 and at least two values"
    try:
        low, high, number = given["log_range"]
        low, high, count = float(low), float(high), int(number)
    except (TypeError, ValueError):
        raise ConfigError(f"{where}: {rule}; given {given!r:.200}.") from None
    if len(given) > 1 or not (0 < low < np.inf and 0 < high < np.inf) or not 2 <= count <= LARGEST or count != number:
        raise ConfigError(f"{where}: {rule}; given {given!r:.200}.")
    return [float(f"{value:.6g}") for value in np.geomspace(low, high, count)]


def _point(base: dict[str, Any], choice: dict[str, Any], name: str) -> Point:
    said = ", ".join(f"{key}={value}" for key, value in choice.items())
    source = f"{name} ({said:.300})"
    choice = dict(choice)
    given = choice.pop(TARGET, None)
    target = None if given is None else Target.build(_mapping(given, source), source)
    values = with_values(_of_kind(base, choice), choice)
    if target is not None:
        if COEFFICIENT in choice:
            raise ConfigError(f"{source}: target and {COEFFICIENT} exclude each other. Leave one out.")
        if not _coefficient(values):
            raise ConfigError(
                f"{source}: a target needs a first guess of {COEFFICIENT}, above 0. Set it in the recipe or in "
                "the sweep's settings."
            )
    return Point(RunConfig.build(values, source), target)


def _mapping(given: Any, source: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise ConfigError(f"{source}: target must read {{ce_increase: 0.1}} or {{l0: 40}}; given {given!r:.80}.")
    return given


def _coefficient(values: Mapping[str, Any]) -> Any:
    section: Any = values
    for part in COEFFICIENT.split("."):
        section = section.get(part) if isinstance(section, dict) else None
    return section


def _of_kind(base: dict[str, Any], choice: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe without the weights that are no part of the kind a grid chooses, so that one recipe serves all kinds:
    a downstream weight that is there for e2e_ds would otherwise turn local into something else.
    """
    unused = UNUSED_WEIGHTS.get(str(choice.get(KIND)), ())
    objective = base.get("objective")
    if not unused or not isinstance(objective, dict):
        return base
    return {**base, "objective": {key: value for key, value in objective.items() if key not in unused}}


def fingerprint(config: RunConfig) -> str:
    """Ten hexadecimal digits of what a recipe holds; its folder, and whether a default is written out, do not count."""
    content = config.model_dump(mode="json", exclude_defaults=True, exclude={"out"})
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]


def placed(config: RunConfig, folder: Path) -> RunConfig:
    """The recipe with a folder of its own in `folder`: `<kind>-<coefficient>-<site>-seed<n>-<fingerprint>`."""
    objective = config.objective
    said = f"{objective.kind}-{objective.sparsity.coefficient:g}-{config.site}-seed{config.seed}"
    return config.model_copy(update={"out": folder / f"{said}-{fingerprint(config)}"})


def with_coefficient(config: RunConfig, coefficient: float) -> RunConfig:
    sparsity = config.objective.sparsity.model_copy(update={"coefficient": coefficient})
    return config.model_copy(update={"objective": config.objective.model_copy(update={"sparsity": sparsity})})


def with_tokens(config: RunConfig, tokens: int) -> RunConfig:
    return config.model_copy(update={"training": config.training.model_copy(update={"tokens": tokens})})
