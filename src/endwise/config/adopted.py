"""The recipe in the folder of an SAE that was trained elsewhere and adopted: where it belongs, and where it is from."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_serializer, model_validator

from endwise.common.errors import ConfigError
from endwise.config.base import Config
from endwise.config.dictionary import DictionaryConfig
from endwise.config.fields import SHARED
from endwise.config.objective import ObjectiveConfig
from endwise.config.run import RunConfig, TrainingConfig

DEFAULT = DictionaryConfig.model_fields["architecture"].default


class OriginConfig(Config):
    """Origin of an SAE, as it was read."""

    name: str
    """Name in tables and legends."""
    path: str
    """Folder or file that it was read from, or its name on the hub."""
    format: str
    """One of `formats.FORMATS`."""
    digest: str
    """SHA-256 of the files that it was read from."""
    rule: str
    """The function in symbols, by which it was read."""
    model: str | None = None
    """The model that the file names; unset: none."""
    stated_l0: float | None = None
    """The mean number of active features that the file states."""
    remarks: tuple[str, ...] = ()
    """Caveats found as it was read."""


class UnknownObjective(ObjectiveConfig):
    """The objective of an SAE that was trained elsewhere: no terms are known, and it has a name to go by."""

    label: str

    @model_validator(mode="after")
    def _resolved(self) -> "UnknownObjective":
        return self

    @property
    def name(self) -> str:
        return self.label


class TrainedElsewhere(TrainingConfig):
    """A training of which nothing is known."""

    tokens: int = 0


class AdoptedConfig(RunConfig):
    """A recipe as `endwise adopt` writes it: it can be measured by, not trained by."""

    adopted: OriginConfig
    objective: Annotated[UnknownObjective, Field(exclude=True)]  # pyright: ignore[reportIncompatibleVariableOverride]
    training: Annotated[TrainingConfig, SHARED, Field(exclude=True)] = TrainedElsewhere()

    @model_validator(mode="before")
    @classmethod
    def _of_unknown_making(cls, values: Any) -> Any:
        """Name what is not known by where the SAE is from: those of one format and `family` are of one method, where
        they state what sets their L0; of others each is one of its own.
        """
        if not isinstance(values, Mapping) or not isinstance(origin := values.get("adopted"), Mapping):
            return values
        if given := sorted({"objective", "training"} & values.keys()):
            raise ValueError(f"{' and '.join(given)} of an SAE that was trained elsewhere are not known; remove them")
        own = given if isinstance(given := values.get("dictionary"), Mapping) else {}
        label = f"{origin.get('format')} {own.get('architecture', DEFAULT)}"
        if origin.get("stated_l0") is None and "k" not in own:
            label = f"{origin.get('name')}, {label}"
        return {**values, "objective": UnknownObjective(label=label)}

    @model_validator(mode="after")
    def _penalty_as_needed(self) -> "AdoptedConfig":
        """Ask for no penalty: what was penalised is not known."""
        return self

    @field_serializer("dictionary")
    def _as_read(self, dictionary: DictionaryConfig) -> dict[str, Any]:
        """Write what the file says, not how such a dictionary would be trained."""
        return dictionary.model_dump(mode="json", exclude_defaults=True)

    @property
    def stated(self) -> tuple[float, str, str, bool]:
        """The fields of a `Knob`: the L0 that the file states; where it states none, the number of features."""
        if self.adopted.stated_l0 is not None:
            return self.adopted.stated_l0, "adopted.stated_l0", "stated L0", False
        return float(self.dictionary.size or 0), "dictionary.size", "features", False

    @property
    def facts(self) -> dict[str, Any]:
        """Statements of its file and caveats, for remarks on its numbers."""
        return {"stated_l0": self.adopted.stated_l0, "remarks": list(self.adopted.remarks)}

    @property
    def family(self) -> str:
        """Return the path without its numbers, in which SAEs of one making differ: layer, size, sparsity."""
        return re.sub(r"[0-9]+", "#", self.adopted.path)


def refuse_adopted(config: object, folder: Path | None = None) -> None:
    """
    Raises:
        ConfigError: the recipe is one of an SAE that was trained elsewhere.
    """
    if isinstance(config, AdoptedConfig):
        raise ConfigError(
            f"{folder or 'The recipe'} is of an SAE that was trained elsewhere ({config.adopted.path}), and its "
            f"training is not known. To train it further, start a run with init_from={folder or config.adopted.path}."
        )
