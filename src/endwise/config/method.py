"""Curves: a method, all that SAEs are trained with, and a knob, the one setting that varies along it."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, TypeVar

from endwise.common.errors import ConfigError
from endwise.config.adopted import AdoptedConfig
from endwise.config.base import Config
from endwise.config.dictionary import DictionaryConfig
from endwise.config.objective import KINDS, LABELS
from endwise.config.phases import word_of
from endwise.config.places import PlacesConfig, Recipe
from endwise.config.run import RunConfig

Part = TypeVar("Part", bound=Config)
AnyRecipe = TypeVar("AnyRecipe", RunConfig, PlacesConfig, Recipe)
COEFFICIENT = "objective.sparsity.coefficient"
TARGETS = {"target_l0": ("target L0", False), "target_ce_increase": ("target CE increase", True)}
"""Knobs by the key of λ's target: the label of that knob, and whether more of it means fewer active features."""


@dataclass(frozen=True, order=True)
class Knob:
    """A setting that is varied along a curve, and where it stands for one run."""

    value: float
    name: str = COEFFICIENT
    """The recipe's key."""
    label: str = "λ"
    sparser: bool = True
    """True if more of it means fewer active features."""

    @classmethod
    def of(cls, config: Recipe) -> "Knob":
        """Find the knob of a recipe: the one that its dictionary has, where it is set, otherwise the target of its
        sparsity, or the coefficient. Of several places it is the first one's, at the mean over the places that have it.
        """
        first, *others = map(cls._of_one, config.recipes)
        values = [first.value, *(knob.value for knob in others if knob.name == first.name)]
        return first if len(set(values)) == 1 else replace(first, value=fmean(values))

    @classmethod
    def _of_one(cls, config: RunConfig) -> "Knob":
        for name, rule in config.dictionary.knobs.items():
            if (value := getattr(config.dictionary, name)) is not None:
                return cls(float(value), f"dictionary.{name}", *rule)
        if isinstance(config, AdoptedConfig):
            return cls(*config.stated)
        sparsity = config.objective.sparsity
        if sparsity is not None and sparsity.target is not None:
            name, value = sparsity.target
            return cls(value, f"objective.sparsity.{name}", *TARGETS[name])
        if (coefficient := config.objective.coefficient) is None:
            raise ConfigError(f"Nothing in the recipe says how sparse its {config.dictionary.architecture} SAE is.")
        return cls(coefficient)

    def __str__(self) -> str:
        return f"{self.label} {self.value:g}"

    @property
    def tag(self) -> str:
        """Name it in folders and lines: the sparsity coefficient by its value alone."""
        return f"{self.value:g}" if self.name == COEFFICIENT else f"{self.name.rpartition('.')[2]}{self.value:g}"

    @property
    def columns(self) -> dict[str, Any]:
        """Name it as tables do: in `coefficient` if it is the sparsity coefficient, otherwise beside that."""
        if self.name == COEFFICIENT:
            return {"coefficient": self.value}
        return {"coefficient": None, "knob": self.label, "knob.value": self.value}

    def set_in(self, config: AnyRecipe, value: float) -> AnyRecipe:
        """Copy a recipe with another value; of a knob that counts, the nearest whole number from 1 on. Of several
        places all that have the knob are changed by one factor, so that their mean is the value.
        """
        path = self.name.split(".")
        if isinstance(config, RunConfig):
            return _with(config, path, value)
        mean, knobs = Knob.of(config).value, map(Knob._of_one, config.recipes)
        places = [
            _with(place, path, value * (knob.value / mean)) if knob.name == self.name else place
            for place, knob in zip(config.places, knobs, strict=True)
        ]
        return config.model_copy(update={"places": tuple(places)})


def _with(section: Part, path: list[str], value: float) -> Part:
    key, *rest = path
    if rest:
        return section.model_copy(update={key: _with(getattr(section, key), rest, value)})
    counts = isinstance(getattr(section, key), int)
    return section.model_copy(update={key: max(1, round(value)) if counts else value})


@dataclass(frozen=True)
class Method:
    """Training of all runs of a curve: objective and dictionary, less the knob and the dictionary's size."""

    key: str
    """A preset's name (`e2e_ds`), or what stands in its place; of one set of runs, no two methods have one key."""
    label: str
    """Name in legends and tables."""
    content: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """The settings that make it, by key."""
    number: int = field(default=0, compare=False, repr=False)
    """Number among those of a set of runs that are no presets, from 0 on: picks its colour."""

    @classmethod
    def of(cls, config: Recipe) -> "Method":
        """Name the method of a recipe by its preset, its further terms and its architecture; of several places by
        those of the first, with what differs at the others.
        """
        first, *others = map(cls._of_one, config.recipes)
        if isinstance(config, RunConfig):
            return first
        apart = {
            f"places.{number}.{key}": other.content.get(key)
            for number, other in enumerate(others, 1)
            for key in {**first.content, **other.content}
            if other.content.get(key) != first.content.get(key)
        }
        first = replace(first, content={**first.content, **apart})
        return first.jointly(config.place, config.inputs) if config.joint else first.named("apart", "each alone", {})

    def jointly(self, places: str, inputs: str | None) -> "Method":
        """Distinguish joint training at several places from training alone."""
        return self.named("joint", "jointly", {"joint": places, "inputs": inputs})

    def named(self, key: str, label: str, content: Mapping[str, Any]) -> "Method":
        """Make it another method, by what more is done."""
        return replace(
            self, key=f"{self.key}-{key}", label=f"{self.label}, {label}", content={**self.content, **content}
        )

    @classmethod
    def _of_one(cls, config: RunConfig) -> "Method":
        dictionary = config.dictionary
        knob = Knob.of(config)
        aside = {"architecture", "size", "ratio", knob.name.removeprefix("dictionary.")}
        own = dictionary.model_dump(mode="json", exclude=aside, exclude_defaults=True)
        content = {f"dictionary.{name}": value for name, value in own.items()}
        if isinstance(config, AdoptedConfig):
            label = config.objective.label
            return cls(re.sub(r"[^\w.]+", "-", label), label, {**content, "from": config.family})
        content = config.objective.method | content
        if knob.name != COEFFICIENT and config.objective.coefficient is not None and not config.objective.is_steered:
            content["sparsity.coefficient"] = config.objective.coefficient
        kinds = [phase.objective.method_kind for phase in config.in_phases]
        key, label = "-then-".join(kinds), " → ".join(LABELS.get(kind, kind) for kind in kinds)
        if (word := word_of(config.phases)) is not None:
            key = label = word
        for number, (own, phase) in enumerate(zip(config.phases, config.in_phases, strict=False)):
            settings = phase.objective.method | own.model_dump(
                mode="json", exclude={"objective"}, exclude_defaults=True
            )
            content |= {f"phases.{number}.{name}": value for name, value in settings.items()}
        if dictionary.architecture == DictionaryConfig.model_fields["architecture"].default:
            return cls(key, label, content)
        content["dictionary.architecture"] = dictionary.architecture
        return cls(f"{key}-{dictionary.architecture}", f"{label} {dictionary.architecture}", content)

    @property
    def digest(self) -> str:
        """Hash the settings that make it."""
        return hashlib.sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def place(self) -> tuple[int, str]:
        """Order methods: the presets as everywhere, then the others by label."""
        return (KINDS.index(self.key) if self.is_preset else len(KINDS), self.label)

    @property
    def is_preset(self) -> bool:
        return self.key in LABELS


PRESET_METHODS = {kind: Method(kind, label) for kind, label in LABELS.items()}
"""The paper's three."""
LOCAL = PRESET_METHODS["local"]
