"""What memory a computation holds, found by running it on tensors that have a shape and a dtype but no values.

PyTorch's fake tensors live on its meta device and claim to be on another one. Every operation, forward and backward,
passes through `MemoryTrace`, which follows the storages that are alive: views share one, and what autograd keeps for
the backward pass counts as long as it is kept. What an operation holds for itself while it computes is not seen.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten: Any = torch.ops.aten


@dataclass(frozen=True)
class Held:
    """What is held at one moment, in bytes by part."""

    parts: dict[str, int]
    during: str
    """The part that was being computed."""

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())


class MemoryTrace:
    """Within it, tensors are fake, and what is held is counted by the part that made it."""

    def __init__(self) -> None:
        self._fake = FakeTensorMode()
        self._watch = _Watch(self._see)
        self._entered = ExitStack()
        self._storages: dict[int, tuple[str, int]] = {}
        self._held: dict[str, int] = {}
        self._part = "other"
        self._peak = Held({}, self._part)
        self._peak_bytes = self._bytes = 0

    def __enter__(self) -> "MemoryTrace":
        self._entered.enter_context(self._fake)
        self._entered.enter_context(self._watch)
        return self

    def __exit__(self, *_: object) -> None:
        self._entered.close()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is made within it counts as this part's."""
        before, self._part = self._part, name
        try:
            yield
        finally:
            self._part = before

    def claim(self, tensor: Tensor, name: str) -> None:
        """From now on the tensor's memory counts as this part's."""
        key = _key(tensor)
        part, size = self._storages[key]
        self._storages[key] = name, size
        self._held[part] -= size
        self._held[name] = self._held.get(name, 0) + size

    def start(self) -> None:
        """Looks for the peak from here on."""
        self._peak, self._peak_bytes = Held(dict(self._held), self._part), self._bytes

    def peak(self) -> Held:
        """The moment since `start` at which most was held."""
        return Held({part: size for part, size in self._peak.parts.items() if size}, self._peak.during)

    def _see(self, tensor: Tensor) -> None:
        key = _key(tensor)
        if key in self._storages:
            return
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        self._storages[key] = self._part, size
        weakref.finalize(storage, self._forget, key)
        self._held[self._part] = self._held.get(self._part, 0) + size
        self._bytes += size
        if self._bytes > self._peak_bytes:
            self._peak, self._peak_bytes = Held(dict(self._held), self._part), self._bytes

    def _forget(self, key: int) -> None:
        part, size = self._storages.pop(key)
        self._held[part] -= size
        self._bytes -= size


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # noqa: SLF001 - a storage's address, as long as it lives


class _Watch(TorchDispatchMode):
    """Shows every operation's results to `see`, and answers what cannot be known without values."""

    def __init__(self, see: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._see = see

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Where a number is asked for (is all of this equal? is it finite?), what holds of a healthy model is answered.
        if func in (aten.allclose.default, aten.equal.default):
            return True
        if func is aten._local_scalar_dense.default:  # noqa: SLF001
            return _one(args[0].dtype)
        if func is aten._grouped_mm.default:  # noqa: SLF001 - its meta implementation takes bf16 only
            result = args[0].new_empty(args[0].shape[0], args[1].shape[-1])
        else:
            result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result


def _one(dtype: torch.dtype) -> bool | float | int:
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
