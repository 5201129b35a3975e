"""Goodfire's `.pt` or `.pth`, a state dict: latents ReLU(x·encoder_linear.weightᵀ + bias), linear decoder.

The file's name states the model and the layer whose output it reads: `Llama-3.1-8B-Instruct-SAE-l19.pth`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from endwise.formats.base import Format, Layout, Stored, added
from endwise.formats.reading import assembled, names_in, pickle_at, taken

_NAMES = {
    "encoder_linear.weight": "W_enc.T",
    "encoder_linear.bias": "b_enc",
    "decoder_linear.weight": "W_dec.T",
    "decoder_linear.bias": "b_dec",
}


@added
class Goodfire(Format):
    """The file of an SAE."""

    name = "goodfire"

    def detects(self, path: Path) -> bool:
        return "encoder_linear.weight" in names_in(path)

    def read(self, path: Path, layouts: Mapping[str, Layout]) -> Stored:
        tensors = taken(path, pickle_at(path), _NAMES)
        return assembled(path, "standard", tensors, layouts, metadata=self.metadata(path))

    def metadata(self, path: Path) -> Mapping[str, Any]:
        name = re.fullmatch(r"(Llama-.+)-SAE-l([0-9]{1,6})", path.stem)
        if name is None:
            return {}
        return {"hook_name": f"blocks.{int(name[2])}.hook_resid_post", "model_name": f"meta-llama/{name[1]}"}
