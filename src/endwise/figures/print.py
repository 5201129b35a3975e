"""Figures for print: PDF and PNG of a chart, the same bytes whenever they are drawn."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import NullLocator, StrMethodFormatter

from endwise.common.files import replacing
from endwise.common.text import printable
from endwise.figures import style
from endwise.figures.charts import Axis, Chart, Ends, Panel, Series

INK, MUTED, RULE, PAPER = "#1c2127", "#58616b", "#e1e0dc", "#ffffff"
WIDTH, HEIGHT = 3.1, 2.75
"""Inches of a panel; three of them stand in a row."""
LEGEND_ROW = 0.18
"""Inches by which each further row of a legend makes a figure higher."""
COLUMNS = 3
DPI = 300
HATCH = "/////"
"""Hatching of every band that is over something else than the chart's first."""

_LEFT_OUT_OF_SVG = ("Creator", "Date", "Format", "Type")
_STYLE: dict[Any, Any] = {
    "pdf.fonttype": 42,  # TrueType: text stays text, which journals ask for
    "text.parse_math": False,
    "text.usetex": False,
    "font.family": "DejaVu Sans",  # which matplotlib brings, so that a figure looks alike everywhere
    "font.size": 8.0,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.linewidth": 0.7,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.autolayout": False,
    "figure.constrained_layout.use": False,
}


def save(chart: Chart, folder: Path, forms: Sequence[str] = ("pdf", "png")) -> list[Path]:
    """Write `<name>.<form>` for each form, each whole or not at all.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    described = {"Title": chart.title, "Subject": chart.caption}
    metadata = {
        "pdf": {**described, "CreationDate": None},
        "png": {"Title": chart.title, "Description": chart.caption, "Software": None},
    }
    paths = []
    with mpl.rc_context(_STYLE):
        figure = draw(chart)
        for form in forms:
            path = folder / f"{chart.name}.{form}"
            with replacing(path) as partial:
                figure.savefig(partial, format=form, dpi=DPI, metadata=metadata[form])
            figure.set_layout_engine(None)  # where everything stands is found once
            paths.append(path)
    return paths


def picture(chart: Chart) -> Markup:
    """Return a chart as SVG that stands in a page: no background, and ink of the page's own colour."""
    drawn = StringIO()
    with mpl.rc_context({**_STYLE, "svg.fonttype": "none", "svg.hashsalt": chart.name}):
        draw(chart).savefig(drawn, format="svg", transparent=True, metadata=dict.fromkeys(_LEFT_OUT_OF_SVG))
    svg = drawn.getvalue()
    for colour, own in (
        (INK, "currentColor"),
        (MUTED, "currentColor"),
        (RULE, "rgb(128 128 128 / 30%)"),
        (PAPER, "none"),
    ):
        svg = svg.replace(colour, own)
    svg = re.sub(r"<style[^>]*>\*\{(.*?)\}</style>", "", svg, flags=re.DOTALL)  # which would be the whole page's
    return Markup(svg[svg.index("<svg") :].replace("<svg ", '<svg style="stroke-linejoin: round" ', 1))


