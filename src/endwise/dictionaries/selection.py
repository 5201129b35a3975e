"""Selection of the k largest features, of each row or of a whole step: selection that top-k dictionaries share.

Those of each row are for the kernels to find (`Kernels.largest`). Of a step, candidates are the few (row, feature)
pairs above a bound that a sample of the rows suggests; what is chosen among them is what would be chosen among all,
since the bound is lowered where there are too few. Ties go to the lower feature, and of a step to the earlier row. Only
positive values are chosen. NaN always is, so that it stays in the latents and stops a run.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import linear

from endwise.common.processes import ALONE, World
from endwise.config.base import Positive
from endwise.config.dictionary import KnobRule
from endwise.dictionaries.latents import found_on, rooms_for
from endwise.dictionaries.linear import LinearConfig
from endwise.kernels import Found, Rooms, kernels_for

SPARSE_BELOW = 1 / 32
"""Largest share of features for which k makes sparse latents, as of ReLU ones."""
CANDIDATES = 4.0
"""Candidates that are worth their cost, as a multiple of that share of all places."""
SAMPLE = 64
"""Rows that a bound is taken from."""
SAMPLE_BLOCK, WIDE_FROM = 32, 4
"""Neighbours in the sample of which only the greatest competes for the bound, where there are so many times more blocks
than are wanted: few hold two of them, and the bound, which comes out lower where one does, is found much sooner."""
MORE = (1.25, 2.0)
"""Multiples of k that the bounds on a step's candidates are to let through, tried in turn before all positive ones."""
CHUNK_ELEMENTS = 1 << 23
"""Pre-activations `[rows d_sae]` held at once where all of a row's are wanted."""
GOLDEN = (5**0.5 - 1) / 2


class TopKConfig(LinearConfig):
    """Number of features that are active."""

    penalised: ClassVar[bool] = False
    counting: ClassVar[tuple[str, ...]] = ("k", "k_start")
    knobs: ClassVar[Mapping[str, KnobRule]] = {"k": KnobRule("k", sparser=False)}
    k: Positive
    """Active features per token."""
    k_start: Positive | None = None
    """k in the first step, from where it moves linearly to `k`; unset: it is `k` throughout. Usual: 10·k."""
    k_steps: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the steps after which it is `k`."""


class Annealed(NamedTuple):
    """k as it moves in training: from `start` linearly to `k`, in the first `share` of the steps."""

    k: int
    start: int | None = None
    share: float = 1.0

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Annealed":
        """Read a recipe's section, or a file's settings."""
        return cls(settings["k"], settings.get("k_start"), settings.get("k_steps", 1.0))

    def at(self, done: float) -> float:
        """Return k after a share of the steps."""
        start = self.k if self.start is None else self.start
        return start + (self.k - start) * min(1.0, done / self.share)


class Cut(NamedTuple):
    """End of a step's k·B largest."""

    smallest: Float[Tensor, ""]
    """Smallest of those that are kept; infinite, if nothing is."""
    ties: Tensor
    """Number of those that equal it and are kept in this process."""
    enough: Bool[Tensor, ""]
    """True if there are as many as were wanted."""

    def within(self, dtype: torch.dtype) -> "Cut":
        """The same for values of half precision, which exceed a number of another process's if they exceed it rounded
        down.
        """
        if dtype.itemsize > 2:
            return self
        near = self.smallest.to(dtype)
        below = (near.view(torch.int16) - 1).view(dtype)
        return self._replace(smallest=near.where(near <= self.smallest, below))

    def kept(self, values: Float[Tensor, "*places"]) -> Bool[Tensor, "*places"]:
        """Mark what is kept of this process's values, which lie in the order of rows."""
        ties = (values == self.smallest).view(-1)
        first = (ties.cumsum(0, dtype=torch.int32) <= self.ties) & ties
        return (values > self.smallest) | first.view(values.shape) | values.isnan()


