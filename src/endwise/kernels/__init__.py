"""The few operations that decide what training costs, in one implementation per kind of device.

`kernels_for(device)` gives the implementation: what was given to `register`, or ships for that type of device (for
CUDA in Triton, where that is installed), or else `eager`, which is written in device-agnostic operations. What each
operation computes is stated once, in `interface`; a test holds every implementation to it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from packaging.version import Version

from endwise.kernels.eager import EagerKernels
from endwise.kernels.interface import Divergence, Found, Kernels, Pairs, Unembedding
from endwise.kernels.rooms import Rooms, rooms_in_use
from endwise.kernels.scan import kept_per_row
from endwise.kernels.screen import has_fast_bfloat16

__all__ = [
    "Divergence",
    "Found",
    "Kernels",
    "Pairs",
    "Rooms",
    "Unembedding",
    "has_fast_bfloat16",
    "kept_per_row",
    "kernels_for",
    "register",
    "registered",
    "rooms_in_use",
    "standing_in",
]

_EAGER = EagerKernels()
_BY_DEVICE: dict[str, Kernels] = {}
_SHIPPED = {"cuda": ("triton", Version("3.7"), "endwise.kernels.on_cuda", "TritonKernels")}
"""Implementations by type of device: the package that its kernels need, the oldest version that they were tried with,
the module they are in, and their class. The module is loaded when such a device is first used; its `supports` says
which ones they are for."""


def register(device_type: str, kernels: Kernels) -> None:
    """Make `kernels` the implementation for devices of a type (`cpu`, `cuda`, ...)."""
    _BY_DEVICE[device_type] = kernels


def registered() -> dict[str, Kernels]:
    """Every implementation by device type; `eager` serves the rest."""
    return {"eager": _EAGER, **_BY_DEVICE}


def kernels_for(device: torch.device) -> Kernels:
    return _BY_DEVICE.get(device.type) or _shipped(device)


@cache
def _shipped(device: torch.device) -> Kernels:
    if device.type not in _SHIPPED:
        return _EAGER
    package, oldest, module, name = _SHIPPED[device.type]
    if not has_version(package, oldest):
        return _EAGER
    found = import_module(module)
    return getattr(found, name)() if found.supports(device) else _EAGER


def has_version(package: str, oldest: Version) -> bool:
    """Return whether a package is there, as old or newer; builds of torch bring it under several names."""
    return find_spec(package) is not None and Version(import_module(package).__version__) >= oldest


@contextmanager
def standing_in(device_type: str, kernels: Kernels) -> Iterator[None]:
    """Context in which `kernels` are the implementation for devices of a type."""
    before = _BY_DEVICE.get(device_type)
    _BY_DEVICE[device_type] = kernels
    try:
        yield
    finally:
        if before is None:
            del _BY_DEVICE[device_type]
        else:
            _BY_DEVICE[device_type] = before
