"""Room for the pairs of a training step on a device whose host does not wait: by what the step before had.

What a pass finds beyond its room is missing from it. The host learns that once it has queued all of the step but the
change of the weights, and takes the step again with the room that it now knows to be needed, or dense. So no weight
follows from a part of the pairs, and which steps are dense depends on the weights and the data, not on the timing.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from jaxtyping import Bool
from torch import Tensor

from endwise.kernels.interface import Found, HeldPairs, Room

WORTH = 2
"""Candidates up to which latents are sparse, as a multiple of the pairs up to which they are."""


class Rooms:
    """Room for one dictionary's pairs, of each of a step's passes."""

    head, least = 1.25, 1024
    """There is room for so many times what was needed, and so many more."""

    def __init__(self) -> None:
        self._known: dict[int, Room] = {}
        """Rooms by limit, as passes of one step may be of several sizes: the most that one needed in the latest step
        that had such; pairs are 0 where they were not counted."""
        self._passes: list[tuple[int, Room, Tensor, torch.cuda.Event | None]] = []

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Context in which encoders hold what they find in this room."""
        token = _IN_USE.set(self)
        try:
            yield
        finally:
            _IN_USE.reset(token)

    def find(self, limit: int, held: Callable[[Room], HeldPairs | None]) -> Found | None:
        """Find pairs, some of which may be missing; None where latents are to be dense.

        Args:
            limit: pairs up to which they are to be sparse.
            held: finds them in the room given.
        """
        if limit not in self._known:
            self._count(limit, held)
        room = self._room(limit)
        if (some := held(room)) is None:
            return None
        self._passes.append((limit, room, *_on_its_way(some.needed)))
        return some.found if room.pairs else None

    def note_missing(self, missing: Bool[Tensor, ""]) -> None:
        """Take note if something is missing from what was found last, whatever the room: it is dense the next time."""
        limit, room, *_ = self._passes[-1]
        candidates = missing.long() * sys.maxsize
        self._passes.append((limit, room, *_on_its_way(torch.stack([candidates, torch.zeros_like(candidates)]))))

    def _count(self, limit: int, held: Callable[[Room], HeldPairs | None]) -> None:
        """Learn what a first pass needs, candidates and then the pairs among them, for which the host waits."""
        room = Room(0, 0)
        for _ in range(2):
            if room.candidates > WORTH * limit or (some := held(room)) is None:
                return
            self._known[limit] = room = Room(*some.needed.tolist())

    def _room(self, limit: int) -> Room:
        known = self._known.get(limit)
        if known is None or known.candidates > WORTH * limit or known.pairs > limit:
            return Room(0, 0)  # what is needed is counted all the same
        wanted = int(self.head * known.pairs) + self.least if known.pairs else limit
        return Room(int(self.head * known.candidates) + self.least, min(wanted, limit))

    def settle(self) -> bool:
        """Learn what passes needed since the last time, and return whether something is missing from one of them.

        The device has the rest of the step still to do when the host hears of it, and does not wait for it.
        """
        missing, most = False, dict[int, Room]()
        for limit, room, needed, there in self._passes:
            if there is not None:
                there.synchronize()
            candidates, pairs = needed.tolist()
            if candidates > room.candidates:
                pairs = 0
            missing |= room.pairs > 0 and (candidates > room.candidates or pairs > room.pairs)
            before = most.get(limit, Room(0, 0))
            most[limit] = Room(max(before.candidates, candidates), max(before.pairs, pairs))
        self._known |= most
        self._passes.clear()
        return missing


_IN_USE: ContextVar[Rooms | None] = ContextVar("rooms", default=None)


def rooms_in_use() -> Rooms | None:
    return _IN_USE.get()


def _on_its_way(needed: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Start a copy to the host, and return what marks its arrival."""
    if not needed.is_cuda:
        return needed, None
    there = torch.cuda.Event()
    copy = torch.empty_like(needed, device="cpu", pin_memory=True).copy_(needed, non_blocking=True)
    there.record(torch.cuda.current_stream(needed.device))
    return copy, there