def cut_of(values: Float[Tensor, " places"], count: Tensor, world: World = ALONE) -> Cut:
    """Find where the `count` largest positive values of all processes end, or all of them if they are fewer.

    Positive floats are ordered as the integers that their bits spell, among which the smallest kept value is selected,
    or searched for digit by digit (`_by_digits`): exactly.

    Args:
        values: this process's; what is not positive, or NaN, does not compete.
        count: of all processes, a whole number.
    """
    bits = values.where(values > 0, 0.0).view(torch.int32 if values.dtype.itemsize == 4 else torch.int64)
    there = (bits > 0).sum()
    world.add([there])
    wanted = torch.minimum(count, there)
    if world.size == 1 and not kernels_for(values.device).holds:  # what is counted is waited for anyway
        last = int(wanted)
        found = bits.kthvalue(len(bits) - last + 1).values if last else bits.new_full((), -1)
    else:
        found = _by_digits(bits, wanted, world)
    smallest = found.view(values.dtype)
    smallest = smallest.where(smallest.isfinite(), torch.inf)  # of no value at all every bit is set, which is NaN
    ties = torch.zeros(world.size + 1, dtype=torch.int64, device=values.device)
    ties[world.rank] = (values == smallest).sum()
    ties[-1] = (values > smallest).sum()
    own = ties[world.rank].clone()
    world.add([ties])
    kept = (wanted - ties[-1] - ties[: world.rank].sum()).clamp(min=0).minimum(own)
    return Cut(smallest, kept, there >= count)


def _by_digits(bits: Tensor, wanted: Tensor, world: World) -> Tensor:
    """Find the smallest of the `wanted` largest integers of all processes, none negative, digit by digit, by counting
    how many are at least so large. Several processes add up their counts: of 15 numbers, eight times.
    """
    found = bits.new_zeros(())
    for shift, ones in _digits(8 * bits.dtype.itemsize - 1, 1 if world.size == 1 else 4):
        counts = torch.stack([(bits >= found + (digit << shift)).sum() for digit in range(1, 1 << ones)])
        world.add([counts])
        found = found + ((counts >= wanted).sum().to(bits.dtype) << shift)
    return found


def _digits(bits: int, width: int) -> Iterator[tuple[int, int]]:
    """Yield where each digit of so many bits begins, from the highest on, and how many bits it has."""
    while bits > 0:
        ones = bits % width or width
        bits -= ones
        yield bits, ones


class Encoder(NamedTuple):
    """`relu(x·weightᵀ + bias)` of rows, of which the largest are asked for. Nothing here has a gradient."""

    x: Float[Tensor, "n d_in"]
    weight: Float[Tensor, "d_sae d_in"]
    bias: Float[Tensor, " d_sae"]
    sparse_below: float = SPARSE_BELOW

    @property
    def limit(self) -> int:
        """Candidates that are worth their cost."""
        return int(CANDIDATES * self.sparse_below * len(self.x) * len(self.weight))

    @property
    def room(self) -> int:
        """Pairs up to which they are held in slots."""
        return int(self.sparse_below * len(self.x) * len(self.weight))

    def makes_sparse(self, k: int | float) -> bool:
        """Return whether k features per row are few enough for sparse latents."""
        return k <= self.sparse_below * len(self.weight)

    def dense(self, rows: Tensor) -> Float[Tensor, "rows d_sae"]:
        return torch.relu(linear(self.x[rows], self.weight, self.bias))

    def sample(self, of: Bool[Tensor, " n"] | None = None) -> Float[Tensor, "rows d_sae"]:
        """Encode rows that lie apart, in no step with the length of a sequence; some of them twice if they are few.

        Args:
            of: rows to choose from; None: all.
        """
        number = torch.arange(SAMPLE, device=self.x.device)
        if of is None:
            return self.dense((number * GOLDEN % 1 * len(self.x)).long())
        chosen = (number * GOLDEN % 1 * of.sum()).long()
        return self.dense((~of).sort(stable=True).indices[chosen])

    def bounds(self, counted: Bool[Tensor, " n"] | None, k: float) -> Float[Tensor, " tries"]:
        """Return bounds on the k·B largest to try in turn, falling to 0."""
        sample = self.sample(counted).view(-1)
        wanted = [min(len(sample), max(1, round(more * k * SAMPLE))) for more in MORE]
        if len(sample) % SAMPLE_BLOCK == 0 and len(sample) >= WIDE_FROM * SAMPLE_BLOCK * wanted[-1]:
            sample = sample.view(-1, SAMPLE_BLOCK).amax(-1)
        largest = sample.nan_to_num(nan=0.0).topk(wanted[-1]).values
        return torch.stack([*(largest[number - 1] for number in wanted), largest.new_zeros(())])

    def above(self, bound: Float[Tensor, ""]) -> Found | None:
        """Find the pairs above a bound; None if they are more than is worth it."""
        return kernels_for(self.x.device).active(self.x, self.weight, self.bias, self.limit, bound)


