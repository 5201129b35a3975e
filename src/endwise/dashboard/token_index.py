"""Index of the features that have to do with a token: an index that is made when a dashboard is written.

A feature is listed under a token for up to three reasons: the token is where one of its contexts peaks (`PEAK`); it
fires there with half of that context's peak or more (`ACTIVE`); or its direction raises the token's logit (`BOOSTED`).
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from endwise.common.text import printable
from endwise.dashboard.scripts import packed
from endwise.features.harvest.results import Context

PEAK, ACTIVE, BOOSTED = 1, 2, 4
REASONS = 8
"""An entry is `feature * REASONS` and the sum of its reasons, in 32 bits."""
SHARD = 512
"""Tokens of one file."""


class TokenIndex:
    def __init__(self) -> None:
        self._tokens, self._entries = array("q"), array("q")

    def add(self, feature: int, contexts: Iterable[Context], boosted: Iterable[int]) -> None:
        """Everything of one feature; no feature comes twice."""
        reasons = dict.fromkeys(boosted, BOOSTED)
        for context in contexts:
            peak = context.activation
            for token, activation in zip(context.tokens, context.activations, strict=True):
                if activation >= peak / 2 > 0:
                    reasons[token] = reasons.get(token, 0) | ACTIVE
            token = context.tokens[context.peak]
            reasons[token] = reasons.get(token, 0) | PEAK
        for token, why in reasons.items():
            self._tokens.append(token)
            self._entries.append(feature * REASONS + why)

    def parts(self, vocabulary: Sequence[str]) -> Iterator[dict[str, object]]:
        """First the directory: how each token that has features is written, how many they are, and how many tokens a
        shard has. Then the shards: entries token after token, and where each token's begin.
        """
        tokens, entries = (np.frombuffer(each, dtype=np.int64) for each in (self._tokens, self._entries))
        order = np.lexsort((entries, tokens))
        tokens, entries = tokens[order], entries[order]
        listed, starts = np.unique(tokens, return_index=True)
        ends = np.append(starts, len(entries))
        yield {
            "texts": [printable(vocabulary[token]) for token in listed],
            "counts": packed(np.diff(ends), "i4"),
            "shard": SHARD,
        }
        for first in range(0, len(listed), SHARD):
            bounds = ends[first : first + SHARD + 1]
            yield {"starts": packed(bounds - bounds[0], "i4"), "entries": packed(entries[bounds[0] : bounds[-1]], "i4")}
