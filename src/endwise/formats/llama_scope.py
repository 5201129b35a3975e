"""Llama Scope (He et al. 2024, arXiv 2410.20526): `hyperparams.json` and `checkpoints/final.safetensors`.

With s = √d / (mean norm of activations) of what is read and of what is written, z = x·Wᵀ + b/s_in, directions
D·s_in/s_out and the bias b_dec/s_out. Latents are z above one threshold θ. What is compared with it is disputed, and
the files leave it open: `gate` in `hyperparams.json` may state it, and a measured L0 near `top_k` shows which is right.
With n the norm of a direction, or 1 where the file says `sparsity_include_decoder_norm: false`:

| `gate` | active where | whose reading |
|---|---|---|
| `released` | z·n > θ | of lm-saes at the time of the release, by which θ was chosen; where nothing is said |
| `saelens` | z > θ | SAELens's |
| `trained` | z·n·s_out > θ | as TopK was trained, on activations of norm √d |

Directions then get norm 1, where n is not 1, and latents are multiplied by n, as lm-saes does.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from endwise.formats.base import Format, Layout, Stored, added
from endwise.formats.llamascopium import places_of, scale_of
from endwise.formats.reading import LINEAR, assembled, checked, config_at, known, safetensors_at, taken, whole, yes

CONFIG_FILE, WEIGHTS_FILE = "hyperparams.json", "checkpoints/final.safetensors"
GATES = ("released", "saelens", "trained")


@added
class LlamaScope(Format):
    """The folder of an SAE."""

    name = "llama-scope"
    files = (WEIGHTS_FILE, CONFIG_FILE)

    def read(self, path: Path, layouts: Mapping[str, Layout]) -> Stored:
        file, weights, config = path / CONFIG_FILE, path / WEIGHTS_FILE, config_at(path / CONFIG_FILE)
        known(file, config, "act_fn", ("jumprelu",))
        known(file, config, "use_glu_encoder", (False,), False)
        known(file, config, "apply_decoder_bias_to_pre_encoder", (False,), True)  # lm-saes's own defaults, from here on
        known(file, config, "norm_activation", ("dataset-wise",), "token-wise")
        tensors = checked(weights, taken(weights, safetensors_at(weights), LINEAR))
        d_model, threshold, norm = whole(file, config, "d_model"), config.get("jump_relu_threshold"), {}
        if isinstance(config.get("dataset_average_activation_norm"), dict):
            norm = config["dataset_average_activation_norm"]
        s_in, s_out = (
            scale_of(file, norm.get(way), d_model, f"dataset_average_activation_norm.{way}") for way in _WAYS
        )
        theta = scale_of(file, threshold, 1, "jump_relu_threshold") ** -1
        tensors |= {"b_enc": tensors["b_enc"] / s_in, "b_dec": tensors["b_dec"] / s_out}
        tensors["W_dec"] = tensors["W_dec"] * (s_in / s_out)
        gate, norms = self._gate(file, config), torch.ones_like(tensors["b_enc"])
        if yes(file, config, "sparsity_include_decoder_norm", True):
            norms = tensors["W_dec"].norm(dim=-1).clamp_min(1e-12)
        least = theta / (s_out if gate == "trained" else 1)
        tensors["threshold"] = norms * least if gate == "saelens" else torch.full_like(norms, least)
        tensors |= {"W_enc": tensors["W_enc"] * norms, "b_enc": tensors["b_enc"] * norms}
        tensors["W_dec"] = tensors["W_dec"] / norms[:, None]
        stated = {"d_in": d_model, **({"d_sae": whole(file, config, "d_sae")} if "d_sae" in config else {})}
        about, out = self.metadata(path), config.get("hook_point_out") not in (None, config.get("hook_point_in"))
        return assembled(
            *(weights, "jumprelu", tensors, layouts),
            config=stated,
            metadata=about,
            transcodes=out,
            origin=CONFIG_FILE,
        )

    def _gate(self, file: Path, config: Mapping[str, Any]) -> str:
        gate = known(file, config, "gate", GATES, GATES[0])
        if "gate" not in config:
            warnings.warn(
                f"{file}: which features count as active is disputed for Llama Scope. Read as {gate!r}; compare the L0 "
                f"with the stated one (endwise inspect --model), and set gate to what fits: {', '.join(GATES)}.",
                stacklevel=5,
            )
        return gate

    def metadata(self, path: Path) -> Mapping[str, Any]:
        config = config_at(path / CONFIG_FILE)
        k = config.get("top_k")
        about = {"model_name": "meta-llama/Llama-3.1-8B"} if "Llama3_1-8B" in str(path.resolve()) else {}
        return places_of(config) | about | ({"stated_l0": float(k)} if type(k) is int else {})


_WAYS = ("in", "out")
