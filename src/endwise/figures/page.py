"""Pages, each one file that needs nothing else: its head, its style, its scripts and its foot."""

from typing import Any

from endwise import __version__
from endwise.common.html import render
from endwise.figures.interactive import library, script_policy
from endwise.figures.style import COLOURS


def page(template: str, *, title: str, **values: Any) -> str:
    """A whole page.

    Args:
        template: its path in the package; it extends `figures/page.html.j2`, whose `eyebrow` and `lead` are among the
            values, unless it has blocks of its own in their place.
    """
    frame = {"version": __version__, "colours": COLOURS, "policy": script_policy(), "library": library()}
    return render(template, title=title, **frame, **values)
