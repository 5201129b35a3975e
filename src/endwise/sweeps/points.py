"""Path from a sweep's file to its points: one recipe each, with a folder named by what the recipe holds."""

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from endwise.common.digests import of_text
from endwise.common.errors import ConfigError, SiteError
from endwise.config.base import read_yaml
from endwise.config.dictionary import ARCHITECTURE, DictionaryConfig, of_others
from endwise.config.fields import identity
from endwise.config.method import COEFFICIENT, AnyRecipe, Knob
from endwise.config.places import PlacesConfig, Recipe, build_recipe, changed_recipe
from endwise.config.recipes import find_recipe
from endwise.models.sites import ARROW, Place
from endwise.runs.folder import RunFolder
from endwise.sweeps.sweep_config import OUT, PLACE, RANGE, TARGET, SweepConfig, Target, flattened, takes_whole_numbers

KIND = "objective.kind"
LARGEST = 100_000
"""Points of a sweep."""
DIGITS = 10

UNUSED_WEIGHTS = {
    "local": ("kl", "downstream_mse", "downstream_sites"),
    "e2e": ("local_mse", "downstream_mse", "downstream_sites"),
    "e2e_ds": ("local_mse",),
}
"""Keys of the objective that a kind's preset does without."""


@dataclass(frozen=True)
class Point:
    """A recipe, complete but for its knob (`config.method`) where a target is to be met."""

    config: Recipe
    target: Target | None = None

    @property
    def key(self) -> str:
        """Equal for equal points, whatever file they come from. The first guess of a knob that is searched for makes
        no other point.
        """
        config = self.config if self.target is None else Knob.of(self.config).set_in(self.config, 0.0)
        return f"{_content(config)} {self.target or ''}"

    def __str__(self) -> str:
        aim = Knob.of(self.config).tag if self.target is None else str(self.target)
        return f"{self.config.objective_name} {aim} {self.config.place} seed {self.config.seed}"


def points_of(sweep: SweepConfig) -> list[Point]:
    """Every point of every grid, each once.

    Raises:
        ConfigError: the recipe, the settings or a grid breaks a rule; the message names the point.
        SiteError: a site's name is not of the form that sites have.
    """
    base = _recipe(sweep)
    grids = {f"grid {number}": _axes(grid, f"grid {number}") for number, grid in enumerate(sweep.grids, 1)}
    if (size := sum(math.prod(map(len, axes.values())) for axes in grids.values())) > LARGEST:
        raise ConfigError(f"The grids have {size:,} points; at most {LARGEST:,} can be swept. Take values out of them.")
    points: dict[str, Point] = {}
    for name, axes in grids.items():
        for point in _points(base, axes, name):
            points.setdefault(point.key, point)
    return list(points.values())


def _recipe(sweep: SweepConfig) -> dict[str, Any]:
    """The recipe with the sweep's settings, less the folder that it names."""
    given = sweep.recipe
    base, name = (read_yaml(find_recipe(given)), given) if isinstance(given, str) else (given, "the recipe")
    flattened(base, name)  # so that a key which it has wrong is said to be the recipe's, not a grid's
    settings = flattened(sweep.settings, "settings")
    _check_no_folder(settings, "settings")
    if TARGET in settings:
        raise ConfigError("settings: a target belongs in a grid. Move it there.")
    return changed_recipe({key: value for key, value in base.items() if key != OUT}, _in_two(settings, "settings"))


def _check_no_folder(keys: Mapping[str, Any], where: str) -> None:
    if OUT in keys:
        raise ConfigError(
            f"{where}: a sweep names the runs' folders itself. Leave {OUT} out; `out` of the sweep is its."
        )


def _axes(grid: Mapping[str, Any], name: str) -> dict[str, list[Any]]:
    """The values that a grid gives each of its keys."""
    keys = flattened(grid, name)
    _check_no_folder(keys, name)
    return {key: _values(key, value, name) for key, value in keys.items()}


def _values(key: str, given: Any, name: str) -> list[Any]:
    if isinstance(given, Mapping) and RANGE in given:
        return _log_range(key, given, f"{name}: {key}")
    if isinstance(given, list | tuple):
        if not given:
            raise ConfigError(f"{name}: {key} is an empty list. Give it at least one value, or leave it out.")
        return list(given)
    return [given]


def _log_range(key: str, given: Mapping[str, Any], where: str) -> list[int | float]:
    rule = f"{RANGE} takes [from, to, how many], both ends above 0 and at least two values"
    try:
        low, high, number = given[RANGE]
        low, high, count = float(low), float(high), int(number)
    except (TypeError, ValueError):
        raise ConfigError(f"{where}: {rule}; given {given!r:.200}.") from None
    if len(given) > 1 or not (0 < low < np.inf and 0 < high < np.inf) or not 2 <= count <= LARGEST or count != number:
        raise ConfigError(f"{where}: {rule}; given {given!r:.200}.")
    if key == TARGET:
        raise ConfigError(f"{where} takes targets, not numbers. Write them out: [{{l0: 20}}, {{l0: 40}}].")
    values = [float(f"{value:.6g}") for value in np.geomspace(low, high, count)]
    return [round(value) for value in values] if takes_whole_numbers(key) else values


def _points(base: dict[str, Any], axes: Mapping[str, Sequence[Any]], name: str) -> Iterator[Point]:
    """A grid's points."""
    combined = (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))
    choices = [(f"{name} ({_shown(choice)})", _in_two(flattened(choice, name), name)) for choice in combined]
    several = len({str(choice.get(KIND)) for _, choice in choices}) > 1
    for source, choice in choices:
        unused = [f"objective.{key}" for key in UNUSED_WEIGHTS.get(str(choice.get(KIND)), ())]
        if several:
            choice = {key: value for key, value in choice.items() if key not in unused}
        own = _of_architecture(_without(base, unused), choice)
        yield _point(*own, source)


