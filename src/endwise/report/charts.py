"""What a figure shows, apart from how it is drawn: one description for the printed and for the interactive figure."""

from dataclasses import dataclass

Ends = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    label: str
    """With its unit."""
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
    """What tells of it where the figure can be pointed at; lines parted by newlines, plain text."""
    x_ends: Ends | None = None
    """95 % interval."""
    y_ends: Ends | None = None
    front: bool = False
    """It lies on the Pareto front of its panel."""


@dataclass(frozen=True)
class Band:
    """A 95 % confidence band: at each x its ends."""

    x: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    of: str
    """What it is over: `held-out text`, `3 seeds`."""


@dataclass(frozen=True)
class Series:
    """Marks that belong together; the kind decides on colour and marker."""

    kind: str
    """local, e2e or e2e_ds."""
    marks: tuple[Mark, ...]
    label: str = ""
    """What tells it from others of its kind in the panel; unset where it is the only one."""
    joined: bool = True
    """A line joins the marks in the order they are given."""
    rank: int = 0
    """Of several series of one kind in a panel: 0, 1, 2, ... from the first to the last, told apart by their dashes."""
    band: Band | None = None


@dataclass(frozen=True)
class Panel:
    title: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    diagonal: bool = False
    """A line where y = x."""


@dataclass(frozen=True)
class Chart:
    name: str
    """Stem of its files, and its id on a page."""
    title: str
    caption: str
    """What is drawn, in which units, with which intervals."""
    panels: tuple[Panel, ...]
    """Side by side."""
