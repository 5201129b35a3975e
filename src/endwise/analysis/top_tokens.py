"""Which tokens a direction speaks for: those whose logits it raises most."""

from collections.abc import Sequence

import torch

from endwise.analysis.cosines import Directions
from endwise.language_model import LanguageModel

TOKENS = 6
_ROWS = 512
"""Directions whose logits are held at a time."""


@torch.no_grad()
def top_tokens(model: LanguageModel, directions: Directions, count: int = TOKENS) -> list[tuple[str, ...]]:
    """For each direction the tokens with the greatest effect on their logits, the greatest first.

    The effect is the direction's product with the unembedding alone: what the direction does by way of the blocks
    between is left out, and so is the final norm, its gain included.

    Args:
        directions: in the residual stream, `[n d_model]`.
    """
    weight = model.readout.unembedding.weight
    chosen: list[tuple[str, ...]] = []
    for start in range(0, len(directions), _ROWS):
        logits = directions[start : start + _ROWS].to(weight) @ weight.T
        chosen += [_written(model, row) for row in logits.topk(min(count, logits.shape[1]), dim=1).indices.tolist()]
    return chosen


def _written(model: LanguageModel, tokens: Sequence[int]) -> tuple[str, ...]:
    """Spaces as `␣`, which could not be seen; without a tokenizer the tokens' numbers."""
    if model.tokenizer is None:
        return tuple(map(str, tokens))
    return tuple(str(model.tokenizer.decode([token])).replace(" ", "␣").replace("\n", "⏎") for token in tokens)
