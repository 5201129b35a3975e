"""Choice of a feature's texts to show to the explainer, and of those to ask about: never the same, nor overlapping.

A text in which the feature does not fire is one that the harvest keeps for another feature, from a sequence of which it
keeps none for this one. A harvest keeps only some of a feature's texts, so a feature that fires often may fire in such
a text after all, unknown to us: that lowers its scores, whatever its explanation, and it lowers those of all kinds.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from endwise.common.seeds import numpy_stream
from endwise.features.harvest.results import TOP, Context, Harvest

LEAST_SHOWN = 3
"""Texts that an explanation is made of, at least."""
POOL_FEATURES, POOL_TEXTS = 500, 4
"""Features, and texts of each, from which the texts are drawn in which another feature does not fire."""


@dataclass(frozen=True)
class Text:
    """A stretch of text, and how strongly a feature fires at each of its tokens."""

    owner: int
    """The feature for which the harvest keeps it."""
    sequence: int
    start: int
    tokens: tuple[int, ...]
    activations: tuple[float, ...]

    @classmethod
    def of(cls, context: Context) -> "Text":
        return cls(context.feature, context.sequence, context.start, context.tokens, context.activations)

    def overlaps(self, other: "Text") -> bool:
        """Return whether they share a token of the corpus, or read alike throughout."""
        if self.tokens == other.tokens:
            return True
        ends = self.start + len(self.tokens), other.start + len(other.tokens)
        return self.sequence == other.sequence and self.start < ends[1] and other.start < ends[0]


@dataclass(frozen=True)
class ScoringSample:
    """The texts of one feature."""

    feature: int
    greatest: float
    """Greatest of its activations in the texts that are shown."""
    shown: tuple[Text, ...]
    active: tuple[Text, ...]
    """Contexts in which it fires, held out from those that are shown."""
    inactive: tuple[Text, ...]
    """Contexts in which it is not known to fire."""


@dataclass(frozen=True)
class Sizes:
    """Numbers of texts that a sample takes."""

    shown: int
    held: int
    """Active ones, and as many inactive ones."""

    @property
    def least(self) -> int:
        return LEAST_SHOWN + self.held


def distinct(texts: Iterable[Text]) -> list[Text]:
    """Each that overlaps none before it."""
    kept: list[Text] = []
    by_sequence: dict[int, list[Text]] = {}
    seen: set[tuple[int, ...]] = set()
    for text in texts:
        neighbours = by_sequence.setdefault(text.sequence, [])
        if text.tokens in seen or any(map(text.overlaps, neighbours)):
            continue
        seen.add(text.tokens)
        neighbours.append(text)
        kept.append(text)
    return kept


def split(
    contexts: Sequence[Context], sizes: Sizes, generator: np.random.Generator
) -> tuple[tuple[Text, ...], tuple[Text, ...]] | None:
    """Texts to show and texts to hold out; None where a feature has too few.

    Held out are as many of each group as can be, the top ones and each quantile. Of the others, those that are shown
    are taken in turns from the top ones and from the quantiles.
    """
    group_of: dict[Text, int] = {}
    for context in contexts:
        group_of.setdefault(Text.of(context), context.group)
    kept = distinct(group_of)
    if len(kept) < sizes.least:
        return None
    groups: dict[int, list[Text]] = {}
    for place in generator.permutation(len(kept)).tolist():
        groups.setdefault(group_of[kept[place]], []).append(kept[place])
    ordered = [groups[group] for group in sorted(groups, key=lambda group: (group != TOP, -group))]
    held = _in_turns(ordered, sizes.held)
    tops, others = groups.get(TOP, []), [texts for group, texts in sorted(groups.items()) if group != TOP]
    rest = [tops, _in_turns(others, sum(map(len, others)))]
    return tuple(_in_turns(rest, sizes.shown)), tuple(held)


def _in_turns(groups: Sequence[list[Text]], count: int) -> list[Text]:
    """Take `count` texts, or all there are, off the groups, one of each in turns."""
    taken: list[Text] = []
    while len(taken) < count and any(groups):
        for group in groups:
            if group and len(taken) < count:
                taken.append(group.pop())
    return taken


def pool_of(contexts: Mapping[int, Sequence[Context]], features: Iterable[int], seed: int) -> list[Text]:
    """`POOL_TEXTS` of each feature's, the quantiles' before the top ones."""
    pool = []
    for feature in features:
        own = contexts.get(feature, ())
        order = numpy_stream(seed, "texts of the pool", feature).permutation(len(own)).tolist()
        order.sort(key=lambda place: own[place].group == TOP)
        pool += distinct(Text.of(own[place]) for place in order)[:POOL_TEXTS]
    return pool


def sample_of(
    feature: int, contexts: Sequence[Context], pool: Sequence[Text], sizes: Sizes, seed: int
) -> ScoringSample | str:
    """A feature's texts, or why it has too few."""
    generator = numpy_stream(seed, "texts of a feature", feature)
    parts = split(contexts, sizes, generator)
    if parts is None:
        return f"it has fewer than {sizes.least} texts that do not overlap"
    shown, active = parts
    sequences = {context.sequence for context in contexts}
    order = generator.permutation(len(pool)).tolist()
    drawn = (pool[place] for place in order)
    others = (text for text in drawn if text.owner != feature and text.sequence not in sequences)
    inactive = distinct([*map(Text.of, contexts), *others])
    inactive = [text for text in inactive if text.owner != feature][: sizes.held]
    if len(inactive) < sizes.held:
        return f"there are fewer than {sizes.held} texts of other features from sequences that it has no text of"
    greatest = max(max(text.activations) for text in shown)
    return ScoringSample(feature, greatest, shown, active, tuple(inactive))


def random_sample(feature: int, pool: Sequence[Text], sizes: Sizes, seed: int) -> ScoringSample | None:
    """Texts drawn at random in the place of a feature's, with activations at random tokens; None if there are too few.

    Whichever of them are called active, nothing tells them from the others: every score is 0.5, but for chance.
    """
    generator = numpy_stream(seed, "random texts", feature)
    order = generator.permutation(len(pool)).tolist()
    drawn = distinct(pool[place] for place in order)[: sizes.shown + 2 * sizes.held]
    drawn = [replace(text, activations=tuple(generator.permutation(text.activations).tolist())) for text in drawn]
    active, inactive, shown = (
        tuple(drawn[part])
        for part in (slice(sizes.held), slice(sizes.held, 2 * sizes.held), slice(2 * sizes.held, None))
    )
    if len(shown) < LEAST_SHOWN:
        return None
    return ScoringSample(feature, max(max(text.activations) for text in shown), shown, active, inactive)


def pool_features(harvest: Harvest, seed: int) -> list[int]:
    """At random from those that fired."""
    alive = np.flatnonzero(harvest.firings > 0)
    count = min(POOL_FEATURES, len(alive))
    return sorted(numpy_stream(seed, "features of the pool").choice(alive, count, replace=False).tolist())
