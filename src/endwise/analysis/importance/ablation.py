"""Exact ablation: what zeroing one feature in the spliced pass does to CE and KL.

The test of the estimates. A sequence in which the feature does not fire is not run: nothing changes there.
Several features go through the tail together, each with the sequences in which it fires.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from endwise.common.seeds import numpy_stream
from endwise.dictionaries import SAE
from endwise.features.importance_table import Ablations, Counts, FeatureImportance, Floats
from endwise.features.spliced import SplicedBatch
from endwise.models.language_model import LanguageModel
from endwise.models.splicing import microbatches


@dataclass(frozen=True)
class AblationSample:
    """Features to ablate: the first `by_rank` for their rank, the others at random."""

    features: Counts
    by_rank: int


def choose(importance: FeatureImportance, count: int, seed: int) -> AblationSample:
    """Half of the sample at ranks spread evenly on a logarithmic scale, from the first on; half at random from the
    other features that fired. All of them, if there are no more than `count`.
    """
    ranked = importance.ranking()[: importance.alive]
    count = min(count, len(ranked))
    places: dict[int, None] = {}
    for place in np.geomspace(1, max(1, len(ranked)), count - count // 2).round().astype(int) - 1 if count else ():
        while int(place) in places and place + 1 < len(ranked):
            place += 1
        places[int(place)] = None
    by_rank = ranked[list(places)]
    others = np.setdiff1d(ranked, by_rank)
    drawn = numpy_stream(seed, "features to ablate").choice(others, count - len(by_rank), replace=False)
    return AblationSample(np.concatenate([by_rank, np.sort(drawn)]).astype(np.int64), len(by_rank))


class AblationSums:
    """Collects, batch after batch, what ablating each feature of a sample does."""

    def __init__(self, sae: SAE, sample: AblationSample) -> None:
        self.sample = sample
        self._sae, self._W_dec = sae, sae.W_dec.detach()
        self._rises: list[Floats] = []
        """Per batch `[2 sample batch]`: rise of CE and KL, summed over each sequence; 0 where it does not fire."""
        self._fires: list[NDArray[np.bool_]] = []
        """Per batch `[sample batch]`."""
        self._terms: list[Counts] = []
        """Per batch `[2 batch]`: predictions and tokens."""

    @torch.no_grad()
    def add(self, model: LanguageModel, batch: SplicedBatch) -> None:
        rises = np.zeros((2, len(self.sample.features), len(batch.mask)))
        fires = np.zeros(rises.shape[1:], dtype=bool)
        if len(self.sample.features):
            latents = torch.stack([batch.latents.of(int(feature)) for feature in self.sample.features])
            columns, rows = ((latents != 0) & batch.mask).any(-1).nonzero(as_tuple=True)
            scale = self._sae.row_scale(batch.read)
            W_dec = self._W_dec[torch.from_numpy(self.sample.features).to(columns.device)]
            for part in microbatches(len(rows), batch.mask):
                column, row = columns[part], rows[part]
                values = latents[column, row] if scale is None else latents[column, row] * scale[row]
                changed = batch.reconstruction[row] - values[..., None] * W_dec[column][:, None]
                rises[:, column.cpu().numpy(), row.cpu().numpy()] = batch.rises(model, changed, row)
                fires[column.cpu().numpy(), row.cpu().numpy()] = True
        self._rises.append(rises)
        self._fires.append(fires)
        self._terms.append(np.stack([batch.whole.predicts.sum(1).cpu().numpy(), batch.mask.sum(1).cpu().numpy()]))

    def result(self, importance: FeatureImportance) -> Ablations:
        rises, terms = np.concatenate(self._rises, axis=2), np.concatenate(self._terms, axis=1).astype(np.float64)
        chosen = self.sample.features
        (ce, ce_se), (kl, kl_se) = (_ratio(sums, n) for sums, n in zip(rises, terms, strict=True))
        return Ablations(
            features=chosen,
            by_rank=np.arange(len(chosen)) < self.sample.by_rank,
            ce=ce,
            ce_se=ce_se,
            kl=kl,
            kl_se=kl_se,
            sequences=np.concatenate(self._fires, axis=1).sum(1),
            estimated_ce=importance.ce_of_half(1)[chosen],
            estimated_kl=importance.kl_of_half(1)[chosen],
            second_ce=(importance.ce_of_half(1) + importance.curvature_of_half(1))[chosen],
            second_kl=(importance.kl_of_half(1) + importance.curvature_of_half(1))[chosen],
        )


def _ratio(sums: Floats, terms: Floats) -> tuple[Floats, Floats]:
    """Σ sums / Σ terms of each row, over sequences, and its standard error (see `attribution`)."""
    sequences, total = len(terms), max(1.0, float(terms.sum()))
    mean = sums.sum(1) / total
    factor = sequences / (sequences - 1) if sequences > 1 else np.nan
    return mean, np.sqrt(factor * np.square(sums - mean[:, None] * terms).sum(1)) / total
