"""The language model and corpus that ship inside the package, so that everything runs offline (`data/README.md`)."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from endwise.common.errors import ModelError


def folder() -> Path:
    """Return the folder of the model, its tokenizer and the two token streams.

    Raises:
        ModelError: this installation has lost them.
    """
    path = Path(__file__).parent / "data"
    if not (path / "model.safetensors").exists():
        raise ModelError(f"This installation lacks the embedded model ({path}). Install endwise again.")
    return path


def train_tokens() -> NDArray[np.uint16]:
    """Token ids to train SAEs on, each document followed by EOS (id 0); read from the disk as needed."""
    return np.load(folder() / "train_tokens.npy", mmap_mode="r", allow_pickle=False)


def heldout_tokens() -> NDArray[np.uint16]:
    """The same of text that neither the language model nor any SAE trains on."""
    return np.load(folder() / "heldout_tokens.npy", mmap_mode="r", allow_pickle=False)
