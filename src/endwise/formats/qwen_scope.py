"""Qwen-Scope's `layer<n>.sae.pt`: TopK SAEs of the residual stream, one file a layer.

Latents are the k largest of ReLU(x·W_encᵀ + b_enc), with W_enc [F d] and W_dec [d F]; nothing is subtracted. The k is
in the configuration beside (`config.json`, `model_type: topk_sae`), or in the repository's name,
`SAE-Res-<model>-W<N>K-L0_<k>`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from endwise.common.errors import FormatError
from endwise.common.files import there_is
from endwise.formats.base import Format, Layout, Stored, added
from endwise.formats.reading import assembled, config_at, known, meta, pickle_at, taken, whole

CONFIG_FILE = "config.json"
FILE = re.compile(r"layer([0-9]{1,6})\.sae\.pt")
_NAMES = {"W_enc": "W_enc.T", "b_enc": "b_enc", "W_dec": "W_dec.T", "b_dec": "b_dec"}
_REPOSITORY = re.compile(r"SAE-Res-(?P<model>[^/\\]+)-W[0-9]+K-L0_(?P<k>[0-9]{1,6})")


@added
class QwenScope(Format):
    """The file of a layer."""

    name = "qwen-scope"

    def detects(self, path: Path) -> bool:
        return FILE.fullmatch(path.name) is not None and there_is(path)

    def read(self, path: Path, layouts: Mapping[str, Layout]) -> Stored:
        tensors, config = taken(path, pickle_at(path), _NAMES), {}
        if stated := _config(path):
            file = path.parent / CONFIG_FILE
            known(file, stated, "hook_point", ("resid_post",), "resid_post")
            config = {ours: whole(file, stated, theirs) for theirs, ours in (("d_model", "d_in"), ("d_sae", "d_sae"))}
            k = whole(file, stated, "k", config["d_sae"])
        elif named := _REPOSITORY.search(str(path.parent.resolve() / path.name)):
            k = whole(path, {"k": int(named["k"])}, "k", len(tensors["b_enc"]))
        else:
            raise FormatError(
                f"{path}: how many features a token has, k, is neither in a {CONFIG_FILE} beside it nor in the name of "
                "its folder (SAE-Res-<model>-W<N>K-L0_<k>). Keep the repository's name."
            )
        about, origin = self.metadata(path), CONFIG_FILE if stated else "its W_enc"
        return assembled(path, "topk", tensors, layouts, config={**config, "k": k}, metadata=about, origin=origin)

    def metadata(self, path: Path) -> Mapping[str, Any]:
        match, named = FILE.fullmatch(path.name), _REPOSITORY.search(str(path.parent.resolve() / path.name))
        stated = _config(path).get("base_model")
        model = stated if isinstance(stated, str) else f"Qwen/{named['model']}" if named else None
        return meta(hook_name=f"blocks.{int(match[1])}.hook_resid_post" if match else None, model_name=model)


def _config(path: Path) -> dict[str, Any]:
    """Return the configuration beside a file; empty, where there is none of such an SAE."""
    file = path.parent / CONFIG_FILE
    config = config_at(file) if there_is(file) else {}
    return config if config.get("model_type") == "topk_sae" else {}
