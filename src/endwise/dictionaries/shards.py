"""Dictionaries whose features are shared out among processes (tensor parallelism along `d_sae`).

Each process holds an equal part of the features, encodes every row of its replica, and decodes a part of the
reconstruction; the parts are summed. Outside, a shard looks like the whole dictionary: reconstructions, penalties and
L0 are sums over the shards, what there is one of per feature lies end to end. Inside, the architecture sees a
dictionary of fewer features, and knows nothing of it, but for those that choose among features (`World.shards`).

Every process of a replica computes the same loss, so that the gradient of a sum is each part's own gradient, and
gradients of encoders and decoders stay where they are. Parameters that are no feature's (the decoder's bias, a skip
connection) are the first shard's: in the others they are 0 and do not learn, so that each counts once, in the
reconstruction as in the gradient's norm.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from endwise.common.processes import World
from endwise.dictionaries.base import SAE, Exported, TrainingPass
from endwise.dictionaries.latents import Latents, latents_of
from endwise.dictionaries.sharing import summed


def _like(sae: SAE, d_sae: int, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> SAE:
    """Return a dictionary like another, of other features."""
    other = copy(sae)
    other.d_sae = d_sae
    none = dict.fromkeys(vars(sae)["_buffers"])
    vars(other).update(_parameters={**vars(sae)["_parameters"], **parameters}, _buffers={**none, **buffers})
    return other


@dataclass(frozen=True)
class ShardLatents(Latents):
    """Latents of all features, of which this process holds its own."""

    own: Latents
    shards: World

    def dense(self) -> Float[Tensor, "*rows d_sae"]:
        """Lay the shards end to end; a gradient reaches this process's own."""
        own = self.own.dense()
        parts = list(self.shards.stack(own.detach()))
        parts[self.shards.rank] = own
        return torch.cat(parts, -1)

    def penalty(self, p: float = 1.0, mask: Bool[Tensor, "*rows"] | None = None) -> Float[Tensor, "*rows"]:
        return summed(self.own.penalty(p, mask), self.shards)

    def l0(self) -> Float[Tensor, "*rows"]:
        return summed(self.own.l0(), self.shards)

    def smallest(self) -> Float[Tensor, "*rows"]:
        return self.shards.stack(self.own.smallest().detach()).amin(0)

    def fired(self, mask: Bool[Tensor, "*rows"]) -> Bool[Tensor, " d_sae"]:
        return self.shards.stack(self.own.fired(mask).to(torch.uint8)).flatten() > 0

    def firings(self, mask: Bool[Tensor, "*rows"]) -> Int64[Tensor, " d_sae"]:
        return self.shards.stack(self.own.firings(mask)).flatten()

    def only(self, features: Bool[Tensor, " d_sae"]) -> "ShardLatents":
        return replace(self, own=self.own.only(features.chunk(self.shards.size)[self.shards.rank]))

    def of(self, feature: int) -> Float[Tensor, "*rows"]:
        return self.dense()[..., feature]


