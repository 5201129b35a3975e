"""Style of figures, however they are drawn: colours, markers, dashes, the range of an axis and its round numbers."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from endwise.common.text import minus
from endwise.config.method import Method
from endwise.figures.charts import Axis, Band, Chart, Ends, Mark, Panel, Series

_PRESETS = ("local", "e2e", "e2e_ds")
_FURTHER = ("#CC79A7", "#56B4E9", "#E69F00", "#7B3294", "#8C6D31", "#4D4D4D")
_STYLES = (*_PRESETS, *(f"method-{number}" for number in range(len(_FURTHER))))
COLOURS = dict(zip(_STYLES, ("#0072B2", "#D55E00", "#009E73", *_FURTHER), strict=True))
"""One colour a method in every figure, by the name of its style: of the paper's kinds, and of further methods in turn.
From the palette of Okabe and Ito, which colour-blind readers can tell apart; each has a marker of its own too."""
_MARKERS = dict(zip(_STYLES, "os^DvPX<>", strict=True))
DASHES: tuple[tuple[float, ...], ...] = ((), (5.0, 2.0), (1.5, 1.5), (6.0, 1.5, 1.5, 1.5), (9.0, 3.0))
"""Dashes by a series' rank, in points: drawn and left out in turns; () is one unbroken line."""
CROWD = 100
"""A series of more marks than these has them smaller and paler, the more so the more there are."""
BAND = 0.16
"""Opacity of a band."""

_LETTER, _GAP = 0.022, 0.03
"""Width of a letter of an axis' labels, and the least space between two labels, as shares of the axis."""
_LINE = 0.05
"""Height of a label, as a share of an upright axis."""
_MARGIN, _MARGIN_SHARE = 1.15, 0.04
"""Margin by which a logarithmic axis goes beyond what it shows: at least this factor, and this share of its length."""


def style_of(method: Method) -> str:
    """Name the style of a method, which is a CSS variable too (`var(--local)`)."""
    return method.key if method.key in _PRESETS else f"method-{method.number % len(_FURTHER)}"


def colour_of(method: Method) -> str:
    return COLOURS[style_of(method)]


def marker_of(series: Series) -> str:
    """Name the method's marker; a third series of it without lines, which no dashes tell apart, has a cross."""
    return "X" if series.rank > 1 and not series.joined else _MARKERS[style_of(series.method)]


def name_of(series: Series) -> str:
    """Return its name in a legend."""
    return f"{series.method.label}, {series.label}" if series.label else series.method.label


def first_of_each_name(chart: Chart) -> dict[str, Series]:
    """List what a legend shows, method by method: series of one name look alike in all panels, and a line and the marks
    about it are one.
    """
    firsts: dict[str, Series] = {}
    for panel in chart.panels:
        for series in panel.series:
            first = firsts.setdefault(name_of(series), series)
            joined, marked = first.joined or series.joined, first.marked or series.marked
            firsts[name_of(series)] = replace(first, joined=joined, marked=marked)
    return dict(sorted(firsts.items(), key=lambda item: item[1].method.place))


def bands_of(chart: Chart) -> list[str]:
    """List what its bands are over, each once; all but the first are hatched."""
    return list(dict.fromkeys(s.band.of for panel in chart.panels for s in panel.series if s.band is not None))


def signs_of(chart: Chart) -> dict[str, str]:
    """List a legend's other entries: each in words, and its sign (`band`, `hatched`, `interval` or `front`)."""
    signs = {f"95 % band over {of}": "hatched" if number else "band" for number, of in enumerate(bands_of(chart))}
    marks = [mark for panel in chart.panels for series in panel.series for mark in series.marks]
    signs |= {"95 % interval": "interval"} if any(mark.x_ends or mark.y_ends for mark in marks) else {}
    return signs | ({"Pareto front": "front"} if any(mark.front for mark in marks) else {})


def distances(values: Sequence[tuple[float, Ends | None]]) -> tuple[list[float], list[float]] | None:
    """Measure how far below and above each value its interval ends, 0 where one has none; None if none has."""
    if all(ends is None for _, ends in values):
        return None
    below = [0.0 if ends is None else max(0.0, value - ends[0]) for value, ends in values]
    return below, [0.0 if ends is None else max(0.0, ends[1] - value) for value, ends in values]


