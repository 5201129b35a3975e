"""Content of a figure, apart from how it is drawn: one description for the printed and for the interactive figure."""

import re
from dataclasses import dataclass

from endwise.config.method import Method

Ends = tuple[float, float]

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Axis:
    label: str
    """Label with its unit."""
    log: bool = False
    from_zero: bool = False
    """The axis begins at 0, or at the lowest value if that is below."""
    categories: tuple[str, ...] = ()
    """Names of the values 0, 1, 2, ..., where they are names."""


@dataclass(frozen=True)
class Mark:
    """One measured value."""

    x: float
    y: float
    hover: str = ""
    """Text shown where the figure can be pointed at; lines parted by newlines, plain text."""
    x_ends: Ends | None = None
    """95 % interval."""
    y_ends: Ends | None = None
    front: bool = False
    """Marks a point on the Pareto front of its panel."""


@dataclass(frozen=True)
class Band:
    """A 95 % confidence band: at each x its ends."""

    x: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    of: str
    """Name of what it is over: `held-out text`, `3 seeds`."""


@dataclass(frozen=True)
class Series:
    """Marks that belong together; the method decides on colour and marker."""

    method: Method
    marks: tuple[Mark, ...]
    label: str = ""
    """Label among others of its method in the panel; unset where it is the only one."""
    joined: bool = True
    """A line joins the marks in the order they are given."""
    marked: bool = True
    """The marks are drawn, and not only the line through them."""
    rank: int = 0
    """Number among several series of one method in a panel: 0, 1, 2, ... from the first to the last, distinguished by
    their dashes, and all but the first by hollow markers; of those without a line the third by crosses."""
    band: Band | None = None


@dataclass(frozen=True)
class Note:
    """Words at a place of a panel."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Panel:
    title: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    diagonal: bool = False
    """A line where y = x; both axes then have one range."""
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True)
class Chart:
    name: str
    """Stem of its files, and its id on a page: letters, digits, `_`, `.` and `-`."""
    title: str
    caption: str
    """Sentences on what is drawn, in which units, with which intervals."""
    panels: tuple[Panel, ...]
    """Side by side."""
    large: bool = False
    """Each panel takes the place of four."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"A chart's name is letters, digits, `_`, `.` and `-`; given {self.name!r:.80}.")
