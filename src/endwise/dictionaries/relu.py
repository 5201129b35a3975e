"""The paper's dictionary: ReLU features, decoder columns of unit norm."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from endwise.dictionaries.base import SAE, Latents


class ReluSAE(SAE):
    """`c = ReLU(W_eᵀ·x + b_e)`, `x̂ = c·D + b_d`; nothing is subtracted from the input (paper §2, eq. 1-2).

    Both matrices are stored feature-major, `[d_sae d_in]`. While training, `decoder` is raw and each feature's
    direction is normalised where it is used, as in the reference code; a dictionary read from a file is used as it is.

    Initialisation as in the reference: encoder and biases uniform in ±1/√fan_in (PyTorch's Linear), decoder orthogonal
    (orthonormal over `d_in`, so that a raw row's norm is about √(d_in/d_sae)).
    """

    architecture = "standard"

    def __init__(self, d_in: int, d_sae: int, *, seed: int = 0, unit_norm: bool = True) -> None:
        super().__init__(d_in, d_sae)
        self.unit_norm = unit_norm
        generator = torch.Generator().manual_seed(seed)

        def uniform(*shape: int, fan_in: int) -> nn.Parameter:
            return nn.Parameter((torch.rand(*shape, generator=generator) * 2 - 1) / fan_in**0.5)

        self.encoder = uniform(d_sae, d_in, fan_in=d_in)
        self.b_enc = uniform(d_sae, fan_in=d_in)
        self.decoder = nn.Parameter(torch.empty(d_sae, d_in))
        nn.init.orthogonal_(self.decoder, generator=generator)
        self.b_dec = uniform(d_in, fan_in=d_sae)

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:
        return self.encoder.T

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]:
        return normalize(self.decoder, dim=-1) if self.unit_norm else self.decoder

    def encode(self, x: Float[Tensor, "*rows d_in"]) -> Latents:
        return Latents(torch.relu(linear(x.to(self.encoder.dtype), self.encoder, self.b_enc)))

    def decode(self, latents: Latents) -> Float[Tensor, "*rows d_in"]:
        return linear(latents.values, self.W_dec.T, self.b_dec)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], cfg: Mapping[str, Any]) -> "ReluSAE":
        b_enc = tensors["b_enc"]
        if cfg.get("apply_b_dec_to_input", True):
            # (x − b_dec)·W_enc + b_enc = x·W_enc + (b_enc − b_dec·W_enc)
            b_enc = b_enc - tensors["b_dec"] @ tensors["W_enc"]
        sae = cls.__new__(cls)  # not __init__, whose random weights would only be overwritten
        SAE.__init__(sae, cfg["d_in"], cfg["d_sae"])
        sae.unit_norm = False
        state = {"encoder": tensors["W_enc"].T, "b_enc": b_enc, "decoder": tensors["W_dec"], "b_dec": tensors["b_dec"]}
        for name, tensor in state.items():
            sae.register_parameter(name, nn.Parameter(tensor.float().contiguous()))
        return sae
