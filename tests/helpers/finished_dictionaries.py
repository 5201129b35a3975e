"""A finished dictionary of every architecture, of random weights, and what it reads."""

import functools

import torch

from endwise.config.dictionary import ARCHITECTURES

NAMES = ("standard", "gated", "topk", "jumprelu", "batchtopk", "matryoshka_batchtopk")
ONE_THRESHOLD = {"batchtopk", "matryoshka_batchtopk"}
SIZE, WIDTH = 48, 16


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def x_of(rows=3000, seed=9):
    """Activations off the origin, with directions of many sizes."""
    return drawn(rows, WIDTH, seed=seed) * torch.linspace(0.3, 3, WIDTH) + drawn(WIDTH, seed=1)


@functools.cache
def finished(architecture):
    """As a file gives it; the directions of a choice by size have one norm, the others many."""
    names = ("W_enc", "W_dec", "b_dec", "b_enc", "b_gate", "b_mag", "r_mag")
    shapes = ((WIDTH, SIZE), (SIZE, WIDTH), (WIDTH,), *((SIZE,),) * 4)
    tensors = {name: drawn(*shape, seed=n) / 3 for n, (name, shape) in enumerate(zip(names, shapes, strict=True))}
    lengths = torch.ones(SIZE) if architecture in {"topk", *ONE_THRESHOLD} else torch.linspace(0.3, 2, SIZE)
    tensors["W_dec"] = torch.nn.functional.normalize(tensors["W_dec"], dim=1) * lengths[:, None]
    tensors["threshold"] = torch.full((SIZE,), 0.7) if architecture in ONE_THRESHOLD else drawn(SIZE, seed=8).abs()
    return ARCHITECTURES[architecture].from_tensors(tensors, {"d_in": WIDTH, "d_sae": SIZE, "k": 6}).eval()
