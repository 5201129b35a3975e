"""Comparison that every neighbour's script ends with; it needs torch and safetensors alone."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

CLOSE = 1e-4
"""Largest difference, as a share of the root mean square; of cross-entropies, in nats."""


@dataclass(frozen=True)
class Case:
    """Files that endwise wrote (`case.py`)."""

    folder: Path
    site: str
    clean: float
    spliced: float
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, folder: Path) -> "Case":
        about = json.loads((folder / "case.json").read_text())
        return cls(folder, about["site"], about["clean"], about["spliced"], load_file(folder / "case.safetensors"))

    @property
    def tokens(self) -> Tensor:
        return self.tensors["tokens"]

    def reconstruct(self) -> Callable[[Tensor], Tensor]:
        """The SAE as SAELens reads it, or, in an environment that SAELens cannot be in, endwise."""
        try:
            import sae_lens  # type: ignore[pyrefly:missing-import]
        except ImportError:
            import endwise

            return endwise.SAE.load(self.folder)
        return sae_lens.SAE.load_from_disk(str(self.folder / "sae"))


def cross_entropy(logits: Tensor, tokens: Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), tokens[:, 1:].flatten()))


def compared(what: str, theirs: Tensor | float, ours: Tensor | float) -> None:
    """Print how far both are apart, and end with an error where that is too far."""
    apart = abs(theirs - ours)
    if isinstance(apart, Tensor) and isinstance(ours, Tensor):
        apart = float(apart.max() / ours.square().mean().sqrt())
    print(f"{what}: {apart:.1e} apart")
    if not apart < CLOSE:
        sys.exit(f"{what}: further apart than {CLOSE:g}")


def given() -> Case:
    """The case that the command line names."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} CASE (a folder that case.py wrote)")
    return Case.read(Path(sys.argv[1]))
