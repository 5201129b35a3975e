"""Pages, each one file that needs nothing else, its style, its head and its foot."""

from importlib.resources import files
from string import Template

from endwise import __version__
from endwise.common.showing import Wide, escape, table
from endwise.figures.interactive import library, script_policy
from endwise.figures.style import COLOURS

__all__ = ["Wide", "escape", "page", "table", "template"]


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


def template(package: str, name: str) -> Template:
    """Read a page's frame from the files of a package."""
    return Template(files(package).joinpath(name).read_text(encoding="utf-8"))
