"""Checkpoints of a run whose dictionary is split into shards: brought together for one file, and shared out again."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from endwise.common.processes import World
from endwise.runs.checkpoints import Checkpoint
from endwise.training.joint import AnyTrainee


def shards_of(trainee: AnyTrainee) -> World:
    """Return the processes among which its features are shared out; of a whole dictionary, this one alone."""
    return trainee.parts[0].sae.world.shards


def gathered(trainee: AnyTrainee) -> Checkpoint:
    """Return `checkpoint` of the whole dictionary, in the first of the shards; all of them must call it."""
    own, sharing = trainee.checkpoint(), Sharing.of(trainee)
    if sharing.shards.size == 1:
        return own
    tensors = dict(own.tensors)
    for name in sorted(name for name, tensor in tensors.items() if sharing.is_split(name, tensor)):
        if (pieces := sharing.shards.to_first(tensors[name])) is not None:
            tensors[name] = torch.cat(pieces)
    return replace(own, tensors=tensors)


def give(trainee: AnyTrainee, *, with_checkpoint: bool = False) -> None:
    """Give the process that writes a dictionary's file, and its checkpoint, what this one holds of them."""
    if shards_of(trainee).size > 1 and trainee.parts[0].sae.world.replicas.is_first:
        for part in trainee.parts:
            part.sae.export()
        if with_checkpoint:
            gathered(trainee)


@dataclass(frozen=True)
class Sharing:
    """Share of a whole dictionary's checkpoint that belongs to this process."""

    shards: World
    parameters: frozenset[str]
    of_features: frozenset[str]
    """Tensors whose first axis is that of the features."""

    @classmethod
    def of(cls, trainee: AnyTrainee) -> "Sharing":
        saes = [part.sae for part in trainee.parts]
        named = [(name, parameter) for sae in saes for name, parameter in sae.named_parameters()]
        split = {id(parameter) for sae in saes for parameter in sae.per_feature()}
        return cls(
            shards_of(trainee),
            frozenset(name for name, _ in named),
            frozenset(name for name, parameter in named if id(parameter) in split),
        )

    def is_split(self, name: str, tensor: Tensor) -> bool:
        """Return whether a checkpoint's tensor is shared out along its first axis."""
        return _parameter(name) in self.of_features and tensor.ndim > 0

    def own(self, name: str, tensor: Tensor) -> Tensor | None:
        """Return this process's part of a checkpoint's tensor; None: it has none."""
        if self.is_split(name, tensor):
            return tensor.chunk(self.shards.size)[self.shards.rank].clone()
        if self.shards.is_first or _parameter(name) not in self.parameters - self.of_features:
            return tensor
        return torch.zeros_like(tensor) if _kind(name) == "sae" else None

    def part(self, whole: Checkpoint) -> Checkpoint:
        """Return this process's part of a checkpoint."""
        if self.shards.size == 1:
            return whole
        owned = ((name, self.own(name, tensor)) for name, tensor in whole.tensors.items())
        return replace(whole, tensors={name: tensor for name, tensor in owned if tensor is not None})


def _kind(name: str) -> str:
    """`sae`, `optimizer`, or another kind of a checkpoint's tensor; those of several places have the place in front."""
    return name.rpartition(":")[2].partition(".")[0]


def _parameter(name: str) -> str | None:
    """The parameter that a checkpoint's tensor is, or is a moment of; None: of none."""
    rest = name.rpartition(":")[2].partition(".")[2]
    return {"sae": rest, "optimizer": rest.rpartition(".")[0]}.get(_kind(name))
