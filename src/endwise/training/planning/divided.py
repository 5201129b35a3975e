"""A dry run in one of the processes that a language model's blocks are divided among (`models.sharding`)."""

import torch
from torch import Tensor

from endwise.config.places import Recipe
from endwise.models.blocks import find_blocks
from endwise.training.planning.dry_run import CHECKPOINT, MODEL, DryRun
from endwise.training.planning.memory_trace import Held

GATHERED = "gathered blocks"


class DividedDryRun(DryRun):
    """Dry run that holds one process's rows of every block, all that is outside the blocks, and of the largest block
    what it is gathered into: the parts as they come, and the weights made of them.

    Args:
        processes: that the blocks are divided among.
    """

    def __init__(self, config: Recipe, device: torch.device, sequences: int, processes: int) -> None:
        super().__init__(config, device, sequences)
        blocks = [list(block.module.parameters()) for block in find_blocks(self.model.model, self.model.n_layers)]
        whole = [sum(each.nbytes for each in block) for block in blocks]
        own = [sum(_of_first(each, processes) for each in block) for block in blocks]
        self._elsewhere, self._gathered = sum(whole) - sum(own), 2 * max(whole)

    def stages(self, accumulation: int, microbatch: int, *, only_step: bool = False) -> dict[str, Held]:
        found = super().stages(accumulation, microbatch, only_step=only_step)
        for name, held in found.items():
            held.parts[MODEL] -= self._elsewhere
            if name != CHECKPOINT:
                held.parts[GATHERED] = self._gathered
        return found


def _of_first(parameter: Tensor, processes: int) -> int:
    """Bytes of the rows that the first process has, which has most; a number cannot be cut."""
    rows = len(parameter) if parameter.ndim else 1
    return parameter.nbytes // rows * -(-rows // processes)
