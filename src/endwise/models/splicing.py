"""Running a model on its SAE's reconstructions: the one place where a value is put at a site and the rest is run."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from endwise.common.axes import Activation, TokenMask
from endwise.common.errors import ModelError
from endwise.models.language_model import Clean, LanguageModel, Spliced
from endwise.models.sites import Part, Place, Site

Scalar = Float[Tensor, ""]
Given = TypeVar("Given", bound=Callable[[Tensor], Tensor])
Change = Callable[[Tensor, Tensor], Tensor]
"""Maps the activation read at a place's first site, `[batch pos d_in]`, and the model's own at the second,
`[batch pos d_out]`, to what stands at the second."""
CPU_TAIL_TOKENS, GPU_TAIL_TOKENS = 1024, 16384
"""Tokens at a time in the spliced pass: enough for matrix products at full speed."""


def sequences_at_a_time(context: int, device: torch.device) -> int:
    """Return how many sequences of `context` tokens go through the tail at a time, unless a recipe says."""
    return max(1, (CPU_TAIL_TOKENS if device.type == "cpu" else GPU_TAIL_TOKENS) // context)


def microbatches(count: int, mask: TokenMask, size: int | None = None) -> list[slice]:
    """Cut `count` sequences, as long as those of the mask, into those that go through the tail at a time.

    Args:
        size: sequences at a time; None: `sequences_at_a_time`.
    """
    size = size or sequences_at_a_time(mask.shape[1], mask.device)
    return [slice(start, start + size) for start in range(0, count, size)]


@dataclass(frozen=True)
class SplicedRows:
    """Some sequences of a spliced pass, beside the clean pass of the same."""

    rows: slice
    clean: Clean
    mask: TokenMask
    spliced: Spliced


Loss = Callable[[SplicedRows], Scalar]
"""A sum over the mask's tokens of some sequences."""


@dataclass(frozen=True)
class SplicedPass:
    """The tail of a model, run with a value in place at a site. Nothing outside `models` calls `LanguageModel.replay`.

    Args:
        model: runs the tail; it may be that of the clean pass in another precision.
        site: where the value is put.
        record: later sites whose activations to keep.
        final: whether to continue to the hidden state that enters the unembedding.
        microbatch: sequences at a time in `in_parts` and `gradients`; None: `sequences_at_a_time`.
    """

    model: LanguageModel
    site: Site
    record: Sequence[Site] = ()
    final: bool = True
    microbatch: int | None = None

    def run(self, clean: Clean, value: Activation, mask: TokenMask | None = None) -> Spliced:
        """Run the tail on all sequences at once.

        Args:
            clean: recorded the site.
            mask: positions outside it keep their own activation; None: the value is taken as it is.
        """
        if mask is not None:
            value = torch.where(mask[..., None], value, clean.activations[self.site])
        return self.model.replay(clean, {self.site: value}, record=self.record, final=self.final)

    def in_parts(self, clean: Clean, value: Activation, mask: TokenMask) -> Iterator[SplicedRows]:
        """Run the tail on a microbatch after another."""
        for rows in microbatches(len(mask), mask, self.microbatch):
            yield self._of(rows, clean.rows(rows), value[rows], mask[rows])

    def gradients(self, clean: Clean, value: Activation, mask: TokenMask, losses: Sequence[Loss]) -> list[Activation]:
        """Return the gradient of each loss's sum at the value, which is `[batch pos width]`; 0 at masked positions.

        One forward pass of the tail, and a backward pass for each loss, microbatch by microbatch: memory is bounded by
        one of them. The graph that the value comes from is not entered.
        """
        found = [torch.empty_like(value) for _ in losses]
        for rows in microbatches(len(mask), mask, self.microbatch):
            leaf = value.detach()[rows].requires_grad_()
            part = self._of(rows, clean.rows(rows), leaf, mask[rows])
            totals = [loss(part) for loss in losses]
            for number, (total, gradient) in enumerate(zip(totals, found, strict=True)):
                total.backward(retain_graph=number + 1 < len(totals))
                assert leaf.grad is not None
                gradient[rows] = leaf.grad
                leaf.grad = None
        return found

    def _of(self, rows: slice, clean: Clean, value: Activation, mask: TokenMask) -> SplicedRows:
        return SplicedRows(rows, clean, mask, self.run(clean, value, mask))


