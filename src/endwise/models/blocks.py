"""Finds the blocks of a Hugging Face model, and in each the modules whose outputs are added to the residual stream."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from endwise.common.errors import ModelError

ATTENTION_NAMES = ("attn", "self_attn", "attention", "self_attention")
MLP_NAMES = ("mlp", "feed_forward", "ffn", "ff", "block_sparse_moe")
PROJECTION_NAMES = ("c_proj", "out_proj", "o_proj", "dense", "wo")
"""Attention's output projection, a module of its own in every family; that of queries, keys and values may be fused."""
POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
"""A block that has the second also has the first as a norm of attention's output (Gemma 2 and 3, OLMo 2). In a Llama
the first stands alone, and is the norm before the MLP."""


@dataclass(frozen=True)
class Branch:
    """One of a block's two additions to the residual stream."""

    compute: nn.Module
    """The attention or MLP module, which a replay with a known result does not run."""
    write: nn.Module
    """The module whose output is added: `compute` itself, or the norm that follows it."""


@dataclass(frozen=True)
class Block:
    module: nn.Module
    attention: Branch | None
    mlp: Branch | None
    projection: nn.Module | None
    """Attention's output projection."""

    def branches(self) -> Iterator[Branch]:
        yield from (branch for branch in (self.attention, self.mlp) if branch is not None)


def find_blocks(model: nn.Module, n_layers: int | None) -> list[Block]:
    """The model's blocks, in order.

    Blocks may be of several kinds (attention here, a state space there) where the configuration says how many there
    are.

    Raises:
        ModelError: no list of modules looks like them.
    """
    lists = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    }
    as_many = {name: modules for name, modules in lists.items() if n_layers is None or len(modules) == n_layers}
    fitting = {name: modules for name, modules in as_many.items() if len({type(module) for module in modules}) == 1}
    with_attention = {name: modules for name, modules in fitting.items() if _child(modules[0], ATTENTION_NAMES)}
    candidates = with_attention or fitting or (as_many if n_layers is not None else {})
    if not candidates:
        found = ", ".join(f"{name} ({len(modules)})" for name, modules in lists.items()) or "none"
        raise ModelError(
            f"{type(model).__name__} has no list of {n_layers} blocks that sites could be named after; "
            f"its module lists: {found}."
        )
    shallowest = min(candidates, key=lambda name: name.count("."))
    return [_block(module) for module in candidates[shallowest]]


def _block(module: nn.Module) -> Block:
    attention, mlp = _child(module, ATTENTION_NAMES), _child(module, MLP_NAMES)
    after_attention, after_mlp = (getattr(module, name, None) for name in POST_NORMS)
    if after_mlp is None:
        after_attention = None
    return Block(module, _branch(attention, after_attention), _branch(mlp, after_mlp), _projection(attention))


def _branch(compute: nn.Module | None, norm: nn.Module | None) -> Branch | None:
    return None if compute is None else Branch(compute, norm if isinstance(norm, nn.Module) else compute)


def _projection(attention: nn.Module | None) -> nn.Module | None:
    """The one module of such a name within attention; None where there is none, or more than one."""
    modules = () if attention is None else attention.named_modules()
    named = [module for name, module in modules if name.rpartition(".")[2] in PROJECTION_NAMES]
    return named[0] if len(named) == 1 else None


def _child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return next((child for name, child in module.named_children() if name in names), None)


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return what a block is called with.

    Raises:
        ModelError: neither a positional argument nor one named `hidden_states`.
    """
    if args:
        return args[0]
    if "hidden_states" not in kwargs:
        raise ModelError(
            f"The modules that look like the model's blocks are called with {', '.join(kwargs) or 'nothing'}, "
            "not with hidden_states, so endwise does not know how to enter them."
        )
    return kwargs["hidden_states"]


def with_first_input(args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor) -> tuple[Any, dict[str, Any]]:
    """Return the same arguments with `first_input` replaced."""
    return ((value, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": value})


def first_tensor(output: Any) -> Tensor:
    """A module's result: the output, or the first of several.

    Raises:
        ModelError: it is no tensor.
    """
    result = output[0] if isinstance(output, tuple) else output
    if not isinstance(result, Tensor):
        raise ModelError(
            f"A module that looks like a block or a part of one returns a {type(result).__name__}, not a tensor."
        )
    return result
