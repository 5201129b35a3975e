"""Encoding of text into ids: a tokenizer, its special tokens, and which ids are allowed."""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from typing import Any

import numpy as np

from endwise.common.errors import DataError
from endwise.tokens.chats import ChatEncoding


@dataclass(frozen=True)
class Encoding:
    """Way in which text becomes ids, and the ids that are allowed."""

    tokenizer: Any | None
    separator: int | None
    vocab_size: int
    specials: bool = False
    """True if special tokens that are written out in text, such as `<|endoftext|>`, count as those tokens."""
    roles: tuple[str, ...] = ()
    """See `ChatEncoding.left_out`."""

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Encode each text; nothing is put before or after it."""
        return text_ids(self.tokenizer, texts, self.specials)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def fingerprint(self) -> str:
        """Equal for tokenizers that encode alike."""
        if self.tokenizer is None:
            return "none"
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            content: Any = [type(self.tokenizer).__name__, sorted(self.tokenizer.get_vocab().items())]
        else:
            content = json.loads(backend.to_str())
            # Calls set these two as they go; we never truncate or pad.
            content.pop("truncation", None)
            content.pop("padding", None)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @cached_property
    def chats(self) -> ChatEncoding:
        """Turn conversations into ids."""
        return ChatEncoding(self.tokenizer, self.roles)

    @property
    def of_chats(self) -> list[Any]:
        """Equal where conversations become the same; empty where the tokenizer writes none."""
        template = getattr(self.tokenizer, "chat_template", None)
        return [template, list(self.roles)] if template else []


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of the tokens that a tokenizer calls special."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def text_ids(tokenizer: Any, texts: list[str], specials: bool) -> list[list[int]]:
    """Ids of each text as it stands, no token put before or after it. Texts are tokenised together, on all cores if the
    tokenizer is a fast one.

    Args:
        specials: whether special tokens that are written out count as those tokens, or are text as any other.
    """
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    found: list[list[int]] = tokenizer(texts, split_special_tokens=not specials, **options)["input_ids"]
    if specials:
        return found
    special = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.pop(tokenizer.unk_token, None)
    known = set(special.values())
    for place, ids in enumerate(found):
        if not known.isdisjoint(ids):  # of a vocabulary that holds it as a word (word-level, unigram): broken in two
            written = "|".join(re.escape(content) for content, number in special.items() if number in ids)
            cuts = [0, *(match.start() + 1 for match in re.finditer(written, texts[place])), len(texts[place])]
            parts = [texts[place][start:end] for start, end in pairwise(cuts)]
            parts_ids = tokenizer(parts, split_special_tokens=True, **options)["input_ids"]
            found[place] = list(chain.from_iterable(parts_ids))
    return found


def outside_vocabulary(name: str, token: int, encoding: Encoding) -> DataError:
    return DataError(
        f"{name} holds the token id {token}, outside the model's vocabulary of {encoding.vocab_size} (ids 0 to "
        f"{encoding.vocab_size - 1}). It was made for another tokenizer; tokenise the text with this model's."
    )
