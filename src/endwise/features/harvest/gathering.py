"""Sums and contexts of one SAE's features, gathered while the text goes by; none depends on the order of the text."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from endwise.common.axes import TokenMask
from endwise.common.errors import ConfigError, DataError
from endwise.dictionaries import SAE, Latents
from endwise.features.attribution import contributions, scaled, spliced_gradients
from endwise.features.harvest.co_firing import SAMPLED_TOKENS, TokenSample
from endwise.features.harvest.firings import Firings
from endwise.features.harvest.slots import Candidates, Slots
from endwise.features.harvest.sums import FixedPointSums, drawn
from endwise.models.language_model import Clean, LanguageModel
from endwise.models.readout import next_tokens
from endwise.models.sites import Place, Site

BINS, _FIRST_EXPONENT, _STEP_BITS = 160, -20, 21
"""Four bins to an octave, of equal width within it, from 2^-20 to 2^20: a float's exponent and the first two bits of
its mantissa are the bin's number."""
_FIRST_BIN = (127 + _FIRST_EXPONENT) << (23 - _STEP_BITS)
_SEQUENCE_BITS = 32
_PARTS = ("activation", "ce", "squares", "top", "sample", "together")
"""Parts of what is gathered that are no tensors themselves."""


@dataclass(frozen=True)
class Kept:
    """Numbers of what is kept of every feature."""

    top: int = 24
    """Contexts of the greatest activations, each from another sequence."""
    groups: int = 5
    """Quantiles of the activations."""
    per_group: int = 8
    """Contexts from each."""
    before: int = 40
    """Tokens of a context before the one at which the feature fires."""
    after: int = 23
    tokens: int = 10
    """Boosted tokens, and as many suppressed ones."""
    co_firing: int = 10
    """Other features that fire at the same tokens."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            limit = 100 if name == "groups" else 1_000
            if type(value) is not int or not 0 <= value <= limit:
                raise ConfigError(f"{name} must be a whole number from 0 to {limit:,}; given {value!r:.40}. Change it.")

    @property
    def window(self) -> int:
        return self.before + 1 + self.after


def bin_edges() -> Tensor:
    """`[BINS + 1]`; a value belongs to the last edge that is not above it. The first bin holds all that is smaller, and
    the last all that is greater, up to the greatest number of float32.
    """
    bits = (torch.arange(BINS + 1, dtype=torch.int32) + _FIRST_BIN) << _STEP_BITS
    edges = bits.view(torch.float32)
    edges[0], edges[-1] = 0.0, torch.finfo(torch.float32).max
    return edges


def bins_of(values: Tensor) -> Int64[Tensor, " values"]:
    """Return the bins of positive values of float32."""
    bits = values.contiguous().view(torch.int32)
    return ((bits >> _STEP_BITS) - _FIRST_BIN).clamp(0, BINS - 1).long()


class Gathered:
    """Counts, sums and contexts of every feature, in memory that does not grow with the text.

    Args:
        share: of the tokens, those whose features are kept to be counted together.
        attribute: whether to attribute the CE besides, which needs the spliced pass forward and backward.
    """

    def __init__(self, sae: SAE, kept: Kept, share: float, *, attribute: bool) -> None:
        self.sae, self.kept, self.attribute = sae, kept, attribute
        self._W_dec = sae.W_dec.detach()
        device, d_sae = self._W_dec.device, sae.d_sae
        self.histogram = torch.zeros(d_sae, BINS, dtype=torch.int64, device=device)
        self.greatest = torch.zeros(d_sae, device=device)
        self.activation = FixedPointSums(d_sae, device)
        self.ce, self.squares = FixedPointSums(d_sae, device), FixedPointSums(d_sae, device)
        """Over sequences, of −c·dCE/dc summed over the sequence, and of its square (see `attribution`)."""
        self.top = Slots(d_sae, kept.top, kept.window, device)
        self.sample = Slots(d_sae, kept.groups * kept.per_group, kept.window, device)
        self.together = TokenSample(share)
        self.counts = torch.zeros(3, dtype=torch.int64)
        """Tokens and predictions that count, and predictions whose CE was attributed."""

    @property
    def tokens(self) -> int:
        return int(self.counts[0])

    def add(
        self,
        model: LanguageModel,
        clean: Clean,
        place: Place | Site,
        mask: TokenMask,
        numbers: Tensor,
        attribute: bool = True,
    ) -> None:
        """Some sequences, with their numbers in the corpus.

        Args:
            clean: must have recorded the place's sites.
            attribute: whether to attribute the CE of these, where it is attributed at all.

        Raises:
            DataError: a latent or a gradient is not finite.
        """
        place = Place.of(place)
        with torch.no_grad():
            read = clean.activations[place.reads]
            latents, mask = self.sae.encode(read), self.sae.within_limit(read, mask)
            firings = Firings.of(latents, mask, numbers, self.sae.d_sae)
            self._add_counts(firings)
            self.together.add(firings)
            self._add_top(firings)
            self._add_sample(firings)
        _, predicts = next_tokens(clean.tokens, mask)
        predictions = int(predicts.sum())
        attribute = attribute and self.attribute
        self.counts += torch.tensor([int(mask.sum()), predictions, predictions * attribute])
        if attribute:
            self._attribute(model, clean, place, mask, latents)

    def _add_counts(self, firings: Firings) -> None:
        places = firings.features * BINS + bins_of(firings.values)
        self.histogram.view(-1).index_add_(0, places, torch.ones_like(places))
        self.greatest.scatter_reduce_(0, firings.features, firings.values, "amax")
        self.activation.add(firings.features, firings.values)

    def _add_top(self, firings: Firings) -> None:
        """Keys are a value's bits, which are in the order of positive values, then the sequence's number, the first
        greatest: ties go to the text that comes first.
        """
        bits = firings.values.contiguous().view(torch.int32).long() << _SEQUENCE_BITS
        keys = bits | ((1 << _SEQUENCE_BITS) - 1 - firings.sequences)
        best = firings.strongest(keys > self.top.least[firings.features])
        self._offer(self.top, firings, best, keys[best])

    def _add_sample(self, firings: Firings) -> None:
        keys = drawn(firings.features, firings.sequences, firings.positions)
        chosen = (keys > self.sample.least[firings.features]).nonzero()[:, 0]
        self._offer(self.sample, firings, chosen, keys[chosen])

    def _offer(self, slots: Slots, firings: Firings, chosen: Tensor, keys: Tensor) -> None:
        slots.offer(
            Candidates(
                firings.features[chosen],
                keys,
                firings.sequences[chosen],
                firings.positions[chosen],
                firings.values[chosen],
                lambda some: firings.windows(chosen[some], self.kept.before, self.kept.after),
            )
        )

    def _attribute(self, model: LanguageModel, clean: Clean, place: Place, mask: TokenMask, latents: Latents) -> None:
        with torch.no_grad():
            read = clean.activations[place.reads]
            reconstruction, scale = self.sae.reconstruct(latents, read), self.sae.row_scale(read)
        gradients = spliced_gradients(model, clean, place.writes, reconstruction, mask)
        if not gradients["ce"].isfinite().all():
            raise DataError("A gradient of the CE is NaN or infinite; look for a diverged SAE or model.")
        for each in contributions(latents, self._W_dec, [scaled(gradients["ce"], scale)], mask):
            self.ce.add_all(each.signed[0])
            self.squares.add_all(each.signed[0].square())

    def merge(self, other: "Gathered") -> None:
        """Add what was gathered from other sequences."""
        self.histogram += other.histogram
        self.counts += other.counts
        self.greatest = torch.maximum(self.greatest, other.greatest)
        for name in _PARTS:
            getattr(self, name).merge(getattr(other, name))

    def tensors(self) -> dict[str, Tensor]:
        """All of it, to resume from."""
        found = {"histogram": self.histogram, "greatest": self.greatest, "counts": self.counts}
        for name in _PARTS:
            found |= {f"{name}.{part}": tensor for part, tensor in getattr(self, name).tensors().items()}
        return found

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """
        Raises:
            KeyError, RuntimeError: they are not what `tensors` gives for an SAE of this size.
        """
        for name, own in self.tensors().items():
            if not name.startswith("together."):
                own.copy_(tensors[name])
        for slots in (self.top, self.sample):
            slots.settle()
        self.together.tokens, self.together.features = [tensors["together.tokens"]], [tensors["together.features"]]


def share_of_tokens(tokens: int) -> float:
    """Return the share of so many positions to draw so that about `SAMPLED_TOKENS` are."""
    return min(1.0, SAMPLED_TOKENS / max(1, tokens))
