"""The paper's dictionary: ReLU features, decoder columns of unit norm."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from endwise.common.seeds import torch_stream
from endwise.config.dictionary import ARCHITECTURES, DictionaryConfig
from endwise.dictionaries.base import SAE
from endwise.dictionaries.latents import DenseLatents, Latents, decode_sparse, encode_sparse

SPARSE_BELOW = 1 / 32
"""Largest share of active features for which sparse latents cost less than dense ones (docs/performance.md)."""
NORM_FLOOR = 1e-12
"""As in `torch.nn.functional.normalize`."""


@ARCHITECTURES.add("standard", "relu")
class ReluSAE(SAE):
    """`c = ReLU(W_eᵀ·x + b_e)`, `x̂ = c·D + b_d`; nothing is subtracted from the input (paper §2, eq. 1-2).

    Both matrices are stored feature-major, `[d_sae d_in]`. While training, `decoder` is raw and each feature's
    direction is normalised where it is used, as in the reference code; a dictionary read from a file is used as it is.

    Initialisation as in the reference: encoder and biases uniform in ±1/√fan_in (PyTorch's Linear), decoder orthogonal
    (orthonormal over `d_in`, so that a raw row's norm is about √(d_in/d_sae)).
    """

    architecture = "standard"
    sparse_below = SPARSE_BELOW

    def __init__(self, d_in: int, d_sae: int, *, seed: int = 0, unit_norm: bool = True) -> None:
        super().__init__(d_in, d_sae)
        self.unit_norm = unit_norm
        generator = torch_stream(seed, "initialisation")

        def uniform(*shape: int, fan_in: int) -> nn.Parameter:
            return nn.Parameter((torch.rand(*shape, generator=generator) * 2 - 1) / fan_in**0.5)

        self.encoder = uniform(d_sae, d_in, fan_in=d_in)
        self.b_enc = uniform(d_sae, fan_in=d_in)
        self.decoder = nn.Parameter(torch.empty(d_sae, d_in))
        nn.init.orthogonal_(self.decoder, generator=generator)
        self.b_dec = uniform(d_in, fan_in=d_sae)

    @classmethod
    def build(cls, config: DictionaryConfig, d_in: int, seed: int) -> "ReluSAE":
        return cls(d_in, config.features(d_in), seed=seed)

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:
        return self.encoder.T

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]:
        return normalize(self.decoder, dim=-1) if self.unit_norm else self.decoder

    def encode(self, x: Float[Tensor, "*rows d_in"], counted: Bool[Tensor, "*rows"] | None = None) -> Latents:
        """Sparse where few features are active, dense where many are, as early in training; the values are the same.

        The choice is made by counting, so that it depends on the input and the weights alone. On a GPU, where counting
        would make the host wait, latents are dense.
        """
        x = x.to(self.encoder.dtype)
        sparse = None if x.is_cuda else encode_sparse(x, self.encoder, self.b_enc, self.sparse_below)
        return sparse or DenseLatents(torch.relu(linear(x, self.encoder, self.b_enc)))

    def decode(self, latents: Latents) -> Float[Tensor, "*rows d_in"]:
        if (sparse := latents.pairs()) is not None:
            norms = self.decoder.detach().norm(dim=-1).clamp_min(NORM_FLOOR) if self.unit_norm else None
            return decode_sparse(sparse, self.decoder, self.b_dec, norms)
        return linear(latents.dense(), self.W_dec.T, self.b_dec)

    def to_train(self, config: DictionaryConfig) -> "ReluSAE":
        """The same function, with directions that are normalised where they are used: what training can go on from.

        A feature's latents are multiplied by the norm that its direction gives up, so that x̂ stays as it is and the
        sparsity penalty counts them as it counts those of any SAE in training.
        """
        norms = self.decoder.detach().norm(dim=-1)
        unit = {
            "encoder": self.encoder * norms[:, None],
            "b_enc": self.b_enc * norms,
            "decoder": normalize(self.decoder, dim=-1),
            "b_dec": self.b_dec,
        }
        return self._of(unit, unit_norm=True)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], cfg: Mapping[str, Any]) -> "ReluSAE":
        names = {"encoder": "W_enc", "b_enc": "b_enc", "decoder": "W_dec", "b_dec": "b_dec"}
        state = {own: tensors[name] for own, name in names.items()}
        return cls._of({**state, "encoder": tensors["W_enc"].T}, unit_norm=False)

    @classmethod
    def _of(cls, state: Mapping[str, Tensor], unit_norm: bool) -> "ReluSAE":
        sae = cls.__new__(cls)  # not __init__, whose random weights would only be overwritten
        d_sae, d_in = state["encoder"].shape
        SAE.__init__(sae, d_in, d_sae)
        sae.unit_norm = unit_norm
        for name, tensor in state.items():
            sae.register_parameter(
                name, nn.Parameter(tensor.detach().float().clone(memory_format=torch.contiguous_format))
            )
        return sae
