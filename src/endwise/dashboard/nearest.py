"""The features nearest to each by the cosine of their decoder directions: in its own dictionary, and in other runs'."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from endwise.analysis.geometry.cosines import MEMORY, Nearest, nearest_across, nearest_within

NEAREST = 5


@dataclass(frozen=True)
class Neighbours:
    """Nearest features in one dictionary for every feature of one run, the nearest first; `[d_sae k]`."""

    feature: NDArray[np.int64]
    """-1 where there is none: for a feature that never fired, and beyond what the dictionary has."""
    cosine: NDArray[np.float32]


@dataclass(frozen=True)
class Dictionary:
    """One run's decoder, of which only the features that fired count."""

    features: NDArray[np.int64]
    """Their numbers."""
    directions: Tensor
    """Decoder directions of these, of unit length, `[n d_model]`."""
    d_sae: int
    place: tuple[object, ...]
    """Model and site: directions of two places have nothing to do with each other."""

    @classmethod
    def of(
        cls, W_dec: Float[Tensor, "d_sae d_in"], firings: NDArray[np.int64], place: Sequence[object]
    ) -> "Dictionary":
        norms = W_dec.double().norm(dim=1)
        features = np.flatnonzero((firings > 0) & (norms > 0).cpu().numpy())
        kept = torch.from_numpy(features)
        unit = torch.nn.functional.normalize(W_dec[kept].double(), dim=1).float()
        return cls(features, unit, len(W_dec), tuple(place))


def all_neighbours(
    dictionaries: Sequence[Dictionary], *, k: int = NEAREST, memory: int = MEMORY
) -> list[Mapping[int, Neighbours]]:
    """Find each dictionary's features' neighbours, by the other dictionary's place in the list, its own included.

    Args:
        memory: bytes that a search may hold besides.

    Returns: dictionaries of two models, sites or widths are not compared, and are not in each other's mapping.
    """
    found: list[dict[int, Neighbours]] = [{} for _ in dictionaries]
    for i, a in enumerate(dictionaries):
        if len(a.features) > 1:
            found[i][i] = _neighbours(a, a, nearest_within(a.directions, k=k, memory=memory), k)
        for j, b in enumerate(dictionaries[:i]):
            if _comparable(a, b):
                of_a, of_b = nearest_across(a.directions, b.directions, k=k, memory=memory)
                found[i][j], found[j][i] = _neighbours(a, b, of_a, k), _neighbours(b, a, of_b, k)
    return [dict(sorted(each.items())) for each in found]


def _comparable(a: Dictionary, b: Dictionary) -> bool:
    same_width = a.directions.shape[1] == b.directions.shape[1]
    return a.place == b.place and same_width and len(a.features) > 0 and len(b.features) > 0


def _neighbours(a: Dictionary, b: Dictionary, found: Nearest, k: int) -> Neighbours:
    feature = np.full((a.d_sae, k), -1, dtype=np.int64)
    cosine = np.zeros((a.d_sae, k), dtype=np.float32)
    width = found.index.shape[1]
    feature[a.features, :width] = b.features[found.index.cpu().numpy()]
    cosine[a.features, :width] = found.cosine.cpu().numpy()
    return Neighbours(feature, cosine)
