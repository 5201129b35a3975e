"""Dictionaries whose first features reconstruct alone, coarse ones before fine ones (Bussmann et al. 2025,
arXiv 2503.17547), trained on what they reconstruct or on what the model makes of it.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int64
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import linear

from endwise.common.seeds import numpy_stream
from endwise.config.base import Positive
from endwise.config.dictionary import ARCHITECTURES
from endwise.dictionaries.batchtopk import BatchTopKConfig, BatchTopKSAE
from endwise.dictionaries.latents import DenseLatents, Latents, SparseLatents
from endwise.kernels import Pairs

GROUPS = (1 / 32, 1 / 16, 1 / 8, 1 / 4)
"""Shares of the first groups of features; the last has the rest."""
SHORTEST, EXPONENT = 1 / 32, 0.5
"""Law of random prefixes: the shortest's share of all features, and α of P(length > m) ∝ m^−α."""
Share = Annotated[float, Field(gt=0, lt=1)]


class MatryoshkaConfig(BatchTopKConfig):
    """BatchTopK whose first features reconstruct alone."""

    counting: ClassVar[tuple[str, ...]] = (*BatchTopKConfig.counting, "random_prefixes")
    architecture: str = "matryoshka_batchtopk"
    groups: Annotated[tuple[Share, ...], Field(min_length=1)] = GROUPS
    """Shares of the features that each group has, the first group first; a last one has the rest. A prefix is a group
    with all before it."""
    random_prefixes: Annotated[Positive, Field(ge=2)] | None = None
    """Prefixes of which all but the whole dictionary are drawn for each step, in place of those of `groups`."""

    @model_validator(mode="after")
    def _some_left(self) -> "MatryoshkaConfig":
        if sum(self.groups) >= 1:
            raise ValueError(f"groups are {sum(self.groups):g} of the features in all; leave some for the last group")
        return self

    def prefixes(self, width: int) -> tuple[int, ...]:
        return prefixes_of(self.groups, self.features(width))[:-1]


