"""Sparse dictionaries, one architecture a file; importing one registers it."""

from endwise.dictionaries.base import SAE, Exported, at_inference
from endwise.dictionaries.latents import DenseLatents, Latents, SparseLatents
from endwise.dictionaries.relu import ReluSAE
from endwise.formats.saelens import read_cfg

__all__ = ["SAE", "DenseLatents", "Exported", "Latents", "ReluSAE", "SparseLatents", "at_inference", "read_cfg"]
