"""Probing of a model by a few short passes: its sites, their widths, and whether it can be taken at all."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from endwise.common.axes import Activation, AnyWidth, Tokens
from endwise.common.errors import ModelError
from endwise.models.blocks import Block, first_input, first_tensor
from endwise.models.checks import (
    FAILURES,
    Tried,
    find_unspliceable,
    refuse_lookahead,
    refuse_no_blocks,
    refuse_not_finite,
    same,
)
from endwise.models.hooking import SiteHooks, removed
from endwise.models.passes import Clean
from endwise.models.sites import Part, Site

PARALLEL = (
    "its blocks are parallel: attention and the MLP both read hook_resid_pre, and what they add is added at once, so "
    "that no residual stream lies between them."
)
UNDIVIDED = "a block that is run in two halves, up to attention and from there on, gives a different result."
CORE = (Part.RESID_PRE, Part.ATTN_OUT, Part.MLP_OUT, Part.RESID_POST)
"""Parts that are the result of a module, or a block's input."""


@dataclass
class Known:
    """Knowledge of a model's sites."""

    widths: dict[Site, int] = field(default_factory=dict)
    """Width of every site that has a value."""
    unspliceable: dict[Site, str] = field(default_factory=dict)
    """Sites that cannot be spliced at, each with the reason."""
    absent: dict[Site, str] = field(default_factory=dict)
    """Sites that one might look for, each with why the model has none."""
    returns: dict[nn.Module, int | None] = field(default_factory=dict)
    """Length of the tuple that it returns; None: a bare tensor."""


@torch.no_grad()
def probe(model: Tried, tokens: Tokens, blocks: list[Block], unembedding: nn.Module, known: Known) -> None:
    """Learn a model's sites from a few passes of `tokens` (`[1 pos]`), and check it.

    Args:
        known: is filled; the model's own methods read it.

    Raises:
        ModelError: see `checks` and `LanguageModel`.
    """
    hooks = SiteHooks(blocks, known.returns)
    activations, final = _learn(model, tokens, blocks, unembedding, hooks, known)
    with_values = type(final) is Tensor
    if with_values:
        logits = model.logits(tokens)
        refuse_not_finite(model, activations, final, logits)
        _check_readout(model, final, logits)
    for layer in range(len(blocks)):
        at = {part: activations.get(Site(layer, part)) for part in Part}
        parts = tuple(Part) if _adds_up(at) else (Part.RESID_PRE, Part.RESID_POST)
        known.widths |= {Site(layer, part): int(value.shape[-1]) for part in parts if (value := at[part]) is not None}
    clean = Clean(tokens, activations, final)
    _drop_parallel(model, clean, known)
    if not with_values:  # but shapes alone: nothing to compare
        return
    refuse_lookahead(model, tokens, model.vocab_size)
    _drop_undivided(model, clean, final, known)
    other = (tokens + 1) % model.vocab_size
    known.unspliceable |= find_unspliceable(model, hooks, other, sorted(known.widths), clean)


def _learn(
    model: Tried, tokens: Tokens, blocks: list[Block], unembedding: nn.Module, sites: SiteHooks, known: Known
) -> tuple[dict[Site, AnyWidth], Activation]:
    """Every site's value in one pass, and the final state; `known.returns` is filled."""
    runs: Counter[nn.Module] = Counter()
    activations: dict[Site, AnyWidth] = {}
    final: list[Activation] = []
    candidates = {Site(layer, part) for layer, block in enumerate(blocks) for part in _core(block)}

    def learn_return(module: nn.Module, _args: Any, output: Any) -> None:
        runs[module] += 1
        known.returns[module] = len(output) if isinstance(output, tuple) else None

    with ExitStack() as hooks:
        for module in {module for block in blocks for module in _modules(block)}:
            hooks.enter_context(removed(module.register_forward_hook(learn_return)))
        for site in candidates:
            sites.on(hooks, site, partial(activations.__setitem__, site))
        for site, module in _read_before(blocks):
            act = partial(_keep_input, activations, site, tokens)
            hooks.enter_context(removed(module.register_forward_pre_hook(act, with_kwargs=True)))
        at_unembedding = unembedding.register_forward_pre_hook(lambda _, arguments: final.append(arguments[0]))
        hooks.enter_context(removed(at_unembedding))
        model.model(input_ids=tokens, use_cache=False)
    if not final or not candidates <= activations.keys():
        raise ModelError(f"{model.name}: a pass does not go through its blocks and its unembedding as expected.")
    kind, most = type(blocks[0].module).__name__, max(runs[block.module] for block in blocks)
    refuse_no_blocks(model, kind, most, tokens, activations)
    for layer, block in enumerate(blocks):
        if any(runs[module] != 1 for branch in block.branches() for module in (branch.compute, branch.write)):
            activations.pop(Site(layer, Part.ATTN_OUT), None)  # of several blocks, or several times in one
        if block.projection is not None and runs[block.projection] != 1:
            activations.pop(Site(layer, Part.ATTN_Z), None)
        stream, added = (activations.get(Site(layer, part)) for part in (Part.RESID_PRE, Part.ATTN_OUT))
        if stream is not None and added is not None and stream.shape == added.shape:
            activations[Site(layer, Part.RESID_MID)] = stream + added
    return activations, final[0]


