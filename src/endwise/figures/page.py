"""Pages, each one file that needs nothing else, its style, its head and its foot."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape as escape_html
from importlib.resources import files
from string import Template

from endwise import __version__
from endwise.common.text import printable
from endwise.figures.interactive import library, script_policy
from endwise.figures.style import COLOURS


def escape(text: object) -> str:
    """As text on the page, without the hidden characters that could turn a line around (U+202E)."""
    return escape_html(printable(text))


def page(*, title: str, eyebrow: str, lead: str, body: str, interactive: bool = False) -> str:
    """A whole page of parts that are HTML already.

    Args:
        interactive: it has figures of `figures.interactive`, whose scripts it then carries.
    """
    colours = " ".join(f"--{style}: {colour};" for style, colour in COLOURS.items())
    return template("endwise.figures", "page.html").substitute(
        version=escape(__version__),
        title=title,
        style=template("endwise.figures", "style.css").substitute(colours=colours),
        scripts_allowed=f"; {script_policy()}; img-src data: blob:" if interactive else "",
        scripts=library() if interactive else "",
        eyebrow=eyebrow,
        lead=lead,
        body=body,
    )


@dataclass(frozen=True)
class Wide:
    """A cell of words that takes several columns."""

    text: str
    columns: int


def table(headings: Sequence[str], rows: Iterable[Sequence[object]], *, text: Iterable[int] = ()) -> str:
    """A table of numbers, its first column aside, and but for the columns of short `text`."""
    classes = dict.fromkeys(text, "text")

    def cell(column: int, content: object) -> str:
        if isinstance(content, Wide):
            return f'<td class="words" colspan="{content.columns}">{escape(content.text)}</td>'
        return f"<td{' class=text' if column in classes else ''}>{escape(content)}</td>"

    head = "".join(
        f'<th scope="col"{" class=text" if index in classes else ""}>{escape(heading)}</th>'
        for index, heading in enumerate(headings)
    )
    body = []
    for first, *rest in rows:
        cells = "".join(cell(i, content) for i, content in enumerate(rest, 1))
        body.append(f'<tr class="first"><th scope="row">{escape(first)}</th>{cells}</tr>')
    content = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{content}</div>'


def template(package: str, name: str) -> Template:
    """Read a page's frame from the files of a package."""
    return Template(files(package).joinpath(name).read_text(encoding="utf-8"))
