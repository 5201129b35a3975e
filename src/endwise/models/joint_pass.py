"""The spliced pass with reconstructions at several places, each of what the model computes with the others in place."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from endwise.common.axes import AnyWidth, TokenMask
from endwise.common.errors import ModelError
from endwise.models.language_model import Clean, LanguageModel
from endwise.models.sites import Place, Site
from endwise.models.splicing import Scalar, SplicedRows, microbatches

Reconstruct = Callable[[AnyWidth, TokenMask], AnyWidth]
"""Reconstruction put at a place by a joint pass: a function of what is read there, and of the positions that count."""


@dataclass(frozen=True)
class AtPlace:
    """Values that a joint pass meets at a place that has a function."""

    read: AnyWidth
    """Input of the function."""
    found: AnyWidth
    """Value that the model computes at the site that is written."""
    value: AnyWidth
    """Value that the function gave for it."""


@dataclass(frozen=True)
class JointRows(SplicedRows):
    """Some sequences of a joint pass, beside the clean pass of the same."""

    at: Mapping[Place, AtPlace]


@dataclass(frozen=True)
class JointGradients:
    """Gradients that the backward pass of a joint pass leaves, and what it met. All are sums over tokens."""

    values: Mapping[Site, AnyWidth]
    """At the values that were given; 0 at masked positions."""
    parameters: Sequence[Tensor]
    """At the parameters asked for."""
    at: Mapping[Place, AtPlace]
    """Values read and found at each place that has a function in the whole pass, without its graph, and in place of
    the value the gradient there."""


@dataclass(frozen=True)
class JointPass:
    """The tail of a model, run with several reconstructions in place, which feed each other in the order of the model.

    At some sites values are put, as in a `SplicedPass`; at some places functions of what this very pass computes there.
    At masked positions what the pass itself computes stays.

    Args:
        model: as in `SplicedPass`; so are `record` (a site that is written gives what is put there), `final` and
            `microbatch`.
        functions: by place.

    Raises:
        ModelError: two are put at one site.
    """

    model: LanguageModel
    functions: Mapping[Place, Reconstruct]
    record: Sequence[Site] = ()
    final: bool = True
    microbatch: int | None = None

    def run(self, clean: Clean, values: Mapping[Site, AnyWidth], mask: TokenMask) -> JointRows:
        """Run the tail on all sequences at once.

        Args:
            clean: recorded the first site.
        """
        return self._of(slice(None), clean, values, mask)

    def _of(self, rows: slice, clean: Clean, values: Mapping[Site, AnyWidth], mask: TokenMask) -> JointRows:
        visit = _Visit(mask, values, self.functions)
        spliced = self.model.replay(clean, visit.patches(), record=self.record, final=self.final)
        return JointRows(rows, clean, mask, spliced, visit.at)

    def gradients(
        self,
        clean: Clean,
        values: Mapping[Site, AnyWidth],
        mask: TokenMask,
        loss: Callable[[JointRows], Scalar],
        parameters: Sequence[Tensor] = (),
    ) -> JointGradients:
        """Return the gradient of the loss's sum at the values and at the parameters, microbatch by microbatch.

        It is that of one pass: through later functions it enters what they read, and so what was put before them.

        Args:
            parameters: of the functions.
        """
        found: list[tuple[list[Tensor], dict[Place, AtPlace]]] = []
        totals: list[Tensor] = [torch.zeros_like(each) for each in parameters]
        for rows in microbatches(len(mask), mask, self.microbatch):
            leaves = {site: value.detach()[rows].requires_grad_() for site, value in values.items()}
            part = self._of(rows, clean.rows(rows), leaves, mask[rows])
            met = [at.value for at in part.at.values()]
            wanted = [*leaves.values(), *met, *parameters]
            gradients = _gradients(loss(part), wanted)
            for total, gradient in zip(totals, gradients[len(wanted) - len(totals) :], strict=True):
                total += gradient
            at = zip(part.at.items(), gradients[len(leaves) :], strict=False)
            kept = {place: AtPlace(one.read.detach(), one.found.detach(), grad) for (place, one), grad in at}
            found.append((gradients[: len(leaves)], kept))
        at_values = {site: torch.cat([each[number] for each, _ in found]) for number, site in enumerate(values)}
        return JointGradients(
            at_values, totals, {place: _joined(place, [at[place] for _, at in found]) for place in found[0][1]}
        )


def _gradients(total: Scalar, wanted: Sequence[Tensor]) -> list[Tensor]:
    """The gradient at each tensor, 0 where the total does not depend on it."""
    if not total.requires_grad:
        return [torch.zeros_like(each) for each in wanted]
    reached = [each for each in wanted if each.requires_grad]
    given = iter(torch.autograd.grad(total, reached, allow_unused=True, materialize_grads=True))
    return [next(given) if each.requires_grad else torch.zeros_like(each) for each in wanted]


def _joined(place: Place, parts: Sequence[AtPlace]) -> AtPlace:
    read, value = (torch.cat([getattr(each, name) for each in parts]) for name in ("read", "value"))
    found = read if place.reads == place.writes else torch.cat([each.found for each in parts])
    return AtPlace(read, found, value)


class _Visit:
    """One joint pass on its way through the model: what is put where, and what was met so far."""

    def __init__(
        self, mask: TokenMask, values: Mapping[Site, AnyWidth], functions: Mapping[Place, Reconstruct]
    ) -> None:
        self._mask, self._values = mask, values
        self._writes = {place.writes: (place, function) for place, function in functions.items()}
        self._reads: dict[Site, list[Place]] = {}
        for place in functions:
            if place.reads != place.writes:
                self._reads.setdefault(place.reads, []).append(place)
        twice = [site.name for site in self._writes if site in values]
        if twice or len(self._writes) < len(functions):
            raise ModelError(f"Two reconstructions cannot be put at one site ({', '.join(twice)}). Choose others.")
        self._kept: dict[Place, Tensor] = {}
        self.at: dict[Place, AtPlace] = {}

    def patches(self) -> dict[Site, Callable[[Tensor], Tensor]]:
        return {site: partial(self._act, site) for site in {*self._values, *self._writes, *self._reads}}

    def _act(self, site: Site, found: Tensor) -> Tensor:
        """Return what the model continues with at a site; who reads it there is given that."""
        value = self._values.get(site)
        if site in self._writes:
            place, function = self._writes[site]
            read = found if place.reads == site else self._kept.pop(place)
            value = function(read, self._mask)
            self.at[place] = AtPlace(read, found, value)
        result = found if value is None else torch.where(self._mask[..., None], value, found).to(found.dtype)
        for place in self._reads.get(site, ()):
            self._kept[place] = result
        return result