class ShardedSAE(SAE):
    """A dictionary of which this process holds some features, under the names and with the face of the whole.

    Args:
        whole: is left as it is.
        world: a grid (`World.split`).
    """

    def __init__(self, whole: SAE, world: World) -> None:
        super().__init__(whole.d_in, whole.d_sae, whole.d_out)
        self.architecture = whole.architecture  # type: ignore[pyrefly:read-only]  of its kind, not of a class
        of_features, shards = set(map(id, whole.per_feature())), world.shards
        own: dict[str, Tensor] = {}
        for name, parameter in whole.named_parameters():
            if id(parameter) in of_features:
                own[name] = nn.Parameter(parameter.detach().chunk(shards.size)[shards.rank].clone())
            else:
                kept = parameter.detach().clone() if shards.is_first else torch.zeros_like(parameter)
                own[name] = nn.Parameter(kept, requires_grad=shards.is_first)
        part = _like(whole, whole.d_sae // shards.size, own, dict(whole.named_buffers()))
        # It is no module of this one: its parameters and buffers are this one's, by the names that the whole has.
        vars(self).update(part=part, _parameters=vars(part)["_parameters"], _buffers=vars(part)["_buffers"])
        self.first_tokens, self.last_tokens, self.sparse_below = part.first_tokens, part.last_tokens, part.sparse_below
        self.dead_window, self.wants_gradient = part.dead_window, part.wants_gradient  # type: ignore[pyrefly:read-only]
        self.world = world

    part: SAE

    @property
    def W_enc(self) -> Float[Tensor, "d_in own"]:
        """Variant of `SAE.W_enc` for this process's features."""
        return self.part.W_enc

    @property
    def W_dec(self) -> Float[Tensor, "own d_out"]:
        """Variant of `SAE.W_dec` for this process's features."""
        return self.part.W_dec

    def encode(self, x: Float[Tensor, "*rows d_in"], counted: Bool[Tensor, "*rows"] | None = None) -> Latents:
        return ShardLatents(self.part.encode(x, counted), self.world.shards)

    def decode(self, latents: Latents | Tensor) -> Float[Tensor, "*rows d_out"]:
        return summed(self.part.decode(self._own(latents)), self.world.shards)

    def reconstruct(self, latents: Latents, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        return summed(self.part.reconstruct(self._own(latents), x), self.world.shards)

    def _own(self, latents: Latents | Tensor) -> Latents:
        if isinstance(latents, ShardLatents):
            return latents.own
        shards = self.world.shards
        dense = latents_of(latents, self.d_sae).dense()
        return latents_of(dense.chunk(shards.size, -1)[shards.rank], self.part.d_sae)

    def join(self, world: World) -> None:
        super().join(world)
        self.part.join(world)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.part.train(mode)
        return self

    @contextmanager
    def aside(self) -> Iterator[None]:
        with self.part.aside():
            yield

    @property
    def sums_as_it_learns(self) -> bool:
        return self.part.sums_as_it_learns

    def begin_step(self, done: float) -> None:
        self.part.begin_step(done)

    @property
    def own_weights(self) -> Mapping[str, float]:
        return self.part.own_weights

    def own_terms(self, seen: TrainingPass) -> Mapping[str, Float[Tensor, ""]]:
        dead = seen.dead.chunk(self.world.shards.size)[self.world.shards.rank]
        return self.part.own_terms(replace(seen, dead=dead))

    def see_first(self, x: Float[Tensor, "tokens d_in"], target: Float[Tensor, "tokens d_out"]) -> None:
        self.part.see_first(x, target)

    def see_last(self, x: Float[Tensor, "tokens d_in"], target: Float[Tensor, "tokens d_out"]) -> None:
        self.part.see_last(x, target)

    def per_feature(self) -> Sequence[nn.Parameter]:
        return self.part.per_feature()

    def raise_bar(self, by: float) -> None:
        self.part.raise_bar(by)

    def after_step(self) -> None:
        self.part.after_step()

    def export(self) -> Exported:
        """Variant of `SAE.export` in the first shard; all must call it, and in the others it is empty."""
        of_features, whole = set(map(id, self.per_feature())), dict[str, Tensor]()
        for name, parameter in self.named_parameters():
            pieces = self.world.shards.to_first(parameter) if id(parameter) in of_features else None
            whole[name] = nn.Parameter(torch.cat(pieces) if pieces else parameter.detach().cpu())
        buffers = {name: buffer.cpu() for name, buffer in self.named_buffers()}
        return _like(self.part, self.d_sae, whole, buffers).export()

    @classmethod
    def build(cls, config: Any, d_in: int, seed: int) -> SAE:
        raise NotImplementedError("A dictionary is made whole, and split then (`SAE.split`).")

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], cfg: Mapping[str, Any]) -> SAE:
        raise NotImplementedError("A file is read as the whole dictionary.")
