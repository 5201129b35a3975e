"""Hooks at sites: what reads and replaces the values there, and what starts a pass at one of them."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from endwise.models.blocks import Block, Branch, first_input, first_tensor, with_first_input
from endwise.models.passes import Act, Patch
from endwise.models.sharding import gathered_backward, let_go
from endwise.models.sites import Part, Site

NEEDS: dict[Part, tuple[Part, ...]] = {
    Part.ATTN_Z: (Part.RESID_PRE,),
    Part.ATTN_OUT: (Part.RESID_PRE,),
    Part.MLP_IN: (Part.RESID_PRE, Part.ATTN_OUT),
    Part.MLP_OUT: (Part.RESID_PRE, Part.ATTN_OUT),
}
"""Values besides its own that a replay from a part needs: what the block had computed before it and reads again."""
RESIDUAL = (Part.RESID_PRE, Part.RESID_MID, Part.RESID_POST)


def needed(site: Site) -> set[Site]:
    """Return the sites whose values a replay from one needs besides its own."""
    return {Site(site.layer, part) for part in NEEDS.get(site.part, ())}


class Stop(Exception):
    """End of a pass that has computed all that is asked of it."""


class SiteHooks:
    """Acts on the values at a model's sites while it runs. All that is installed goes when its `ExitStack` closes.

    Args:
        blocks: the model's, in order.
        returns: of each block and part of one, the length of the tuple that it returns; None: a bare tensor.
    """

    def __init__(self, blocks: list[Block], returns: Mapping[nn.Module, int | None]) -> None:
        self._blocks, self._returns = blocks, returns

    def on(self, hooks: ExitStack, site: Site, act: Act) -> None:
        """Call `act` with the value at a site whenever a pass gets there."""
        block = self._blocks[site.layer]
        if site.part not in (Part.RESID_PRE, Part.RESID_POST):
            act = gathered_backward(block.module, act)
        if site.part is Part.RESID_MID:
            hooks.enter_context(self._acting_between(block, act))
            return
        module, before = _where(block, site.part)

        def at_input(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            changed = act(first_input(args, kwargs))
            return None if changed is None else with_first_input(args, kwargs, changed)

        def at_output(_module: nn.Module, _args: Any, output: Any) -> Any:
            changed = act(first_tensor(output))
            return (changed, *output[1:]) if isinstance(output, tuple) and changed is not None else changed

        if before:
            hooks.enter_context(removed(module.register_forward_pre_hook(at_input, with_kwargs=True)))
        else:
            hooks.enter_context(removed(module.register_forward_hook(at_output)))

    def patch(self, hooks: ExitStack, site: Site, change: Patch) -> None:
        """Replace the value at a site. An SAE is fp32 whatever the model runs in; the model gets its own dtype back."""

        def changed(value: Tensor) -> Tensor:
            return (change if isinstance(change, Tensor) else change(value)).to(value.dtype)

        self.on(hooks, site, changed)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run a pass within it, which `Stop` ends. Nothing stays gathered (`sharding`), here or by one that failed."""
        self._let_go()
        try:
            yield
        except Stop:
            pass
        finally:
            self._let_go()

    def _let_go(self) -> None:
        for block in self._blocks:
            let_go(block.module)

    def enter_at(
        self, hooks: ExitStack, site: Site, value: Tensor, known: Mapping[Site, Tensor], dtype: torch.dtype
    ) -> None:
        """Have the next pass begin at a site with a value: what comes before it is not computed.

        Args:
            known: the clean values of `needed`.
            dtype: the model's.
        """
        start = site.stream
        if start.layer == len(self._blocks):  # nothing is left but the final norm
            skipped, last = self._blocks[:-1], self._blocks[-1]
            self._skip(hooks, last, value)
        else:
            skipped = self._blocks[: start.layer]
            self.enter_block(hooks, start, value, known, dtype)
        for block in skipped:
            self._skip(hooks, block, None)

    def enter_block(
        self, hooks: ExitStack, site: Site, value: Tensor, known: Mapping[Site, Tensor], dtype: torch.dtype
    ) -> None:
        """Have the next pass enter a block at a site in it with a value, whatever the blocks before give."""
        before = {each.part: known[each].to(dtype) for each in needed(site)}
        entering = value if site.part in RESIDUAL else before[Part.RESID_PRE]
        self.on(hooks, Site(site.layer, Part.RESID_PRE), lambda _: entering)
        self._enter_inside(hooks, self._blocks[site.layer], site, value, before.get(Part.ATTN_OUT))

    def _enter_inside(
        self, hooks: ExitStack, block: Block, site: Site, value: Tensor, attention_out: Tensor | None
    ) -> None:
        attention, mlp, part = block.attention, block.mlp, site.part
        if part is Part.RESID_PRE:
            return
        assert attention is not None and mlp is not None
        if part is Part.ATTN_Z:
            projection, size = block.projection, self._returns[attention.compute]
            assert projection is not None

            def projected(*_args: Any, **_kwargs: Any) -> Any:  # in the block's own call, when its weights are there
                return _answer_with(first_tensor(projection(value)), size)

            hooks.enter_context(replaced(attention.compute, "forward", projected))
        elif part is Part.ATTN_OUT:
            self._answer_branch(hooks, attention, value)
        elif part is Part.RESID_MID:
            hooks.enter_context(self._adding_nothing(block, value))
        else:
            assert attention_out is not None
            self._answer_branch(hooks, attention, attention_out)
            if part is Part.MLP_OUT:
                self._answer_branch(hooks, mlp, value)
            else:
                self.on(hooks, site, lambda _: value)

    def _skip(self, hooks: ExitStack, block: Block, value: Tensor | None) -> None:
        """Variant of `_answer` that skips the block's hooks too, since those of FSDP2 would gather its weights."""
        self._answer(hooks, block.module, value)
        for name in ("_forward_pre_hooks", "_forward_hooks"):
            hooks.enter_context(replaced(block.module, name, OrderedDict()))

    def _answer_branch(self, hooks: ExitStack, branch: Branch, value: Tensor) -> None:
        for module in {branch.compute, branch.write}:
            self._answer(hooks, module, value)

    def _answer(self, hooks: ExitStack, module: nn.Module, value: Tensor | None) -> None:
        """Skip the module's computation for this call: it returns `value`, or its input, as its caller expects it."""
        hooks.enter_context(replaced(module, "forward", partial(_answer_with, value, self._returns[module])))

    @contextmanager
    def _acting_between(self, block: Block, act: Act) -> Iterator[None]:
        """Call `act` with what lies between a block's attention and its MLP; several are called in turn."""
        assert block.attention is not None
        standing = block.module.__dict__.get("forward")
        if isinstance(standing, _InTwo):
            standing.acts.append(act)
            try:
                yield
            finally:
                standing.acts.remove(act)
            return
        adding_nothing = partial(self._adding_nothing, block)
        in_two = _InTwo(block.module.forward, block.attention.write, adding_nothing, [act])
        with replaced(block.module, "forward", in_two):
            yield

    @contextmanager
    def _adding_nothing(self, block: Block, stream: Tensor) -> Iterator[None]:
        """Context in which a block's attention adds zeros to the residual stream, and no hook of its modules runs."""
        assert block.attention is not None
        own = {block.attention.compute, block.attention.write}
        names = {name: module for name, module in block.module.named_children() if module in own}
        nothing = torch.zeros_like(stream)
        for name, module in names.items():
            setattr(block.module, name, _Answering(nothing, self._returns[module]))
        try:
            yield
        finally:
            for name, module in names.items():
                setattr(block.module, name, module)


