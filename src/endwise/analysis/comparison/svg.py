"""The report's figures: SVG to be put inside a page, whose style sheet gives every colour and the typeface.

matplotlib draws with placeholder colours; these become CSS variables, so that one drawing serves light and dark pages.
"""

import io
import re
from collections.abc import Callable, Iterable
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from endwise.analysis.comparison.comparison import Summary
from endwise.common.text import printable
from endwise.config.method import Method
from endwise.evaluation.summary import RunSummary, layer_label
from endwise.figures.page import escape
from endwise.figures.print import log_axis
from endwise.figures.style import COLOURS, SHAPES, colour_of, marker_of, style_of

_INK, _GRID, _PAPER = "#010101", "#020202", "#030303"
_VARIABLES = {
    _INK: "var(--muted)",
    _GRID: "var(--rule)",
    _PAPER: "var(--card)",
    **{colour.lower(): f"var(--{style})" for style, colour in COLOURS.items()},
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "endwise",
    "text.parse_math": False,
    "text.usetex": False,
    "font.size": 10.5,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.linewidth": 0.8,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
}
_SIZE = (4.9, 3.7)


def pareto(summary: Summary, against: str, name: str) -> str:
    """CE increase over `l0` or `alive` (log scale), one curve a method, with the intervals of both.

    Args:
        name: prefix of every id in the drawing; one page must not use it twice.
    """

    def draw(axes: Axes) -> None:
        for method in summary.methods:
            runs = sorted((run for run in summary.runs if run.method == method), key=lambda run: getattr(run, against))
            x, y = [float(getattr(run, against)) for run in runs], [run.ce_increase for run in runs]
            axes.errorbar(x, y, _errors(runs, "ce_increase"), _errors(runs, against), **_look(method))
        _log_scale(axes, "x", [float(getattr(run, against)) for run in summary.runs])
        axes.set_ylim(bottom=min(0.0, *(run.ce_increase for run in summary.runs)))
        axes.set_xlabel({"l0": "L0: features per token", "alive": "alive features"}[against])
        axes.set_ylabel("CE increase, nats per token")

    return _svg(draw, name)


def downstream(summary: Summary, name: str) -> str:
    """Downstream MSE (log scale) at each later site, one line a method, of the runs at similar CE increase."""
    runs = [run for run in summary.similar if run.downstream_mse]
    sites = list(dict.fromkeys(site for run in runs for site in run.downstream_mse))

    def draw(axes: Axes) -> None:
        for run in runs:
            kept = [site for site in sites if run.downstream_mse.get(site, 0) > 0]
            values = [run.downstream_mse[site] for site in kept]
            errors = _errors([run] * len(kept), [f"downstream_mse.{site}" for site in kept], values)
            axes.errorbar([sites.index(site) for site in kept], values, errors, **_look(run.method))
        axes.set_xticks(range(len(sites)), [printable(layer_label(site)) for site in sites])
        axes.set_xlim(-0.3, len(sites) - 0.7)
        _log_scale(axes, "y", [value for run in runs for value in run.downstream_mse.values()])
        axes.set_xlabel("later residual stream, by the block it enters")
        axes.set_ylabel("mean squared error per dimension")

    return _svg(draw, name)


def swatch(method: Method) -> str:
    """The method's marker and line, small, for legends and tables; decoration only, the word stands beside it."""
    return (
        f'<svg class="swatch" viewBox="0 0 28 14" aria-hidden="true" style="--c:var(--{style_of(method)})">'
        f'<path class="line" d="M1 7H27"/>{SHAPES[marker_of(method)]}</svg>'
    )


def legend(methods: Iterable[Method]) -> str:
    items = "".join(f"<li>{swatch(method)}{escape(method.label)}</li>" for method in methods)
    return f'<ul class="legend">{items}</ul>'


def _look(method: Method) -> dict[str, Any]:
    marker = marker_of(method)
    return {
        "color": colour_of(method),
        "marker": marker,
        "markersize": 8.5 if marker == "^" else 7,
        "markeredgecolor": _PAPER,
        "markeredgewidth": 1.0,
        "linewidth": 1.8,
        "elinewidth": 1.2,
        "capsize": 0,
    }


def _errors(
    runs: list[RunSummary], metric: str | list[str], values: list[float] | None = None
) -> list[list[float]] | None:
    """Distances to the ends of the intervals, `[2, runs]`, as matplotlib takes them; None if a run lacks one."""
    names = [metric] * len(runs) if isinstance(metric, str) else metric
    ends = [run.intervals.get(name) for run, name in zip(runs, names, strict=True)]
    points = values or [float(getattr(run, name, 0)) for run, name in zip(runs, names, strict=True)]
    known = [(point, end) for point, end in zip(points, ends, strict=True) if end is not None]
    if not runs or len(known) < len(runs):
        return None
    return [[max(0.0, p - low) for p, (low, _) in known], [max(0.0, high - p) for p, (_, high) in known]]


def _log_scale(axes: Axes, which: str, values: list[float]) -> None:
    positive = [value for value in values if value > 0]
    if positive:
        log_axis(axes, which, min(positive) / 1.15, max(positive) * 1.15)


def _svg(draw: Callable[[Axes], None], name: str) -> str:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=_SIZE, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.set_axisbelow(True)
        axes.grid(True, axis="both")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0, pad=6)
        draw(axes)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_page(text.getvalue(), name)


def _for_page(svg: str, name: str) -> str:
    """matplotlib's file as an element of a page: no prologue, ids of its own, the page's colours and typeface."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\bid="([^"]*)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]*)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'href="#([^"]*)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(
        r'<svg[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg class="figure" viewBox="\1" aria-hidden="true">', svg, count=1
    )
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg
