"""Sites: the places in a language model where an SAE can be spliced in, by the names TransformerLens gives them."""

import difflib
import re
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

from endwise.common.errors import SiteError


class Part(StrEnum):
    """Places in a block. The order is the order of computation."""

    RESID_PRE = "hook_resid_pre"
    """The residual stream entering the block."""
    ATTN_Z = "attn.hook_z"
    """Input of attention's output projection: the heads' results, one after the other."""
    ATTN_OUT = "hook_attn_out"
    """Value that attention adds to the residual stream."""
    RESID_MID = "hook_resid_mid"
    """The residual stream between attention and the MLP, where the one comes after the other."""
    MLP_IN = "mlp_in"
    """The tensor that the MLP module receives: after the norm before it, weight and bias included."""
    MLP_OUT = "hook_mlp_out"
    """Value that the MLP adds to the residual stream."""
    RESID_POST = "hook_resid_post"
    """The residual stream leaving the block."""


ARROW = " -> "
_ORDER = {part: index for index, part in enumerate(Part)}
_BEFORE_THE_MLP = ("hook_mlp_in", "ln2.hook_normalized")
"""Names that other tools have for what may be another value than `MLP_IN`."""


@dataclass(frozen=True)
class Site:
    """`blocks.<layer>.<part>`; sorts in the order of computation."""

    layer: int
    part: Part

    @property
    def name(self) -> str:
        return f"blocks.{self.layer}.{self.part.value}"

    @property
    def depth(self) -> tuple[int, int]:
        """Sort sites in the order in which a forward pass reaches them."""
        return self.layer, _ORDER[self.part]

    @property
    def stream(self) -> "Site":
        """The same tensor by one name: what leaves a block is what enters the next."""
        return Site(self.layer + 1, Part.RESID_PRE) if self.part is Part.RESID_POST else self

    def __lt__(self, other: "Site") -> bool:
        return self.depth < other.depth

    def __str__(self) -> str:
        return self.name

    @staticmethod
    def parse(name: str) -> "Site":
        """
        Raises:
            SiteError: the name is not of this form.
        """
        match = re.fullmatch(r"blocks\.([0-9]{1,6})\.([\w.]+)", name)
        parts = [part.value for part in Part]
        if match is not None and match[2] in _BEFORE_THE_MLP:
            raise SiteError(
                f"{name!r} is what other tools call the MLP's input, which may be its value before the norm, or before "
                f"the norm's weight and bias. blocks.{int(match[1])}.{Part.MLP_IN} is what the MLP module receives, "
                "after all of these: name that if it is meant."
            )
        if match is None or match[2] not in parts:
            near = difflib.get_close_matches(name.rpartition(".")[2], parts, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise SiteError(f"A site is named blocks.<layer>.<{' | '.join(parts)}>; given {name!r}.{hint}")
        return Site(int(match[1]), Part(match[2]))


SomeSites = Collection[Site | str] | Site | str


def each_of(sites: SomeSites) -> Collection[Site | str]:
    """Take one site, or several, as a user gives them."""
    return [sites] if isinstance(sites, Site | str) else sites


@dataclass(frozen=True)
class Place:
    """Place of a dictionary: an SAE reads and writes one site, a transcoder reads one and writes a later one.

    Written `blocks.3.hook_resid_pre`, or `blocks.3.mlp_in -> blocks.3.hook_mlp_out`.

    Raises:
        SiteError: what is written comes before what is read.
    """

    reads: Site
    """Site that the dictionary encodes."""
    writes: Site
    """Site whose activation its reconstruction stands for."""

    def __post_init__(self) -> None:
        if self.writes < self.reads:
            raise SiteError(
                f"A dictionary cannot write {self.writes.name} from what it reads at {self.reads.name}: the model "
                "computes that later. Write the site that is read, or a later one."
            )

    @classmethod
    def at(cls, site: Site) -> "Place":
        """Return the place of an SAE."""
        return cls(site, site)

    @classmethod
    def of(cls, given: "Place | Site") -> "Place":
        """Return the place, or that of an SAE at the site."""
        return given if isinstance(given, Place) else cls.at(given)

    @classmethod
    def parse(cls, name: str) -> "Place":
        """Read what `name` writes.

        Raises:
            SiteError: the name is not of this form, or the order is not.
        """
        reads, arrow, writes = name.partition(ARROW)
        return cls(Site.parse(reads), Site.parse(writes if arrow else reads))

    @property
    def name(self) -> str:
        return self.reads.name if self.reads == self.writes else f"{self.reads.name}{ARROW}{self.writes.name}"

    @property
    def sites(self) -> tuple[Site, ...]:
        """The one site, or what is read and what is written."""
        return (self.reads,) if self.reads == self.writes else (self.reads, self.writes)

    def __lt__(self, other: "Place") -> bool:
        return (self.writes, self.reads) < (other.writes, other.reads)

    def __str__(self) -> str:
        return self.name
