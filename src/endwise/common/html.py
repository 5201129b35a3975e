"""HTML from templates, which lie beside the code that fills them. Every value is escaped, unless it is `Markup`: a part
that a template made.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from endwise.common.text import minus, printable

PARTS = "common/parts.html.j2"
Row = Sequence[object]


def render(template: str, **values: Any) -> str:
    """Fill a template.

    Args:
        template: its path in the package.

    Raises:
        jinja2.UndefinedError: it asks for a value that was not given.
    """
    return _environment().get_template(template).render(values)


def part(template: str, macro: str, *values: Any) -> Markup:
    """Fill one macro of a template: a part of a page."""
    return getattr(_environment().get_template(template).module, macro)(*values)


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("endwise", ""),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["minus"] = lambda cell: minus(cell) if type(cell) is str else cell
    made.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return made


def _finalize(value: object) -> object:
    """Write out the hidden characters of text, which could turn a line around (U+202E)."""
    return value if hasattr(value, "__html__") else printable(value)


@dataclass(frozen=True)
class Wide:
    """A cell of words that takes several columns."""

    text: str
    columns: int


def table(
    headings: Sequence[str], rows: Iterable[Row], *, text: Iterable[int] = (), title: str = "", note: str = ""
) -> Markup:
    """A table of numbers, its first column aside, and but for the columns of short `text`, under a title."""
    return part(PARTS, "table", headings, rows, list(text), title, note)


def paragraph(words: str, kind: str = "", code: str = "") -> Markup:
    """A paragraph of a class of the style sheet, with a command at its end."""
    return part(PARTS, "paragraph", words, kind, code)


def bullets(kind: str, lines: Iterable[str], role: str = "") -> Markup:
    """A list of a class of the style sheet; empty where there are no lines."""
    return part(PARTS, "bullets", kind, list(lines), role)
