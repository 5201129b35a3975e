"""Firings with the greatest keys of every feature, in a table whose size does not grow with the text."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

EMPTY = torch.iinfo(torch.int64).min
"""The key of a slot in which nothing is."""
FULL = torch.iinfo(torch.int64).max
_KEPT = ("keys", "sequences", "positions", "activations")
"""Numbers of a firing that a slot keeps, besides the activations around it."""


@dataclass(frozen=True)
class Candidates:
    """Firings that ask for a slot. No two of one feature, here or in the table, may have the same key."""

    features: Int[Tensor, " n"]
    keys: Int[Tensor, " n"]
    sequences: Int[Tensor, " n"]
    positions: Int[Tensor, " n"]
    activations: Float[Tensor, " n"]
    windows: Callable[[Tensor], Tensor]
    """Function from firings' numbers to the activations around each, `[some window]`; called for those kept."""


class Slots:
    """`[d_sae slots]` firings, those of the greatest keys, each with its feature's activations around it.

    What is in the slots depends on the candidates alone, not on their order, as keys differ; where in a feature's slots
    each stands is arbitrary. A new one takes the place of one that has to go, so that no others are moved.
    """

    def __init__(self, d_sae: int, slots: int, window: int, device: torch.device) -> None:
        self.keys = torch.full((d_sae, slots), EMPTY, dtype=torch.int64, device=device)
        self.sequences = torch.zeros(d_sae, slots, dtype=torch.int32, device=device)
        self.positions = torch.zeros_like(self.sequences)
        self.activations = torch.zeros(d_sae, slots, device=device)
        self.windows = torch.zeros(d_sae, slots, window, device=device)
        self.least = torch.full((d_sae,), EMPTY if slots else FULL, dtype=torch.int64, device=device)
        """`[d_sae]`: only a greater key is let in."""

    def offer(self, given: Candidates) -> None:
        numbers = (given.keys > self.least[given.features]).nonzero()[:, 0]
        numbers, ranks = self._best(given, numbers)
        if not len(numbers):
            return
        features, row_of = torch.unique_consecutive(given.features[numbers], return_inverse=True)
        offered = torch.full((len(features), int(ranks.max()) + 1), EMPTY, dtype=torch.int64, device=numbers.device)
        offered[row_of, ranks] = given.keys[numbers]
        number_at = torch.zeros_like(offered)
        number_at[row_of, ranks] = numbers
        held = self.keys[features]
        least = torch.cat([held, offered], 1).topk(held.shape[1], 1).values[:, -1:]
        enter = (offered >= least) & (offered > EMPTY)
        leave = (held < least) | (held == EMPTY)
        leave &= leave.cumsum(1) <= enter.sum(1, keepdim=True)
        row, slot = leave.nonzero().unbind(1)
        self._put(features[row], slot, given, number_at[enter])
        self.least[features] = self.keys[features].amin(1)

    def merge(self, other: "Slots") -> None:
        """Take from another table whatever belongs here."""
        feature, slot = (other.keys > EMPTY).nonzero().unbind(1)
        kept = {name: getattr(other, name)[feature, slot] for name in _KEPT}
        self.offer(Candidates(feature, **kept, windows=lambda some: other.windows[feature[some], slot[some]]))

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in (*_KEPT, "windows")}

    def settle(self) -> None:
        """Finish loading, once `tensors` are filled."""
        if self.keys.shape[1]:
            self.least = self.keys.amin(1)

    def _best(self, given: Candidates, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Keep no more candidates of a feature than it has slots, sorted by feature and key, and each one's rank."""
        numbers = numbers[given.keys[numbers].argsort(descending=True)]
        numbers = numbers[given.features[numbers].argsort(stable=True)]
        features = given.features[numbers].contiguous()
        ranks = torch.arange(len(numbers), device=numbers.device) - torch.searchsorted(features, features)
        kept = ranks < self.keys.shape[1]
        return numbers[kept], ranks[kept]

    def _put(self, features: Tensor, slots: Tensor, given: Candidates, numbers: Tensor) -> None:
        for name in _KEPT:
            own = getattr(self, name)
            own[features, slots] = getattr(given, name)[numbers].to(own.dtype)
        self.windows[features, slots] = given.windows(numbers)
