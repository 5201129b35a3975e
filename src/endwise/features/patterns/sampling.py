"""Contexts in which features fire, drawn at random from half of a text."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from endwise.common.seeds import numpy_stream
from endwise.features.harvest.firings import Firings
from endwise.features.harvest.slots import EMPTY, Candidates, Slots
from endwise.features.harvest.sums import drawn
from endwise.features.patterns.settings import PatternSettings
from endwise.features.patterns.watching import Watched
from endwise.models.language_model import LanguageModel
from endwise.tokens import Corpus, TokenBatch

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Half:
    """Some sequences of a corpus."""

    corpus: Corpus
    sequences: range
    batch: int

    def batches(self, model: LanguageModel, advance: Advance) -> Iterator[tuple[Tensor, TokenBatch]]:
        """Each batch with the numbers of its sequences in the corpus."""
        model.attend_within(self.corpus.layout.ends)
        for start in range(self.sequences.start, self.sequences.stop, self.batch):
            rows = range(start, min(start + self.batch, self.sequences.stop))
            yield torch.arange(rows.start, rows.stop, device=model.device), self.corpus.batch(rows).to(model.device)
            advance(len(rows))

    @property
    def first(self) -> int:
        """Position of a sequence's first token of text, which a BOS comes before."""
        return int(self.corpus.layout.bos is not None)

    @property
    def before(self) -> tuple[int, ...]:
        """Tokens before a short text that is read by itself: a BOS where sequences begin with one; otherwise the
        separator, after which documents begin in a stream.
        """
        layout = self.corpus.layout
        found = layout.bos if layout.bos is not None or layout.packing != "stream" else layout.separator
        return () if found is None else (found,)


@dataclass(frozen=True)
class ContextSample:
    """Contexts of every feature and random direction (`[watched]`)."""

    watched: Watched
    """The random directions with their thresholds."""
    firings: NDArray[np.int64]
    """Tokens of the half at which each fires, `[watched]`."""
    unigrams: NDArray[np.int64]
    """Occurrences of each token in the half, `[vocab]`."""
    features: NDArray[np.int64]
    """Feature of each context, ascending, `[contexts]`."""
    activations: NDArray[np.float32]
    """Activation at its last token."""
    windows: NDArray[np.int64]
    """The tokens that end each context, `[contexts longest]`; -1 before a sequence's beginning."""


def sample(watched: Watched, text: Half, settings: PatternSettings, advance: Advance) -> ContextSample:
    """Read half of a text, draw contexts, and give every random direction a threshold above which it fires as often as
    some feature does.

    Raises:
        DataError: a latent is NaN, infinite or negative.
    """
    slots = Slots(watched.count, settings.contexts, 0, watched.model.device)
    firings = torch.zeros(watched.count, dtype=torch.int64, device=watched.model.device)
    unigrams = torch.zeros(watched.model.vocab_size, dtype=torch.int64, device=watched.model.device)
    along: list[tuple[Tensor, TokenBatch, Tensor]] = []

    def take(found: Firings) -> None:
        firings.index_add_(0, found.features, torch.ones_like(found.features))
        _offer(slots, found, settings.seed)

    for numbers, batch in text.batches(watched.model, advance):
        read, mask = watched.read(batch.tokens, batch.mask)
        unigrams.index_add_(0, batch.tokens[batch.mask], torch.ones_like(batch.tokens[batch.mask]))
        take(Firings.of(watched.sae.encode(read), mask, numbers, watched.sae.d_sae))
        along.append((watched.along(read), TokenBatch(batch.tokens, mask), numbers))
    if len(watched.directions):
        watched = watched.above(_thresholds(along, firings[: watched.sae.d_sae], settings))
    empty = torch.zeros(0, dtype=torch.int64, device=watched.model.device)
    for projected, batch, numbers in along:
        nothing = Firings(empty, empty, projected.new_zeros(0), numbers, batch.tokens.shape[1], watched.sae.d_sae)
        take(watched.with_random(nothing, projected, batch.mask))
    kept = (slots.keys > EMPTY).nonzero()
    feature, slot = kept.unbind(1)
    sequences, positions = slots.sequences[feature, slot].cpu().numpy(), slots.positions[feature, slot].cpu().numpy()
    return ContextSample(
        watched,
        firings.cpu().numpy(),
        unigrams.cpu().numpy(),
        feature.cpu().numpy(),
        slots.activations[feature, slot].cpu().numpy(),
        _windows(text, sequences, positions, settings.longest),
    )


def _offer(slots: Slots, found: Firings, seed: int) -> None:
    keys = drawn(found.features + seed * found.d_sae, found.sequences, found.positions)
    windows = found.values.new_zeros(len(keys), 0)
    offered = Candidates(
        found.features, keys, found.sequences, found.positions, found.values, lambda some: windows[some]
    )
    slots.offer(offered)


def _thresholds(along: list[tuple[Tensor, TokenBatch, Tensor]], firings: Tensor, settings: PatternSettings) -> Tensor:
    """Threshold of each random direction: exceeded at as many tokens as some feature, drawn at random, fires at;
    infinite where there are fewer features that fire often enough.
    """
    values = torch.cat([projected[batch.mask] for projected, batch, _ in along])
    often = np.flatnonzero((firings >= settings.least).cpu().numpy())
    count = min(len(often), values.shape[1])
    chosen = numpy_stream(settings.seed, "densities of random directions").choice(often, count, replace=False)
    thresholds = torch.full((values.shape[1],), torch.inf, device=values.device)
    for place, feature in enumerate(chosen.tolist()):
        fires = min(int(firings[feature]), len(values) - 1)
        thresholds[place] = values[:, place].topk(fires + 1).values[-1]
    return thresholds


def _windows(text: Half, sequences: NDArray, positions: NDArray, longest: int) -> NDArray[np.int64]:
    """The tokens up to each position, `[contexts longest]`."""
    found = np.full((len(sequences), longest), -1, dtype=np.int64)
    wanted, which = np.unique(sequences, return_inverse=True)
    order = np.argsort(which, kind="stable")
    starts = np.searchsorted(which[order], np.arange(len(wanted) + 1))
    for first in range(0, len(wanted), text.batch):
        rows = wanted[first : first + text.batch]
        tokens = text.corpus.batch(rows).tokens.numpy()
        some = order[starts[first] : starts[first + len(rows)]]
        places = positions[some][:, None] + np.arange(1 - longest, 1)
        inside = places >= text.first
        found[some] = np.where(inside, tokens[(which[some] - first)[:, None], np.maximum(places, 0)], -1)
    return found