def _in_two(keys: dict[str, Any], where: str) -> dict[str, Any]:
    """The keys with the two that `place` stands for."""
    if PLACE not in keys:
        return keys
    if both := keys.keys() & {"site", "writes"}:
        raise ConfigError(f"{where}: {PLACE} and {min(both)} exclude each other. Leave one out.")
    site, arrow, writes = str(keys[PLACE]).partition(ARROW)
    own = {"site": site, "writes": writes if arrow else None}
    return {key: value for key, value in keys.items() if key != PLACE} | own


def _shown(choice: Mapping[str, Any]) -> str:
    return f"{', '.join(f'{key}={value}' for key, value in choice.items()):.300}"


def _without(base: dict[str, Any], unused: Sequence[str]) -> dict[str, Any]:
    """The recipe without the weights that are no part of the kind a grid chooses, so that one recipe serves all kinds:
    a downstream weight that is there for e2e_ds would otherwise turn local into something else.
    """
    objective = base.get("objective")
    if not isinstance(objective, dict):
        return base
    return {**base, "objective": {key: value for key, value in objective.items() if f"objective.{key}" not in unused}}


def _of_architecture(base: dict[str, Any], choice: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The recipe and a grid's choice without the keys of other architectures than the one that is chosen, if one is, so
    that one grid serves several: `dictionary.k` is for those that have it.
    """
    section = base.get("dictionary")
    if ARCHITECTURE not in choice or not isinstance(section, dict):
        return base, choice
    name = choice[ARCHITECTURE]
    others = of_others([*choice, *(f"dictionary.{key}" for key in section)], name)
    kept = {key: value for key, value in section.items() if f"dictionary.{key}" not in others}
    return {**base, "dictionary": kept}, {key: value for key, value in choice.items() if key not in others}


def _point(base: dict[str, Any], choice: dict[str, Any], source: str) -> Point:
    given = choice.pop(TARGET, None)
    if given is not None and not isinstance(given, dict):
        raise ConfigError(f"{source}: target must read {{ce_increase: 0.1}} or {{l0: 40}}; given {given!r:.80}.")
    target = None if given is None else Target.build(given, f"{source}: target")
    try:
        values = changed_recipe(base, choice)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    if both := values.keys() & {"site", "writes"} if "places" in values else ():
        raise ConfigError(
            f"{source}: the recipe has `places`, each with a site of its own, so that {min(both)} (or `place`) says "
            "nothing of it. Leave it out, set one place's as places.0.site, or list `places` in the grid."
        )
    if target is not None and _needs_coefficient(values) and _coefficient(values) is None:
        raise _no_first_guess(source, COEFFICIENT)
    config = build_recipe(values, source)
    knob = Knob.of(config)
    if target is not None and knob.name in choice:
        raise ConfigError(f"{source}: target and {knob.name} exclude each other. Leave one out.")
    if target is not None and not knob.value:
        raise _no_first_guess(source, knob.name)
    try:
        for recipe in config.recipes:
            Place.parse(recipe.place)
    except SiteError as error:
        raise SiteError(f"{source}: {error}") from None
    return Point(config, target)


def _no_first_guess(source: str, name: str) -> ConfigError:
    return ConfigError(
        f"{source}: a target needs a {name.rpartition('.')[2]} above 0 to start its search from. Set {name} in the "
        "recipe or in the sweep's settings."
    )


def _needs_coefficient(values: Mapping[str, Any]) -> bool:
    section = values.get("dictionary")
    return not isinstance(section, dict) or DictionaryConfig.chosen(section).penalised


def _coefficient(values: Mapping[str, Any]) -> Any:
    section: Any = values
    for part in COEFFICIENT.split("."):
        section = section.get(part) if isinstance(section, dict) else None
    return section


def _content(config: Recipe) -> str:
    return json.dumps(identity(config, short=True), sort_keys=True)


def fingerprint(config: Recipe) -> str:
    """`DIGITS` hexadecimal digits of what a recipe computes; how it is executed, its folder, and whether a default is
    written out do not count.
    """
    return of_text(_content(config))[:DIGITS]


def _fingerprint_of_0_1(config: Recipe) -> str:
    """Fingerprint as version 0.1 made it, for which execution counted too."""
    new = {"out", "trackers"}
    content = json.dumps(config.model_dump(mode="json", exclude_defaults=True, exclude=new), sort_keys=True)
    return of_text(content)[:DIGITS]


def placed(config: AnyRecipe, folder: Path) -> AnyRecipe:
    """The recipe with a folder of its own in `folder`: `<kind>-<knob>-<site>-seed<n>-<fingerprint>`; several places
    stand there by their number. An SAE that it starts from counts by its name if it lies beside it, so that runs are
    called alike wherever the folder lies. A run that version 0.1 made keeps its folder.
    """
    start = config.init_from
    content = config
    if start is not None and start.parent == folder:
        content = config.model_copy(update={"init_from": Path(start.name)})
    several = isinstance(config, PlacesConfig)
    place = f"{len(config.places)}-places" if several else config.place.replace(ARROW, "-to-")
    stem = f"{config.objective_name}-{Knob.of(config).tag}-{place}-seed{config.seed}"
    own, older = (folder / f"{stem}-{digits}" for digits in (fingerprint(content), _fingerprint_of_0_1(content)))
    out = older if RunFolder(older).has_run() and not RunFolder(own).has_run() else own
    return config.model_copy(update={"out": out})


def with_tokens(config: AnyRecipe, tokens: int) -> AnyRecipe:
    return config.model_copy(update={"training": config.training.model_copy(update={"tokens": tokens})})