def clean_by_tail(tail: LanguageModel, head: Clean, site: Site, record: Sequence[Site], final: bool) -> Clean:
    """Continue a clean pass with the model that runs the spliced one, so that its rounding is on both sides.

    Args:
        head: recorded the site, where `tail` takes over.
    """
    with torch.no_grad():
        after = SplicedPass(tail, site, record, final).run(head, head.activations[site])
    return Clean(head.tokens, head.activations | after.activations, after.final)


@contextmanager
def spliced(
    model: LanguageModel, saes: Mapping[str | Site | Place, Callable[[Tensor], Tensor]]
) -> Iterator[LanguageModel]:
    """Context in which the Hugging Face model `model.model` computes, and generates, with reconstructions in place.

    Args:
        model: the model to run.
        saes: by place (a `Place`, or its name), an SAE or any function of the activation `[batch pos d_model]`. Several
            feed each other in the order of the model; a transcoder (`blocks.3.mlp_in -> blocks.3.hook_mlp_out`) reads
            one site and writes another.

    Raises:
        SiteError: the model has no such site.
        ModelError: an SAE is not as wide as its site.
    """
    with changed(model, {place: _instead(sae) for place, sae in at_places(model, saes).items()}):
        yield model


def at_places(model: LanguageModel, saes: Mapping[str | Site | Place, Given]) -> dict[Place, Given]:
    """Find the places of a model that dictionaries are given for.

    Raises:
        SiteError: the model has no such site.
        ModelError: a dictionary is not as wide as its site.
    """
    placed = {model.place(given): sae for given, sae in saes.items()}
    for place, sae in placed.items():
        refuse_width(model, place.reads, getattr(sae, "d_in", None))
        refuse_width(model, place.writes, getattr(sae, "d_out", getattr(sae, "d_in", None)))
    return placed


@contextmanager
def changed(model: LanguageModel, changes: Mapping[Place, Change]) -> Iterator[None]:
    """Context in which the Hugging Face model computes, and generates, with changed values where the places write."""
    with ExitStack() as patches:
        for place in sorted(changes):
            patches.enter_context(model.patched(_patch_of(place, changes[place])))
        yield


def _instead(sae: Callable[[Tensor], Tensor]) -> Change:
    return lambda read, _own: sae(read)


def refuse_width(model: LanguageModel, site: Site, width: int | None) -> None:
    """
    Raises:
        ModelError: a dictionary of this width is not as wide as the site; None: any will do.
    """
    if width is not None and width != model.width(site):
        raise ModelError(
            f"{site.name} of {model.name} has width {model.width(site)}; the SAE given for it has {width}."
        )


def _patch_of(place: Place, change: Change) -> dict[Site, Callable[[Tensor], Tensor]]:
    """Return what a whole pass puts at a place: of two sites, the value is kept at the first for the second."""
    if place.reads == place.writes:
        return {place.reads: lambda value: change(value, value)}
    kept: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        kept[:] = [value]
        return value

    return {place.reads: keep, place.writes: lambda own: change(kept.pop(), own)}


def squared_error(
    estimate: Activation, truth: Activation, mask: TokenMask, scale: Callable[[Activation], Tensor] | None = None
) -> Scalar:
    """Σ over the mask's tokens of the mean over dims of the squared difference, in fp32 (float64 stays float64).

    Args:
        scale: of the true activation, what each token's is divided by.
    """
    difference = estimate - truth if estimate.dtype == torch.float64 else estimate.float() - truth.float()
    # Masked before it is squared: the gradient of a square that overflows would be 0 · ∞.
    errors = difference.where(mask[..., None], 0.0).square().mean(-1)
    return (errors if scale is None else errors / scale(truth).where(mask, 1.0)).sum()


def later_residuals(model: LanguageModel, site: Site) -> tuple[Site, ...]:
    """`hook_resid_pre` of every block after the site's own (the reference's downstream sites), less the one that is the
    site itself under its other name, `hook_resid_post` of the block before.
    """
    first = site.layer + 1 + (site.part is Part.RESID_POST)
    return tuple(model.readable(Site(layer, Part.RESID_PRE)) for layer in range(first, model.n_layers))