class _Reached(Exception):
    def __init__(self, by: "_InTwo", value: Tensor) -> None:
        self.by, self.value = by, value


class _InTwo:
    """Stands in for a block's `forward` while somebody acts on what lies between its attention and its MLP.

    No module gives that value. The block is run up to attention's result, whose sum with the block's input is the
    value; then, with what is made of that for its input and with zeros for attention's result, for the rest. Adding
    zeros changes no bit.

    Args:
        forward: the block's own.
        write: the module whose output is added to the residual stream.
        adding_nothing: see `SiteHooks`.
    """

    def __init__(self, forward: Callable[..., Any], write: nn.Module, adding_nothing: Any, acts: list[Act]) -> None:
        self.forward, self.acts = forward, acts
        self._write, self._adding_nothing = write, adding_nothing

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            with removed(self._write.register_forward_hook(self._stop)):
                return self.forward(*args, **kwargs)
        except _Reached as reached:
            if reached.by is not self:
                raise
            value = first_input(args, kwargs) + reached.value
        for act in tuple(self.acts):
            changed = act(value)
            value = value if changed is None else changed
        args, kwargs = with_first_input(args, kwargs, value)
        with self._adding_nothing(value):
            return self.forward(*args, **kwargs)

    def _stop(self, _module: nn.Module, _args: Any, output: Any) -> None:
        raise _Reached(self, first_tensor(output))


class _Answering(nn.Module):
    """Returns one value, whatever it is called with."""

    def __init__(self, value: Tensor, size: int | None) -> None:
        super().__init__()
        self._value, self._size = value, size

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _answer_with(self._value, self._size)


def _where(block: Block, part: Part) -> tuple[nn.Module, bool]:
    """Return the module that has the part's value, and whether as its input."""
    attention, mlp = block.attention, block.mlp
    found = {
        Part.RESID_PRE: (block.module, True),
        Part.ATTN_Z: (block.projection, True),
        Part.ATTN_OUT: (None if attention is None else attention.write, False),
        Part.MLP_IN: (None if mlp is None else mlp.compute, True),
        Part.MLP_OUT: (None if mlp is None else mlp.write, False),
        Part.RESID_POST: (block.module, False),
    }
    module, before = found[part]
    assert module is not None
    return module, before


def _answer_with(value: Tensor | None, size: int | None, *args: Any, **kwargs: Any) -> Any:
    result = value if value is not None else first_input(args, kwargs)
    return result if size is None else (result, *[None] * (size - 1))


@contextmanager
def removed(handle: Any) -> Iterator[None]:
    """Remove a hook at the end."""
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def replaced(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Context in which a method of the module, or another attribute of its own, is another."""
    own = module.__dict__.get(name)  # accelerate, for one, puts a forward on the instance
    setattr(module, name, value)
    try:
        yield
    finally:
        if own is None:
            module.__dict__.pop(name)
        else:
            setattr(module, name, own)
