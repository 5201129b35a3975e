"""Distance that the features of an SAE moved: the cosine of each one's directions with their start."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cosine_similarity

from endwise.dictionaries import SAE

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Moved:
    """Cosines of all features, before with after, `[d_sae]`; NaN of a direction that is 0."""

    decoder: NDArray[np.float32] = field(repr=False)
    encoder: NDArray[np.float32] = field(repr=False)
    fired: NDArray[np.bool_] = field(repr=False)
    """Features that fired before or after, of which quantiles are taken."""

    @classmethod
    def of(cls, before: SAE, after: SAE, fired: NDArray[np.bool_]) -> "Moved":
        with torch.no_grad():
            pairs = [(before.W_dec, after.W_dec), (before.W_enc.T, after.W_enc.T)]
            decoder, encoder = (
                cosine_similarity(old.double().cpu(), new.double().cpu(), dim=-1, eps=0.0).float().numpy()
                for old, new in pairs
            )
        return cls(decoder, encoder, fired)

    def quantiles(self, of: NDArray[np.float32]) -> Mapping[float, float]:
        """Return quantiles of those that fired; NaN where none did."""
        known = of[self.fired & np.isfinite(of)]
        return {share: float(np.quantile(known, share)) if len(known) else float("nan") for share in QUANTILES}

    def to_json(self) -> dict[str, Any]:
        return {
            name: {f"{share:g}": None if np.isnan(value) else value for share, value in self.quantiles(of).items()}
            for name, of in (("decoder_cosine", self.decoder), ("encoder_cosine", self.encoder))
        } | {"features": int(self.fired.sum())}
