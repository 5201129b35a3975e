"""Spliced passes of one batch, without gradients: with the SAE's reconstruction, and with others in its place."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from endwise.common.axes import Activation, TokenMask
from endwise.dictionaries import SAE, Latents
from endwise.models.language_model import Clean, LanguageModel, Spliced
from endwise.models.readout import Comparison
from endwise.models.sites import Place, Site
from endwise.models.splicing import SplicedPass


@dataclass(frozen=True)
class SplicedBatch:
    """Some sequences with their clean pass, and what one SAE makes of it."""

    clean: Clean
    """Clean pass that recorded the site and the final hidden state."""
    site: Site
    """Site at which the reconstruction is put."""
    mask: TokenMask
    """The tokens that count for the SAE."""
    read: Activation
    """Activation that the SAE encoded."""
    latents: Latents
    reconstruction: Activation
    whole: Comparison
    """Comparison of the spliced pass with the reconstruction as it is."""

    @classmethod
    @torch.no_grad()
    def of(cls, model: LanguageModel, sae: SAE, clean: Clean, place: Place | Site, mask: TokenMask) -> "SplicedBatch":
        reads, site = Place.of(place).reads, Place.of(place).writes
        read = clean.activations[reads]
        mask = sae.within_limit(read, mask)
        latents = sae.encode(read)
        reconstruction = sae.reconstruct(latents, read)
        parts = SplicedPass(model, site).in_parts(clean, reconstruction, mask)
        compared = [_compare(model, part.clean, part.spliced, part.mask) for part in parts]
        joined = {name: torch.cat([getattr(each, name) for each in compared]) for name in vars(compared[0])}
        return cls(clean, site, mask, read, latents, reconstruction, Comparison(**joined))

    @torch.no_grad()
    def rises(self, model: LanguageModel, changed: Activation, rows: Int[Tensor, " rows"]) -> NDArray[np.float64]:
        """Compute how much CE and KL rise when `changed` stands in the reconstruction's place; `[2 rows]`, summed over
        each sequence.

        Args:
            rows: the sequences, one for each of `changed`; any may come several times.
        """
        clean, mask = self.clean.rows(rows), self.mask[rows]
        compared = _compare(model, clean, SplicedPass(model, self.site).run(clean, changed, mask), mask)
        ce = (compared.ce_spliced - self.whole.ce_spliced[rows]).sum(1, dtype=torch.float64)
        kl = (compared.kl - self.whole.kl[rows]).sum(1, dtype=torch.float64)
        return torch.stack([ce, kl]).cpu().numpy()


@torch.no_grad()
def spliced_ce(
    model: LanguageModel, clean: Clean, site: Site, mask: TokenMask, value: Activation
) -> Float[Tensor, " batch"]:
    """CE with a value at the site, summed over each sequence, in float64."""
    sums = []
    for part in SplicedPass(model, site).in_parts(clean, value, mask):
        assert part.spliced.final is not None
        ce = model.readout.cross_entropy(part.spliced.final, part.clean.tokens, part.mask)
        sums.append(ce.sum(1, dtype=torch.float64))
    return torch.cat(sums)


def _compare(model: LanguageModel, clean: Clean, spliced: Spliced, mask: TokenMask) -> Comparison:
    assert clean.final is not None and spliced.final is not None
    return model.readout.compare(clean.final, [spliced.final], clean.tokens, mask)[0]
