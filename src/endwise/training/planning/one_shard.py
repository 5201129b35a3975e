"""One of the processes among which a dictionary's features are shared out, planned for without the others."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from endwise.common.processes import ALONE, T, World
from endwise.config.run import RunConfig
from endwise.dictionaries import SAE
from endwise.models.language_model import LanguageModel
from endwise.models.sites import Place
from endwise.training.making import new_dictionary


@dataclass(frozen=True)
class _WithoutOthers(World):
    """Processes of which this one alone is there; what the others would give is like its own."""

    def add(self, tensors: Sequence[Tensor]) -> None:
        pass

    def total(self, number: int) -> int:
        return self.size * number

    def gather(self, value: T) -> list[T]:
        return [value] * self.size

    def stack(self, tensor: Tensor) -> Tensor:
        return torch.stack([tensor] * self.size)


def planned_dictionary(config: RunConfig, model: LanguageModel, place: Place) -> SAE:
    """Make what the first of the shards holds of a recipe's dictionary.

    Raises:
        ConfigError: see `new_dictionary` and `SAE.split`.
    """
    shards = config.training.shards
    return new_dictionary(config, model, place).split(
        _WithoutOthers(0, shards, grid=(ALONE, _WithoutOthers(0, shards)))
    )


def whole_count(sae: SAE) -> int:
    """Return how many parameters the whole dictionary has."""
    of_features = sum(parameter.numel() for parameter in sae.per_feature())
    return sum(parameter.numel() for parameter in sae.parameters()) + (sae.world.shards.size - 1) * of_features
