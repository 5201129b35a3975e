"""OpenAI's autoencoders of GPT-2 small (Gao et al. 2024, arXiv 2406.04093): one `.pt` of tensors and settings.

Latents are σ((x − pre_bias)·encoder.weightᵀ + latent_bias), the output latents·decoder.weightᵀ + pre_bias. `activation`
says σ: ReLU, or TopK with the k of `activation_state_dict`; of the latter the input is (x − mean)/(std + 1e-5) over its
dimensions, Bessel's std, and the output is brought back. The path names place and layer: `…/resid_post_mlp_v5_32k/
autoencoders/6.pt`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from endwise.common.errors import FormatError
from endwise.formats.base import Format, Layout, Stored, added
from endwise.formats.reading import assembled, known, meta, names_in, pickle_at, taken, whole

_NAMES = {"pre_bias": "b_dec", "encoder.weight": "W_enc.T", "latent_bias": "b_enc"}
_DECODERS = {"decoder.weight": "W_dec.T", "decoder.linear.weight": "W_dec"}
"""Decoders of two kinds: its own, and tied to the encoder."""
_LEFT = {
    "activation",
    "activation_state_dict",
    "stats_last_nonzero",
    "latents_activation_frequency",
    "latents_mean_square",
}
_PLACES = {
    "mlp_post_act": "mlp.hook_post",
    "resid_delta_attn": "hook_attn_out",
    "resid_post_attn": "hook_resid_mid",
    "resid_delta_mlp": "hook_mlp_out",
    "resid_post_mlp": "hook_resid_post",
}


@added
class OpenAI(Format):
    """The file of an autoencoder."""

    name = "openai"

    def detects(self, path: Path) -> bool:
        return {"pre_bias", "latent_bias"} <= names_in(path)

    def read(self, path: Path, layouts: Mapping[str, Layout]) -> Stored:
        found = pickle_at(path)
        activation, config = known(path, found, "activation", ("ReLU", "TopK"), "ReLU"), {}
        decoder = next((name for name in _DECODERS if name in found), "decoder.weight")
        tensors = taken(path, found, {**_NAMES, decoder: _DECODERS[decoder]}, _LEFT)
        if activation == "TopK":
            state = found.get("activation_state_dict")
            if not isinstance(state, Mapping):
                raise FormatError(f"{path}: activation_state_dict must hold the k of TopK. Restore it.")
            known(path, state, "postact_fn", ("ReLU",), "ReLU")
            config = {"k": whole(path, state, "k", len(tensors["b_enc"])), "normalize": "layer_norm"}
        architecture = "topk" if activation == "TopK" else "standard"
        return assembled(
            path, architecture, tensors, layouts, config=config, metadata=self.metadata(path), subtracts_b_dec=True
        )

    def metadata(self, path: Path) -> Mapping[str, Any]:
        place = re.search(
            rf"({'|'.join(_PLACES)})[^/\\]*[/\\]autoencoders[/\\]([0-9]{{1,6}})\.pt$",
            str(path.parent.resolve() / path.name),
        )
        site = None if place is None else f"blocks.{int(place[2])}.{_PLACES[place[1]]}"
        return meta(hook_name=site, model_name=None if place is None else "gpt2")
