"""Presentation of every question about finished runs: on a terminal, and as tables, figures and a page, set by set."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from markupsafe import Markup
from rich.console import Console

from endwise.analysis.sets import Compared, remark_list, summaries
from endwise.common.files import expanded, write_atomic
from endwise.common.html import paragraph
from endwise.common.remarks import show_remarks
from endwise.common.tables import write_table
from endwise.common.terminal import Grid, show
from endwise.common.text import model_titles
from endwise.evaluation.summary import remarks_of
from endwise.figures.charts import Chart
from endwise.figures.interactive import div
from endwise.figures.page import page
from endwise.figures.print import save

S = TypeVar("S", bound=Compared)
Rows = Sequence[Mapping[str, Any]]


def print_sets(
    found: Iterable[S],
    console: Console | None,
    tables: Callable[[S], Iterable[Grid | str]],
    findings: Callable[[S], Iterable[Grid | str]],
) -> None:
    """Show of each set its tables, what must be remarked on its runs, and what they show."""
    for one in found:
        for each in tables(one):
            show(each, console)
        show_remarks(remarks_of(summaries(one)), console)
        for each in findings(one):
            show(each, console)


def write_page(
    found: Sequence[S],
    out: Path,
    name: str,
    *,
    title: str,
    lead: str,
    tables: Mapping[str, Rows],
    charts: Callable[[S, int], Iterable[Chart]],
    parts: Callable[[S, int, Sequence[Markup]], Iterable[str]],
) -> Path:
    """Write tables as CSV and parquet, every figure as PDF and PNG, and the page `<name>.html`, a section a set.

    Args:
        tables: rows by the table's name.
        charts: the figures of a set, given its number, from 1 on; those that show nothing are left out.
        parts: what stands under a set's head, given its number and its figures; text that is no `Markup` is escaped.

    Returns: the page.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    out = expanded(out)
    for table, rows in tables.items():
        write_table(rows, out / table)
    sections = []
    for number, one in enumerate(found, 1):
        drawn = [chart for chart in charts(one, number) if any(panel.series for panel in chart.panels)]
        for chart in drawn:
            save(chart, out)
        head = paragraph(f"{one.setting}.", "lead"), remark_list(summaries(one))
        sections.append((one.setting.site, [*head, *parts(one, number, list(map(div, drawn)))], ""))
    models = ", ".join(model_titles(one.setting.model for one in found).values())
    content = page(title=title, eyebrow=models, lead=lead, sections=sections)
    path = out / f"{name}.html"
    write_atomic(path, content.encode())
    return path
