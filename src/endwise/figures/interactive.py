"""Figures for a page: each point names its run. Drawn by plotly.js, which the page carries, so that it opens from a
file without a network; colours are the page's own style sheet's, light or dark.
"""

import hashlib
import math
import textwrap
from base64 import b64encode
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from endwise.common.html import part
from endwise.common.text import printable
from endwise.config.method import Method
from endwise.figures import style
from endwise.figures.charts import Axis, Chart, Ends, Mark, Panel, Series

SYMBOLS = {"o": "circle", "s": "square", "^": "triangle-up", "D": "diamond", "v": "triangle-down"}
SYMBOLS |= {"P": "cross", "X": "x", "<": "triangle-left", ">": "triangle-right"}
HOVER_WIDTH = 46
"""Characters of a line of a point's text; longer ones are folded."""
AXIS_WIDTH = 36
"""Characters of a line of an axis' label: as many as the axis of a panel is long on a phone."""

Json = dict[str, Any]
_PARTS = "figures/chart.html.j2"


def div(chart: Chart) -> Markup:
    """The chart as an element of a page that also has `library()`: legend, panels, caption, and what is drawn as JSON.

    Text in a chart stays text: nothing in it is read as a tag, here or by plotly.
    """
    names = [(_plain(name), name, _look(series)) for name, series in style.first_of_each_name(chart).items()]
    panels = [(panel.title, in_words(panel), style.left_out(panel)) for panel in chart.panels]
    hatched = style.bands_of(chart)[1:]
    figures = [_figure(panel, hatched) for panel in chart.panels]
    return part(_PARTS, "chart", chart, names, style.signs_of(chart), panels, figures)


@cache
def library() -> Markup:
    """Return what a page with charts needs once: their style, plotly.js, and the script that draws every chart."""
    return part(_PARTS, "library", _scripts())


def script_policy() -> Markup:
    """The `script-src` of a Content-Security-Policy under which the library's scripts run and no other does."""
    hashes = (b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in _scripts())
    return Markup("script-src " + " ".join(f"'sha256-{digest}'" for digest in hashes))


def in_words(panel: Panel) -> str:
    """Describe the panel for those who do not see it."""
    parts = []
    for series in panel.series:
        points = ", ".join(f"{mark.y:.4g} at {_place(panel.x, mark.x)}" for mark in series.marks[: style.CROWD])
        more = f", and {len(series.marks) - style.CROWD:,} more" if len(series.marks) > style.CROWD else ""
        parts.append(f"{style.name_of(series)}: {points or 'nothing'}{more}")
    return f"{panel.y.label} over {panel.x.label}. {'; '.join(parts)}."


@cache
def _scripts() -> tuple[str, str]:
    plotly = files("plotly").joinpath("package_data", "plotly.min.js").read_text(encoding="utf-8")
    own = files("endwise.figures").joinpath("interactive.js").read_text(encoding="utf-8")
    assert not any("</script" in script or "<!--" in script for script in (plotly, own))
    return plotly, own


def _figure(panel: Panel, hatched: Sequence[str]) -> Json:
    """Plotly's description of a panel."""
    x, y = style.limits(panel)
    return {
        "data": [trace for series in panel.series for trace in _traces(series, panel, hatched)],
        "layout": {
            "xaxis": _axis(panel.x, x),
            "yaxis": _axis(panel.y, y, upright=True),
            "shapes": [_diagonal(x)] if panel.diagonal else [],
            "annotations": [
                {"x": note.x, "y": note.y, "text": _plain(note.text), "showarrow": False, "font": _BOLD}
                for note in panel.notes
            ],
        },
    }


def _axis(axis: Axis, ends: Ends, upright: bool = False) -> Json:
    described: Json = {"title": {"text": _folded(axis.label, AXIS_WIDTH)}}
    if axis.categories:
        names = [_plain(name) for name in axis.categories]
        return described | {"range": list(ends), "tickvals": list(range(len(names))), "ticktext": names}
    if not axis.log:
        return described | {"range": list(ends)}
    ticks = style.log_ticks(*ends, upright=upright)
    texts = [style.tick_text(tick) for tick in ticks]
    return described | {"type": "log", "range": [math.log10(end) for end in ends], "tickvals": ticks, "ticktext": texts}


def _diagonal(ends: Ends) -> Json:
    low, high = ends
    line = {"color": "var(--muted)", "width": 1, "dash": "4px,3px"}
    return {"type": "line", "x0": low, "y0": low, "x1": high, "y1": high, "layer": "below", "line": line}


