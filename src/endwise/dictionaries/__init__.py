"""Sparse dictionaries, one architecture a file; importing one here registers it under its SAELens name."""

from endwise.dictionaries.base import SAE
from endwise.dictionaries.latents import DenseLatents, Latents, SparseLatents
from endwise.dictionaries.relu import ReluSAE
from endwise.formats.saelens import read_cfg

__all__ = ["SAE", "DenseLatents", "Latents", "ReluSAE", "SparseLatents", "read_cfg"]
