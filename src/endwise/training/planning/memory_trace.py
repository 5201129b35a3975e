"""Memory that a computation holds, found by running it on tensors that have a shape and a dtype but no values.

PyTorch's fake tensors live on its meta device and claim to be on another one. Every operation, forward and backward,
passes through `MemoryTrace`, which follows the storages that are alive: views share one, and what autograd keeps for
the backward pass counts as long as it is kept. What an operation holds for itself while it computes is not seen.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.utils import import_utils

aten: Any = torch.ops.aten


@dataclass(frozen=True)
class Held:
    """Memory held at one moment, in bytes by part."""

    parts: dict[str, int]
    during: str
    """The part that was being computed."""

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())


class MemoryTrace:
    """Context in which tensors are fake, and what is held is counted by the part that made it.

    Args:
        fake: False follows real tensors instead.
    """

    def __init__(self, *, fake: bool = True) -> None:
        self._fake = FakeTensorMode() if fake else nullcontext()
        self._watch = _Watch(self._see, fake)
        self._entered = ExitStack()
        self._storages: dict[int, tuple[str, int, weakref.ref[UntypedStorage]]] = {}
        self._held: dict[str, int] = {}
        self._part = "other"
        self._peak = Held({}, self._part)
        self._peak_bytes = self._bytes = 0

    def copy(self) -> "MemoryTrace":
        """A trace that holds what this one holds now, for one of several computations on it."""
        made = MemoryTrace(fake=self._watch.fakes)
        made._fake = self._fake  # tensors of two modes do not mix
        for part, _, alive in list(self._storages.values()):
            if (storage := alive()) is not None:
                with made.part(part):
                    made._see(storage)
        return made

    def __enter__(self) -> "MemoryTrace":
        self._entered.enter_context(self._fake)
        self._entered.enter_context(_as_real_ones())
        self._entered.enter_context(self._watch)
        return self

    def __exit__(self, *_: object) -> None:
        self._entered.close()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what is made within it as this part's."""
        before, self._part = self._part, name
        try:
            yield
        finally:
            self._part = before

    def claim(self, tensor: Tensor, name: str) -> None:
        """Count the tensor's memory as this part's from now on."""
        key = tensor.untyped_storage()._cdata  # noqa: SLF001
        part, size, alive = self._storages[key]
        self._storages[key] = name, size, alive
        self._held[part] -= size
        self._held[name] = self._held.get(name, 0) + size

    def start(self) -> None:
        """Look for the peak from here on."""
        self._peak, self._peak_bytes = Held(dict(self._held), self._part), self._bytes

    def peak(self) -> Held:
        """The moment since `start` at which most was held."""
        return Held({part: size for part, size in self._peak.parts.items() if size}, self._peak.during)

    def _see(self, storage: UntypedStorage) -> None:
        key = storage._cdata  # noqa: SLF001 - its address, as long as it lives
        if key in self._storages:
            return
        size = storage.nbytes()
        self._storages[key] = self._part, size, weakref.ref(storage)
        weakref.finalize(storage, self._forget, key)
        self._held[self._part] = self._held.get(self._part, 0) + size
        self._bytes += size
        if self._bytes > self._peak_bytes:
            self._peak, self._peak_bytes = Held(dict(self._held), self._part), self._bytes

    def _forget(self, key: int) -> None:
        part, size, _ = self._storages.pop(key)
        self._held[part] -= size
        self._bytes -= size


@contextmanager
def _as_real_ones() -> Iterator[None]:
    """transformers makes masks for fake tensors that it leaves out for real ones; within this it does not know them."""
    recognises = getattr(import_utils, "is_fake_tensor", None)
    if recognises is None:
        yield
        return
    setattr(import_utils, "is_fake_tensor", _no)  # noqa: B010 - not a name that every release has
    try:
        yield
    finally:
        setattr(import_utils, "is_fake_tensor", recognises)  # noqa: B010


def _no(_: object) -> bool:
    return False


class _Watch(TorchDispatchMode):
    """Shows every operation's results to `see`, and answers what cannot be known without values."""

    def __init__(self, see: Callable[[UntypedStorage], None], fakes: bool) -> None:
        super().__init__()
        self._see, self.fakes = see, fakes

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and to say so at each of thousands of operations takes long

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.fakes and func is torch.ops.prim.device.default:  # half of all that a pass asks for
            return args[0].fake_device
        # Asked for a value (is this equal to that? is it finite?), a fake tensor says what holds of a healthy model.
        if self.fakes and func in (aten.allclose.default, aten.equal.default):
            return True
        if self.fakes and func is aten._local_scalar_dense.default:  # noqa: SLF001
            return _one(args[0].dtype)
        stand_in = _STAND_INS.get(func) if self.fakes else None
        result = (stand_in or func)(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        return result


def _one(dtype: torch.dtype) -> bool | float | int:
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1


def _attention(query: Tensor, _key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    """Fused attention's result lies position by position, so that its heads are joined without a copy. PyTorch's own
    description of it has it lie head by head.
    """
    batch, heads, positions, _width = query.shape
    result = query.new_empty(batch, positions, heads, value.shape[-1]).transpose(1, 2)
    return result, query.new_empty(batch, positions, heads, dtype=torch.float32).transpose(1, 2)


def _experts(rows: Tensor, matrices: Tensor, *_: Any, **__: Any) -> Tensor:
    """PyTorch's own description of this product takes bf16 only."""
    return rows.new_empty(rows.shape[0], matrices.shape[-1])


def _all_places(mask: Tensor) -> Tensor:
    """Return room for all places: how many features are dead, or rows count, is not known before."""
    return mask.new_empty(mask.numel(), mask.dim(), dtype=torch.int64)


def _indexed(tensor: Tensor, indices: Any) -> Tensor:
    """Index a tensor; of a mask, all places count."""
    first = indices[0]
    if len(indices) == 1 and first is not None and first.dtype == torch.bool:
        return tensor.new_empty(first.numel(), *tensor.shape[first.dim() :])
    return aten.index.Tensor(tensor, indices)


def _counts(numbers: Tensor, _weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    return numbers.new_empty(minlength)


_STAND_INS: dict[Any, Callable[..., Any]] = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,  # noqa: SLF001
    aten._grouped_mm.default: _experts,  # noqa: SLF001
    aten.nonzero.default: _all_places,
    aten.index.Tensor: _indexed,
    aten.bincount.default: _counts,
}
"""Stand-ins for operations whose results PyTorch describes otherwise than they are, or not before values are known."""