def shrink(series: Series) -> float:
    """Return the factor by which its marks are smaller than those of a series of few."""
    return min(1.0, math.sqrt(CROWD / max(1, len(series.marks))))


def dashes(series: Series) -> tuple[float, ...]:
    return DASHES[series.rank % len(DASHES)]


def drawn(series: Series, panel: Panel) -> tuple[Mark, ...]:
    """The marks for which the panel's axes have a place."""
    return tuple(mark for mark in series.marks if _has_place(mark.x, panel.x) and _has_place(mark.y, panel.y))


def drawn_band(band: Band, panel: Panel) -> list[tuple[float, float, float]]:
    """x, low and high, where the panel's axes have a place for them."""
    return [
        (x, low, high)
        for x, low, high in zip(band.x, band.low, band.high, strict=True)
        if _has_place(x, panel.x) and _has_place(low, panel.y) and _has_place(high, panel.y)
    ]


def left_out(panel: Panel) -> str:
    """Say how many marks an axis has no place for; empty if none."""
    count = sum(len(series.marks) - len(drawn(series, panel)) for series in panel.series)
    if not count:
        return ""
    return f"{count} {'point is' if count == 1 else 'points are'} at 0 or below and not on the logarithmic axis."


def limits(panel: Panel) -> tuple[Ends, Ends]:
    """The ranges of x and y: every mark with its intervals, and a margin. Bands may leave the frame."""
    x = _range(panel.x, [value for mark in _marks(panel) for value in (mark.x, *(mark.x_ends or ()))])
    y = _range(panel.y, [value for mark in _marks(panel) for value in (mark.y, *(mark.y_ends or ()))])
    if panel.diagonal:
        x = y = (min(x[0], y[0]), max(x[1], y[1]))
    return x, y


def log_ticks(low: float, high: float, upright: bool = False) -> list[float]:
    """Round numbers for a logarithmic axis: powers of ten at one distance, where three or more have room; otherwise the
    coarsest series that puts at least three between low and high, or else the finest.
    """
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    for stride in range(1, len(powers)):
        tens = [ten for power in powers if power % stride == 0 and low <= (ten := float(f"1e{power}")) <= high]
        if len(tens) < 3:
            break
        if _apart(tens, low, high, upright) == tens:
            return tens
    inside: list[float] = []
    for digits in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)):
        numbers = [float(f"{digit}e{power}") for power in powers for digit in digits]
        inside = [number for number in numbers if low <= number <= high]
        if len(inside) >= 3:
            break
    return _apart(inside or [low, high], low, high, upright)


def _apart(ticks: list[float], low: float, high: float, upright: bool) -> list[float]:
    """Ticks whose labels leave each other room, from the lowest on."""
    kept = ticks[:1]
    for tick in ticks[1:]:
        letters = (len(tick_text(kept[-1])) + len(tick_text(tick))) / 2
        room = _LINE if upright else letters * _LETTER
        if math.log(tick / kept[-1]) >= (_GAP + room) * math.log(high / low):
            kept.append(tick)
    return kept


def tick_text(value: float) -> str:
    """`1,000`, `0.001`, `2×10⁻⁵`."""
    digits, _, power = f"{value:,.10g}".partition("e")
    if not power:
        return minus(digits)
    ten = "10" + str(int(power)).translate(_RAISED)
    return ten if digits == "1" else f"{minus(digits)}×{ten}"


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _marks(panel: Panel) -> Iterator[Mark]:
    return (mark for series in panel.series for mark in drawn(series, panel))


def _has_place(value: float, axis: Axis) -> bool:
    return math.isfinite(value) and (value > 0 or not axis.log)


def _range(axis: Axis, values: list[float]) -> Ends:
    if axis.categories:
        return -0.3, len(axis.categories) - 0.7
    values = [value for value in values if _has_place(value, axis)] or [1.0]
    low, high = min(values), max(values)
    if axis.log:
        margin = max(_MARGIN, (high / low) ** _MARGIN_SHARE)
        return low / margin, high * margin
    if axis.from_zero:
        low = min(low, 0.0)
    margin = 0.05 * (high - low) or 0.5 * abs(high) or 1.0
    return (low if axis.from_zero and low == 0 else low - margin), high + margin
