"""Randomness: from a seed a stream of its own for every purpose, and the states of the generators all code shares.

A purpose's stream does not change when another purpose draws more, and equal seeds for two purposes give unrelated
numbers.
"""

import hashlib
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


def numpy_stream(seed: int, purpose: str, *which: int) -> np.random.Generator:
    """The stream of a purpose; `which` tells apart those of one purpose (epochs, say)."""
    return np.random.default_rng(_sequence(seed, purpose, *which))


def torch_stream(seed: int, purpose: str) -> torch.Generator:
    """Variant of `numpy_stream` on the CPU whatever the device, so that a seed means the same on all of them."""
    return torch.Generator().manual_seed(_number(seed, purpose))


def _sequence(seed: int, purpose: str, *which: int) -> np.random.SeedSequence:
    # NumPy pads entropy with zeros, so that [seed] and [seed, 0] would be one stream; spawn keys are kept apart.
    name = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8])
    return np.random.SeedSequence(seed, spawn_key=(name, *which))


def _number(seed: int, purpose: str) -> int:
    return int(_sequence(seed, purpose).generate_state(1, np.uint64)[0])


@contextmanager
def shared_generators(seed: int) -> Iterator[None]:
    """Context in which the generators of torch, numpy and python that any code may draw from start from the seed; their
    states of before come back at its end.
    """
    before = generator_states()
    number = _number(seed, "shared generators")
    torch.manual_seed(number)
    np.random.seed(number % 2**32)  # noqa: NPY002  It is this one whose draws must repeat.
    random.seed(number)
    try:
        yield
    finally:
        restore_generators(before)


def generator_states() -> dict[str, Tensor]:
    """Collect, by `random.<library>`, the states of the shared generators."""
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    version, internal, gauss_next = random.getstate()
    states = {
        "random.torch": torch.get_rng_state(),
        "random.numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "random.numpy.position": torch.tensor([position, has_gauss]),
        "random.numpy.gauss": torch.tensor(gauss, dtype=torch.float64),
        "random.python": torch.tensor([version, *internal]),
        "random.python.gauss": torch.tensor(float("nan") if gauss_next is None else gauss_next, dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states |= {f"random.cuda.{n}": state for n, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def restore_generators(states: Mapping[str, Tensor]) -> None:
    """Put the generators back to `generator_states`; a GPU that is not here any more is left out."""
    torch.set_rng_state(states["random.torch"])
    position, has_gauss = states["random.numpy.position"].tolist()
    keys = states["random.numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, float(states["random.numpy.gauss"])))  # noqa: NPY002
    version, *internal = states["random.python"].tolist()
    gauss = float(states["random.python.gauss"])
    random.setstate((version, tuple(internal), None if gauss != gauss else gauss))
    for n in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"random.cuda.{n}" in states:
            torch.cuda.set_rng_state(states[f"random.cuda.{n}"], n)
