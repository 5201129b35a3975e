"""Checks of a language model, tried on a short pass before any long work: that it is finite, that it does not
look ahead, and that what follows a site is computed from the site's value as it is in the whole model.
"""

import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from endwise.common.axes import Tokens
from endwise.common.errors import ModelError
from endwise.models.hooking import SiteHooks
from endwise.models.readout import Readout
from endwise.models.sites import Part, Site

FIRST = Site(0, Part.RESID_PRE)
STREAMS = (Part.RESID_PRE, Part.RESID_POST)
FAILURES = (LookupError, AttributeError, TypeError, ValueError, RuntimeError, AssertionError)
"""Errors that a model may raise when it is run otherwise than it expects."""


@runtime_checkable
class Tried(Protocol):
    """A model as these checks see it."""

    @property
    def name(self) -> str: ...
    @property
    def model(self) -> nn.Module: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def n_layers(self) -> int: ...
    @property
    def context(self) -> int | None: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def readout(self) -> Readout: ...
    @property
    def vocab_size(self) -> int: ...
    def logits(self, tokens: Tokens) -> Tensor: ...
    def clean(self, tokens: Tokens, record: Any = (), final: bool = False) -> Any: ...
    def replay(self, clean: Any, patch: Mapping[Site, Any], record: Any = (), final: bool = True) -> Any: ...


def refuse_not_finite(model: Tried, activations: Mapping[Site, Tensor], final: Tensor, logits: Tensor) -> None:
    """
    Raises:
        ModelError: a pass of ordinary tokens gives NaN or infinity; it says where, and whose fault that is.
    """
    if _finite(final) and _finite(logits):
        return
    where = next((site.name for site in sorted(activations) if not _finite(activations[site])), "the logits")
    half = model.dtype == torch.float16
    wider = "Set model.dtype to bfloat16 or float32. " if half else ""
    weight = next((name for name, value in model.model.named_parameters() if not _finite(value)), None)
    if weight is not None:
        reason = f"its weights hold NaN or infinity ({weight}). {wider}The checkpoint may be damaged: restore it."
    elif half:
        reason = f"{where} overflows float16, whose largest number is 65,504. {wider}"
    else:
        reason = f"{where} is NaN or infinite, though its weights are finite. Does its config.json belong to them?"
    raise ModelError(f"{model.name} cannot be used: {reason.strip()}")


def refuse_lookahead(model: Tried, tokens: Tokens, vocab_size: int) -> None:
    """Change the probe's tokens one at a time: the states that earlier predictions are made of must stay.

    Raises:
        ModelError: an earlier one changes.
    """
    length = tokens.shape[1]
    rows = tokens.repeat(length, 1)
    for position in range(1, length):
        rows[position, position] = (rows[position, position] + 1 + vocab_size // 2) % vocab_size
    final = model.clean(rows, final=True).final
    for position in range(1, length):
        if not same(final[position, :position], final[0, :position]):
            raise ModelError(
                f"{model.name} looks ahead: what it predicts before position {position} changes with the token at "
                f"{position}, so it does not predict the next token. endwise needs a causal model; one that can be "
                "either is causal if its config.json says so (is_causal or is_decoder: true)."
            )


def refuse_no_gradients(model: Tried, tokens: Tokens) -> None:
    """
    Raises:
        ModelError: of a quantised model, whose quantiser gives no gradient to what its layers are given.
    """
    clean = model.clean(tokens, [FIRST])
    value = clean.activations[FIRST].clone().requires_grad_()
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*autograd kernel was not registered")  # and none would come
            model.replay(clean, {FIRST: value}).final.float().square().sum().backward()
        why = None if value.grad is not None and _finite(value.grad) and bool(value.grad.any()) else "it gives none"
    except (*FAILURES, UserWarning) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:160]
    if why is not None:
        raise ModelError(
            f"{model.name} is quantised, and no gradient goes through its layers ({why}), which training and "
            "importance need. Give the checkpoint that it was made from, or another quantiser's."
        )


def refuse_no_blocks(model: Tried, kind: str, runs: int, tokens: Tokens, activations: Mapping[Site, Tensor]) -> None:
    """
    Args:
        kind: the class of what look like its blocks.
        runs: how often the busiest of them ran in the pass of `tokens` that gave `activations`.

    Raises:
        ModelError: they do not pass on a residual stream, once each.
    """
    for site in sorted(activations):
        shape = activations[site].shape
        if site.part in STREAMS and (len(shape) != 3 or shape[:2] != tokens.shape):
            raise ModelError(
                f"{model.name}: what its blocks ({kind}) pass on has the shape {[*shape]} at {site.name}, not "
                "[batch pos d_model], so there is no residual stream to splice into. endwise cannot take this model."
            )
    if runs > 1:
        raise ModelError(
            f"{model.name} runs its blocks ({kind}) {runs} times in one pass, so that a site has no single value. "
            "endwise cannot take this model."
        )


