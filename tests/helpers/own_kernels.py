"""Kernels other than those that ship: eager ones of another size, or on a processor that is quick, or slow, in bf16."""

import torch

from endwise.kernels import registered
from endwise.kernels.eager import EagerKernels


class OwnKernels(EagerKernels):
    """Eager kernels.

    Args:
        screened: whether the processor multiplies bf16 matrices in hardware; None: as this machine's does.
        elements: pre-activations held at once.
        logits: rows of logits held at once.
    """

    def __init__(self, screened=None, elements=None, logits=None):
        self.screened, self.logits = screened, logits
        if elements is not None:
            self.elements = self.most_elements = elements

    def is_screened(self, x):
        return super().is_screened(x) if self.screened is None else self.screened and x.dtype == torch.float32

    def rows_per_chunk(self, unembedding):
        return self.logits or super().rows_per_chunk(unembedding)


class DenseKernels(OwnKernels):
    """Finds no encoder's features few enough for sparse latents."""

    def active(self, *_, **__):
        return None


def all_kernels(screens=(None,), elements=(None,)):
    """Every registered implementation by name, and eager ones as they would be elsewhere."""
    own = {
        f"eager, screened: {screened}, {size} at once": OwnKernels(screened, size)
        for screened in screens
        for size in elements
    }
    return registered() | own
