"""Sparse dictionaries, one architecture a file; importing one here registers it under its SAELens name."""

from endwise.dictionaries.base import SAE, Latents, read_cfg
from endwise.dictionaries.relu import ReluSAE

__all__ = ["SAE", "Latents", "ReluSAE", "read_cfg"]