_BOLD = {"size": 13, "color": "var(--ink)", "weight": 700}


def _traces(series: Series, panel: Panel, hatched: Sequence[str]) -> Iterator[Json]:
    marks, name = style.drawn(series, panel), _plain(style.name_of(series))
    quiet: Json = {"type": "scatter", "name": name, "hoverinfo": "skip"}
    if series.band is not None and (band := style.drawn_band(series.band, panel)):
        x, low, high = (list(values) for values in zip(*band, strict=True))
        hatching = {"shape": "/", "size": 6, "solidity": 0.25, "fgcolor": f"{_colour(series)} {3 * style.BAND:g}"}
        yield {
            **quiet,
            "x": x + x[::-1],
            "y": low + high[::-1],
            "mode": "lines",
            "line": {"width": 0},
            "fill": "toself",
            "fillcolor": f"{_colour(series)} {style.BAND}",
            **({"fillpattern": hatching} if series.band.of in hatched else {}),
        }
    x, y = [mark.x for mark in marks], [mark.y for mark in marks]
    dash = ",".join(f"{1.6 * length:g}px" for length in style.dashes(series)) or "solid"
    yield {
        "type": "scatter",
        "name": name,
        "x": x,
        "y": y,
        "mode": "markers" if not series.joined else "lines+markers" if series.marked else "lines",
        "line": {"color": _colour(series), "width": 1.8, "dash": dash},
        "marker": _marker(series),
        "error_x": _bars(series, [(mark.x, mark.x_ends) for mark in marks]),
        "error_y": _bars(series, [(mark.y, mark.y_ends) for mark in marks]),
        "hovertext": [_hover(mark, series, panel) for mark in marks],
        "hoverinfo": "text" if series.marked else "skip",
    }
    if front := [mark for mark in marks if mark.front]:
        ring = {"symbol": "circle-open", "size": 15, "color": "var(--ink)", "line": {"width": 1.2}}
        yield {**quiet, "x": [m.x for m in front], "y": [m.y for m in front], "mode": "markers", "marker": ring}


def _colour(series: Series) -> str:
    return f"var(--{style.style_of(series.method)})"


def _marker(series: Series) -> Json:
    hollow, crowded = series.rank > 0, len(series.marks) > style.CROWD
    fill, edge = ("var(--card)", _colour(series)) if hollow else (_colour(series), "var(--card)")
    return {
        "symbol": SYMBOLS[style.marker_of(series)],
        "size": round(max(4.0, style.shrink(series) * (10 if style.marker_of(series) == "^" else 9)), 1),
        "color": fill,
        "opacity": max(0.5, 0.9 * style.shrink(series)) if crowded else 1,
        "line": {"color": edge, "width": 1.6 if hollow else 0 if crowded else 1},
    }


def _bars(series: Series, values: list[tuple[float, Ends | None]]) -> Json:
    if (distances := style.distances(values)) is None:
        return {"visible": False}
    below, above = distances
    bars: Json = {"type": "data", "symmetric": False, "array": above, "arrayminus": below}
    return bars | {"color": _colour(series), "thickness": 1.2, "width": 0}


def _hover(mark: Mark, series: Series, panel: Panel) -> str:
    place = f"{panel.y.label} {mark.y:.4g}\n{panel.x.label} {mark.x:.4g}"
    text = printable(mark.hover or f"{style.name_of(series)}\n{place}")
    return _folded(text, HOVER_WIDTH)


def _folded(text: str, width: int) -> str:
    """Text for plotly, in lines of so many characters."""
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, width) or [""]]
    return "<br>".join(_plain(line) for line in lines)


def _plain(text: str) -> str:
    """Text that plotly shows as it stands: it reads some tags and the entities."""
    return printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("\n", "<br>")


def _place(axis: Axis, value: float) -> str:
    return axis.categories[round(value)] if axis.categories else f"{value:,.4g}"


def swatch(method: Method) -> Markup:
    """The method's marker and line, small; decoration only, its name stands beside it."""
    return part(_PARTS, "swatch", *_look(Series(method, ())))


def _look(series: Series) -> tuple[str, str, str, bool]:
    """Style, marker, dashes of the line, if there is one, and whether the marker is hollow."""
    pattern = " ".join(f"{length:g}" for length in style.dashes(series)) or "none"
    return style.style_of(series.method), style.marker_of(series), pattern * series.joined, series.rank > 0
