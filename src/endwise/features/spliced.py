"""Spliced passes of one batch, without gradients: with the SAE's reconstruction, and with others in its place."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from endwise.common.axes import Activation, TokenMask
from endwise.dictionaries import SAE, Latents
from endwise.models.language_model import Clean, LanguageModel
from endwise.models.readout import Comparison
from endwise.models.sites import Site

CPU_TAIL_TOKENS, GPU_TAIL_TOKENS = 1024, 16384
"""Tokens at a time in the spliced pass, as in training."""


def microbatches(count: int, mask: TokenMask) -> list[slice]:
    """Of `count` sequences as long as those of the mask, those that go through the tail at a time."""
    most = CPU_TAIL_TOKENS if mask.device.type == "cpu" else GPU_TAIL_TOKENS
    size = max(1, most // mask.shape[1])
    return [slice(start, start + size) for start in range(0, count, size)]


@dataclass(frozen=True)
class SplicedBatch:
    """Some sequences with their clean pass, and what one SAE makes of it."""

    clean: Clean
    """It recorded the site and the final hidden state."""
    site: Site
    mask: TokenMask
    latents: Latents
    reconstruction: Activation
    whole: Comparison
    """Of the spliced pass with the reconstruction as it is."""

    @classmethod
    @torch.no_grad()
    def of(cls, model: LanguageModel, sae: SAE, clean: Clean, site: Site, mask: TokenMask) -> "SplicedBatch":
        latents = sae.encode(clean.activations[site])
        reconstruction = sae.decode(latents)
        compared = [
            _compare(model, clean.rows(rows), site, mask[rows], reconstruction[rows])
            for rows in microbatches(len(mask), mask)
        ]
        joined = {name: torch.cat([getattr(each, name) for each in compared]) for name in vars(compared[0])}
        return cls(clean, site, mask, latents, reconstruction, Comparison(**joined))

    @torch.no_grad()
    def rises(self, model: LanguageModel, changed: Activation, rows: Int[Tensor, " rows"]) -> NDArray[np.float64]:
        """By how much CE and KL rise when `changed` stands in the reconstruction's place; `[2 rows]`, summed over each
        sequence.

        Args:
            rows: the sequences, one for each of `changed`; any may come several times.
        """
        clean = _picked(self.clean, rows)
        compared = _compare(model, clean, self.site, self.mask[rows], changed)
        ce = (compared.ce_spliced - self.whole.ce_spliced[rows]).sum(1, dtype=torch.float64)
        kl = (compared.kl - self.whole.kl[rows]).sum(1, dtype=torch.float64)
        return torch.stack([ce, kl]).cpu().numpy()


@torch.no_grad()
def spliced_ce(
    model: LanguageModel, clean: Clean, site: Site, mask: TokenMask, value: Activation
) -> Float[Tensor, " batch"]:
    """CE with a value at the site, summed over each sequence, in float64."""
    sums = []
    for rows in microbatches(len(mask), mask):
        part, kept = clean.rows(rows), mask[rows]
        final = _final(model, part, site, kept, value[rows])
        sums.append(model.readout.cross_entropy(final, part.tokens, kept).sum(1, dtype=torch.float64))
    return torch.cat(sums)


def _picked(clean: Clean, rows: Int[Tensor, " rows"]) -> Clean:
    assert clean.final is not None
    activations = {site: value[rows] for site, value in clean.activations.items()}
    return Clean(clean.tokens[rows], activations, clean.final[rows])


def _final(model: LanguageModel, clean: Clean, site: Site, mask: TokenMask, value: Activation) -> Activation:
    patched = torch.where(mask[..., None], value, clean.activations[site].to(value.dtype))
    final = model.replay(clean, {site: patched}).final
    assert final is not None
    return final


def _compare(model: LanguageModel, clean: Clean, site: Site, mask: TokenMask, value: Activation) -> Comparison:
    assert clean.final is not None
    final = _final(model, clean, site, mask, value)
    return model.readout.compare(clean.final, [final], clean.tokens, mask)[0]