def find_unspliceable(model: Tried, hooks: SiteHooks, other: Tokens, sites: list[Site], clean: Any) -> dict[Site, str]:
    """Replay the model from every site with the site's own value, which must change nothing.

    Args:
        hooks: at the model's sites.
        other: tokens of the same shape as those that `clean` read; with their value at the last block's output, the
            model must end as if it had read them.
        sites: those with values of shape `[batch pos d_model]`, in the order of computation.
        clean: the pass in which they all and the final state were recorded.

    Returns:
        The sites that cannot be spliced at, each with the reason.

    Raises:
        ModelError: nothing but the first block's input can be replayed: what was taken for blocks are none.
    """
    reasons: dict[Site, str] = {}
    last = Site(model.n_layers - 1, Part.RESID_POST)
    streams = [site for site in sites if site.part in STREAMS]
    for site in reversed(streams):
        reason = _reason(model, other, site, clean, reasons)
        if reason is not None:
            reasons[site] = reason
    if all(site in reasons for site in streams if site != FIRST):
        raise ModelError(
            f"{model.name}: the modules that look like its blocks are not blocks, or share more than the stream: "
            f"{reasons[last]} endwise cannot take this model."
        )
    for part in {site.part for site in sites}.difference(STREAMS):
        tried = [site for site in sites if site.part is part]
        alone = [site for site in tried if any(Site(site.layer, stream) in reasons for stream in STREAMS)]
        together = [site for site in tried if site not in alone]
        if together and not _begin_together(model, hooks, together, clean):
            alone = tried
        reasons |= {site: reason for site in alone if (reason := _reason(model, other, site, clean, reasons))}
    return reasons


def _begin_together(model: Tried, hooks: SiteHooks, sites: list[Site], clean: Any) -> bool:
    """Enter several blocks in one pass, each at a site in it with the site's own value, which must change nothing.

    Blocks that can be begun at their inputs read nothing of blocks before, which run here and not in a replay.
    """
    leaving = [Site(site.layer, Part.RESID_POST) for site in sites]
    try:
        with ExitStack() as entered:
            for site in sites:
                hooks.enter_block(entered, site, clean.activations[site], clean.activations, model.dtype)
            found = model.clean(clean.tokens, leaving).activations
    except FAILURES:
        return False
    return all(same(found[site], clean.activations[site]) for site in leaving)


def _reason(model: Tried, other: Tokens, site: Site, clean: Any, reasons: Mapping[Site, str]) -> str | None:
    """Say why no SAE can be spliced in at a site; `reasons` has it of all residual streams after."""
    value, after = clean.activations[site], Site(site.layer, Part.RESID_POST)
    if site == FIRST:  # nothing is skipped
        return None
    if site.layer == model.n_layers - 1 and site == after:  # nothing is left to run: only a change can show
        swapped = model.clean(other, [site], final=True)
        return _replayed(lambda: model.replay(clean, {site: swapped.activations[site]}).final, swapped.final)
    if site.part is Part.RESID_POST:
        following = Site(site.layer + 1, Part.RESID_PRE)
        entering = clean.activations[following]
        if entering.shape == value.shape and torch.equal(value.to(entering.device), entering):
            return reasons.get(following)
        return "the model changes it before the next block reads it."
    reason = reasons.get(after)
    if reason is None:  # what is right where the block ends stays so
        replayed = partial(model.replay, clean, {site: value}, [after], final=False)
        reason = _replayed(lambda: replayed().activations[after], clean.activations[after])
    if reason is not None and site.part is Part.RESID_PRE:  # its block may compute what those after it share
        reason = _replayed(lambda: model.replay(clean, {site: value}).final, clean.final)
    return reason


def _replayed(replay: Callable[[], Tensor], expected: Tensor) -> str | None:
    """Say why what a replay gives is not what the whole model gave."""
    beside = "what comes after it needs more of what comes before than the residual stream"
    try:
        found = replay()
    except FAILURES as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        return f"{beside} (a pass that begins there fails: {reason})."
    return None if same(found, expected) else f"{beside} (a pass that begins there gives other predictions)."


def same(ours: Tensor, theirs: Tensor, tolerance: float | None = None) -> bool:
    """Equal, to what rounding may do: unset, where the same is computed twice."""
    tolerance = tolerance or (2e-2 if theirs.dtype in (torch.bfloat16, torch.float16) else 1e-5)
    return ours.shape == theirs.shape and torch.allclose(
        ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max())
    )


def _finite(value: Tensor) -> bool:
    return bool(value.isfinite().all())
