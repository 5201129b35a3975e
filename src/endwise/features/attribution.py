"""Gradient attribution: what every feature contributes to the loss, to first order, in one pass over the text.

The spliced pass runs on x̂ = Σ_f c_f·d_f + b. With g = ∂L/∂x̂ at a token, L the sum of the losses of the whole sequence,
∂L/∂c_f = d_f·g: one backward pass to the reconstruction gives every feature's derivative, and only features that fire
have any effect, one dot product per active pair. Setting c_f to 0 changes L by −c_f·(d_f·g) to first order; that is
what is added up, once with its sign and once without.

Where training has ended the slope is small, and what a feature is worth shows in the second order. Let a_s be the sum
of −c_f·(d_f·g) over a sequence: the derivative of its loss by the share of the feature that is taken away. The
expectation of a_s² over targets that the model itself would give is the Fisher information in that direction, which is
the Gauss-Newton curvature of CE and of KL alike. The text's own targets stand for these, so that Σ_s (a_s + ½ a_s²)
estimates the rise to second order, at no further cost.

The clean pass stops at the site unless the KL is asked for; the backward pass computes activation gradients only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from endwise.common.axes import Activation, TokenMask
from endwise.dictionaries import SAE, Latents
from endwise.dictionaries.latents import SparseLatents
from endwise.features.importance_table import FeatureImportance
from endwise.kernels import kernels_for
from endwise.models.language_model import Clean, LanguageModel
from endwise.models.readout import Readout, next_tokens
from endwise.models.sites import Place, Site
from endwise.models.splicing import SplicedPass, SplicedRows

Loss = Literal["ce", "kl"]
Sums = Float[Tensor, " d_sae"]


def spliced_gradients(
    model: LanguageModel,
    clean: Clean,
    site: Site,
    reconstruction: Activation,
    mask: TokenMask,
    losses: Sequence[Loss] = ("ce",),
) -> dict[Loss, Activation]:
    """Compute the gradients of each loss, summed over the batch, by the reconstruction; 0 at masked positions.

    One forward pass of the tail, and a backward pass to the reconstruction for each loss.

    Args:
        site: where the reconstruction is put.
        clean: must have recorded the site and, for the KL, the final hidden state.
        mask: positions outside it keep their own activation.
    """
    totals = [partial(_total, model.readout, loss) for loss in losses]
    gradients = SplicedPass(model, site).gradients(clean, reconstruction, mask, totals)
    return dict(zip(losses, gradients, strict=True))


def _total(readout: Readout, loss: Loss, part: SplicedRows) -> Tensor:
    final = part.spliced.final
    assert final is not None
    if loss == "ce":
        return readout.cross_entropy(final, part.clean.tokens, part.mask).sum()
    assert part.clean.final is not None
    return readout.kl(part.clean.final, final, part.mask)


@dataclass(frozen=True)
class Contributions:
    """Contributions in one sequence: sums over its tokens that count, per feature."""

    firings: Int64[Tensor, " d_sae"]
    active: Sums
    """Σ c"""
    signed: list[Sums]
    """Sums Σ −c·(d·g), for each gradient."""
    absolute: list[Sums]
    """Sums Σ |c·(d·g)|, for each gradient."""


def contributions(
    latents: Latents,
    W_dec: Float[Tensor, "d_sae d_out"],
    gradients: Sequence[Activation],
    mask: TokenMask,
) -> list[Contributions]:
    """Every feature's latent × gradient in each sequence, in float64.

    Sparse latents cost one dot product per active pair; dense ones a product of each sequence with the whole decoder.
    """
    if (sparse := latents.pairs()) is not None:
        return _sparse(sparse, W_dec, gradients, mask)
    return _dense(latents.dense(), W_dec, gradients, mask)


def scaled(gradient: Activation, scale: Tensor | None) -> Activation:
    """Return the gradient by Σ c·d, where the reconstruction has that times a number of each row (`SAE.row_scale`)."""
    return gradient if scale is None else gradient * scale[..., None].to(gradient.dtype)


def _sparse(
    latents: SparseLatents, W_dec: Tensor, gradients: Sequence[Activation], mask: TokenMask
) -> list[Contributions]:
    pairs = latents.places
    kernels = kernels_for(W_dec.device)
    counts = mask.flatten()[pairs.rows]
    values = latents.values.where(counts, 0.0)
    changes = [
        -values * kernels.dot_products(W_dec, pairs.features, g.flatten(0, 1).to(W_dec.dtype), pairs) for g in gradients
    ]
    ends = [*pairs.row_starts[:: mask.shape[1]].tolist(), len(pairs.rows)]
    found = []
    for start, end in pairwise(ends):
        features = pairs.features[start:end]

        def summed(numbers: Tensor, features: Tensor = features) -> Sums:
            # Of no numbers at all, bincount gives whole ones.
            return torch.bincount(features, numbers.double(), minlength=pairs.n_features).double()

        signed = [summed(change[start:end]) for change in changes]
        absolute = [summed(change[start:end].abs()) for change in changes]
        firings = torch.bincount(features[counts[start:end]], minlength=pairs.n_features)
        found.append(Contributions(firings, summed(values[start:end]), signed, absolute))
    return found


def _dense(values: Tensor, W_dec: Tensor, gradients: Sequence[Activation], mask: TokenMask) -> list[Contributions]:
    found = []
    for sequence, kept in enumerate(mask):
        latents = values[sequence].where(kept[:, None], 0.0)
        changes = [-latents * (gradient[sequence].to(W_dec.dtype) @ W_dec.T) for gradient in gradients]
        signed = [change.sum(0, dtype=torch.float64) for change in changes]
        absolute = [change.abs().sum(0, dtype=torch.float64) for change in changes]
        active = latents.sum(0, dtype=torch.float64)
        found.append(Contributions((latents != 0).sum(0), active, signed, absolute))
    return found


class Attribution:
    """Adds up contributions, sequence after sequence, in memory that does not grow with the text.

    Args:
        sequences: how many there will be; they fall into `blocks` runs of neighbours, as even as can be.
        kl: whether to attribute the KL besides the CE.
    """

    def __init__(self, sae: SAE, sequences: int, blocks: int, *, kl: bool = False) -> None:
        self.sae, self.kl = sae, kl
        self._W_dec = sae.W_dec.detach()
        self._sequences, self._seen, self._tokens = sequences, 0, 0
        device, d_sae = self._W_dec.device, sae.d_sae
        zeros = torch.zeros(d_sae, dtype=torch.float64, device=device)
        self._firings = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self._active = zeros.clone()
        self._losses = [_LossSums(d_sae, device) for _ in range(1 + kl)]
        self._blocks = [torch.zeros(blocks, d_sae, dtype=torch.float64, device=device) for _ in self._losses]
        self._squares = torch.zeros_like(self._blocks[0])
        self._terms = np.zeros((2, blocks))
        """Predictions and tokens that count, block by block."""

    def add(self, model: LanguageModel, clean: Clean, place: Place | Site, mask: TokenMask) -> None:
        """Some sequences, the next in order."""
        place = Place.of(place)
        with torch.no_grad():
            read = clean.activations[place.reads]
            mask = self.sae.within_limit(read, mask)
            latents = self.sae.encode(read)
            reconstruction = self.sae.reconstruct(latents, read)
        losses: list[Loss] = ["ce", "kl"] if self.kl else ["ce"]
        gradients = spliced_gradients(model, clean, place.writes, reconstruction, mask, losses)
        _, predicts = next_tokens(clean.tokens, mask)
        scale = self.sae.row_scale(read)
        along = [scaled(gradients[loss], scale) for loss in losses]
        each = contributions(latents, self._W_dec, along, mask)
        for found, predictions, tokens in zip(each, predicts.sum(1).tolist(), mask.sum(1).tolist(), strict=True):
            self._add_sequence(found, predictions, tokens)

    def _add_sequence(self, found: Contributions, predictions: int, tokens: int) -> None:
        block = self._seen * self._terms.shape[1] // self._sequences
        self._seen += 1
        self._tokens += tokens
        self._firings += found.firings
        self._active += found.active
        terms = (predictions, tokens)
        self._terms[:, block] += terms
        for index, sums in enumerate(self._losses):
            sums.add(found.signed[index], found.absolute[index], terms[index])
            self._blocks[index][block] += found.signed[index]
        self._squares[block] += found.signed[0].square()

    def result(self) -> FeatureImportance:
        ce = self._losses[0]
        nothing = [np.full(self.sae.d_sae, np.nan) for _ in range(3)]
        kl, kl_se, kl_absolute = self._losses[1].estimates() if self.kl else nothing
        firings, active = self._firings.cpu().numpy(), self._active.cpu().numpy()
        mean_active = np.divide(active, firings, out=np.full(len(firings), np.nan), where=firings > 0)
        estimate, error, absolute = ce.estimates()
        squares = self._squares.cpu().numpy()
        return FeatureImportance(
            ce=estimate,
            ce_second=estimate + squares.sum(0) / (2 * max(1.0, self._terms[0].sum())),
            ce_se=error,
            ce_absolute=absolute,
            kl=kl,
            kl_se=kl_se,
            kl_absolute=kl_absolute,
            firings=firings,
            mean_active=mean_active,
            ce_blocks=self._blocks[0].cpu().numpy(),
            squares_blocks=squares,
            predictions_blocks=self._terms[0],
            kl_blocks=self._blocks[1].cpu().numpy() if self.kl else np.zeros((0, self.sae.d_sae)),
            tokens_blocks=self._terms[1],
            tokens=self._tokens,
        )


class _LossSums:
    """Sums of one loss: Σ a, Σ |a| by token, and what the standard error of R = Σ a / Σ n is made of, per feature.

    a is a sequence's sum, n the number of its terms. Linearised, the error of a ratio of sums over S independent
    sequences is √(S/(S−1) · Σ (a − R·n)²) / Σ n, which needs Σ a², Σ a·n and Σ n² alone.
    """

    def __init__(self, d_sae: int, device: torch.device) -> None:
        self._sum, self._absolute, self._squares, self._products = (
            torch.zeros(d_sae, dtype=torch.float64, device=device) for _ in range(4)
        )
        self._terms, self._terms_squared, self._sequences = 0, 0, 0

    def add(self, signed: Sums, absolute: Sums, terms: int) -> None:
        self._sum += signed
        self._absolute += absolute
        self._squares += signed.square()
        self._products += signed * terms
        self._terms += terms
        self._terms_squared += terms * terms
        self._sequences += 1

    def estimates(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """R, its standard error (NaN for fewer than two sequences), and Σ |a| / Σ n."""
        terms = max(1, self._terms)
        mean = self._sum / terms
        scatter = self._squares - 2 * mean * self._products + mean.square() * self._terms_squared
        freedom = self._sequences - 1
        factor = self._sequences / freedom if freedom > 0 else float("nan")
        error = (scatter.clamp_min(0.0) * factor).sqrt() / terms
        return mean.cpu().numpy(), error.cpu().numpy(), (self._absolute / terms).cpu().numpy()
