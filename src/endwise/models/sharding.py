"""Language models whose blocks lie in parts, one in each process of a run, by PyTorch's FSDP2.

A block is gathered when a pass enters it, and let go when the pass leaves it; so again in the backward pass, which
needs the weights of a frozen model for the gradients of activations alone. FSDP2 prepares its root when that first
runs. Here a pass skips blocks, starts inside one, and ends before the model's own forward returns, so every block is a
root of its own: the model itself is none, and it does not matter which block runs first, or whether the model's forward
ever returns. What is outside the blocks is whole in every process: the embedding, the final norm, and the unembedding,
which predictions are compared by without a pass of the model.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad

from endwise.common.errors import ModelError
from endwise.common.processes import World
from endwise.models.blocks import find_blocks
from endwise.models.passes import Act

Shard = Callable[[nn.Module], None]


def sharder(world: World, device: torch.device) -> Shard:
    """Return what puts this process's part of a model's blocks on its device; all processes call this, and none waits
    for another to apply what it returns.

    Raises:
        ModelError: this torch cannot.
    """
    if not hasattr(FSDPModule, "reset_iter_state"):
        raise ModelError(
            f"model.sharded needs a later torch than {torch.__version__}. Install the newest, or unset it."
        )
    mesh = init_device_mesh(device.type, (world.size,))

    def shard(model: nn.Module) -> None:
        for block in _blocks(model.eval().requires_grad_(False)):
            for parameter in block.parameters():
                parameter.data = parameter.data.contiguous()
            numbers = {parameter for parameter in block.parameters() if parameter.ndim == 0}  # which cannot be cut
            fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=numbers)
        model.to(device)

    return shard


def lend_blocks(model: nn.Module, world: World) -> None:
    """Let processes gather blocks in the order that each runs them; called once all of them hold their parts."""
    for block in _blocks(model):
        assert isinstance(block, FSDPModule)
        gathering: Any = _Gathering(world, list(block.parameters()))
        block.set_custom_all_gather(gathering)


def shares(model: nn.Module) -> int:
    """Number of processes that a model's blocks are divided among."""
    return next((each.device_mesh.size() for each in model.parameters() if isinstance(each, DTensor)), 1)


def let_go(block: nn.Module) -> None:
    """Free a block that is gathered, and forget the pass that was in it, which an exception has ended."""
    if isinstance(block, FSDPModule):
        block.reset_iter_state()


def gathered_backward(block: nn.Module, act: Act) -> Act:
    """Return the same for a value within a block, which is then gathered as soon as a gradient comes to that value.
    FSDP2 does so where one comes to the block's result, which a pass need not reach.
    """
    if not isinstance(block, FSDPModule):
        return act
    unshard = block.unshard

    def gathered(value: Tensor) -> Tensor | None:
        if value.requires_grad:
            value.register_hook(lambda _: unshard())
        return act(value)

    return gathered


def _blocks(model: Any) -> Iterator[nn.Module]:
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    return (block.module for block in find_blocks(model, layers))


class _Gathering:
    """FSDP2's all-gather of one block, agreed upon by all processes.

    Args:
        parameters: the block's, of which each process has some rows.
    """

    def __init__(self, world: World, parameters: list[Any]) -> None:
        self._lending, self._size = world.lending, world.size
        self._parameters = [each for each in parameters if hasattr(each, "to_local")]
        self._number = self._lending.offer(self._part)
        self._compared = False

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> None:
        part = input_tensor.view(torch.uint8)
        if not self._compared and not torch.equal(part, self._part()):
            raise ModelError(
                f"torch {torch.__version__} lays out a block's weights in an unknown way. Unset model.sharded."
            )
        self._compared = True
        self._lending.gather(self._number, output_tensor.view(torch.uint8), part)

    @torch.no_grad()
    def _part(self) -> Tensor:
        """This process's rows of all parameters as FSDP2 lays them out: one after another, each filled up with zeros to
        the rows of the first process.
        """
        rows = [each.to_local() for each in self._parameters]
        missing = [-(-len(each) // self._size) - len(own) for each, own in zip(self._parameters, rows, strict=True)]
        filled = [pad(own, (0, 0) * (own.ndim - 1) + (0, n)) for own, n in zip(rows, missing, strict=True)]
        return torch.cat([each.flatten().view(torch.uint8) for each in filled])
