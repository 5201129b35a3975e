"""Terms that endwise does not bring, as a user would add them: a class and its registration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cosine_similarity

from endwise.common.axes import TokenMask
from endwise.config.objective import TERMS, TermConfig
from endwise.models.language_model import Clean, LanguageModel, Spliced
from endwise.models.readout import Readout
from endwise.models.sites import Site
from endwise.models.splicing import Scalar, later_residuals
from endwise.training.objectives import SiteTerm, SplicedTerm


class NextCosineConfig(TermConfig):
    ahead: int = 1


@TERMS.add("next_cosine")
@dataclass(frozen=True)
class NextCosine(SplicedTerm):
    """1 − cos(spliced, clean) of the input of a later block, summed over tokens."""

    name = "next_cosine"
    unit = "1 − cosine per token"
    Settings = NextCosineConfig
    coefficient: float
    sites: tuple[Site, ...]

    @classmethod
    def build(cls, weight: float, settings: Mapping[str, Any], model: LanguageModel, site: Site) -> "NextCosine":
        return cls(weight, (later_residuals(model, site)[settings["ahead"] - 1],))

    def total(self, readout: Readout, clean: Clean, spliced: Spliced, mask: TokenMask) -> Scalar:
        (site,) = self.sites
        cosines = cosine_similarity(spliced.activations[site].float(), clean.activations[site].float(), dim=-1)
        return (1 - cosines).where(mask, 0.0).sum()


@TERMS.add("bound")
@dataclass(frozen=True)
class Bound(SiteTerm):
    """Squared norm of the reconstruction, mean over dims."""

    name = "bound"
    unit = "activation² per token and dimension"
    coefficient: float

    def total(self, activation, reconstruction, latents, mask):
        return torch.where(mask, reconstruction.float().square().mean(-1), 0.0).sum()
