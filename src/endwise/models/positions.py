"""Positions of a text in the passes of a Hugging Face model: whole or continued from a cache, padded on either side."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from endwise.common.axes import TokenMask, Tokens
from endwise.common.errors import ConfigError, ModelError
from endwise.models.hooking import removed, replaced

Positions = Literal["all", "prompt", "last", "generated"] | slice
"""Positions of a text, counted from its first token, padding aside: all of them; those of the prompt; the prompt's
last; those after the prompt, which `generate` adds, or a pass that continues a cache; or a slice, whose negative ends
count back from the end of the prompt. The prompt is what `generate`, or the first pass of a text, is given."""
NAMES = ("all", "prompt", "last", "generated")


def refuse_positions(positions: object) -> None:
    """
    Raises:
        ConfigError: these are no `Positions`.
    """
    if isinstance(positions, slice):
        ends = (positions.start, positions.stop, positions.step)
        known = all(end is None or type(end) is int for end in ends) and (ends[2] is None or ends[2] > 0)
    else:
        known = isinstance(positions, str) and positions in NAMES
    if not known:
        named = ", ".join(NAMES)
        raise ConfigError(f"positions are {named}, or a slice of whole numbers; given {positions!r:.80}.")


@dataclass(frozen=True)
class Passed:
    """Tokens of one pass."""

    ids: Tokens | None
    """None: the pass was given embeddings."""
    real: TokenMask
    """False at padding."""
    index: Int[Tensor, "batch pos"]
    """Position of each in its text, padding not counted."""
    prompt: Int[Tensor, " batch"]
    """Tokens of each prompt."""

    def chosen(self, positions: Positions) -> TokenMask:
        """Mark the positions, padding never."""
        index, length = self.index, self.prompt[:, None]
        if isinstance(positions, slice):
            start, stop = (
                end if end is None or end >= 0 else (length + end).clamp_min(0)
                for end in (positions.start, positions.stop)
            )
            from_start = index - (0 if start is None else start)
            inside = (from_start >= 0) & (from_start % (positions.step or 1) == 0)
            return self.real & (inside if stop is None else inside & (index < stop))
        named = {"prompt": index < length, "last": index == length - 1, "generated": index >= length}
        return self.real & named[positions] if positions in named else self.real


class Passes:
    """Follows a model's passes: which positions of their texts they hold.

    A pass continues a text if it is one of the same call of `generate`, or if a cache holds as many positions as were
    seen of that text; any other begins a text. Padding is what the attention mask leaves out.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._body: Any = getattr(model, "base_model", model)
        self._signature = inspect.signature(self._body.forward)  # pyrefly: ignore[missing-attribute]
        self._generating = False
        self._columns = 0
        """Positions that `generate` was given, padding included."""
        self._given: Tensor | None = None
        """Attention mask that it was given."""
        self._seen = 0
        """Positions of the text so far, padding included."""
        self._padding: Int[Tensor, " batch"] | None = None
        """Positions of these that are padding."""
        self._now: Passed | None = None

    @property
    def now(self) -> Passed:
        """The pass that runs.

        Raises:
            ModelError: a block runs without its model.
        """
        if self._now is None:
            raise ModelError("A block of the model was called by itself. Call the model, or its generate.")
        return self._now

    @contextmanager
    def followed(self) -> Iterator["Passes"]:
        """Context in which the model's passes are followed."""
        with ExitStack() as hooks:
            hooks.enter_context(removed(self._body.register_forward_pre_hook(self._enter, with_kwargs=True)))
            if callable(generate := getattr(self._model, "generate", None)):
                hooks.enter_context(replaced(self._model, "generate", self._following(generate)))
            yield self

    def _following(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(generate)
        def following(*args: Any, **kwargs: Any) -> Any:
            given = [*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))]
            self._columns = next((each.shape[1] for each in given if isinstance(each, Tensor)), 0)
            self._given = kwargs.get("attention_mask")
            self._generating, self._seen, self._now = True, 0, None
            try:
                return generate(*args, **kwargs)
            finally:
                self._generating, self._columns, self._given, self._seen, self._now = False, 0, None, 0, None

        return following

    def _enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = self._signature.bind_partial(*args, **kwargs).arguments
        given = {**bound.get("kwargs", {}), **bound}
        ids: Any = given.get("input_ids")
        entering: Tensor = given["inputs_embeds"] if ids is None else ids
        batch, new = entering.shape[:2]
        # Found by what it can do: transformers 5.24 calls `cache` what was `past_key_values` before.
        cache = next((each for each in given.values() if hasattr(each, "get_seq_length")), given.get("cache_params"))
        past = self._past(cache)
        before, now = self._now, torch.full((batch,), past, device=entering.device)
        same_text = before is not None and len(before.prompt) == batch
        same_text = same_text and (self._generating or 0 < past == self._seen)
        real, padding = _unmasked(given.get("attention_mask"), entering, past, more=cache is not None)
        if padding is None:
            padding = self._padding if same_text and self._padding is not None else torch.zeros_like(now)
        index = (now - padding)[:, None] + real.long().cumsum(1) - 1
        if before is not None and same_text:
            prompt = before.prompt
        else:  # of which `generate` may give less than all to the first pass
            later = torch.ones(batch, max(0, self._columns - past - new), dtype=torch.bool, device=now.device)
            if later.numel() and self._given is not None:
                ahead = self._given[:, past + new :].to(now.device) != 0
                later = ahead.repeat_interleave(batch // len(ahead), 0)
            prompt = index[:, -1] + 1 + later.sum(1)
        self._seen, self._padding = past + new, padding + (~real).sum(1)
        self._now = Passed(ids, real, index, prompt)

    def _past(self, cache: Any) -> int:
        """Return how many positions a cache holds; one that does not count (a state space's) continues the text."""
        try:
            return 0 if cache is None else int(cache.get_seq_length())
        except (AttributeError, ValueError):
            return self._seen


def _unmasked(mask: Any, entering: Tensor, past: int, more: bool) -> tuple[TokenMask, Int[Tensor, " batch"] | None]:
    """Return which of the new positions are none of padding, and how many positions before them are, if the mask says.

    Args:
        mask: as the model was given it, or as `generate` makes it for a static cache: `[batch 1 new positions]`.
        more: may be of more positions, which a cache holds or has room for.

    Raises:
        ModelError: it is of another kind.
    """
    batch, new = entering.shape[:2]
    if isinstance(mask, Mapping):  # one for each kind of attention; the one that looks back furthest
        there = [each for each in mask.values() if each is not None]
        mask = max(there, key=lambda each: each.shape[-1], default=None)
    if mask is None:
        return torch.ones(batch, new, dtype=torch.bool, device=entering.device), None
    covered = isinstance(mask, Tensor) and (mask.shape[-1] == past + new or (more and mask.shape[-1] > past + new))
    if covered and mask.ndim == 2:
        mask = mask.to(entering.device) != 0
        return mask[:, past : past + new], (~mask[:, :past]).sum(1)
    if covered and mask.ndim == 4 and mask.shape[-2] == new:
        own = mask[:, 0, :, past : past + new].diagonal(dim1=-2, dim2=-1).to(entering.device)
        return (own if own.dtype == torch.bool else own == 0).expand(batch, new), None
    raise ModelError(
        f"The pass has an attention mask ({getattr(mask, 'shape', type(mask).__name__)!s:.80}) that does not show "
        f"which of {past + new} positions are padding. Give one of [batch positions]: 1 for a token, 0 for padding."
    )
