"""The few operations that decide what training costs, in one implementation per kind of device.

`kernels_for(device)` gives the implementation; `register` adds one (a Triton version, say) beside `eager`, which is
written in device-agnostic operations and stands in wherever there is no other. What each operation computes is said
once, in `interface`; a test holds every registered implementation to it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from endwise.kernels.eager import EagerKernels
from endwise.kernels.interface import Divergence, Found, Kernels, Pairs, Unembedding
from endwise.kernels.scan import kept_per_row
from endwise.kernels.screen import has_fast_bfloat16

__all__ = [
    "Divergence",
    "Found",
    "Kernels",
    "Pairs",
    "Unembedding",
    "has_fast_bfloat16",
    "kept_per_row",
    "kernels_for",
    "register",
    "registered",
    "standing_in",
]

_EAGER = EagerKernels()
_BY_DEVICE: dict[str, Kernels] = {}


def register(device_type: str, kernels: Kernels) -> None:
    """Make `kernels` the implementation for devices of a type (`cpu`, `cuda`, ...)."""
    _BY_DEVICE[device_type] = kernels


def registered() -> dict[str, Kernels]:
    """Every implementation by device type; `eager` serves the rest."""
    return {"eager": _EAGER, **_BY_DEVICE}


def kernels_for(device: torch.device) -> Kernels:
    return _BY_DEVICE.get(device.type, _EAGER)


@contextmanager
def standing_in(device_type: str, kernels: Kernels) -> Iterator[None]:
    """Within it, `kernels` are the implementation for devices of a type."""
    before = _BY_DEVICE.get(device_type)
    _BY_DEVICE[device_type] = kernels
    try:
        yield
    finally:
        if before is None:
            del _BY_DEVICE[device_type]
        else:
            _BY_DEVICE[device_type] = before
