"""Result of tuning an SAE."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cosine_similarity

from endwise.common.showing import Shown
from endwise.config.run import RunConfig
from endwise.dictionaries import SAE
from endwise.evaluation.inspecting import Inspected
from endwise.finetuning.texts import BeforeAfter

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


@dataclass(frozen=True, repr=False)
class Finetuned(Shown):
    """A tuned SAE, and what came of it."""

    sae: SAE
    config: RunConfig
    folder: Path
    """Run folder, with the SAE in SAELens's layout."""
    source: Inspected
    given_back: Path | None
    """The SAE in the format that it came in; None: `refused` says why not."""
    refused: str | None
    text: BeforeAfter
    """Held-out text of the kind that it was tuned on."""
    others: Mapping[str, BeforeAfter]
    """Text of other kinds, by name."""
    moved: Moved
    remarks: Sequence[str]

    def shown_facts(self) -> dict[str, object]:
        ratio = f"{self.text.ce_increase.estimate:.1%} of what it was"
        return {"": self.source.name, "at": self.config.place, "CE increase": ratio, "in": self.folder}

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source.name,
            "format": self.source.format_name,
            "read_as": self.source.rule,
            "given_back": None if self.given_back is None else str(self.given_back),
            "not_given_back": self.refused,
            "text": self.text.to_json(),
            "others": {name: each.to_json() for name, each in self.others.items()},
            "moved": self.moved.to_json(),
            "remarks": list(self.remarks),
        }
