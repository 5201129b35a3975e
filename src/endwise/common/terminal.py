"""Output on a terminal, or to whatever reads it: no number and no name is ever cut."""

import textwrap
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from endwise.common.text import minus, printable

WIDEST = 100_000
"""Columns of an output that no terminal stands behind: as many as any table takes."""
Cell = str | Text
_INDENT = "  "
_GLUE = "\0"  # which no text holds that is printable


@dataclass(frozen=True)
class Grid:
    """Rows under headings, as a table; where a terminal is too narrow for it, each row as lines of its own.

    Rich by itself cuts numbers short and leaves columns out. Shown live it is cropped to the terminal's width, and long
    names are folded there; `show` keeps them whole. Texts may hold anything: they are made printable here.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    """Each with a cell for every heading."""
    title: str = ""
    words: Collection[str] = ()
    """Headings of columns that are set to the left, besides the first."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table | Text]:
        width, fold = options.max_width, options.overflow != "ignore"
        if self.title:
            yield _lines(printable(self.title), width, fold, "italic")
        for table in (self._table(padding=1), self._table(padding=0)):
            if Measurement.get(console, options.update(max_width=WIDEST), table).maximum <= width:
                yield table
                return
        yield _lines(printable(self.headings[0]), width, fold)
        for row in self.rows:
            yield from self._record(row, width, fold)

    def _table(self, padding: int) -> Table:
        table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, padding))
        for place, heading in enumerate(self.headings):
            left = self._is_left(place)
            table.add_column(Text(printable(heading)), justify="left" if left else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*self._cells(row))
        return table

    def _is_left(self, place: int) -> bool:
        return place == 0 or self.headings[place] in self.words

    def _cells(self, row: Sequence[Cell]) -> list[Text]:
        """The cells of a row, numbers with minus signs."""
        return [
            _text(cell if self._is_left(place) or isinstance(cell, Text) else minus(cell))
            for place, cell in enumerate(row)
        ]

    def _record(self, row: Sequence[Cell], width: int, fold: bool) -> Iterator[Text]:
        """The first cell, then the others behind their headings, as many on a line as there is room for."""
        name, *cells = (cell.plain.strip() for cell in self._cells(row))
        yield _lines(name.replace(" ", _GLUE), width, fold)
        pairs = [
            _glued(printable(heading), cell, width - len(_INDENT))
            for heading, cell in zip(self.headings[1:], cells, strict=True)
            if cell
        ]
        if pairs:
            yield _lines("   ".join(pairs), width, fold, indent=_INDENT)


class Bars(Progress):
    """Bars behind their names; where a terminal is too narrow for both, under them, so that no name is cut."""

    def get_renderables(self) -> Iterator[Table | Text]:
        for task in self.tasks:  # none, while rich makes the object, which has no console yet
            options = self.console.options.update(max_width=WIDEST)
            table = self.make_tasks_table([task])
            if Measurement.get(self.console, options, table).maximum <= self.console.width:
                yield table
                continue
            yield _lines(printable(task.description), self.console.width, fold=True)
            unnamed = copy(task)
            unnamed.description = ""
            yield self.make_tasks_table([unnamed])


def _text(cell: Cell) -> Text:
    return cell if isinstance(cell, Text) else Text(printable(cell))


def _glued(heading: str, cell: str, room: int) -> str:
    """The two, such that no line ends within them, or at least not within the cell, if there is room."""
    whole = f"{heading} {cell}".strip()
    if len(whole) <= room:
        return whole.replace(" ", _GLUE)
    return f"{heading} {cell.replace(' ', _GLUE) if len(cell) <= room else cell}".strip()


def _lines(text: str, width: int, fold: bool, style: str = "", indent: str = "") -> Text:
    """The text, broken between words; within a word that no line holds only if it is to be folded."""
    lines = textwrap.wrap(
        text,
        max(width, len(indent) + 1),
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=fold,
        break_on_hyphens=False,
    )
    return Text("\n".join(lines).replace(_GLUE, " "), style)


_PRINTED: ContextVar[set[str] | None] = ContextVar("printed", default=None)


@contextmanager
def printing_once() -> Iterator[None]:
    """Print no line twice within it, or within the outermost of several: a remark on a text or a recipe holds for each
    run, phase and round that uses it.
    """
    token = _PRINTED.set(set()) if _PRINTED.get() is None else None
    try:
        yield
    finally:
        if token is not None:
            _PRINTED.reset(token)


def is_new_line(line: str) -> bool:
    """Return whether a line is new here, and this process is the one that prints; if so, it counts as printed."""
    from endwise.common.processes import is_first_process

    printed = _PRINTED.get()
    if not is_first_process() or (printed is not None and line in printed):
        return False
    if printed is not None:
        printed.add(line)
    return True


def note(text: str, shown: bool = True) -> None:
    """Print something to stderr, unless silenced or printed before."""
    if shown and is_new_line(text):
        show(text, Console(stderr=True))


def show(what: Grid | str, console: Console | None = None) -> None:
    """A grid, or a sentence; broken into lines only where a terminal shows it, and names not even there.

    Args:
        console: unset: stdout's.
    """
    console = console or Console()
    width = console.width
    try:
        if not console.is_terminal:
            console.width = WIDEST
        shown = _lines(printable(what), console.width, fold=False) if isinstance(what, str) else what
        console.print(shown, soft_wrap=True)
    finally:
        console.width = width
