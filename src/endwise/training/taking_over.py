"""Changes made by taking a finished dictionary over: measured where training starts, and reported."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from endwise.dictionaries import SAE, at_inference

SAME = 1e-5
"""Root mean square of a change, as a share of that of the reconstructions, up to which it is rounding."""
COMPARED_ON = 4096
"""Tokens of training text that both are compared on."""
ROWS = 512
"""Rows at a time."""


@dataclass(frozen=True)
class TakenOver:
    """A dictionary before and after it was taken over, on the same training tokens, both as used outside training."""

    source: str
    """Architecture before."""
    architecture: str
    l0_before: float
    l0: float
    """Active features per token."""
    error_before: float
    error: float
    """Squared error of reconstructions over the squared distance of what they stand for from its mean."""
    change: float
    """Root mean square of the difference of reconstructions over that of the reconstructions before."""
    tokens: int

    @classmethod
    def of(cls, source: SAE, sae: SAE, x: Tensor, target: Tensor) -> "TakenOver":
        """Compare two dictionaries on activations `[tokens width]`."""
        variance = (target - target.mean(0)).double().square().sum()
        l0s, errors, change, size = [0.0, 0.0], [0.0, 0.0], 0.0, 0.0
        with torch.no_grad(), at_inference([sae, source]):
            for read, wanted in zip(x.split(ROWS), target.split(ROWS), strict=True):
                outs = []
                for place, each in enumerate((source, sae)):
                    latents = each.encode(read)
                    outs.append(each.reconstruct(latents, read).double())
                    l0s[place] += float(latents.l0().sum())
                    errors[place] += float((outs[-1] - wanted).square().sum() / variance)
                change += float((outs[1] - outs[0]).square().sum())
                size += float(outs[0].square().sum())
        share = (change / size) ** 0.5 if size else float(change > 0)
        before, after = (l0 / len(x) for l0 in l0s)
        kinds = source.architecture, sae.architecture
        return cls(*kinds, before, after, errors[0], errors[1], share, len(x))

    @property
    def kept(self) -> bool:
        """True if it is the same function."""
        return self.change <= SAME

    @property
    def record(self) -> dict[str, object]:
        """Return it as JSON has it."""
        return {**asdict(self), "kept": self.kept}

    def __str__(self) -> str:
        return (
            f"init_from: taken over from {self.source} to {self.architecture}, the SAE changes: on {self.tokens:,} "
            f"tokens L0 {self.l0_before:.4g} -> {self.l0:.4g}, unexplained variance {self.error_before:.4g} -> "
            f"{self.error:.4g}, reconstructions by {self.change:.2g} of their size."
        )
