"""What every sparse dictionary has in common: its parts, its two maps, and its file."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from endwise.common.files import expanded, write_json, write_tensors
from endwise.dictionaries.latents import Latents
from endwise.formats.saelens import CFG_FILE, WEIGHTS_FILE, describe

SAELENS_VERSION = "6.0.0"
"""The generation of SAELens whose layout `save` writes; SAELens reads older numbers through a legacy path."""


class SAE(nn.Module, ABC):
    """A sparse autoencoder `x̂ = decode(encode(x))` of width `d_in` with `d_sae` features.

    `W_enc [d_in d_sae]`, `b_enc [d_sae]`, `W_dec [d_sae d_in]`, `b_dec [d_in]` are the field's names for what the
    function uses; how an architecture stores them is its own matter.
    """

    architecture: ClassVar[str]
    """SAELens's name of the architecture; subclasses register under it."""
    _known: ClassVar[dict[str, type["SAE"]]] = {}

    b_enc: nn.Parameter
    b_dec: nn.Parameter

    def __init_subclass__(cls) -> None:
        SAE._known[cls.architecture] = cls

    def __init__(self, d_in: int, d_sae: int) -> None:
        super().__init__()
        self.d_in, self.d_sae = d_in, d_sae

    @property
    @abstractmethod
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]: ...

    @property
    @abstractmethod
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]: ...

    @abstractmethod
    def encode(self, x: Float[Tensor, "*rows d_in"]) -> Latents: ...

    @abstractmethod
    def decode(self, latents: Latents) -> Float[Tensor, "*rows d_in"]: ...

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], cfg: Mapping[str, Any]) -> "SAE":
        """The dictionary that a SAELens file describes, as a function unchanged."""

    def forward(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_in"]:
        return self.decode(self.encode(x))

    def save(self, folder: Path | str, metadata: Mapping[str, Any] | None = None) -> None:
        """Writes SAELens's v6 layout (`cfg.json`, `sae_weights.safetensors`), which opens in SAELens as it is."""
        folder = expanded(folder)
        cfg = {
            "architecture": self.architecture,
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": False,
            "normalize_activations": "none",
            "reshape_activations": "none",
            "metadata": {"sae_lens_version": SAELENS_VERSION, **(metadata or {})},
        }
        tensors = {name: getattr(self, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
        weights = {name: tensor.detach().float() for name, tensor in tensors.items()}
        write_tensors(folder / WEIGHTS_FILE, weights, {"metadata": json.dumps(cfg["metadata"])})
        write_json(folder / CFG_FILE, cfg)

    @staticmethod
    def load(folder: Path | str, device: str | torch.device = "cpu") -> "SAE":
        """Reads a folder in SAELens's layout, of any of its versions; a run folder's `sae/` is one, and so the run
        folder itself will do.

        Raises:
            FormatError: the folder, its `cfg.json` or its weights are missing or not what the format says, or what they
                say of the function is none of ours.
        """
        folder = expanded(folder)
        if not (folder / CFG_FILE).exists() and (folder / "sae" / CFG_FILE).exists():
            folder = folder / "sae"
        cfg, tensors = describe(folder, set(SAE._known))
        return SAE._known[cfg["architecture"]].from_tensors(tensors, cfg).to(device).requires_grad_(False)
