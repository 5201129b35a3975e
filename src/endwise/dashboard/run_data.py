"""A run's data as the page reads it: an overview of all features, the features in shards, and the index of tokens."""

from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from endwise.common.text import printable
from endwise.dashboard.nearest import Neighbours
from endwise.dashboard.scripts import Texts, packed, script, short
from endwise.dashboard.sources import DashboardRun
from endwise.features.explanations import Explanations
from endwise.features.harvest.results import TOP, Context, Harvest
from endwise.features.patterns.files import Patterns
from endwise.features.patterns.trie import Pattern

PEAK, ACTIVE, BOOSTED = 1, 2, 4
REASONS = 8
"""An entry is `feature * REASONS` and the sum of its reasons, in 32 bits."""
TOKENS_OF_A_FILE = 512
"""Tokens of one file."""


class TokenIndex:
    """Index of the features that have to do with a token.

    A feature is listed for up to three reasons: the token is where one of its contexts peaks (`PEAK`); it fires there
    with half of that context's peak or more (`ACTIVE`); or its direction raises the token's logit (`BOOSTED`).
    """

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
            "shard": TOKENS_OF_A_FILE,
        }
        for first in range(0, len(listed), TOKENS_OF_A_FILE):
            bounds = ends[first : first + TOKENS_OF_A_FILE + 1]
            yield {"starts": packed(bounds - bounds[0], "i4"), "entries": packed(entries[bounds[0] : bounds[-1]], "i4")}


SHARD = 128
"""Features of one file."""
SHOWN_SCORES = ("f1", "precision", "recall", "correlation")
"""Scores of patterns."""
PATTERNS, ALTERNATIVES = 12, 8
"""Patterns of a feature that are shown, those of most contexts first, and tokens of one place in them."""


def write_run_data(
    source: DashboardRun,
    folder: Path,
    key: str,
    neighbours: Mapping[int, Neighbours],
    explanations: Explanations | None,
    patterns: Patterns | None = None,
) -> dict[str, Any]:
    """Write `overview.js`, `features-<n>.js`, `tokens.js` and `tokens-<n>.js` into a new folder.

    Args:
        key: what each file's content is handed to the page under, before `/overview` and so on.
        neighbours: by the place of the other run among those of the site.

    Returns: what the page must know before it reads them.
    """
    folder.mkdir(parents=True)
    index, tops = TokenIndex(), np.full(source.harvest.d_sae, -1, dtype=np.int64)
    for place, shard in enumerate(_shards(source, neighbours, index, tops, patterns)):
        _write(folder, f"features-{place}", key, shard)
    for place, part in enumerate(index.parts(source.harvest.vocabulary)):
        _write(folder, f"tokens-{place - 1}" if place else "tokens", key, part)
    _write(folder, "overview", key, _overview(source, tops, explanations))
    return {"shard": SHARD, "explained": explanations is not None}


def _write(folder: Path, name: str, key: str, value: Any) -> None:
    (folder / f"{name}.js").write_bytes(script(f"{key}/{name}", value))


def _overview(source: DashboardRun, tops: np.ndarray, explanations: Explanations | None) -> dict[str, Any]:
    """Columns, one entry per feature; texts by their place in `texts`, -1 for none."""
    harvest, texts = source.harvest, Texts()
    vocabulary = harvest.vocabulary
    boosted = [first[0] if first else -1 for first in harvest.features["boosted"].to_pylist()]
    explained = [None if explanations is None else explanations.of(feature) for feature in range(harvest.d_sae)]

    def places(tokens: Sequence[int] | np.ndarray) -> str:
        return packed(np.array([-1 if token < 0 else texts.place(vocabulary[token]) for token in tokens]), "i4")

    def scores(name: str) -> str | None:
        if explanations is None:
            return None
        found = [None if each is None else getattr(each, name) for each in explained]
        return packed(np.array([np.nan if score is None else score for score in found]))

    return {
        "firings": packed(harvest.firings, "f8"),
        "density": packed(harvest.column("density"), "f8"),
        "mean": packed(harvest.column("mean_active")),
        "max": packed(harvest.column("max_active")),
        "importance": packed(harvest.column("ce_second")),
        "ce": packed(harvest.column("ce")),
        "top": places(tops),
        "boosted": places(boosted),
        "texts": texts.all,
        "explanations": None
        if explanations is None
        else ["" if each is None else printable(each.text) for each in explained],
        "detection": scores("detection"),
        "fuzzing": scores("fuzzing"),
    }


