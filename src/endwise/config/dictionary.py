"""The `dictionary` section of a recipe: what all architectures share, and where each adds its own keys."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import Field, ValidationError, model_serializer, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails, PydanticCustomError

from endwise.common.errors import ConfigError
from endwise.common.registry import Registry
from endwise.config.base import Config, Positive

ARCHITECTURES: Registry[Any] = Registry("architectures", "endwise.dictionaries")
"""Sparse dictionaries (`endwise.SAE`), by SAELens's names and by other words for them."""


ARCHITECTURE = "dictionary.architecture"
SIZES = {"size", "ratio"}
"""Keys of which a dictionary has one."""


class KnobRule(NamedTuple):
    """Form in which a key is written that varies along a curve."""

    label: str
    sparser: bool = False
    """True if more of it means fewer active features."""


class DictionaryConfig(Config):
    """The sparse dictionary. Each architecture has these keys and its own."""

    knobs: ClassVar[Mapping[str, KnobRule]] = {}
    """Keys that are varied along a curve in place of the sparsity coefficient where they are set."""
    batchwise: ClassVar[bool] = False
    """True if a token's latents in training, or a term, depend on the other tokens of a pass: more than one pass a step
    (`training.accumulation`) would be another training, and is refused."""
    penalised: ClassVar[bool] = True
    """True if a sparsity coefficient sets how many features are active; if not, a recipe needs none."""
    counting: ClassVar[tuple[str, ...]] = ()
    """Keys that count features, of which there cannot be more than the dictionary has."""
    powers: ClassVar[bool] = True
    """True if the penalty is one of |c|^p, so that `objective.sparsity.p` says something of it."""
    architecture: str = "standard"
    """SAELens's name of it; `relu` is another word for `standard`."""
    size: Positive | None = None
    """Number of features `d_sae`; give this or `ratio`."""
    ratio: Annotated[float, Field(gt=0, le=10**6)] | None = None
    """Number of features as a multiple of the site's width."""

    @model_validator(mode="after")
    def _one_size(self) -> "DictionaryConfig":
        if (self.size is None) == (self.ratio is None):
            raise ValueError("give exactly one of size (features) and ratio (features per dimension of the site)")
        if self.size is not None and (problem := self._too_many(self.size)):
            raise ValueError(problem)
        return self

    def _too_many(self, features: int) -> str | None:
        counts = {name: getattr(self, name) or 0 for name in self.counting}
        over = (f"{name} is {count:g}, more than the {features} features there are" for name, count in counts.items())
        return next((each for each, count in zip(over, counts.values(), strict=True) if count > features), None)

    @model_serializer(mode="wrap")
    def _named(self, handler: Any) -> dict[str, Any]:
        """Name another architecture than that of a recipe that names none, though it is its own section's default: what
        is written without defaults would otherwise be alike for all.
        """
        values = handler(self)
        if self.architecture == DictionaryConfig.model_fields["architecture"].default:
            return values
        return {"architecture": self.architecture, **values}

    def features(self, width: int) -> int:
        """Return `d_sae` for a site of this width.

        Raises:
            ConfigError: a key counts more features than that.
        """
        features = self.size if self.size is not None else max(1, round((self.ratio or 0) * width))
        if problem := self._too_many(features):
            raise ConfigError(f"dictionary: {problem}. Lower it, or raise dictionary.ratio.")
        return features

    def prefixes(self, width: int) -> tuple[int, ...]:
        """Numbers of first features that are meant to reconstruct alone, ascending, the whole left out: evaluations
        measure each.
        """
        return ()

    @classmethod
    def chosen(cls, values: Mapping[str, Any]) -> "type[DictionaryConfig]":
        """The section of the architecture that the values name.

        Raises:
            ConfigError: there is none of that name.
        """
        return ARCHITECTURES[str(values.get("architecture", cls.model_fields["architecture"].default))].Config

    @classmethod
    def all_fields(cls) -> dict[str, FieldInfo]:
        sections: list[type[Config]] = [ARCHITECTURES[name].Config for name in ARCHITECTURES.names()]
        return {name: field for each in (*sections, cls) for name, field in each.model_fields.items()}


def of_architecture(value: Any) -> Any:
    """Validate a dictionary's section by the rules of the architecture that it names."""
    if not isinstance(value, Mapping):
        return value
    try:
        section = DictionaryConfig.chosen(value)
    except ConfigError as error:
        kind = PydanticCustomError("architecture", "{message}", {"message": str(error)})
        detail = InitErrorDetails(type=kind, loc=("architecture",), input=value["architecture"])
        raise ValidationError.from_exception_data("dictionary", [detail]) from None
    name = ARCHITECTURES[str(value["architecture"])].architecture if "architecture" in value else None
    return section.model_validate({**value, "architecture": name} if name else value)


def with_room_for(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a recipe's values without what changes of its dictionary replace: another architecture's keys, and its
    size where they say its ratio, or the other way round.
    """
    values, section = _without_old_keys(values, changes), values.get("dictionary")
    given = {name for name in SIZES if changes.get(f"dictionary.{name}") is not None}
    if len(given) != 1 or not isinstance(section, dict):
        return values
    return {**values, "dictionary": {k: v for k, v in values["dictionary"].items() if k not in SIZES - given}}


def _without_old_keys(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a recipe's values without those keys of its dictionary that its architecture has and the one that the
    changes choose has not, with a line that says so; a key that neither has stays, to be refused.
    """
    section, name = values.get("dictionary"), changes.get(ARCHITECTURE)
    if not isinstance(section, dict) or name is None:
        return values
    try:
        old, new = DictionaryConfig.chosen(section), DictionaryConfig.chosen({"architecture": name})
    except ConfigError:  # which the recipe is refused for, unless the change repairs it
        return values
    unused = [key for key in section if key in old.model_fields and key not in new.model_fields]
    if not unused:
        return values
    names = ", ".join(f"dictionary.{key}" for key in unused)
    warnings.warn(f"{names} left out, which a {name} dictionary does not have.", stacklevel=5)
    return {**values, "dictionary": {key: value for key, value in section.items() if key not in unused}}


def of_others(keys: Iterable[str], name: Any) -> set[str]:
    """Pick those dotted keys of the dictionary that only other architectures than the one of that name have.

    Raises:
        ConfigError: there is none of that name.
    """
    own, all_keys = DictionaryConfig.chosen({"architecture": name}).model_fields, DictionaryConfig.all_fields()
    names = {key: key.removeprefix("dictionary.") for key in keys if key.startswith("dictionary.")}
    return {key for key, field in names.items() if field in all_keys and field not in own}
