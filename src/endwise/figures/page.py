"""Pages, each one file that needs nothing else: its head, its style, its scripts and its foot."""

from collections.abc import Iterable, Sequence
from typing import Any

from endwise import __version__
from endwise.common.html import render
from endwise.figures.interactive import library, script_policy
from endwise.figures.style import COLOURS

FRAME = "figures/page.html.j2"
Section = tuple[str, Iterable[str], str]
"""Title, parts and id (empty: none) of a section of a page."""


def page(
    *,
    title: str,
    eyebrow: str,
    lead: str,
    place: str = "",
    parts: Iterable[str] = (),
    sections: Sequence[Section] = (),
    template: str = FRAME,
    **values: Any,
) -> str:
    """A whole page. Of its parts `Markup` stands as it is, other text is escaped.

    Args:
        place: site that it is all about.
        parts: what stands before the sections.
        template: one that extends `FRAME` with a body of its own, of these `values`.
    """
    shared = {"title": title, "eyebrow": eyebrow, "lead": lead, "place": place, "parts": parts, "sections": sections}
    frame = {"version": __version__, "colours": COLOURS, "policy": script_policy(), "library": library()}
    return render(template, **shared, **frame, **values)
