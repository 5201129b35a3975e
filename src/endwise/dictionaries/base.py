"""What every sparse dictionary has in common: its parts, its two maps, and its file."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from endwise.dictionaries.latents import Latents
from endwise.errors import FormatError
from endwise.files import write_json, write_tensors
from endwise.reading import expanded, read_json

CFG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
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
        """Reads a folder in SAELens's v6 layout; a run folder's `sae/` is one, and so the run folder itself will do.

        Raises:
            FormatError: the folder, its `cfg.json` or its weights are missing or not what the format says.
        """
        folder = expanded(folder)
        if not (folder / CFG_FILE).exists() and (folder / "sae" / CFG_FILE).exists():
            folder = folder / "sae"
        cfg = read_cfg(folder)
        architecture = SAE._known.get(str(cfg.get("architecture")))
        if architecture is None:
            known = ", ".join(sorted(SAE._known))
            given = f"{cfg.get('architecture')!r:.80}"
            raise FormatError(f"{folder / CFG_FILE}: architecture {given} is not one of {known}. Convert the SAE.")
        if cfg.get("normalize_activations", "none") != "none" or cfg.get("reshape_activations", "none") != "none":
            raise FormatError(
                f"{folder / CFG_FILE}: only SAEs with normalize_activations and reshape_activations 'none' can be "
                "spliced; fold the normalisation into the weights first (SAELens can)."
            )
        return architecture.from_tensors(_read_weights(folder, cfg), cfg).to(device).requires_grad_(False)


def read_cfg(folder: Path) -> dict[str, Any]:
    """
    Raises:
        FormatError: there is no `cfg.json`, or it is not what the format says.
    """
    path = folder / CFG_FILE
    try:
        cfg = read_json(path)
    except FileNotFoundError:
        raise FormatError(f"{folder} holds no {CFG_FILE}: give a folder in SAELens's layout or a run folder.") from None
    for key in ("d_in", "d_sae"):
        if type(cfg.get(key)) is not int or cfg[key] < 1:
            raise FormatError(f"{path}: {key} must be a whole number above 0, not {cfg.get(key)!r:.80}. Correct it.")
    if type(cfg.get("apply_b_dec_to_input", True)) is not bool:
        given = f"{cfg['apply_b_dec_to_input']!r:.80}"
        raise FormatError(f"{path}: apply_b_dec_to_input must be true or false, not {given}. Correct it.")
    if not isinstance(cfg.setdefault("metadata", {}), dict):
        raise FormatError(f"{path}: metadata must be an object, not {cfg['metadata']!r:.80}. Correct it.")
    return cfg


def _read_weights(folder: Path, cfg: Mapping[str, Any]) -> dict[str, Tensor]:
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except FileNotFoundError:
        raise FormatError(f"{folder} holds no {WEIGHTS_FILE}; only safetensors weights are read.") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise FormatError(f"{folder / WEIGHTS_FILE} is not a valid safetensors file ({error}). Restore it.") from None
    d_in, d_sae = cfg["d_in"], cfg["d_sae"]
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    for name, shape in shapes.items():
        found = tuple(tensors[name].shape) if name in tensors else "no such tensor"
        if found != shape:
            raise FormatError(
                f"{folder / WEIGHTS_FILE}: {name} must have the shape {shape} of cfg.json, found {found}."
            )
        if not tensors[name].is_floating_point() or not tensors[name].float().isfinite().all():
            raise FormatError(
                f"{folder / WEIGHTS_FILE}: {name} must hold finite floating-point numbers, but it is "
                f"{tensors[name].dtype}{' with NaN or infinity' if tensors[name].is_floating_point() else ''}. "
                "Restore the file, or train the SAE anew."
            )
    return tensors
