"""Beginning and end of all programs here: the job, the SAE and its model as SAELens opens them, the numbers."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sae_lens  # type: ignore[pyrefly:missing-import]
import torch


@dataclass(frozen=True)
class BenchJob:
    """Job that `endwise bench` wrote for the program; the folder that it starts in is its own."""

    name: str
    sae: str
    model: str
    """A name that TransformerLens knows, or a folder."""
    site: str
    settings: dict[str, Any]
    local: str | None
    """Folder of data to use instead of the suite's own."""
    heldout: str | None
    """File of sequences of tokens to measure on instead."""

    @classmethod
    def given(cls) -> "BenchJob":
        return cls(**json.loads(Path(sys.argv[1]).read_text()))

    @property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"

    def open_sae(self) -> Any:
        sae = sae_lens.SAE.load_from_disk(self.sae, device=self.device)
        sae.cfg.metadata.model_name = self.name_of_model
        return sae

    def open_model(self) -> Any:
        """The plain model. A folder is opened by TransformerLens's bridge, as its own models know names alone."""
        if Path(self.model).is_dir():
            from transformer_lens.model_bridge import TransformerBridge  # type: ignore[pyrefly:missing-import]

            return TransformerBridge.boot_transformers(self.model, device=self.device)
        from transformer_lens import HookedTransformer  # type: ignore[pyrefly:missing-import]

        return HookedTransformer.from_pretrained_no_processing(self.model, device=self.device)

    @property
    def name_of_model(self) -> str:
        """A name that can be a part of a relative path."""
        return self.model.strip("/").replace("/", "_")


def done(numbers: Mapping[str, float | int]) -> None:
    Path("done.json").write_text(json.dumps(numbers))
