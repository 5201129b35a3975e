"""Principal directions of the activations at a site, and how an SAE reconstructs each of them (paper, figure 21)."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from endwise.analysis.directions.text_at_site import SiteBatch, TextAtSite
from endwise.common.axes import Activation
from endwise.common.errors import DataError
from endwise.common.statistics import CONFIDENCE, Floats, Interval, resampling_weights

NOTHING = 1e-12
"""A direction with less than this share of the variance is one that the model never writes to, and has no numbers."""


@dataclass(frozen=True)
class Principal:
    """Mean and principal directions of a text's activations, float64, on the model's device."""

    mean: Float[Tensor, " d_model"]
    variance: Float[Tensor, " d_model"]
    """Variance of the activations along each direction (divided by the number of tokens), descending."""
    directions: Float[Tensor, "d_model d_model"]
    """One unit vector a row, orthogonal, in the order of `variance`; its largest entry is positive."""
    tokens: int

    def along(self, x: Activation) -> Float[Tensor, "batch pos d_model"]:
        """⟨x − mean, v⟩ for every direction v."""
        return (x.double() - self.mean) @ self.directions.T


def principal(text: TextAtSite, *, with_starts: bool = False) -> Principal:
    """Compute them from the covariance, which one pass accumulates in float64.

    Args:
        with_starts: position 0 and document starts count too. There, models keep activations many times as long as any
            other, which then are the first directions and nearly all of the variance.

    Raises:
        DataError: fewer than two tokens count, or an activation is not finite.
    """
    width, device = text.model.width(text.site), text.model.device
    shift, total = (torch.zeros(width, dtype=torch.float64, device=device) for _ in range(2))
    products, count = torch.zeros(width, width, dtype=torch.float64, device=device), 0
    for batch in text.batches():
        kept = batch.activation[batch.counted(with_starts)].double()
        if not count and len(kept):  # far from the mean, the difference of two large sums would lose what is asked for
            shift = kept.mean(0)
        centred = kept - shift
        total += centred.sum(0)
        products += centred.T @ centred
        count += len(kept)
    if count < 2 or not bool(products.isfinite().all()):
        why = "an activation is NaN or infinite" if count >= 2 else f"{count} of them count"
        raise DataError(f"Directions need at least two tokens with finite activations; {why}. Give more text.")
    offset = total / count
    variance, vectors = torch.linalg.eigh((products / count - torch.outer(offset, offset)).cpu())
    directions = vectors.T.flip(0)
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return Principal(
        shift + offset,
        variance.flip(0).clamp_min(0).to(device),
        (directions * largest.sign()).to(device),
        count,
    )


@dataclass(frozen=True)
class Estimates:
    """A number for each direction, with the ends of its 95 % bootstrap interval over sequences: `[directions]` each."""

    estimate: Floats
    low: Floats
    high: Floats

    def of(self, index: int) -> Interval:
        """The number of one direction."""
        return Interval(*(float(end[index]) for end in (self.low, self.high, self.estimate)))

    @classmethod
    def of_draws(cls, draws: Floats, estimate: Floats) -> "Estimates":
        """Compute it from resampled values `[resamples directions]`; NaN among them are left out."""
        tail = (1 - CONFIDENCE) / 2
        ends = np.full((2, len(estimate)), np.nan)
        some = np.isfinite(draws).any(0)
        if some.any():
            ends[:, some] = np.nanquantile(draws[:, some], [tail, 1 - tail], axis=0)
        low, high = ends
        return cls(estimate, low, high)


@dataclass(frozen=True)
class Reconstructed:
    """Reconstruction of each direction v by an SAE; with x = ⟨a − ā, v⟩ and y = ⟨â − ā, v⟩ of each token."""

    correlation: Estimates
    """Pearson's, of x and y over tokens. 0 where y never changes."""
    explained_variance: Estimates
    """1 − Σ(x − y)² / Σx². Below 0 where leaving the direction at its mean would be nearer."""


class AlongDirections:
    """Takes batch after batch of one SAE's reconstructions."""

    def __init__(self, principal: Principal, *, with_starts: bool = False) -> None:
        self._principal, self._with_starts = principal, with_starts
        self._sums: list[Floats] = []
        """Tokens, Σx, Σy, Σx², Σy², Σxy and Σ(x − y)²: `[7 batch d_model]` of each batch."""

    def add(self, batch: SiteBatch, x: Float[Tensor, "batch pos d_model"], reconstruction: Activation) -> None:
        """
        Args:
            x: `Principal.along` of the batch's activations.
        """
        y = self._principal.along(reconstruction)
        counted = batch.counted(self._with_starts)[..., None]
        parts = (torch.ones_like(x), x, y, x.square(), y.square(), x * y, (x - y).square())
        self._sums.append(torch.stack([part.where(counted, 0.0).sum(1) for part in parts]).cpu().numpy())

    def reconstructed(self, resamples: int, seed: int) -> Reconstructed:
        """Join what all batches show."""
        sums = np.concatenate(self._sums, axis=1)
        weights = resampling_weights(sums.shape[1], resamples, seed)
        drawn = np.stack([weights @ each for each in sums])
        total = sums.sum(1)
        return Reconstructed(
            Estimates.of_draws(_correlation(drawn), _correlation(total)),
            Estimates.of_draws(_explained(drawn), _explained(total)),
        )


def _correlation(sums: Floats) -> Floats:
    n, x, y, xx, yy, xy = sums[:6]
    of_x, of_y = n * xx - x**2, n * yy - y**2
    there = of_x > NOTHING * of_x.sum(-1, keepdims=True)
    varies = there & (of_y > NOTHING * n * yy)
    spread = np.sqrt(np.where(varies, of_x * of_y, 1.0))
    return np.where(varies, (n * xy - x * y) / spread, np.where(there, 0.0, np.nan))


def _explained(sums: Floats) -> Floats:
    xx, error = sums[3], sums[6]
    there = xx > NOTHING * xx.sum(-1, keepdims=True)
    return 1 - np.where(there, error / np.where(there, xx, 1.0), np.nan)
