"""A recipe for several places of one model: what they share, and what each has of its own."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from endwise.common.errors import ConfigError
from endwise.config.adopted import AdoptedConfig
from endwise.config.base import Config, SiteName, changed_and_built, read_yaml
from endwise.config.dictionary import SIZES, DictionaryConfig, of_architecture, with_room_for
from endwise.config.fields import EXECUTION, SHARED
from endwise.config.objective import ObjectiveConfig
from endwise.config.phases import PhaseConfig, given_values, refuse_shares, spelled_out, with_objective
from endwise.config.run import DataConfig, EvaluationConfig, ModelConfig, RunConfig, Seed, Start, TrainingConfig

JOINED = " + "
"""Words between the places of one run in its name."""
Inputs = Literal["clean", "spliced"]
OF_A_PLACE = ("dictionary", "objective", "seed", "init_from")
"""Keys that stand for every place, unless it has its own."""
OF_A_SWEEP = {"recipe", "grids"}
"""Keys that a sweep must have."""
OF_THE_PASS = ("kl", "downstream_mse", "downstream_sites", "balance", "terms")
"""Keys of an objective that one spliced pass has one of."""


class PlaceConfig(Config):
    """One place: its own part of a recipe."""

    site: SiteName
    """Site, like `site` of a recipe for one place."""
    writes: SiteName | None = None
    """Site written, like `writes` of a recipe for one place."""
    dictionary: Annotated[SerializeAsAny[DictionaryConfig], BeforeValidator(of_architecture)]
    """Keys that differ from the recipe's `dictionary`."""
    objective: ObjectiveConfig
    """Keys that differ from the recipe's `objective`; if joint, of terms at the place (`sparsity`, `local_mse`)."""
    seed: Seed = 0
    init_from: Start | None = None


class PlacesConfig(Config):
    """A recipe for several places of one model."""

    model: Annotated[ModelConfig, SHARED] = ModelConfig()
    places: Annotated[tuple[PlaceConfig, ...], Field(min_length=1)]
    """Each a `site`, and what differs there from `dictionary`, `objective`, `seed` and `init_from` of the recipe."""
    joint: bool = True
    """Puts all reconstructions in place in one spliced pass, with one loss; if false, each is trained as it would
    be alone, in one clean pass with the others."""
    inputs: Inputs = "clean"
    """Inputs that the terms at each place (`local_mse`, `sparsity`, the dictionary's own) are computed on, if joint:
    the model's own activation, or that of the spliced pass, which the earlier reconstructions have changed. Their
    gradient goes into that place's dictionary alone."""
    phases: Annotated[tuple[PhaseConfig, ...], BeforeValidator(spelled_out)] = ()
    """Phases as in a recipe for one place, the same for all places."""
    data: Annotated[DataConfig, SHARED] = DataConfig()
    training: TrainingConfig
    """Learning rate and clipping are of each dictionary; so are its Adam's moments."""
    evaluation: EvaluationConfig = EvaluationConfig()
    trackers: Annotated[tuple[str, ...], EXECUTION] = ()
    out: Annotated[Path | None, EXECUTION] = None
    """Run folder; each place's is in it, under `places`."""

    @classmethod
    def changed(cls, values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
        """Variant of `RunConfig.changed` for what stands for every place, or of one by its number: `places.0.seed`.

        Raises:
            ConfigError: a change of what stands for every place changes nothing, since each has its own value.
        """
        values = super().changed(with_room_for(values, changes), changes)
        for key in changes:
            places = values.get("places")
            if not isinstance(places, Sequence) or key.split(".")[0] not in OF_A_PLACE:
                continue
            if all(_has(each, key) for each in places):
                raise ConfigError(
                    f"{key}: every place has a value of its own, so that one for all would change nothing. Set it at "
                    f"the places, the first as places.0.{key}."
                )
        return values

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, values: Any) -> Any:
        """Put what stands for every place into each of them."""
        values = with_objective(values)
        if not isinstance(values, Mapping) or not isinstance(values.get("places"), Sequence):
            return values
        shared = {key: values[key] for key in OF_A_PLACE if key in values}
        places = [_over(shared, place) if isinstance(place, Mapping) else place for place in values["places"]]
        return {key: value for key, value in values.items() if key not in OF_A_PLACE} | {"places": places}

    @model_validator(mode="after")
    def _each_is_a_recipe(self) -> "PlacesConfig":
        for place in self.places:
            try:
                self.recipe(place)
            except ConfigError as error:
                raise ValueError(f"at {place.site}: {' '.join(str(error).split())}") from None
        written = [place.writes or place.site for place in self.places]
        if len(set(written)) < len(written):
            raise ValueError("two places write one site; name each site once")
        return self

    @model_validator(mode="after")
    def _one_loss(self) -> "PlacesConfig":
        first = self.places[0].objective
        if self.joint and first.balance is not None:
            raise ValueError(
                f"objective.balance is {first.balance}, which weighs terms by the local error of one place; the loss "
                "of a joint pass is of several. Leave it out, or set joint: false"
            )
        if self.joint and self.training.shards > 1:
            raise ValueError(
                f"training.shards is {self.training.shards}, but a joint pass needs whole dictionaries; set "
                "training.shards=1, or joint: false"
            )
        by_ce = [place.site for place in self.places if (s := place.objective.sparsity) and s.target_ce_increase]
        if self.joint and by_ce:
            raise ValueError(
                f"at {by_ce[0]} objective.sparsity.target_ce_increase is given, and a joint pass has one CE increase, "
                "of all places together. Give target_l0, or set joint: false"
            )
        for place in self.places[1:] if self.joint else ():
            both = [
                {key: getattr(objective, key) for key in OF_THE_PASS} | objective.weights | {"local_mse": None}
                for objective in (first, place.objective)
            ]
            if apart := [key for key, value in both[0].items() if both[1].get(key) != value]:
                raise ValueError(
                    f"at {place.site} the objective differs in {', '.join(apart)} from the first place's; a joint "
                    "pass has one loss, and a place of its own only sparsity and local_mse. Give all the same, or set "
                    "joint: false"
                )
        return self

    @model_validator(mode="after")
    def _each_phase_is_a_recipe(self) -> "PlacesConfig":
        refuse_shares(self.phases)
        try:
            _ = self.in_phases
        except ConfigError as error:
            raise ValueError(f"in a phase: {' '.join(str(error).split())}") from None
        return self

    @property
    def in_phases(self) -> "list[PlacesConfig]":
        """See `RunConfig.in_phases`."""
        if not self.phases:
            return [self]
        values, found = self.model_dump(exclude={"phases"}), []
        for phase in self.phases:
            places = [
                {**place.model_dump(), "objective": phase.objective_over(given_values(place.objective))}
                for place in self.places
            ]
            rate = {"learning_rate": phase.learning_rate or self.training.learning_rate}
            own = {"places": places, "training": values["training"] | rate}
            found.append(PlacesConfig.build({**values, **own}, "the recipe"))
        return found

    @property
    def objective_name(self) -> str:
        """Variant of `RunConfig.objective_name` for the first place."""
        return self.recipes[0].objective_name

    @property
    def dictionary(self) -> DictionaryConfig:
        """Dictionary of the first place."""
        return self.places[0].dictionary

    @property
    def objective(self) -> ObjectiveConfig:
        """Objective of the first place, whose terms of the spliced pass are those of all."""
        return self.places[0].objective

    @property
    def seed(self) -> int:
        return self.places[0].seed

    @property
    def seeds(self) -> dict[str, int]:
        """Variant of `RunConfig.seeds` for the first place."""
        return self.recipes[0].seeds

    @property
    def init_from(self) -> None:
        """Nothing: what each place starts from is its own matter."""
        return

    @property
    def place(self) -> str:
        return JOINED.join(recipe.place for recipe in self.recipes)

    @property
    def recipes(self) -> list[RunConfig]:
        """Each place's as a recipe for one, in the order of the file."""
        return [self.recipe(place) for place in self.places]

    def recipe(self, place: PlaceConfig) -> RunConfig:
        """Recipe of one place by itself."""
        shared = {"model", "data", "training", "evaluation", "trackers", "phases"}
        return RunConfig.build({**self.model_dump(include=shared), **place.model_dump()}, "the recipe")


