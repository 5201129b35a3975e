"""Llamascopium's folder (2.x; lm-saes before): `config.json` and `sae_weights.safetensors`.

Activations are multiplied by s = √d / (their mean norm), of what is read and of what is written, unless the file says
that this was made part of the weights (`norm_activation: inference`). With z = s_in·x·W_E + b_E, latents are z where
z·n > θ, n being the norm of the feature's W_D unless `sparsity_include_decoder_norm` is false, and the output is
(latents·W_D + b_D)/s_out. θ = exp(log_jumprelu_threshold), or 0 for relu. Of topk, latents are chosen by z·n, and here
they are z·n as well, with directions of norm 1. Where `hook_point_out` is not `hook_point_in`, it is a transcoder.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from endwise.common.errors import FormatError
from endwise.common.files import there_is
from endwise.formats.base import Format, Layout, Stored, added
from endwise.formats.reading import (
    LINEAR,
    assembled,
    checked,
    config_at,
    known,
    meta,
    safetensors_at,
    taken,
    unit_directions,
    whole,
    yes,
)

CONFIG_FILE, WEIGHTS_FILE = "config.json", "sae_weights.safetensors"
NORM = "dataset_average_activation_norm."
_NAMES = {"W_E": "W_enc", "b_E": "b_enc", "W_D": "W_dec", "b_D": "b_dec"}
_THRESHOLDS = ("activation_function.log_jumprelu_threshold", "log_jumprelu_threshold")
_ARCHITECTURES = {"relu": "standard", "jumprelu": "jumprelu", "topk": "topk"}


@added
class Llamascopium(Format):
    """The folder of an SAE."""

    name = "llamascopium"
    files = (WEIGHTS_FILE, CONFIG_FILE)

    def detects(self, path: Path) -> bool:
        if not super().detects(path) or there_is(path / "cfg.json"):
            return False
        try:
            return "hook_point_in" in config_at(path / CONFIG_FILE)
        except FormatError:
            return False

    def read(self, path: Path, layouts: Mapping[str, Layout]) -> Stored:
        file, weights, config = path / CONFIG_FILE, path / WEIGHTS_FILE, config_at(path / CONFIG_FILE)
        known(file, config, "sae_type", ("sae",), "sae")
        known(file, config, "use_decoder_bias", (True,), True)
        architecture = _ARCHITECTURES[known(file, config, "act_fn", tuple(_ARCHITECTURES), "relu")]
        found = safetensors_at(weights)
        norms = {name.removeprefix(NORM): found.pop(name) for name in list(found) if name.startswith(NORM)}
        names = dict(LINEAR if "encoder.weight" in found else _NAMES)
        names |= {name: "threshold" for name in _THRESHOLDS if architecture == "jumprelu" and name in found}
        tensors = checked(weights, taken(weights, found, names))
        if "threshold" in tensors:
            tensors["threshold"] = tensors["threshold"].exp()
        d_model, own = whole(file, config, "d_model"), {}
        s_in, s_out = (_scale(file, config, norms, way, d_model) for way in ("in", "out"))
        if yes(file, config, "sparsity_include_decoder_norm", True):
            if architecture == "topk":
                tensors = unit_directions(tensors)
            if "threshold" in tensors:
                tensors["threshold"] = tensors["threshold"] / tensors["W_dec"].norm(dim=-1).clamp_min(1e-12)
        if architecture == "topk":
            own["k"] = whole(file, config, "top_k", len(tensors["b_enc"]))
        tensors["W_enc"] = tensors["W_enc"] * s_in
        tensors |= {"W_dec": tensors["W_dec"] / s_out, "b_dec": tensors["b_dec"] / s_out}
        out = config.get("hook_point_out") not in (None, config.get("hook_point_in"))
        return assembled(
            *(weights, architecture, tensors, layouts),
            config={"d_in": d_model, **own},
            metadata=self.metadata(path),
            transcodes=out,
            origin=CONFIG_FILE,
        )

    def metadata(self, path: Path) -> Mapping[str, Any]:
        return places_of(config_at(path / CONFIG_FILE))


def places_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return where a configuration of this family says that its SAE belongs."""
    reads, writes = (config.get(f"hook_point_{way}") for way in ("in", "out"))
    out = writes if writes != reads and isinstance(writes, str) else None
    return meta(
        hook_name=reads if isinstance(reads, str) else None, hook_name_out=out, model_name=config.get("model_name")
    )


def scale_of(file: Path, norm: Any, d_model: int, what: str) -> float:
    """Return √d / norm.

    Raises:
        FormatError: the norm is no number above 0.
    """
    norm = float(norm) if isinstance(norm, Tensor) and norm.numel() == 1 else norm
    if type(norm) not in (int, float) or not 0 < norm < math.inf:
        raise FormatError(f"{file}: the mean norm of activations ({what}) must be a number above 0, not {norm!r:.80}.")
    return math.sqrt(d_model) / norm


def _scale(file: Path, config: Mapping[str, Any], norms: Mapping[str, Tensor], way: str, d_model: int) -> float:
    if known(file, config, "norm_activation", ("dataset-wise", "inference"), "dataset-wise") == "inference":
        return 1.0
    hook = config.get(f"hook_point_{way}", config.get("hook_point_in"))
    stated = config.get("dataset_average_activation_norm")
    given = norms.get(str(hook), stated.get(way) if isinstance(stated, dict) else None)
    if given is None:
        raise FormatError(
            f"{file}: activations are scaled by their mean norm at {hook!r:.80} (norm_activation), and neither file "
            f"holds it ({NORM}{str(hook)[:80]}). Export the SAE with it."
        )
    return scale_of(file, given if not isinstance(given, Tensor) else given.detach().to(torch.float64), d_model, NORM)
