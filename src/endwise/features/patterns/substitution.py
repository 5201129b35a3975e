"""Suffixes made general: tokens that may be any token, and tokens that some others can stand for."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from endwise.common.seeds import numpy_stream
from endwise.features.patterns.settings import PatternSettings
from endwise.features.patterns.short_texts import ShortTexts
from endwise.features.patterns.suffixes import Suffixes
from endwise.features.patterns.trie import Pattern
from endwise.models.language_model import LanguageModel

_ROWS = 1024
"""Tokens whose nearest are looked for at a time."""


@dataclass(frozen=True)
class Substitutes:
    """Tokens to try in the place of others."""

    drawn: NDArray[np.int64]
    """Tokens of the text, the more often the likelier, `[longest substitutes]`: others for each place, counted from the
    end, and no token twice for one."""
    nearest: NDArray[np.int64]
    """Find, for every token that occurs, the others that occur and are nearest by the cosine of input embeddings,
    `[vocab near]`."""

    @classmethod
    def of(cls, model: LanguageModel, unigrams: NDArray[np.int64], settings: PatternSettings) -> "Substitutes":
        occurring = np.flatnonzero(unigrams)
        generator = numpy_stream(settings.seed, "substitutes of patterns")
        shares = unigrams[occurring] / unigrams.sum()
        count = min(settings.substitutes, len(occurring))
        drawn = [generator.choice(occurring, count, replace=False, p=shares) for _ in range(settings.longest)]
        nearest = np.zeros((len(unigrams), min(settings.substitutes, len(occurring) - 1)), dtype=np.int64)
        nearest[occurring] = _nearest(model, occurring, nearest.shape[1])
        return cls(np.array(drawn), nearest)


@torch.no_grad()
def _nearest(model: LanguageModel, tokens: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Find, for each of some tokens, the nearest others among them, the nearest first, `[tokens count]`."""
    embedding: Any = model.model.get_input_embeddings()
    vectors = embedding(torch.from_numpy(tokens).to(model.device)).float()
    unit = torch.nn.functional.normalize(vectors, dim=1)
    parts = [np.zeros((0, count), dtype=np.int64)]
    for start in range(0, len(tokens), _ROWS):
        cosines = unit[start : start + _ROWS] @ unit.T
        here = torch.arange(len(cosines), device=cosines.device)
        cosines[here, here + start] = -2.0
        parts.append(tokens[cosines.topk(count, dim=1).indices.cpu().numpy()])
    return np.concatenate(parts)


def generalised(
    texts: ShortTexts, suffixes: Suffixes, substitutes: Substitutes, settings: PatternSettings
) -> list[Pattern]:
    """Patterns of suffixes of one length.

    From the first token to the last, a token becomes a wildcard if the activation is kept (`settings.kept`, of the mean
    of the suffix's contexts) with `settings.any_token` of the drawn substitutes in its place, tokens that are wildcards
    already being replaced too. In the place of every other token stand, besides itself, the drawn and the nearest ones
    that keep it, each tried alone.
    """
    count, length = suffixes.tokens.shape
    tokens, trials = suffixes.tokens, substitutes.drawn[:length][::-1]  # the first token's substitutes first
    wild = np.zeros((count, length), dtype=bool)
    serving: list[tuple[NDArray, NDArray]] = []

    def serve(tried: NDArray, rows: NDArray) -> NDArray:
        """Return which of `[rows tried length]` texts keep the activations of these suffixes."""
        values = texts.at_end(tried.reshape(-1, length), np.repeat(suffixes.features[rows], tried.shape[1]))
        return values.reshape(tried.shape[:2]) >= settings.kept * suffixes.activations[rows, None]

    for place in range(length):
        tried = np.where(wild[:, None], trials.T, tokens[:, None])
        tried[:, :, place] = trials[place]
        kept = serve(tried, np.arange(count))
        wild[:, place] = kept.mean(1) >= settings.any_token
        serving.append((np.broadcast_to(trials[place], kept.shape), kept))
    filled = np.where(wild, trials[:, 0], tokens)
    for place, (drawn, kept) in enumerate(serving):
        fixed = np.flatnonzero(~wild[:, place])
        near = substitutes.nearest[tokens[:, place]]
        tried = np.repeat(filled[fixed, None], near.shape[1], 1)
        tried[:, :, place] = near[fixed]
        near_kept = np.zeros(near.shape, dtype=bool)
        near_kept[fixed] = serve(tried, fixed)
        serving[place] = np.concatenate([drawn, near], 1), np.concatenate([kept, near_kept], 1)
    return [
        Pattern(
            int(suffixes.features[row]),
            tuple(
                None if wild[row, place] else frozenset({int(tokens[row, place]), *candidates[row, kept[row]].tolist()})
                for place, (candidates, kept) in enumerate(serving)
            ),
            float(suffixes.activations[row]),
            int(suffixes.contexts[row]),
        )
        for row in range(count)
    ]
