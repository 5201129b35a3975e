"""Gemma Scope's `params.npz` (Lieberum et al. 2024, arXiv 2408.05147), which has no configuration: the path says it.

Latents are z·[z > θ] with z = x·W_enc + b_enc, of θ ≥ 0; the output is latents·W_dec + b_dec. The layout is
`gemma-scope-<model>-<kind>/layer_<L>/width_<W>/average_l0_<n>/params.npz` with the kind res, mlp, att or transcoders.
"""

import io
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from endwise.common.errors import FormatError
from endwise.common.files import there_is, write_atomic
from endwise.formats.base import Format, Layout, Stored, added
from endwise.formats.reading import arrays_at, assembled, meta, taken

WEIGHTS_FILE = "params.npz"
_NAMES = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
_REPOSITORY = re.compile(r"gemma-scope-(?P<size>[0-9]+b)-(?P<stage>pt|it)-(?P<kind>res|mlp|att|transcoders)")
_KINDS = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z", "transcoders": "mlp_in"}


@added
class GemmaScope(Format):
    """A folder with `params.npz`, or that file."""

    name = "gemma-scope"

    def detects(self, path: Path) -> bool:
        return there_is(self.weights(path))

    def read(self, path: Path, layouts: Mapping[str, Layout]) -> Stored:
        file, about = self.weights(path), self.metadata(path)
        if any("embedding" in part for part in file.parent.resolve().parts):
            raise FormatError(f"{file} is of the model's embeddings by its path, which is no site of endwise's.")
        found = {f"W_{name[2:]}" if name[:2] == "w_" else name: tensor for name, tensor in arrays_at(file).items()}
        if "scaling_factor" in found and (found["scaling_factor"] == 1).all():
            del found["scaling_factor"]
        if "hook_name" not in about:
            warnings.warn(
                f"{file}: its place is not in its path, which must name the repository (gemma-scope-2b-pt-res, -mlp, "
                "-att or -transcoders) and layer_<number>. It is read anyway.",
                stacklevel=4,
            )
        transcodes = "hook_name_out" in about
        return assembled(file, "jumprelu", taken(file, found, _NAMES), layouts, metadata=about, transcodes=transcodes)

    def write(self, path: Path, stored: Stored) -> None:
        if stored.architecture not in ("standard", "jumprelu") or stored.skips or stored.norm is not None:
            raise FormatError(
                f"Gemma Scope has features above thresholds alone (standard, jumprelu), without a skip connection or a "
                f"norm of each token; {path} would be {stored.architecture:.80}. Write it in another format."
            )
        tensors = stored.under(False)
        tensors.setdefault("threshold", torch.zeros_like(tensors["b_enc"]))
        content = io.BytesIO()
        np.savez(content, **{name: tensors[name].cpu().numpy() for name in _NAMES})  # type: ignore[pyrefly:bad-argument-type]
        write_atomic(self.weights(path), content.getvalue())

    def weights(self, path: Path) -> Path:
        return path if path.name == WEIGHTS_FILE else path / WEIGHTS_FILE

    def metadata(self, path: Path) -> Mapping[str, Any]:
        whole = str(self.weights(path).parent.resolve())
        repository = _REPOSITORY.search(whole)
        layer, sparsity = (re.search(rf"{name}_([0-9]{{1,6}})(?:[/\\]|$)", whole) for name in ("layer", "average_l0"))
        about = {"stated_l0": float(sparsity[1])} if sparsity else {}
        if repository is None or layer is None:
            return about
        block, kind = f"blocks.{int(layer[1])}", repository["kind"]
        out = f"{block}.hook_mlp_out" if kind == "transcoders" else None
        model = f"google/gemma-2-{repository['size']}{'-it' if repository['stage'] == 'it' else ''}"
        return about | meta(
            hook_name=f"{block}.{_KINDS[kind]}",
            hook_name_out=out,
            model_name=model,
            context_size=1024,
            prepend_bos=True,
        )