def _core(block: Block) -> Iterator[Part]:
    yield from (Part.RESID_PRE, Part.RESID_POST)
    if block.attention is not None and block.mlp is not None:
        yield from (Part.ATTN_OUT, Part.MLP_OUT)


def _modules(block: Block) -> Iterator[nn.Module]:
    yield block.module
    for branch in block.branches():
        yield from (branch.compute, branch.write)
    if block.projection is not None:
        yield block.projection


def _read_before(blocks: list[Block]) -> Iterator[tuple[Site, nn.Module]]:
    """Parts that are the input of a module."""
    for layer, block in enumerate(blocks):
        if block.projection is not None:
            yield Site(layer, Part.ATTN_Z), block.projection
        if block.mlp is not None:
            yield Site(layer, Part.MLP_IN), block.mlp.compute


def _keep_input(
    activations: dict[Site, Tensor],
    site: Site,
    tokens: Tokens,
    _module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Keep what a module is called with, if it is an activation `[batch pos width]` where one is looked for."""
    try:
        value = first_tensor(first_input(args, kwargs))
    except ModelError:
        return
    if value.ndim == 3 and value.shape[:2] == tokens.shape and value.is_floating_point():
        activations[site] = value


def _drop_parallel(model: Tried, clean: Clean, known: Known) -> None:
    """Find the blocks whose MLP does not depend on their attention, which have no stream between the two."""
    layers = [layer for layer in range(model.n_layers) if Site(layer, Part.RESID_MID) in known.widths]
    depends = _mlps_that_follow(model, clean, layers)
    if depends is None:
        depends = {layer: (_mlps_that_follow(model, clean, [layer]) or {}).get(layer, True) for layer in layers}
    for middle in (Site(layer, Part.RESID_MID) for layer in layers if not depends[layer]):
        del known.widths[middle]
        known.absent[middle] = PARALLEL


def _mlps_that_follow(model: Tried, clean: Clean, layers: list[int]) -> dict[int, bool] | None:
    """By layer, whether the MLP's result depends on attention's; None: a pass fails, as `find_unspliceable` reports."""
    patch = {}
    for layer in layers:
        stream, attention = (Site(layer, part) for part in (Part.RESID_PRE, Part.ATTN_OUT))
        patch |= {stream: clean.activations[stream], attention: clean.activations[attention].clone().requires_grad_()}
    if not patch:
        return {}
    try:
        with torch.enable_grad():
            found = model.replay(clean, patch, [Site(layer, Part.MLP_OUT) for layer in layers], final=False)
    except FAILURES:
        return None
    return {layer: found.activations[Site(layer, Part.MLP_OUT)].requires_grad for layer in layers}


def _drop_undivided(model: Tried, clean: Clean, final: Activation, known: Known) -> None:
    """Read the streams between attention and MLP, which must give what is known of them and change nothing."""
    middles = [site for site in known.widths if site.part is Part.RESID_MID]
    try:
        read = model.clean(clean.tokens, middles, final=True)
        fine = same(read.final, final) and all(
            same(read.activations[site], clean.activations[site]) for site in middles
        )
    except FAILURES:
        fine = False
    for site in () if fine else middles:
        del known.widths[site]
        known.absent[site] = UNDIVIDED


def _check_readout(model: Tried, final: Activation, logits: Tensor) -> None:
    tolerance = 1e-4 if model.dtype == torch.float32 else 3e-2
    if not same(model.readout.logits(final), logits.float(), tolerance):
        raise ModelError(
            f"{model.name}: its logits are not the unembedding (with bias, scale and soft-cap of its config) of its "
            "last hidden state, so endwise cannot compare predictions from hidden states and refuses the model."
        )


def _adds_up(at: Mapping[Part, Tensor | None]) -> bool:
    """Return whether resid_pre + attn_out + mlp_out = resid_post, to rounding."""
    pre, attention, mlp, post = (at[part] for part in CORE)
    if pre is None or attention is None or mlp is None or post is None or not pre.shape == attention.shape == mlp.shape:
        return False
    gap = (pre.double() + attention.double() + mlp.double() - post.double()).abs().max()
    return bool(gap <= (1e-4 if post.dtype == torch.float32 else 3e-2) * post.double().abs().max())
