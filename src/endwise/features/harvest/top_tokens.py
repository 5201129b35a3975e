"""Tokens that a direction speaks for: those whose logits it raises most, and lowers most."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from endwise.features.token_texts import REPLACEMENT, named_bytes, pieces
from endwise.models.language_model import LanguageModel

_ROWS = 512
"""Directions whose logits are held at a time."""


@dataclass(frozen=True)
class TokenEffects:
    """Tokens whose logits each direction changes most; all `[n count]`."""

    boosted: NDArray[np.int64]
    """The greatest rise first."""
    boosted_logits: NDArray[np.float32]
    """The direction's product with the token's unembedding, for a latent of 1."""
    suppressed: NDArray[np.int64]
    """The greatest fall first."""
    suppressed_logits: NDArray[np.float32]


@torch.no_grad()
def token_effects(model: LanguageModel, directions: Float[Tensor, "n d_model"], count: int) -> TokenEffects:
    """Find for each direction the tokens with the greatest effects on their logits.

    The effect is the direction's product with the unembedding alone: what the direction does by way of the blocks
    between is left out, and so is the final norm, its gain included.

    Args:
        directions: in the residual stream.
    """
    weight = model.readout.unembedding.weight
    count = min(count, len(weight))
    parts = []
    for start in range(0, len(directions), _ROWS):
        logits = directions[start : start + _ROWS].to(weight) @ weight.T
        parts.append([*logits.topk(count, dim=1), *logits.topk(count, dim=1, largest=False)])
    logits, boosted, fallen, suppressed = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return TokenEffects(boosted.numpy(), logits.float().numpy(), suppressed.numpy(), fallen.float().numpy())


def written(model: LanguageModel, token: int) -> str:
    """Write a token as it stands in text, a space before a word included; a part of a character by its bytes; without a
    tokenizer the token's number.
    """
    if model.tokenizer is None:
        return str(token)
    text = str(model.tokenizer.decode([token], clean_up_tokenization_spaces=False))
    piece = model.tokenizer.convert_ids_to_tokens(token)
    if REPLACEMENT in text and isinstance(piece, str) and REPLACEMENT not in piece:
        return named_bytes(piece)
    # A SentencePiece decoder takes off the space that a text's first word is given.
    return f" {text}" if isinstance(piece, str) and piece.startswith("▁") and not text.startswith(" ") else text


def written_text(model: LanguageModel, tokens: Sequence[int]) -> list[str]:
    """One text per token, which joined are what the tokenizer makes of them all (see `pieces`)."""
    if model.tokenizer is None:
        return [str(token) for token in tokens]
    decode: Any = model.tokenizer.decode
    return pieces(
        tokens,
        lambda some: str(decode(list(some), clean_up_tokenization_spaces=False)),
        lambda token: written(model, token),
    )