@ARCHITECTURES.add("matryoshka_batchtopk")
class MatryoshkaSAE(BatchTopKSAE):
    """BatchTopK over all features, of which every prefix `c[:m]·D[:m] + b_d` is to reconstruct too.

    *Prefixes* are those of `groups`; or, with `random_prefixes` n, in every step the whole dictionary and n − 1 lengths
    m drawn from a Pareto distribution cut off at both ends, P(length > m) = (m^−α − F^−α) / (s^−α − F^−α) for m from
    s = F/32 to F, α = ½. Draws depend on the seed and the step alone.

    *Terms at the site* are means over the prefixes' losses.

    *Spliced terms* see one prefix for each sequence, so that they cost one tail: of S sequences and n prefixes, each
    sequence has each prefix with probability 1/n, so that the expected loss is the mean of the prefixes' losses. The
    whole dictionary is always among a step's: sequence i of a random order has the prefix at the quantile (i + u)/S, u
    uniform in [0, 1), of the whole dictionary first and then the others. If S < n the whole dictionary has probability
    1/S instead, and the others share the rest equally.
    """

    architecture = "matryoshka_batchtopk"
    Config = MatryoshkaConfig

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        d_out: int | None = None,
        *,
        groups: Sequence[float] = GROUPS,
        random_prefixes: int | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(d_in, d_sae, d_out, seed=seed, **settings)
        self.groups, self.random_prefixes, self.seed, self._done = tuple(groups), random_prefixes, seed, 0.0
        self.prefixes = prefixes_of(self.groups, d_sae)
        """Numbers of features that a step's prefixes have, ascending; the last has all."""
        self.begin_step(0.0)

    @classmethod
    def own(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        prefixes = {name: settings[name] for name in ("groups", "random_prefixes") if name in settings}
        return {**super().own(settings), **prefixes}

    def begin_step(self, done: float) -> None:
        super().begin_step(done)
        self._done = done
        if self.random_prefixes is not None:
            self.prefixes = drawn_prefixes(self.random_prefixes, self.d_sae, self._stream("lengths"))

    def _stream(self, purpose: str) -> np.random.Generator:
        return numpy_stream(self.seed, f"matryoshka {purpose}", int(self._done * 2**53))

    def nested(self, latents: Latents, x: Float[Tensor, "*rows d_in"]) -> Sequence[Float[Tensor, "*rows d_out"]]:
        """Decode each group once, and add up."""
        sizes = [end - start for start, end in itertools.pairwise((0, *self.prefixes))]
        rest = self.b_dec if self.W_skip is None else self.b_dec + linear(x.to(self.W_skip.dtype), self.W_skip)
        return list(itertools.accumulate(self._by_group(latents, sizes), initial=rest))[1:]

    def _by_group(self, latents: Latents, sizes: list[int]) -> Sequence[Float[Tensor, "*rows d_out"]]:
        """Return what each group adds to the reconstruction."""
        if (sparse := latents.pairs()) is None:
            groups = zip(latents.dense().split(sizes, -1), self.W_dec.split(sizes), strict=True)
            return [values @ directions for values, directions in groups]
        places, number = sparse.places, len(sizes)
        ends = torch.tensor(sizes, device=places.features.device).cumsum(0)
        # Within a row pairs lie in the order of features, so that those of a row's groups lie one after another.
        rows = places.rows * number + torch.bucketize(places.features, ends, right=True)
        starts = torch.searchsorted(rows, torch.arange(places.n_rows * number, device=rows.device))
        of_groups = Pairs(rows, places.features, starts, places.n_features, places.pads)
        return self.sums(SparseLatents(sparse.values, of_groups, (*sparse.shape, number))).unbind(-2)

    def spliced(self, latents: Latents, x: Float[Tensor, "batch *pos d_in"]) -> Float[Tensor, "batch *pos d_out"]:
        """Reconstruct each sequence from a prefix of its own."""
        lengths = self.lengths(len(x)).to(x.device)
        lengths = lengths.view(-1, *(1 for _ in x.shape[1:-1])).expand(x.shape[:-1])
        if (sparse := latents.pairs()) is not None:
            kept = sparse.places.features < lengths.flatten()[sparse.places.rows]
            return self.reconstruct(sparse.where(kept), x)
        features = torch.arange(self.d_sae, device=x.device)
        return self.reconstruct(DenseLatents(latents.dense().where(features < lengths[..., None], 0.0)), x)

    def lengths(self, sequences: int) -> Int64[Tensor, " sequences"]:
        """Draw how many features the spliced reconstruction of each of this process's sequences has."""
        drawn = lengths_of(self.prefixes, self.world.total(sequences), self._stream("sequences"))
        return torch.tensor(self.world.share(drawn))


def prefixes_of(groups: Sequence[float], d_sae: int) -> tuple[int, ...]:
    """Numbers of features that each group ends with, ascending; the last has all."""
    ends = {max(1, round(share * d_sae)) for share in itertools.accumulate(groups)}
    return (*sorted(end for end in ends if end < d_sae), d_sae)


def drawn_prefixes(count: int, d_sae: int, stream: np.random.Generator) -> tuple[int, ...]:
    """Draw `count` − 1 lengths (see `MatryoshkaSAE`), and the whole; equal ones count once."""
    low, high = max(1.0, SHORTEST * d_sae) ** -EXPONENT, float(d_sae) ** -EXPONENT
    lengths = (low - stream.random(count - 1) * (low - high)) ** (-1 / EXPONENT)
    return (*sorted({int(length) for length in lengths} - {d_sae}), d_sae)


def lengths_of(prefixes: Sequence[int], sequences: int, stream: np.random.Generator) -> list[int]:
    """Draw a prefix for each sequence (see `MatryoshkaSAE`)."""
    whole, *others = reversed(prefixes)
    share = max(1 / len(prefixes), 1 / sequences)
    ends = np.linspace(share, 1.0, len(prefixes))
    quantiles = (np.arange(sequences) + stream.random()) / sequences
    chosen = np.searchsorted(ends, quantiles, side="right").clip(max=len(others))
    return [(whole, *others)[number] for number in stream.permutation(chosen)]
