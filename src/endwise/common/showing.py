"""What results show of themselves: a line by `repr`, and a card of HTML where they are a notebook's last expression.

A card needs no network, no script and no server. Its colours are shades of the text's own, so that it is legible on
whatever background the notebook has.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape as escape_html
from typing import TypeVar

from endwise.common.text import printable

K = TypeVar("K")
V = TypeVar("V")
ACCENT = "213, 94, 0"
"""Red, green and blue of what is shaded by a number."""
_STYLE = """
.endwise { font: 14px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; max-width: 60rem;
  margin: 4px 0 16px; overflow-wrap: anywhere; text-align: left; }
.endwise p { margin: 6px 0; }
.endwise .name { font-weight: 650; font-size: 15px; }
.endwise .note, .endwise .of { opacity: 0.72; font-size: 12px; line-height: 1.35; }
.endwise .of { display: block; }
.endwise .facts { display: flex; flex-wrap: wrap; align-items: flex-end; gap: 6px 24px; margin: 6px 0 10px; }
.endwise .facts b { font-weight: 600; font-variant-numeric: tabular-nums; }
.endwise .parts { display: flex; flex-wrap: wrap; gap: 4px 32px; align-items: flex-start; }
.endwise .parts > * { flex: 0 1 auto; min-width: 0; }
.endwise .scroll { overflow-x: auto; max-width: 100%; }
.endwise table { border-collapse: collapse; margin: 4px 0 10px; font-size: 13px; font-variant-numeric: tabular-nums;
  color: inherit; }
.endwise.endwise th, .endwise.endwise td { padding: 2px 12px 2px 0; text-align: right; white-space: nowrap; border: 0;
  border-bottom: 1px solid color-mix(in srgb, currentColor 18%, transparent); background: none; color: inherit; }
.endwise.endwise th:first-child, .endwise.endwise .text { text-align: left; }
.endwise thead th { opacity: 0.72; font-weight: 500; }
.endwise tbody th { font-weight: 500; }
.endwise.endwise td.words { white-space: normal; text-align: left; min-width: 16rem; }
.endwise.endwise ol { list-style: none; margin: 4px 0 10px; padding: 0; }
.endwise li { display: flex; gap: 12px; padding: 3px 0;
  border-bottom: 1px solid color-mix(in srgb, currentColor 12%, transparent); }
.endwise li > .value { flex: 0 0 3.5rem; text-align: right; opacity: 0.72; font-variant-numeric: tabular-nums; }
.endwise span.text { white-space: pre-wrap; }
.endwise svg { display: block; max-width: 100%; height: auto; color: inherit; }
.endwise .scroll > svg { width: 100%; min-width: 40rem; }
.endwise svg text { fill: currentColor; }
"""


def escape(text: object) -> str:
    """As text on the page, without the hidden characters that could turn a line around (U+202E)."""
    return escape_html(printable(text))


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


class Shown:
    """A result that says what it is, by `shown_facts` in a line, and with `shown_parts` besides on its card."""

    @property
    def title(self) -> str:
        return type(self).__name__

    def shown_facts(self) -> Mapping[str, object]:
        """Return what is said of it in a line, by names."""
        return {}

    def shown_parts(self) -> Iterable[str]:
        """Return what its card shows below these, as HTML, nothing of it unescaped."""
        return ()

    def __repr__(self) -> str:
        return printable(
            f"{self.title}({', '.join(f'{name} {fact}'.strip() for name, fact in self.shown_facts().items())})"
        )

    def _repr_html_(self) -> str:
        return card(self.title, self.shown_facts(), self.shown_parts())


def card(title: str, facts: Mapping[str, object], parts: Iterable[str] = ()) -> str:
    """A result as HTML.

    Args:
        parts: HTML.
    """
    told = "".join(
        f'<div><span class="of">{escape(name)}</span> <b>{escape(fact)}</b></div>' for name, fact in facts.items()
    )
    return (
        f'<div class="endwise"><style>{_STYLE}</style><p class="name">{escape(title)}</p>'
        f'<div class="facts">{told}</div>{"".join(parts)}</div>'
    )


class Several(dict[K, V]):
    """Results by what they are of; in a notebook, one card below another."""

    def _repr_html_(self) -> str:
        return "".join(f'<p class="endwise">{escape(key)}</p>{_card_of(value)}' for key, value in self.items())


class Listed(list[V]):
    """Results; in a notebook, one card below another."""

    def _repr_html_(self) -> str:
        return "".join(map(_card_of, self))


def _card_of(value: object) -> str:
    shown = getattr(value, "_repr_html_", None)
    return f"<pre>{escape(repr(value))}</pre>" if shown is None else str(shown())


def notes(remarks: Iterable[str]) -> str:
    """Show remarks."""
    return "".join(f'<p class="note">! {escape(remark)}</p>' for remark in remarks)


def shaded(texts: Sequence[str], values: Sequence[float], greatest: float) -> str:
    """Show a text token by token, the darker the greater its value."""
    spans = []
    for text, value in zip(texts, values, strict=True):
        share = max(0.0, min(1.0, value / greatest)) if greatest > 0 else 0.0
        colour = f' style="background-color: rgba({ACCENT}, {0.12 + 0.5 * share:.2f})"' if share > 0 else ""
        spans.append(f'<span{colour} title="{value:.3g}">{escape(text)}</span>' if colour else escape(text))
    return f'<span class="text">{"".join(spans)}</span>'


def bars(counts: Sequence[float | int], edges: Sequence[float], label: str) -> str:
    """A histogram.

    Args:
        edges: of the bins, one more than these.
        label: what it is of.
    """
    width, height, most = 360, 90, max([*counts, 1e-12])
    each = width / max(1, len(counts))
    drawn = "".join(
        f'<rect x="{place * each + 0.5:.2f}" y="{height - height * count / most:.2f}" width="{max(1.0, each - 1):.2f}" '
        f'height="{height * count / most:.2f}" fill="rgb({ACCENT})">'
        f"<title>{low:.3g} to {high:.3g}: {count:,.0f}</title></rect>"
        for place, (count, low, high) in enumerate(zip(counts, edges, edges[1:], strict=False))
    )
    ends = "".join(
        f'<text x="{x}" y="{height + 15}" font-size="11" text-anchor="{anchor}">{edge:.3g}</text>'
        for x, anchor, edge in ((0, "start", edges[0]), (width, "end", edges[-1]))
    )
    return (
        f'<div><p class="note">{escape(label)}</p><svg viewBox="0 0 {width} {height + 18}" width="{width}" role="img" '
        f'aria-label="{escape(label)}">{drawn}<line x1="0" x2="{width}" y1="{height}" y2="{height}" '
        f'stroke="currentColor" stroke-opacity="0.4"/>{ends}</svg></div>'
    )
