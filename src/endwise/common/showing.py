"""Displays of results: a line by `repr`, and a card of HTML where they are a notebook's last expression.

A card needs no network, no script and no server. Its colours are shades of the text's own, so that it is legible on
whatever background the notebook has.
"""

from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from markupsafe import Markup

from endwise.common.html import paragraph, part
from endwise.common.text import printable

K = TypeVar("K")
V = TypeVar("V")
CARD = "common/card.html.j2"
FEW = 8
"""Numbers that a line shows, each."""


class Shown:
    """A result that says what it is, by `shown_facts` in a line, and with `shown_parts` besides on its card. A
    dataclass says what `brief` makes of its fields, and is made with `repr=False`.
    """

    @property
    def title(self) -> str:
        return type(self).__name__

    def shown_facts(self) -> Mapping[str, object]:
        """Return the facts shown in its line, by name."""
        known = fields(self) if is_dataclass(self) else ()
        values = {each.name: getattr(self, each.name) for each in known if each.repr}
        return {name: brief(value) for name, value in values.items() if value is not None}

    def shown_parts(self) -> Iterable[str]:
        """Return what its card shows below these: `Markup` as it is, other text escaped."""
        return ()

    def __repr__(self) -> str:
        return printable(
            f"{self.title}({', '.join(f'{name} {fact}'.strip() for name, fact in self.shown_facts().items())})"
        )

    def _repr_html_(self) -> str:
        return card(self.title, self.shown_facts(), self.shown_parts())


def brief(value: Any) -> str:
    """A value in a few words: of an array its type and shape, of what holds more than a few only how many."""
    if (shape := getattr(value, "shape", None)) is not None:
        return f"{str(getattr(value, 'dtype', '')).removeprefix('torch.')}[{' '.join(map(str, shape))}]"
    if isinstance(value, Sized) and not isinstance(value, str | Shown):
        few = isinstance(value, list | tuple) and len(value) <= FEW and all(isinstance(each, int) for each in value)
        return str(value) if few else f"({len(value):,} in all)"
    return str(value)


def card(title: str, facts: Mapping[str, object], parts: Iterable[str] = ()) -> str:
    """A result as HTML, of parts as `Shown.shown_parts` has them."""
    return str(part(CARD, "card", title, facts, parts))


class Several(dict[K, V]):
    """Results by what they are of, a path also as text; in a notebook, one card below another."""

    def __missing__(self, key: object) -> V:
        if isinstance(key, str):
            return self[Path(key)]  # type: ignore[pyrefly:bad-index]
        raise KeyError(key)

    def _repr_html_(self) -> str:
        return "".join(_named(key, value) for key, value in self.items())


class Listed(list[V]):
    """Results; in a notebook, one card below another."""

    def _repr_html_(self) -> str:
        return "".join(_named(None, value) for value in self)


def _named(name: object, value: object) -> str:
    shown = getattr(value, "_repr_html_", None)
    return str(part(CARD, "named", name, repr(value) if shown is None else Markup(shown())))


def notes(remarks: Iterable[str]) -> Iterable[Markup]:
    """Show remarks."""
    return (paragraph(f"! {remark}", "note") for remark in remarks)


def box(kind: str, parts: Iterable[str]) -> Markup:
    """Parts in an element of a class of the card's style."""
    return part(CARD, "box", kind, parts)


def bars(counts: Sequence[float | int], edges: Sequence[float], label: str) -> Markup:
    """A histogram.

    Args:
        edges: of the bins, one more than these.
        label: what it is of.
    """
    return part(CARD, "bars", list(zip(counts, edges, edges[1:], strict=False)), label)