def top_per_row(encoder: Encoder, k: int) -> Found | None:
    """Find each row's k largest positive pre-activations; None where that is for a dense product to find."""
    if not encoder.makes_sparse(k):
        return None
    kernels = kernels_for(encoder.x.device)
    now, held = partial(kernels.largest, *encoder[:3], k, encoder.limit), partial(kernels.largest_held, *encoder[:3], k)
    return found_on(kernels, encoder.x, encoder.room, now, held)


class AboveBound(NamedTuple):
    """Pairs among which are the largest of a step."""

    found: Found
    bound: Float[Tensor, ""]
    """Number that all of them exceed, and none else of this process."""
    rooms: Rooms | None
    """Room in which they are held; None: they are counted."""

    def check(self, cut: Cut) -> None:
        """Have a step taken again whose cut would fall below the bound, where that is not known before."""
        if self.rooms is not None:
            self.rooms.note_missing((~cut.enough | (cut.smallest <= self.bound)) & (self.bound > 0))


def candidates_of_step(
    encoder: Encoder, counted: Bool[Tensor, " n"] | None, k: float, count: Tensor, world: World = ALONE
) -> AboveBound | None:
    """Find pairs among which are the `count` largest of all processes; None where that is for a dense product.

    Where pairs are counted that is so in all processes. In slots they are those above a bound that lets many more
    through than are wanted, so that it is rare that too few are; other processes may be dense.

    Args:
        counted: rows that compete.
        k: features wanted per row.
    """
    if not encoder.makes_sparse(k):
        return None
    kernels = kernels_for(encoder.x.device)
    choosing = partial(world.together, "choosing the active features")
    with choosing():
        bounds = encoder.bounds(counted, k)
    world.add([bounds])
    bounds = bounds / world.size
    if (rooms := rooms_for(kernels, encoder.x)) is not None:
        bound = bounds[len(MORE) - 1]
        with choosing():
            found = rooms.find(encoder.room, partial(kernels.active_held, *encoder[:3], above=bound))
        return None if found is None else AboveBound(found, bound, rooms)
    some: AboveBound | None = None
    for bound in bounds:
        with choosing():
            found = encoder.above(bound)
        state = torch.tensor([int(found is None), 0], device=count.device)
        if found is not None:
            some = AboveBound(found, bound, None)
            state[1] = ((found.values > 0) if counted is None else counted[found.pairs.rows]).sum()
        world.add([state])
        if state[0] > 0:
            return None
        if state[1] >= count:
            return some
    return some


def threshold_for(
    encoder: Encoder, k: float, shards: World = ALONE, elements: int = CHUNK_ELEMENTS
) -> Float[Tensor, ""]:
    """Find θ above which, of rows `x`, k pre-activations are on average; 0 if there are not so many positive ones.

    Args:
        shards: processes that hold the other features.
        elements: of `[rows d_sae]`, held at once.
    """
    count = round(k * len(encoder.x))
    size = max(1, elements // len(encoder.weight))
    largest = encoder.x.new_zeros(0)
    for rows in torch.arange(len(encoder.x), device=encoder.x.device).split(size):
        values = encoder.dense(rows).view(-1)
        values = values[values > (largest[-1] if len(largest) == count else 0.0)]
        largest = torch.cat([largest, values])
        largest = largest.topk(min(count, len(largest))).values
    if shards.total(len(largest)) < count:
        return encoder.x.new_zeros(())
    last = largest[-1] if shards.size == 1 else cut_of(largest, torch.tensor(count, device=largest.device), shards)[0]
    return torch.nextafter(last, largest.new_zeros(()))
