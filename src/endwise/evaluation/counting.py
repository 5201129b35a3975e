"""Tokens of a text that count for dictionaries that leave out positions of outlying norm."""

from collections.abc import Iterable
from dataclasses import dataclass

from endwise.common.axes import TokenMask
from endwise.dictionaries import SAE, within_norm
from endwise.models.language_model import Clean
from endwise.models.sites import Place, Site


@dataclass(frozen=True, order=True)
class Counting:
    """A token counts where the text's mask says so and where what is read, in the clean pass, is within the limit of
    every dictionary that has one (`SAE.norm_limit`).
    """

    limits: tuple[tuple[Site, float], ...] = ()

    @classmethod
    def of(cls, saes: Iterable[tuple[Place, SAE]]) -> "Counting":
        """Make it for dictionaries that are in place at once, or for one alone."""
        limits = {(place.reads, float(sae.norm_limit)) for place, sae in saes if sae.norm_limit is not None}
        return cls(tuple(sorted(limits)))

    @property
    def sites(self) -> set[Site]:
        """Sites that a clean pass must have recorded."""
        return {site for site, _ in self.limits}

    def of_these(self, clean: Clean, mask: TokenMask) -> TokenMask:
        """The positions that count, of those of a mask."""
        for site, limit in self.limits:
            mask = within_norm(clean.activations[site], limit, mask)
        return mask


EVERY = Counting()
"""Tokens that the text's mask counts."""
Spot = tuple[Site, Counting]
"""A site that is written, and the tokens that count for who writes it."""
