"""Kernels other than those that ship: eager ones of another size, or on a processor that is quick, or slow, in bf16."""

import torch

from endwise.kernels import Pairs, Rooms, registered
from endwise.kernels.eager import EagerKernels
from endwise.kernels.interface import HeldPairs
from endwise.kernels.keeping import kept_of, largest_of_rows


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


class HeldKernels(OwnKernels):
    """Holds pairs in slots, as kernels of a GPU do, but chosen among all places."""

    holds = True

    def active_held(self, x, weight, bias, room, above=None):
        least = 0.0 if above is None else above
        return self._held(x, weight, bias, room, lambda _, z: (z.view(len(x), -1) <= least).logical_not().view(-1))

    def largest_held(self, x, weight, bias, k, room):
        return self._held(x, weight, bias, room, lambda *all_pairs: largest_of_rows(*all_pairs, k))

    def _held(self, x, weight, bias, room, chosen):
        n, d_sae = len(x), len(weight)
        places, z = torch.arange(n * d_sae), torch.addmm(bias, x, weight.T).view(-1)
        pairs = Pairs(places // d_sae, places % d_sae, torch.arange(n) * d_sae, d_sae)
        kept = chosen(pairs, z)
        needed = kept.sum()
        return HeldPairs(kept_of(pairs, z, kept, min(room)), torch.stack([needed, needed.clamp_max(room.candidates)]))


class TightRooms(Rooms):
    """No more room than the step before needed, so that many steps are taken again."""

    head, least = 1.0, 0

    def __init__(self):
        super().__init__()
        self.missing = []
        """True or False for each question whether something was missing."""

    def settle(self):
        self.missing.append(super().settle())
        return self.missing[-1]


def all_kernels(screens=(None,), elements=(None,)):
    """Every registered implementation by name, and eager ones as they would be elsewhere."""
    own = {
        f"eager, screened: {screened}, {size} at once": OwnKernels(screened, size)
        for screened in screens
        for size in elements
    }
    return registered() | own
