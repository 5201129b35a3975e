"""Write docs/cli.md from the commands' own help."""

import re
from pathlib import Path

import typer
from typer.cli import get_docs_for_click

from endwise.cli import app

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"
HEAD = """# Commands

This page is written by `make docs` from what each command prints with `--help`. A command
ends with 0 where it did what was asked.
"""


def render() -> str:
    """Return the page."""
    command = typer.main.get_command(app)
    docs = get_docs_for_click(obj=command, ctx=typer.Context(command, info_name="endwise"), name="endwise")
    commands = docs[docs.index("\n## ") :].replace("\n* `--help`: Show this message and exit.", "")
    return HEAD + re.sub(r"\n\*\*Options\*\*:\n+(?=\n## |$)", "\n", commands).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