Recipe = RunConfig | PlacesConfig


def build_recipe(values: Mapping[str, Any], source: str = "the configuration") -> Recipe:
    """Validate a recipe, which is one for several places if it has the key `places`, and of an SAE that was trained
    elsewhere if it has the key `adopted`.

    Raises:
        ConfigError: it breaks a rule.
    """
    if values.keys() >= OF_A_SWEEP:
        raise ConfigError(f"{source} is a sweep, of many runs. Train them: endwise.sweep")
    kind = PlacesConfig if "places" in values else AdoptedConfig if "adopted" in values else RunConfig
    return kind.build(dict(values), source)


def read_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and apply overrides; see `Config.read` and `build_recipe`.

    Raises:
        ConfigError: it breaks a rule, or an override changes nothing, since every place has its own value.
    """
    values = read_yaml(path)
    if values.keys() >= OF_A_SWEEP:
        raise ConfigError(f"{path} is a sweep, of many runs. Train them: endwise sweep {shlex.quote(str(path))}")
    return changed_and_built(values, overrides or [], changed_recipe, build_recipe, str(path))


def changed_recipe(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Change the values of a recipe: see `Config.changed`.

    Raises:
        ConfigError: see `PlacesConfig.changed`; or a change is of one place, and there are none.
    """
    several = "places" in values or "places" in changes
    if not several and (of_one := next((key for key in changes if key.startswith("places.")), None)):
        raise ConfigError(f"{of_one}: the recipe has no places. Give the key without `places.` and the number.")
    return (PlacesConfig if several else RunConfig).changed(values, changes)


def _has(values: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return False
        values = values[part]
    return True


def _over(shared: Mapping[str, Any], place: Mapping[str, Any]) -> dict[str, Any]:
    """A place's keys over those that stand for all; a size replaces a ratio, and another architecture all but these."""
    base, own = dict(shared), place.get("dictionary")
    if isinstance(base.get("dictionary"), Mapping) and isinstance(own, Mapping):
        kept = dict(base["dictionary"])
        if own.get("architecture", kept.get("architecture")) != kept.get("architecture"):
            kept = {key: value for key, value in kept.items() if key in SIZES}
        if own.keys() & SIZES:
            kept = {key: value for key, value in kept.items() if key not in SIZES}
        base["dictionary"] = kept
    return _merged(base, place)


def _merged(base: Any, own: Any) -> Any:
    if not isinstance(base, Mapping) or not isinstance(own, Mapping):
        return own
    return {**base, **{key: _merged(base[key], value) if key in base else value for key, value in own.items()}}
