"""The tokens that a direction speaks for, in letters: for labels of features."""

from endwise.analysis.cosines import Directions
from endwise.features.top_tokens import token_effects, written
from endwise.language_model import LanguageModel

TOKENS = 6


def top_tokens(model: LanguageModel, directions: Directions, count: int = TOKENS) -> list[tuple[str, ...]]:
    """For each direction the tokens with the greatest effect on their logits (`token_effects`), the greatest first.

    Spaces are written as `␣`, which could not be seen; without a tokenizer the tokens' numbers.

    Args:
        directions: in the residual stream, `[n d_model]`.
    """
    if not len(directions):
        return []
    boosted = token_effects(model, directions, count).boosted
    return [tuple(_visible(written(model, token)) for token in row) for row in boosted.tolist()]


def _visible(text: str) -> str:
    return text.replace(" ", "␣").replace("\n", "⏎")
