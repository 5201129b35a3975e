"""A transcoder that is nowhere in the package: one file and one registration; it may be of two widths."""

from typing import Any

import torch
from torch import nn

from endwise.config.dictionary import ARCHITECTURES, DictionaryConfig
from endwise.dictionaries import SAE, DenseLatents, Latents
from endwise.formats.saelens import Layout


class OwnConfig(DictionaryConfig):
    """Ramps, and a decoder to another width."""

    architecture: str = "own_transcoder"
    slope: float = 1.0


@ARCHITECTURES.add("own_transcoder")
class OwnTranscoder(SAE):
    architecture = "own_transcoder"
    Config = OwnConfig
    layout = Layout(settings=frozenset({"d_out"}))
    two_widths = True

    def __init__(self, d_in: int, d_sae: int, d_out: int, slope: float = 1.0) -> None:
        super().__init__(d_in, d_sae, d_out)
        self.encoder = nn.Parameter(slope * torch.ones(d_in, d_sae))
        self.decoder = nn.Parameter(torch.zeros(d_sae, d_out))
        self.b_enc, self.b_dec = nn.Parameter(torch.zeros(d_sae)), nn.Parameter(torch.zeros(d_out))

    @classmethod
    def build(cls, config: OwnConfig, d_in: int, seed: int, d_out: int | None = None) -> "OwnTranscoder":
        sae = cls(d_in, config.features(d_in), d_in if d_out is None else d_out, config.slope)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for matrix in (sae.encoder, sae.decoder):
                matrix.copy_(torch.randn(matrix.shape, generator=generator) / matrix.shape[0] ** 0.5)
        return sae

    @property
    def W_enc(self):
        return self.encoder

    @property
    def W_dec(self):
        return self.decoder

    def encode(self, x, counted=None) -> Latents:
        return DenseLatents(torch.relu(x.to(self.encoder.dtype) @ self.encoder + self.b_enc))

    def decode(self, latents: Latents):
        return latents.dense() @ self.decoder + self.b_dec

    def to_train(self, config: Any) -> "OwnTranscoder":
        return self.requires_grad_(True)

    @classmethod
    def from_tensors(cls, tensors, cfg) -> "OwnTranscoder":
        sae = cls(cfg["d_in"], cfg["d_sae"], cfg.get("d_out", cfg["d_in"]))
        names = {"encoder": "W_enc", "decoder": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec"}
        with torch.no_grad():
            for own, name in names.items():
                getattr(sae, own).copy_(tensors[name])
        return sae
