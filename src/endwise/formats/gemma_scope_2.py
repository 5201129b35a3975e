"""Gemma Scope 2: a folder with `config.json` and `params.safetensors`, SAEs and transcoders with affine skips.

Latents are z·[z > θ] with z = x·w_enc + b_enc; the output is latents·w_dec + b_dec (+ x·affine_skip_connection,
which is [d_in d_out]). Places are modules of the Hugging Face model (`hf_hook_point_in`, `hf_hook_point_out`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from endwise.common.errors import FormatError
from endwise.common.files import write_json
from endwise.common.tensor_files import write_tensors
from endwise.formats.base import Format, Layout, Stored, added
from endwise.formats.reading import assembled, config_at, known, meta, safetensors_at, site_of_module, taken, whole, yes

CONFIG_FILE, WEIGHTS_FILE, SKIP = "config.json", "params.safetensors", "affine_skip_connection"
_NAMES = {"w_enc": "W_enc", "b_enc": "b_enc", "w_dec": "W_dec", "b_dec": "b_dec", "threshold": "threshold"}


@added
class GemmaScope2(Format):
    """The folder of an SAE."""

    name = "gemma-scope-2"
    files = (WEIGHTS_FILE, CONFIG_FILE)

    def read(self, path: Path, layouts: Mapping[str, Layout]) -> Stored:
        file, weights, about = path / CONFIG_FILE, path / WEIGHTS_FILE, self.metadata(path)
        config = config_at(file)
        known(file, config, "architecture", ("jump_relu",))
        skips = yes(file, config, "affine_connection", False)
        tensors = taken(weights, safetensors_at(weights), _NAMES | ({SKIP: "W_skip.T"} if skips else {}))
        stated = {"d_sae": whole(file, config, "width")} if "width" in config else {}
        out = config.get("hf_hook_point_out") not in (None, config.get("hf_hook_point_in"))
        return assembled(
            weights,
            "jumprelu",
            tensors,
            layouts,
            config=stated,
            metadata=about,
            transcodes=out or skips,
            origin="w_enc",
        )

    def write(self, path: Path, stored: Stored) -> None:
        if stored.architecture not in ("standard", "jumprelu") or stored.norm is not None:
            raise FormatError(
                f"Gemma Scope 2 has features above thresholds alone (standard, jumprelu) and no norm of each token; "
                f"{path} would be {stored.architecture:.80}. Write it in another format."
            )
        about = stored.metadata
        reads = _module(path, about.get("hook_name"))
        writes = _module(path, about.get("hook_name_out", about.get("hook_name")))
        tensors = stored.under(False)
        tensors.setdefault("threshold", torch.zeros_like(tensors["b_enc"]))
        written = {theirs: tensors[ours] for theirs, ours in _NAMES.items()}
        written |= {SKIP: tensors["W_skip"].mT} if stored.skips else {}
        write_tensors(path / WEIGHTS_FILE, written, {})
        model, l0 = about.get("model_name"), about.get("stated_l0")
        config = meta(model_name=model, l0=l0, hf_hook_point_out=None if writes == reads else writes)
        own = {"architecture": "jump_relu", "width": stored.config["d_sae"], "affine_connection": stored.skips}
        write_json(path / CONFIG_FILE, {**own, "hf_hook_point_in": reads, **config})

    def metadata(self, path: Path) -> Mapping[str, Any]:
        config = config_at(path / CONFIG_FILE)
        reads, writes = (config.get(f"hf_hook_point_{way}") for way in ("in", "out"))
        sites = [site_of_module(each) if isinstance(each, str) else None for each in (reads, writes)]
        l0 = config.get("l0")
        return meta(
            hook_name=sites[0],
            hook_name_out=None if sites[1] == sites[0] else sites[1],
            hf_hook_name=reads,
            hf_hook_name_out=writes,
            model_name=_model(config.get("model_name")),
            stated_l0=float(l0) if isinstance(l0, int | float) and type(l0) is not bool else None,
        )


_MODULES = {
    "hook_resid_post": "output",
    "hook_mlp_out": "post_feedforward_layernorm.output",
    "mlp_in": "pre_feedforward_layernorm.output",
    "attn.hook_z": "self_attn.o_proj.input",
}


def _module(path: Path, site: Any) -> str:
    """Return the module path of a site.

    Raises:
        FormatError: the format has none for it.
    """
    block, _, part = str(site).removeprefix("blocks.").partition(".")
    if not block.isdecimal() or part not in _MODULES:
        raise FormatError(
            f"{path}: Gemma Scope 2 has places of {', '.join(_MODULES)} alone, and this one is {site!r:.80} "
            "(metadata.hook_name, hook_name_out). Write it in another format."
        )
    return f"model.layers.{block}.{_MODULES[part]}"


def _model(name: Any) -> str | None:
    """The hub's name of the model, of what files call it (`gemma-v3-1b-pt`)."""
    if not isinstance(name, str):
        return None
    name = name.replace("-v3", "-3")
    return name if "/" in name else f"google/{name}"
