"""A tiny random GPT-2 with tokens to train and measure on, for the tests of the procedures."""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from endwise import Corpora, LanguageModel, RunConfig, load_corpora
from endwise.config.run import DataConfig

VOCAB, CONTEXT, WIDTH, LAYERS = 31, 8, 16, 4
EVALUATED = 16
"""Sequences that are measured, or harvested, at once."""
SITE = "blocks.1.hook_resid_pre"
SHIPPED = ("standard", "gated", "topk", "jumprelu", "batchtopk", "matryoshka_batchtopk")
"""The architectures that endwise brings; tests register others."""


@cache
def small_model() -> LanguageModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=CONTEXT, n_embd=WIDTH, n_layer=LAYERS, n_head=2, bos_token_id=0, eos_token_id=0
    )
    gpt2 = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in gpt2.parameters():
            parameter.mul_(5)  # GPT-2's small initial weights would make every prediction alike
    return LanguageModel(gpt2, None)


def write_tokens(folder: Path, seed: int = 0, heldout: int = 512) -> Path:
    """`train.npy` and `heldout.npy`, of random tokens."""
    rng = np.random.default_rng(seed)
    for name, count in (("train", 4096), ("heldout", heldout)):
        np.save(folder / f"{name}.npy", rng.integers(1, VOCAB, count).astype(np.uint16))
    return folder


def data(folder: Path) -> DataConfig:
    return DataConfig(source=str(folder / "train.npy"), heldout=str(folder / "heldout.npy"), context=CONTEXT)


def small_corpora(folder: Path, heldout: int = 256) -> Corpora:
    return load_corpora(
        data(folder),
        tokenizer=None,
        model_context=CONTEXT,
        vocab_size=VOCAB,
        training_tokens=2048,
        evaluation_tokens=heldout,
    )


def recipe(out: Path, kind: str = "e2e", seed: int = 0, **training: object) -> RunConfig:
    objective = {"kind": kind, "sparsity": {"coefficient": 0.3}}
    if kind == "e2e_ds":
        objective["downstream_mse"] = 2.0
    return RunConfig.build(
        {
            "site": SITE,
            "dictionary": {"size": 40},
            "objective": objective,
            "training": {"tokens": 640, "batch": 4, "log_every": 3, "learning_rate": 1e-2, **training},
            "evaluation": {"tokens": 256, "during_training_tokens": 64, "batch": EVALUATED},
            "seed": seed,
            "out": out,
        }
    )