def draw(chart: Chart) -> Figure:
    columns = min(1 if chart.large else 2 if len(chart.panels) == 4 else COLUMNS, len(chart.panels))
    rows = -(-len(chart.panels) // columns)
    scale = 2 if chart.large else 1
    with mpl.rc_context(_STYLE):
        figure = Figure(
            figsize=(scale * WIDTH * columns + 0.2, scale * HEIGHT * rows + 0.7), layout="constrained", facecolor=PAPER
        )
        FigureCanvasAgg(figure)
        figure.suptitle(_text(chart.title), x=0.008, ha="left", fontsize=9.5, fontweight="bold")
        hatched = style.bands_of(chart)[1:]
        for number, panel in enumerate(chart.panels, 1):
            _draw_panel(figure.add_subplot(rows, columns, number), panel, hatched)
        rows_of_legend = _add_legend(figure, chart)
        figure.set_figheight(figure.get_figheight() + LEGEND_ROW * max(0, rows_of_legend - 1))
    return figure


def _draw_panel(axes: Axes, panel: Panel, hatched: Sequence[str]) -> None:
    axes.set_title(_text(panel.title))
    axes.grid(True)
    axes.spines[["top", "right"]].set_visible(False)
    x, y = style.limits(panel)
    _set_axis(axes, "x", panel.x, x)
    _set_axis(axes, "y", panel.y, y)
    note = style.left_out(panel)
    axes.set_xlabel(_text(f"{panel.x.label}\n{note}" if note else panel.x.label))
    axes.set_ylabel(_text(panel.y.label))
    if panel.diagonal:
        axes.plot(x, y, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1.5)
    for series in panel.series:
        _draw_series(axes, series, panel, hatched)
    for note in panel.notes:
        axes.annotate(_text(note.text), (note.x, note.y), ha="center", va="center", fontweight="bold", zorder=3)


def _set_axis(axes: Axes, which: Literal["x", "y"], axis: Axis, ends: Ends) -> None:
    """Range, scale and what is written at it: names, or of a log scale a few round numbers."""
    axes.set(**{f"{which}scale": "log" if axis.log else "linear"})
    axes.set(**{f"{which}lim": ends})
    drawn = axes.xaxis if which == "x" else axes.yaxis
    if axis.log:
        ticks = style.log_ticks(*ends, upright=which == "y")
        drawn.set_ticks(ticks, [style.tick_text(tick) for tick in ticks])
        drawn.set_minor_locator(NullLocator())
    elif axis.categories:
        names = [_text(name) for name in axis.categories]
        slanted: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
        drawn.set_ticks(range(len(names)), names, **(slanted if which == "x" and max(map(len, names)) > 6 else {}))
    elif max(map(abs, ends)) >= 1000:
        drawn.set_major_formatter(StrMethodFormatter("{x:,.10g}"))


def _draw_series(axes: Axes, series: Series, panel: Panel, hatched: Sequence[str]) -> None:
    marks, colour = style.drawn(series, panel), style.colour_of(series.method)
    if series.band is not None and (band := style.drawn_band(series.band, panel)):
        x, low, high = zip(*band, strict=True)
        look = _band_look(colour, style.BAND, series.band.of in hatched)
        axes.fill_between(x, low, high, zorder=1.8, **look)
    if not marks:
        return
    x, y = [mark.x for mark in marks], [mark.y for mark in marks]
    y_bars = style.distances([(mark.y, mark.y_ends) for mark in marks])
    x_bars = style.distances([(mark.x, mark.x_ends) for mark in marks])
    axes.errorbar(x, y, y_bars, x_bars, fmt="none", ecolor=colour, elinewidth=0.8, capsize=0, zorder=2.4)
    axes.plot(x, y, **_look(series), zorder=2.6)
    if front := [mark for mark in marks if mark.front]:
        axes.plot([mark.x for mark in front], [mark.y for mark in front], **_RING, zorder=2.8)


_RING: dict[str, Any] = {
    "linestyle": "none",
    "marker": "o",
    "markersize": 9,
    "markerfacecolor": "none",
    "markeredgecolor": INK,
    "markeredgewidth": 0.7,
}


def _band_look(colour: str, opacity: float, hatched: bool) -> dict[str, Any]:
    return {
        "facecolor": (colour, opacity),
        "edgecolor": (colour, 3 * opacity),  # of the hatching alone
        "hatch": HATCH if hatched else "",
        "linewidth": 0,
    }


def _look(series: Series) -> dict[str, Any]:
    colour, hollow = style.colour_of(series.method), series.rank > 0
    pattern, crowded = style.dashes(series), len(series.marks) > style.CROWD
    return {
        "alpha": max(0.4, 0.8 * style.shrink(series)) if crowded else 1.0,
        "color": colour,
        "linewidth": 1.2 if series.joined else 0,
        "linestyle": (0, pattern) if pattern and series.joined else "-",
        "marker": style.marker_of(series) if series.marked else "",
        "markersize": max(1.8, style.shrink(series) * (5.5 if style.marker_of(series) == "^" else 4.5)),
        "markerfacecolor": PAPER if hollow else colour,
        "markeredgecolor": colour if hollow else PAPER,
        "markeredgewidth": 0.9 if hollow else 0.0 if crowded else 0.6,
    }


def _add_legend(figure: Figure, chart: Chart) -> int:
    """Under the panels, in as many columns as the figure is wide enough for, or in one column a method where each has
    several names; its rows.
    """
    entries = list(_entries(chart))
    names = style.first_of_each_name(chart).values()
    (rows, *others) = set(Counter(series.method for series in names).values()) or {0}
    most = len(entries)
    if rows > 1 and not others and most > rows:
        entries += [(Line2D([], [], linestyle="none"), "")] * (-most % rows)
        most = len(entries) // rows
    dashed = any(series.joined and style.dashes(series) for series in names)
    length = 4.0 if dashed else 2.6  # that a dash is seen whole
    for columns in range(most, 0, -1):
        legend = figure.legend(
            handles=[handle for handle, _ in entries],
            labels=[_text(label) for _, label in entries],
            loc="outside lower center",
            ncols=columns,
            handlelength=length,
            columnspacing=1.6,
        )
        if columns == 1 or _width(legend, figure) <= figure.bbox.width:
            return -(-len(entries) // columns)
        legend.remove()
    return 0


def _width(legend: Legend, figure: Figure) -> float:
    return legend.get_window_extent(FigureCanvasAgg(figure).get_renderer()).width


def _entries(chart: Chart) -> Iterator[tuple[Artist, str]]:
    for name, series in style.first_of_each_name(chart).items():
        yield Line2D([], [], **_look(replace(series, marks=()))), name  # never those of a crowd, small and pale
    for words, sign in style.signs_of(chart).items():
        if sign in ("band", "hatched"):
            yield Patch(**_band_look(MUTED, 2 * style.BAND, sign == "hatched")), words
        else:
            yield Line2D([], [], **(_RING if sign == "front" else {"color": MUTED, "linewidth": 0.8})), words


def _text(text: str) -> str:
    """Printable, and written out where the typeface has no such character."""
    font = get_font(findfont(FontProperties(family=_STYLE["font.family"])))
    return "".join(
        character
        if character == "\n" or font.get_char_index(ord(character))
        else character.encode("unicode_escape").decode("ascii")
        for character in printable(text)
    )
