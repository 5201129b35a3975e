"""Writing of texts in a prompt: one line each, the tokens at which a feature fires between << and >>."""

from collections.abc import Callable, Sequence

from endwise.common.text import printable
from endwise.explaining.samples import Text

MARKED_SHARE = 0.3
"""Share of the greatest activation in a text, above which a token is marked (as Paulo et al. 2024 have it)."""
STRONGEST = 10
"""Activations are written in steps from 1 to this, relative to the feature's greatest."""


def marks_of(text: Text) -> tuple[bool, ...]:
    """Mark tokens: at least the one at which the feature fires most."""
    most = max(text.activations)
    return tuple(each > MARKED_SHARE * most and each > 0 for each in text.activations)


class Writer:
    """Writes texts of one vocabulary.

    Args:
        vocabulary: how each token is written by itself, by its number.
        together: how those of a text are written; unset: each by itself.
    """

    def __init__(
        self, vocabulary: Sequence[str], together: Callable[[Sequence[int]], Sequence[str]] | None = None
    ) -> None:
        self._vocabulary, self._together = vocabulary, together

    def token(self, token: int) -> str:
        """Write a token in one line; one that the vocabulary lacks is named by its number."""
        known = 0 <= token < len(self._vocabulary)
        return _one_line(self._vocabulary[token]) if known else f"[token {token}]"

    def tokens(self, text: Text) -> list[str]:
        """Each in one line, as `token` where one is not in the vocabulary."""
        if self._together is None or not all(0 <= token < len(self._vocabulary) for token in text.tokens):
            return list(map(self.token, text.tokens))
        return list(map(_one_line, self._together(text.tokens)))

    def plain(self, text: Text) -> str:
        return "".join(self.tokens(text))

    def marked(self, text: Text, marks: Sequence[bool]) -> str:
        """Neighbours that are marked share one pair of marks."""
        parts, inside = [], False
        for token, mark in zip(self.tokens(text), marks, strict=True):
            if mark != inside:
                parts.append("<<" if mark else ">>")
                inside = mark
            parts.append(token)
        return "".join([*parts, ">>" if inside else ""])

    def shown(self, text: Text, greatest: float) -> str:
        """The text with its marks, and beneath it how strongly the feature fires at each of them."""
        marks = marks_of(text)
        strengths = ", ".join(
            f'"{self.token(token)}" {_step(activation, greatest)}'
            for token, activation, mark in zip(text.tokens, text.activations, marks, strict=True)
            if mark
        )
        return f"{self.marked(text, marks)}\n   active at: {strengths}"


def numbered(items: Sequence[str]) -> str:
    return "\n".join(f"{number}. {item}" for number, item in enumerate(items, 1))


def _step(activation: float, greatest: float) -> int:
    return min(STRONGEST, max(1, round(STRONGEST * activation / greatest))) if greatest > 0 else STRONGEST


def _one_line(text: str) -> str:
    return printable(text.replace("\n", "\\n"))
