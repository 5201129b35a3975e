"""Sparse dictionaries, one architecture a file; importing one registers it."""

from endwise.dictionaries.base import SAE, Exported, TokenLosses, TrainingPass, at_inference, within_norm
from endwise.dictionaries.batchtopk import BatchTopKSAE
from endwise.dictionaries.gated import GatedSAE
from endwise.dictionaries.jumprelu import JumpReLUSAE
from endwise.dictionaries.latents import DenseLatents, Latents, SparseLatents
from endwise.dictionaries.linear import LinearConfig, LinearSAE
from endwise.dictionaries.matryoshka import MatryoshkaSAE
from endwise.dictionaries.normed import NormedSAE
from endwise.dictionaries.relu import ReluSAE
from endwise.dictionaries.topk import TopKSAE
from endwise.formats.saelens import read_cfg

__all__ = [
    "SAE",
    "BatchTopKSAE",
    "DenseLatents",
    "Exported",
    "GatedSAE",
    "JumpReLUSAE",
    "Latents",
    "LinearConfig",
    "LinearSAE",
    "MatryoshkaSAE",
    "NormedSAE",
    "ReluSAE",
    "SparseLatents",
    "TokenLosses",
    "TopKSAE",
    "TrainingPass",
    "at_inference",
    "read_cfg",
    "within_norm",
]