def _shards(
    source: DashboardRun,
    neighbours: Mapping[int, Neighbours],
    index: TokenIndex,
    tops: np.ndarray,
    patterns: Patterns | None,
) -> Iterator[dict[str, Any]]:
    """The features' pages, `SHARD` at a time; what is seen on the way goes into the index and the top tokens."""
    harvest = source.harvest
    columns = {} if patterns is None else {name: patterns.values(name) for name in SHOWN_SCORES}
    contexts = harvest.all_contexts()
    upcoming = next(contexts, None)
    for first in range(0, harvest.d_sae, SHARD):
        texts, pages = Texts(), []
        for row in harvest.features.slice(first, SHARD).to_pylist():
            feature, own = row["feature"], []
            if upcoming is not None and upcoming[0] == feature:
                own, upcoming = upcoming[1], next(contexts, None)
            index.add(feature, own, row["boosted"] or ())
            tops[feature] = top_token(own)
            page = _page(row, own, neighbours, texts, harvest)
            if patterns is not None:
                found = patterns.patterns.get(feature, ())
                scores = [float(values[feature]) for values in columns.values()]
                page["p"] = {"s": short(scores, 3), "l": _patterns(found, texts, harvest), "n": len(found)}
            pages.append(page)
        yield {"texts": texts.all, "features": pages}


def _patterns(patterns: Sequence[Pattern], texts: Texts, harvest: Harvest) -> list[list[Any]]:
    """Places of each pattern (the tokens that serve, and how many more there are; 0 where any does), its activation
    and its contexts.
    """
    found = []
    for each in patterns[:PATTERNS]:
        places = []
        for label in each.labels:
            tokens = sorted(label or ())
            shown = [texts.place(harvest.vocabulary[token]) for token in tokens[:ALTERNATIVES]]
            places.append([shown, len(tokens) - len(shown)] if tokens else 0)
        found.append([places, *short([each.activation], 3), each.contexts])
    return found


def top_token(contexts: Sequence[Context]) -> int:
    """The token at which its greatest activations add up to most; -1 for a feature that never fired."""
    sums: dict[int, float] = defaultdict(float)
    for context in contexts:
        if context.group == TOP:
            sums[context.tokens[context.peak]] += context.activation
    return max(sums, key=lambda token: sums[token]) if sums else -1


def _page(
    row: Mapping[str, Any],
    contexts: Sequence[Context],
    neighbours: Mapping[int, Neighbours],
    texts: Texts,
    harvest: Harvest,
) -> dict[str, Any]:
    """One feature's; keys are short because they come so often (`feature.js` says them in words)."""

    def places(tokens: Sequence[int] | None) -> list[int]:
        return [texts.place(harvest.vocabulary[token]) for token in tokens or ()]

    def text(context: Context) -> list[int]:
        return list(map(texts.place, harvest.written(context.tokens)))

    nearest = []
    for other, found in neighbours.items():
        near = found.feature[row["feature"]]
        nearest.append([other, near[near >= 0].tolist(), short(found.cosine[row["feature"]][near >= 0].tolist())])
    return {
        "h": row["histogram"] or [],
        "e": short(row["histogram_edges"] or ()),
        "b": places(row["boosted"]),
        "bl": short(row["boosted_logits"] or ()),
        "s": places(row["suppressed"]),
        "sl": short(row["suppressed_logits"] or ()),
        "c": row["co_firing"] or [],
        "cj": short(row["co_firing_jaccard"] or (), 3),
        "n": nearest,
        "x": [
            [each.group, each.sequence, each.position, each.peak, text(each), short(each.activations, 3)]
            for each in contexts
        ],
    }
