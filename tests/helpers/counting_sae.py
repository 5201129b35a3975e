"""A dictionary that is nowhere in the package: one file and one registration make an architecture.

Features above a threshold of their own, which follows, step by step, the largest value that each had where tokens
count; a term of its own wakes dead features; training and inference differ (in training the threshold is 0).
"""

from typing import Any

import torch
from torch import nn

from endwise.config.dictionary import ARCHITECTURES, DictionaryConfig
from endwise.dictionaries import SAE, DenseLatents, Exported, Latents, TrainingPass
from endwise.formats.saelens import Layout


class CountingConfig(DictionaryConfig):
    """Features above a share of the largest value that they had."""

    architecture: str = "counting"
    share: float = 0.1
    """Share of the largest value above which a feature fires."""
    wake: float = 0.5
    """Weight of the term that wakes dead features."""


@ARCHITECTURES.add("counting")
class CountingSAE(SAE):
    architecture = "counting"
    Config = CountingConfig
    layout = Layout(tensors={"largest": ("d_sae",)}, settings=frozenset({"share"}))

    def __init__(self, d_in: int, d_sae: int, share: float, wake: float) -> None:
        super().__init__(d_in, d_sae)
        self.share, self.wake = share, wake
        self.encoder = nn.Parameter(torch.zeros(d_in, d_sae))
        self.decoder = nn.Parameter(torch.zeros(d_sae, d_in))
        self.b_enc, self.b_dec = nn.Parameter(torch.zeros(d_sae)), nn.Parameter(torch.zeros(d_in))
        self.register_buffer("largest", torch.zeros(d_sae))
        self.register_buffer("steps", torch.zeros(()))
        self.seen = torch.zeros(d_sae)
        """Sums over the tokens of a step, added up over processes."""

    @classmethod
    def build(cls, config: CountingConfig, d_in: int, seed: int) -> "CountingSAE":
        sae = cls(d_in, config.features(d_in), config.share, config.wake)
        with torch.no_grad():
            sae.encoder.copy_(torch.randn(sae.encoder.shape, generator=torch.Generator().manual_seed(seed)) / d_in**0.5)
            sae.decoder.copy_(sae.encoder.T)
        return sae

    @property
    def W_enc(self):
        return self.encoder

    @property
    def W_dec(self):
        return self.decoder

    def encode(self, x, counted=None) -> Latents:
        before = torch.relu(x.float() @ self.encoder + self.b_enc)
        if not self.training:
            return DenseLatents(before.where(before > self.share * self.largest, 0.0))
        if not self.counts:
            return DenseLatents(before)
        kept = before.detach() if counted is None else before.detach().where(counted[..., None], 0.0)
        self.seen = self.seen + kept.flatten(0, -2).sum(0)
        return DenseLatents(before)

    def decode(self, latents: Latents):
        return latents.dense() @ self.decoder + self.b_dec

    @property
    def auxiliary_weights(self):
        return {"wake": self.wake}

    def auxiliary(self, seen: TrainingPass):
        before = seen.x.float() @ self.encoder + self.b_enc
        return {"wake": (torch.relu(1 - before) * seen.dead).mean(-1).where(seen.counted, 0.0).sum()}

    def step_statistics(self):
        return (self.seen,)

    def after_step(self) -> None:
        self.steps += 1
        self.largest.copy_(torch.maximum(self.largest, self.seen))
        self.seen = torch.zeros_like(self.seen)

    def to_train(self, config: Any) -> "CountingSAE":
        return self.requires_grad_(True)

    def export(self) -> Exported:
        own = super().export()
        return Exported({**own.tensors, "largest": self.largest}, {"share": self.share})

    @classmethod
    def from_tensors(cls, tensors, cfg) -> "CountingSAE":
        sae = cls(cfg["d_in"], cfg["d_sae"], cfg["share"], wake=0.5)
        names = {"encoder": "W_enc", "decoder": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec", "largest": "largest"}
        with torch.no_grad():
            for own, name in names.items():
                getattr(sae, own).copy_(tensors[name])
        return sae
