"""Texts of single tokens: together they are what the tokenizer's `decode` makes of them."""

import os.path
from collections.abc import Callable, Sequence
from itertools import pairwise

Decode = Callable[[Sequence[int]], str]

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""Character to which bytes are decoded that are no whole one."""


def pieces(tokens: Sequence[int], decode: Decode, word: Callable[[int], str]) -> list[str]:
    """One text per token, which joined are `decode(tokens)`.

    A character that several tokens make up is the last one's, and the others' texts are empty.

    Args:
        word: how a token is written within a text, where it does not depend on the others: what is tried first.
    """
    whole = decode(tokens)
    words = [word(token) for token in tokens]
    joined = "".join(words)
    if joined == f" {whole}" and words and words[0].startswith(" "):  # which decoders take off at the beginning
        words[0] = words[0][1:]
    elif joined != whole:
        words = _by_group(tokens, decode)
        if "".join(words) != whole:
            words = _parts([decode(tokens[:end]) for end in range(1, len(tokens) + 1)], 0)
    return words


def _by_group(tokens: Sequence[int], decode: Decode) -> list[str]:
    """Each group of tokens that ends with a whole character is decoded after the group before it, which is context
    enough for spaces and characters, and linear in the number of tokens.
    """
    found: list[str] = []
    before, begin, decoded = 0, 0, list[str]()
    for end in range(1, len(tokens) + 1):
        decoded.append(decode(tokens[before:end]))
        if decoded[-1].endswith(REPLACEMENT) and end < len(tokens):
            continue
        found += _parts(decoded, len(decode(tokens[before:begin])) if begin else 0)
        before, begin, decoded = begin, end, []
    return found


def _parts(decoded: Sequence[str], begin: int) -> list[str]:
    """The last text from `begin` on, cut where each text before it ceases to be its beginning."""
    whole, cuts = decoded[-1], [begin]
    for text in decoded[:-1]:
        common = os.path.commonprefix([text, whole])  # noqa: RUF071  of letters, as is meant
        cuts.append(max(cuts[-1], len(common)))
    return [whole[start:end] for start, end in pairwise([*cuts, len(whole)])]


def named_bytes(piece: str) -> str:
    """A token that is no whole character, by its bytes: `\\xe4\\xb8`.

    Args:
        piece: the token as a vocabulary of bytes writes it, one character for each; or `<0xE4>`, as it is.
    """
    if piece.startswith("<0x") or any(character not in _BYTES for character in piece):
        return piece
    return "".join(f"\\x{_BYTES[character]:02x}" for character in piece)


def _bytes() -> dict[str, int]:
    """GPT-2's letters for bytes: those that can be seen stand for themselves, the others follow from U+0100 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


_BYTES = _bytes()
