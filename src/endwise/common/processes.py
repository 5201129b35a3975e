"""Several processes that train one run: who they are, and the few things that they do together.

Every process holds the whole SAE and reads its own share of each batch; sums (gradients, loss terms, counts) are added
up over the processes, so that all of them take the same step. The first process alone writes to disk. Reductions are
explicit: the backward pass of a step comes in several pieces, and only its end knows the gradient.

Where a dictionary is split into shards (`World.split`), processes form a grid: *shards* read the same rows and hold
different features, *replicas* hold the same features and read different rows.

Tensors on a CPU travel by gloo, those on a GPU by NCCL. What the hosts agree on (has anyone failed, was a stop asked
for) lies on the CPU, so that no host waits for its GPU.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from endwise.common.errors import ConfigError, ElsewhereFailed, ProcessLost

TIMEOUT_VARIABLE = "ENDWISE_TIMEOUT"
TIMEOUT_SECONDS = 600.0
"""Time that a process waits for the others before it gives up; longer than the longest evaluation, checkpoint, or
tokenising that one does while another has the text already."""

T = TypeVar("T")


class Lending:
    """Tensors that lie in parts, one in each process, gathered whenever any process needs one whole.

    A gathering takes all processes, but they need not come to the same ones in the same order: one has a sequence more
    to go through, the first alone measures something. So all agree before each which tensor is gathered; who asked for
    another, or waits for the others in a reduction, lends its part meanwhile.

    Args:
        hosts: see `World`.
    """

    def __init__(self, hosts: Any = None) -> None:
        self._hosts = hosts
        self._parts: list[Callable[[], Tensor]] = []

    def __deepcopy__(self, _memo: Any) -> "Lending":
        return self  # the processes of a dictionary that is copied are the same

    def offer(self, part: Callable[[], Tensor]) -> int:
        """Take what makes this process's part of a tensor, flat; all processes offer the same tensors in one order.

        Returns:
            The number by which `gather` knows it.
        """
        self._parts.append(part)
        return len(self._parts) - 1

    def gather(self, number: int, whole: Tensor, part: Tensor) -> None:
        """Fill `whole` with the parts of all processes in the order of their ranks, lending others theirs until then.

        Raises:
            ProcessLost: another process is gone, or does not answer in time.
        """
        with _noticing_loss():
            while (wanted := self._agreed(number)) != number:
                self._lend(wanted)
            _gather_into(whole, part)

    def lend(self) -> None:
        """Lend this process's parts until no process wants any; all come here before a reduction.

        Raises:
            ProcessLost: see `gather`.
        """
        with _noticing_loss():
            while self._parts and (wanted := self._agreed(-1)) >= 0:
                self._lend(wanted)

    def _agreed(self, wanted: int) -> int:
        """The tensor that is gathered next: of those that are wanted the one of the largest number; −1: none is."""
        number = torch.tensor(wanted)
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self._hosts)
        return int(number)

    def _lend(self, number: int) -> None:
        part = self._parts[number]()
        _gather_into(part.new_empty(dist.get_world_size() * len(part)), part)


def _gather_into(whole: Tensor, part: Tensor) -> None:
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
    gather(whole, part)


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them. With one process everything here does nothing."""

    rank: int = 0
    size: int = 1
    hosts: Any = field(default=None, repr=False)
    """The process group for tensors on a CPU; None: the default one, which takes them too."""
    devices: Any = field(default=None, repr=False)
    """The process group for other tensors; None: the default one."""
    first: int = 0
    """Number of the first of these processes among all that were started."""
    grid: "tuple[World, World] | None" = None
    """Replicas and shards; None: each process holds the whole dictionary."""
    lending: Lending = field(default_factory=Lending, repr=False, compare=False)
    """Weights that lie in parts (`models.sharding`); of replicas and shards none do."""

    @property
    def is_first(self) -> bool:
        """True in the process that writes."""
        return self.rank == 0

    @property
    def replicas(self) -> "World":
        """Processes that read the other rows, with this one: those over which sums over rows are added up."""
        return self if self.grid is None else self.grid[0]

    @property
    def shards(self) -> "World":
        """Processes that hold the other features, with this one: those over which sums over features are added up."""
        return ALONE if self.grid is None else self.grid[1]

    @property
    def one_replica(self) -> "World":
        """The shards of this process's replica, without the other replicas."""
        return ALONE if self.grid is None else replace(self.shards, grid=(ALONE, self.shards))

    def split(self, shards: int) -> "World":
        """Lay the processes out as a grid: so many, one after another, share the features of one dictionary.

        Args:
            shards: divides the number of processes.
        """
        if shards == 1:
            return self
        starts = range(0, self.size, shards)
        rows = [list(range(start, start + shards)) for start in starts]
        columns = [list(range(shard, self.size, shards)) for shard in range(shards)]
        return replace(self, grid=(self._part(columns), self._part(rows)))

    def _part(self, parts: list[list[int]]) -> "World":
        """The part that holds this process, of parts of all processes."""
        own = next(part for part in parts if self.rank in part)
        with _noticing_loss():
            group = hosts = dist.new_subgroups_by_enumeration(parts, timeout=_timeout())[0]
            if self.hosts is not None:
                hosts = dist.new_subgroups_by_enumeration(parts, timeout=_timeout(), backend="gloo")[0]
        return World(own.index(self.rank), len(own), hosts, group, own[0])

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part: the shares of all, laid end to end, are `items`."""
        start, end = (len(items) * rank // self.size for rank in (self.rank, self.rank + 1))
        return items[start:end]

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Put the sum over all processes in place of each tensor.

        Raises:
            ProcessLost: another process is gone, or does not answer in time.
        """
        if self.size > 1:
            self.lending.lend()
            with _noticing_loss():
                pending = [dist.all_reduce(tensor, group=self._group(tensor), async_op=True) for tensor in tensors]
                for each in pending:
                    assert each is not None
                    each.wait()

    def stack(self, tensor: Tensor) -> Tensor:
        """Return what every process gave, of one shape and type, in the order of their ranks on a new first axis."""
        if self.size == 1:
            return tensor[None]
        gathered = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        self.lending.lend()
        with _noticing_loss():
            dist.all_gather(gathered, tensor.contiguous(), group=self._group(tensor))
        return torch.stack(gathered)

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Element by element, whether it is true in any process."""
        if self.size == 1:
            return list(flags)
        counts = torch.tensor([int(flag) for flag in flags])
        self.add([counts])
        return [bool(count) for count in counts.tolist()]

    def total(self, number: int) -> int:
        """The sum of what every process gives."""
        if self.size == 1:
            return number
        count = torch.tensor(number)
        self.add([count])
        return int(count)

    def gather(self, value: T) -> list[T]:
        """Return what every process gave, in the order of their ranks."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        self.lending.lend()
        with _noticing_loss():
            dist.all_gather_object(gathered, value, group=self.hosts)
        return gathered

    def from_first(self, value: T) -> T:
        """The first process's value."""
        if self.size == 1:
            return value
        held = [value]
        self.lending.lend()
        with _noticing_loss():
            dist.broadcast_object_list(held, src=self.first, group=self.hosts, device=torch.device("cpu"))
        return held[0]

    def to_first(self, tensor: Tensor) -> list[Tensor] | None:
        """Give the first process what every process has, of one shape and type, on the CPU; None in the others."""
        own = tensor.detach().cpu().contiguous()
        gathered = [torch.empty_like(own) for _ in range(self.size)] if self.is_first else None
        self.lending.lend()
        with _noticing_loss():
            dist.gather(own, gathered, dst=self.first, group=self.hosts)
        return gathered

    def tensors_from_first(
        self, tensors: Mapping[str, Tensor], keep: Callable[[str, Tensor], Tensor | None] = lambda _, tensor: tensor
    ) -> dict[str, Tensor]:
        """The first process's tensors, on the CPU; what the others give is ignored.

        Args:
            keep: what of each a process keeps, before it is given the next; None: nothing.
        """
        if self.size == 1:
            return dict(tensors)
        shapes = self.from_first({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})
        received: dict[str, Tensor] = {}
        for name, (shape, dtype) in shapes.items():
            tensor = tensors[name].cpu().contiguous() if self.is_first else torch.empty(shape, dtype=dtype)
            with _noticing_loss():
                dist.broadcast(tensor, src=self.first, group=self.hosts)
            if (kept := keep(name, tensor)) is not None:
                received[name] = kept
        return received

    def _group(self, tensor: Tensor) -> Any:
        return self.hosts if tensor.device.type == "cpu" else self.devices

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Make what is done within it fail in all processes or in none. Of shards, which may wait for each other in the
        midst of it, an error is raised at once, and ends the others as a process that is gone does.

        Raises:
            ElsewhereFailed: `what` failed in another process, which says why.
        """
        if self.grid is not None:
            yield
            return
        failed: Exception | None = None
        try:
            yield
        except ProcessLost:
            raise
        except Exception as error:  # noqa: BLE001  It is raised below, once the others know.
            failed = error
        if self.any([failed is not None])[0]:
            raise failed or ElsewhereFailed(f"Process {self.rank} stopped: another process failed at {what}.")


ALONE = World()
_JOINED: ContextVar[World] = ContextVar("_JOINED", default=ALONE)
_JOININGS = count()


def current() -> World:
    """Return the world that was joined around this call; `ALONE` where none was."""
    return _JOINED.get()


def in_turn(world: World, what: str, act: Callable[[], T]) -> T:
    """Do something in the processes of one machine one after another, so that its memory holds what it takes once.

    Raises:
        ElsewhereFailed: see `World.together`.
    """
    done: list[T] = []
    for turn in range(1 + max(world.gather(local_rank()))):
        with world.together(what):
            if turn == local_rank():
                done.append(act())
    return done[0]


@contextmanager
def joined() -> Iterator[World]:
    """The world that the launcher (`torchrun`) made this process a part of, joined for as long as the context lasts; or
    the one that the caller (Ray Train, for one) has joined already.

    Raises:
        ConfigError: the timeout in the environment is not a number.
        ProcessLost: the other processes cannot be reached.
    """
    if dist.is_available() and dist.is_initialized():
        only_gpus = dist.get_backend() == dist.Backend.NCCL
        with _being(dist.new_group(backend="gloo") if only_gpus else None) as world:
            yield world
        return
    if not launched():
        yield ALONE
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    from torch.distributed.distributed_c10d import PrefixStore  # which not every build of torch has
    from torch.distributed.rendezvous import rendezvous

    timeout = _timeout()
    with _noticing_loss():
        store, rank, size = next(iter(rendezvous("env://", timeout=timeout)))
        # Names of its own each time: processes would take addresses that an earlier world left in the launcher's store.
        own = PrefixStore(f"endwise-{next(_JOININGS)}", store)
        dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=timeout)
    try:
        with _being(None) as world:
            yield world
    finally:
        dist.destroy_process_group()


@contextmanager
def _being(hosts: Any) -> Iterator[World]:
    world = World(dist.get_rank(), dist.get_world_size(), hosts, Lending(hosts))
    token = _JOINED.set(world)
    try:
        yield world
        world.lending.lend()
    finally:
        _JOINED.reset(token)


def launched() -> bool:
    """Return whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ and "MASTER_ADDR" in os.environ


def is_first_process() -> bool:
    """Return whether this process speaks for all."""
    return not launched() or os.environ["RANK"] == "0"


def local_rank() -> int:
    """This process's number on its own machine: the GPU that it uses."""
    return int(os.environ.get("LOCAL_RANK", "0")) if launched() else 0


def _timeout() -> timedelta:
    given = os.environ.get(TIMEOUT_VARIABLE, str(TIMEOUT_SECONDS))
    try:
        return timedelta(seconds=float(given))
    except (ValueError, OverflowError):
        raise ConfigError(f"{TIMEOUT_VARIABLE} must be a number of seconds, given {given!r}.") from None


@contextmanager
def _noticing_loss() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, OSError) as error:  # each backend says it in its own words
        reason = " ".join(str(error).split())[:200]
        raise ProcessLost(
            f"Another process of this run is gone or does not answer ({reason}). Start all of them again, to resume "
            f"from the last checkpoint; {TIMEOUT_VARIABLE} sets the seconds that a process waits for the others."
        ) from error
