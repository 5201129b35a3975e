"""Records that passes through a model take and give."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from endwise.common.axes import Activation, AnyWidth, Tokens
from endwise.common.errors import SiteError
from endwise.common.showing import Shown
from endwise.models.sites import Site

Act = Callable[[Tensor], Tensor | None]
"""Hook called with the value at a site; its result, unless None, takes the value's place."""
Patch = Tensor | Callable[[Tensor], Tensor]


class Activations(dict[Site, AnyWidth]):
    """Activations by site, which its name finds too."""

    def __missing__(self, key: Site | str) -> Tensor:
        """
        Raises:
            SiteError: no site has this name, or it was not recorded.
        """
        site = Site.parse(key) if isinstance(key, str) else key
        if site is not key and site in self:
            return self[site]
        recorded = ", ".join(map(str, sorted(self))) or "none"
        raise SiteError(f"{site} was not recorded in this pass; recorded: {recorded}. Name it when the pass is run.")


@dataclass(frozen=True, repr=False)
class Clean(Shown):
    """Record of the original model's pass."""

    tokens: Tokens
    activations: dict[Site, AnyWidth]
    """The sites asked for, and what a replay from them needs besides."""
    final: Activation | None
    """The hidden state that enters the unembedding."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "activations", Activations(self.activations))

    def rows(self, rows: slice | Tensor) -> "Clean":
        """The same for some of the sequences; nothing is copied for a slice, and any may be picked several times."""
        activations = {site: value[rows] for site, value in self.activations.items()}
        return Clean(self.tokens[rows], activations, None if self.final is None else self.final[rows])


@dataclass(frozen=True, repr=False)
class Spliced(Shown):
    """Record of a pass with reconstructions in place."""

    activations: dict[Site, AnyWidth]
    final: Activation | None

    def __post_init__(self) -> None:
        object.__setattr__(self, "activations", Activations(self.activations))
