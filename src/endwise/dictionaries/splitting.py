"""Splitting of a dictionary's features among processes: what every dictionary has for it."""

from typing import Any, ClassVar

from endwise.common.errors import ConfigError
from endwise.common.processes import World


class SplitDictionary:
    """A dictionary whose features may lie in several processes."""

    architecture: ClassVar[str]
    d_sae: int
    splits: ClassVar[bool] = False
    """True if they may (`dictionaries/shards.py`): `encode`, penalty and `decode` are each feature's own, or agree over
    `World.shards`. Each class says it for itself, and inherits it from none."""

    def unsplit(self) -> str | None:
        """Return the setting for which its features cannot lie in several processes; None: they can."""
        return None if vars(type(self)).get("splits") else f"dictionary.architecture is {self.architecture}"

    def split(self, world: World) -> Any:
        """Return this process's part of it, an SAE with the face of the whole; with one shard, itself.

        Raises:
            ConfigError: it cannot be split, or not evenly.
        """
        if (shards := world.shards.size) == 1:
            return self
        if (reason := self.unsplit()) is not None:
            raise ConfigError(
                f"training.shards is {shards}, but {reason}, with which features cannot be shared out among processes. "
                "Set training.shards=1, or change the other (docs/scaling.md says what can be sharded)."
            )
        if self.d_sae % shards:
            raise ConfigError(
                f"training.shards is {shards}, which does not divide the {self.d_sae:,} features. Change "
                "dictionary.size, or the number of shards."
            )
        own = self.part_for(world)
        own.join(world)
        return own

    def part_for(self, world: World) -> Any:
        """Variant of `split` for what can be."""
        from endwise.dictionaries.shards import ShardedSAE  # which is an SAE

        whole: Any = self
        return ShardedSAE(whole, world)
