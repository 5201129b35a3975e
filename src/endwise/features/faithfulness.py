"""Faithfulness: how much of the model's behaviour the most important features carry (paper, figure 24, as a curve).

Only the first n features in rank are kept, the others are zeroed in the spliced pass. The ranking comes from the first
half of the sequences and the CE from the second, so that a feature is not credited with the noise that ranked it.
"""

import numpy as np
import torch
from torch import Tensor

from endwise.dictionaries import SAE
from endwise.features.importance import Counts, Faithfulness, FeatureImportance, Floats
from endwise.features.spliced import SplicedBatch, spliced_ce
from endwise.language_model import LanguageModel
from endwise.seeds import numpy_stream


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

    @torch.no_grad()
    def add(self, model: LanguageModel, batch: SplicedBatch) -> None:
        whole = batch.whole.ce_spliced.sum(1, dtype=torch.float64)
        nothing = [self._with_first(0, self._places[0], model, batch)] if len(self.kept) > 1 else []
        curves = []
        for places in self._places:
            ce = [self._with_first(int(n), places, model, batch) for n in self.kept[1:-1]]
            curves.append(torch.stack([*nothing, *ce, whole]))
        self._sums.append(torch.stack(curves).cpu().numpy())

    def _with_first(self, n: int, places: Tensor, model: LanguageModel, batch: SplicedBatch) -> Tensor:
        value = self.sae.decode(batch.latents.only(places < n))
        return spliced_ce(model, batch.clean, batch.site, batch.mask, value)

    def result(self, clean: Floats, mean_ablated: Floats, predictions: Floats) -> Faithfulness:
        """
        Args:
            clean, mean_ablated, predictions: `[sequences]`, of the same sequences.
        """
        ce, first_order_ce, random_ce = np.concatenate(self._sums, axis=2)
        return Faithfulness(self.kept, ce, first_order_ce, random_ce, clean, mean_ablated, predictions)


def _places(order: Counts, d_sae: int) -> Tensor:
    """Of every feature its place in the order, from 0; those that are not in it come last."""
    places = np.full(d_sae, d_sae)
    places[order] = np.arange(len(order))
    return torch.from_numpy(places)
