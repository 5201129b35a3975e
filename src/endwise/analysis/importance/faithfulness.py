"""Faithfulness: how much of the model's behaviour the most important features carry (paper, figure 24, as a curve).

Only the first n features in rank are kept, the others are zeroed in the spliced pass. The ranking comes from the first
half of the sequences and the CE from the second, so that a feature is not credited with the noise that ranked it.

Counts double from one to the next. About the one at which `CARRIED` of what the whole SAE carries is reached, further
ones are measured in passes of their own, until its neighbours are at most `NARROW` apart.
"""

import numpy as np
import torch
from torch import Tensor

from endwise.common.axes import TokenMask
from endwise.common.seeds import numpy_stream
from endwise.dictionaries import SAE
from endwise.features.importance_table import Counts, Faithfulness, FeatureImportance, Floats
from endwise.features.spliced import SplicedBatch, spliced_ce
from endwise.models.language_model import Clean, LanguageModel
from endwise.models.sites import Place, Site

CARRIED = 0.9
"""Share, of what the whole SAE carries, for which features are counted."""
NARROW = 1.06
"""Factor between the measured counts on either side of that."""
INSIDE = 3
"""Counts that a pass measures between two others."""


def kept_counts(alive: int) -> Counts:
    """0, the powers of 2 below `alive`, and `alive`: all that fired, with which the SAE is as it is."""
    powers = [1 << power for power in range(alive.bit_length()) if 1 << power < alive]
    return np.array([0, *powers, *([alive] if alive else [])], np.int64)


class FaithfulnessSums:
    """Collects, batch after batch, the CE of one SAE with n features alone: the first by either estimate, and random
    ones.
    """

    def __init__(self, sae: SAE, importance: FeatureImportance, seed: int) -> None:
        self.sae, self.kept = sae, kept_counts(importance.alive)
        ranking = importance.ranking()
        random = numpy_stream(seed, "features to keep").permutation(ranking[: importance.alive])
        device = sae.b_dec.device
        orders = (ranking, importance.ranking(first_order=True), random)
        self._places = [_places(order, sae.d_sae).to(device) for order in orders]
        self._sums: list[Floats] = []
        """Per batch `[3 points batch]`."""
        self.between: list[int] = []
        """Counts that the current pass measures beside those of `kept`."""
        self._between: dict[int, list[Floats]] = {}
        """Sums by count, per batch `[batch]`."""

    @torch.no_grad()
    def add(self, model: LanguageModel, batch: SplicedBatch) -> None:
        whole = batch.whole.ce_spliced.sum(1, dtype=torch.float64)
        nothing = [self._with_first(0, self._places[0], model, batch)] if len(self.kept) > 1 else []
        curves = []
        for places in self._places:
            ce = [self._with_first(int(n), places, model, batch) for n in self.kept[1:-1]]
            curves.append(torch.stack([*nothing, *ce, whole]))
        self._sums.append(torch.stack(curves).cpu().numpy())

    def narrow(self, mean_ablated: float) -> bool:
        """Take up further counts (`between`) about that which carries `CARRIED`; False where none are left to measure.

        Args:
            mean_ablated: the summed CE with the site at its mean, over the sequences that were added.
        """
        sums = dict(zip(self.kept.tolist(), np.concatenate(self._sums, axis=2)[0].sum(1), strict=True))
        sums |= {n: np.concatenate(each).sum() for n, each in self._between.items()}
        counts = sorted(sums)
        carried = np.array([mean_ablated - sums[n] for n in counts])
        reached = int(np.argmax(carried >= CARRIED * carried[-1]))
        above, below = counts[reached], counts[max(0, reached - 1)]
        wide = carried[-1] > 0 and above > NARROW * below > 0
        inside = np.geomspace(below, above, INSIDE + 2)[1:-1] if wide else []
        self.between = sorted({round(float(n)) for n in inside} - {below, above})
        return bool(self.between)

    @torch.no_grad()
    def add_between(self, model: LanguageModel, clean: Clean, place: Place | Site, mask: TokenMask) -> None:
        """Variant of `add` for the counts that `narrow` took up, by importance alone."""
        read, site = clean.activations[Place.of(place).reads], Place.of(place).writes
        latents, mask = self.sae.encode(read), self.sae.within_limit(read, mask)
        for n in self.between:
            value = self.sae.reconstruct(latents.only(self._places[0] < n), read)
            self._between.setdefault(n, []).append(spliced_ce(model, clean, site, mask, value).cpu().numpy())

    def _with_first(self, n: int, places: Tensor, model: LanguageModel, batch: SplicedBatch) -> Tensor:
        value = self.sae.reconstruct(batch.latents.only(places < n), batch.read)
        return spliced_ce(model, batch.clean, batch.site, batch.mask, value)

    def result(self, clean: Floats, mean_ablated: Floats, predictions: Floats) -> Faithfulness:
        """
        Args:
            clean, mean_ablated, predictions: `[sequences]`, of the same sequences.
        """
        ce, first_order_ce, random_ce = np.concatenate(self._sums, axis=2)
        further = {n: np.concatenate(each) for n, each in sorted(self._between.items())}
        between = np.array([*further.values()]).reshape(len(further), len(predictions))
        return Faithfulness(
            self.kept,
            ce,
            first_order_ce,
            random_ce,
            clean,
            mean_ablated,
            predictions,
            np.array([*further], np.int64),
            between,
        )


def _places(order: Counts, d_sae: int) -> Tensor:
    """Return every feature's place in the order, from 0; those that are not in it come last."""
    places = np.full(d_sae, d_sae)
    places[order] = np.arange(len(order))
    return torch.from_numpy(places)
