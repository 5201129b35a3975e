"""Patterns of many features as tries, which a whole text is held against at once.

A trie is read from a text's token backwards: each edge holds one token, any of several, or any at all. Equal ends of
patterns share their edges. At a token, of a feature's patterns that fit the most specific one counts: that with the
most tokens that are no wildcards, then the longest, then the one of the greatest activation.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Label = frozenset[int] | None
"""Tokens that serve; None: any."""


@dataclass(frozen=True)
class Pattern:
    """Ends of texts at which a feature fires."""

    feature: int
    labels: tuple[Label, ...]
    """Labels from the first token to the one at which it fires."""
    activation: float
    """Mean over the contexts that it comes from."""
    contexts: int
    """Their number."""


def merged(patterns: Iterable[Pattern]) -> list[Pattern]:
    """One of each feature's equal patterns, in the order of features, the one of most contexts first."""
    sums: dict[tuple[int, tuple[Label, ...]], tuple[float, int]] = {}
    for each in patterns:
        total, contexts = sums.get((each.feature, each.labels), (0.0, 0))
        sums[each.feature, each.labels] = total + each.activation * each.contexts, contexts + each.contexts
    found = [Pattern(feature, labels, total / n, n) for (feature, labels), (total, n) in sums.items()]
    return sorted(found, key=lambda each: (each.feature, -each.contexts))


@dataclass(frozen=True)
class Matches:
    """Tokens of a text at which a pattern of a feature fits, each such pair once, by row, then feature."""

    rows: NDArray[np.int64]
    """Tokens, `[batch pos]` flattened."""
    features: NDArray[np.int64]
    activations: NDArray[np.float64]
    """Activation of the most specific pattern that fits."""


@dataclass(frozen=True)
class _Edges:
    """Edges from some nodes: by token, and by any."""

    keys: NDArray[np.int64]
    """Parent times vocabulary plus token, ascending."""
    children: NDArray[np.int64]
    parents_of_any: NDArray[np.int64]
    """Ascending."""
    children_of_any: NDArray[np.int64]


class Tries:
    """
    Args:
        patterns: of any features.
        vocabulary: one more than the greatest token.
    """

    def __init__(self, patterns: Sequence[Pattern], vocabulary: int) -> None:
        self._vocabulary = vocabulary
        children: dict[tuple[int, int, Label], int] = {}
        nodes: list[tuple[int, int]] = [(-1, 0)]
        """Feature of each node, and the number of fixed tokens on its way."""
        ends: dict[int, float] = {}
        for each in merged(patterns):
            node, fixed = 0, 0
            for label in reversed(each.labels):
                fixed += label is not None
                key = node, each.feature, label
                if key not in children:
                    children[key] = len(nodes)
                    nodes.append((each.feature, fixed))
                node = children[key]
            ends[node] = each.activation
        self._features = np.array([feature for feature, _ in nodes])
        self._fixed = np.array([fixed for _, fixed in nodes])
        self._ends = np.full(len(nodes), np.nan)
        self._ends[list(ends)] = list(ends.values())
        self._edges = self._sorted(children)

    def _sorted(self, children: dict[tuple[int, int, Label], int]) -> _Edges:
        keys, to, parents, to_any = [], [], [], []
        for (parent, _, label), child in children.items():
            if label is None:
                parents.append(parent)
                to_any.append(child)
            else:
                keys += [parent * self._vocabulary + token for token in label]
                to += [child] * len(label)
        by_key, by_parent = np.argsort(keys, kind="stable"), np.argsort(parents, kind="stable")
        arrays = [np.array(each, dtype=np.int64) for each in (keys, to, parents, to_any)]
        return _Edges(arrays[0][by_key], arrays[1][by_key], arrays[2][by_parent], arrays[3][by_parent])

    def matches(self, tokens: NDArray[np.int64], first: int = 0) -> Matches:
        """
        Args:
            tokens: `[batch pos]`.
            first: the position of a sequence's first token that patterns may hold.
        """
        flat, positions = tokens.ravel(), np.tile(np.arange(tokens.shape[1]), len(tokens))
        rows = np.flatnonzero(positions >= first)
        nodes, depth = np.zeros(len(rows), dtype=np.int64), 0
        found: list[tuple[NDArray, NDArray, NDArray]] = []
        while len(rows):
            inside = positions[rows] - depth >= first
            rows, nodes = rows[inside], nodes[inside]
            rows, nodes = self._step(rows, nodes, flat[rows - depth])
            depth += 1
            ends = ~np.isnan(self._ends[nodes])
            found.append((rows[ends], nodes[ends], np.full(int(ends.sum()), depth)))
        return self._best(*(np.concatenate(each) for each in zip(*found, strict=True)))

    def _step(self, rows: NDArray, nodes: NDArray, tokens: NDArray) -> tuple[NDArray, NDArray]:
        """One token further back, along every edge that takes it."""
        edges, keys = self._edges, nodes * self._vocabulary + tokens
        to = []
        for wanted, have, children in (
            (keys, edges.keys, edges.children),
            (nodes, edges.parents_of_any, edges.children_of_any),
        ):
            low, high = np.searchsorted(have, wanted), np.searchsorted(have, wanted, side="right")
            of, place = _spread(low, high)
            to.append((rows[of], children[place]))
        return np.concatenate([each for each, _ in to]), np.concatenate([each for _, each in to])

    def _best(self, rows: NDArray, nodes: NDArray, depths: NDArray) -> Matches:
        features = self._features[nodes]
        order = np.lexsort((-self._ends[nodes], -depths, -self._fixed[nodes], features, rows))
        rows, features, nodes = rows[order], features[order], nodes[order]
        first = np.ones(len(rows), dtype=bool)
        first[1:] = (rows[1:] != rows[:-1]) | (features[1:] != features[:-1])
        return Matches(rows[first], features[first], self._ends[nodes[first]])


def _spread(low: NDArray, high: NDArray) -> tuple[NDArray, NDArray]:
    """Every number from each `low` to below its `high`, and which of them it belongs to."""
    count = high - low
    of = np.repeat(np.arange(len(low)), count)
    return of, np.arange(len(of)) - np.repeat(np.cumsum(count) - count, count) + low[of]
