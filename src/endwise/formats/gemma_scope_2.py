"""Gemma Scope 2: a folder with `config.json` and `params.safetensors`, SAEs and transcoders with affine skips.

Latents are z·[z > θ] with z = x·w_enc + b_enc; the output is latents·w_dec + b_dec (+ x·affine_skip_connection,
which is [d_in d_out]). Places are modules of the Hugging Face model (`hf_hook_point_in`, `hf_hook_point_out`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from endwise.common.files import there_is
from endwise.formats.base import Format, Layout, Stored, added
from endwise.formats.reading import assembled, config_at, known, safetensors_at, site_of_module, taken, told, whole, yes

CONFIG_FILE, WEIGHTS_FILE, SKIP = "config.json", "params.safetensors", "affine_skip_connection"
_NAMES = {"w_enc": "W_enc", "b_enc": "b_enc", "w_dec": "W_dec", "b_dec": "b_dec", "threshold": "threshold"}


@added
class GemmaScope2(Format):
    """The folder of an SAE."""

    name = "gemma-scope-2"

    def detects(self, path: Path) -> bool:
        return there_is(path / CONFIG_FILE) and there_is(path / WEIGHTS_FILE)

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
            told_by="w_enc",
        )

    def weights(self, path: Path) -> Path:
        return path / WEIGHTS_FILE

    def metadata(self, path: Path) -> Mapping[str, Any]:
        config = config_at(path / CONFIG_FILE)
        reads, writes = (config.get(f"hf_hook_point_{way}") for way in ("in", "out"))
        sites = [site_of_module(each) if isinstance(each, str) else None for each in (reads, writes)]
        l0 = config.get("l0")
        return told(
            hook_name=sites[0],
            hook_name_out=None if sites[1] == sites[0] else sites[1],
            hf_hook_name=reads,
            hf_hook_name_out=writes,
            model_name=_model(config.get("model_name")),
            stated_l0=float(l0) if isinstance(l0, int | float) and type(l0) is not bool else None,
        )


def _model(name: Any) -> str | None:
    """The hub's name of the model, of what files call it (`gemma-v3-1b-pt`)."""
    if not isinstance(name, str):
        return None
    name = name.replace("-v3", "-3")
    return name if "/" in name else f"google/{name}"
