"""Pareto curves as figures, as tables on a terminal, and as a page."""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from markupsafe import Markup
from rich.console import Console

from endwise.analysis.comparable import HELDOUT_TEXT, columns_of, methods_of
from endwise.analysis.comparison.printed import ratio_grid
from endwise.analysis.pages import print_sets, write_page
from endwise.analysis.pareto.curves import (
    AXES,
    Pareto,
    band,
    front,
    has_several_rates,
    point_rows,
    rate_of_most,
    ratio_rows,
)
from endwise.analysis.ratios import MEASURES
from endwise.analysis.sets import KNOB, counted, run_table, title_of, value
from endwise.common.html import Wide, bullets, paragraph, table
from endwise.common.showing import box
from endwise.common.terminal import Grid
from endwise.common.text import minus
from endwise.config.method import Knob, Method
from endwise.config.objective import LABELS
from endwise.evaluation.summary import RunSummary
from endwise.figures.charts import Axis, Band, Chart, Mark, Panel, Series
from endwise.figures.print import picture

WAY_OVER_SEEDS = "Student's t"
OTHER_SEEDS = "other seeds"
"""Label of the runs that lie beside the curve of the first seed."""
AXIS = {
    "l0": Axis("L0: features per token", log=True),
    "alive": Axis("alive features", log=True),
    "ce_increase": Axis("CE increase, nats per token", from_zero=True),
    "kl": Axis("KL(original ‖ spliced), nats per token", from_zero=True),
}


def described(run: RunSummary) -> str:
    """Describe a run and what it measured, line by line."""
    return "\n".join(
        [
            run.title,
            run.site,
            f"{f'{run.tokens:,} training tokens' if run.trained_here else 'trained elsewhere'}, {run.d_sae:,} features",
            *([] if run.learning_rate is None else [f"learning rate {run.learning_rate:g}"]),
            f"L0 {run.l0:.1f}, {run.alive:,} alive",
            minus(f"CE increase {run.ce_increase:+.3f}, KL {run.kl:.3f}"),
            run.folder,
        ]
    )


def mark(run: RunSummary, x: str, y: str, *, front: bool = False) -> Mark:
    """A run as a point of a figure."""
    return Mark(value(run, x), value(run, y), described(run), run.intervals.get(x), run.intervals.get(y), front)


def pareto_chart(runs: Sequence[RunSummary], site: str, name: str) -> Chart:
    """Figures 1, 4 and 5: CE increase against L0 and against alive features, KL against L0."""
    methods = methods_of(runs)
    panels = [
        Panel("", AXIS[x], AXIS[y], tuple(each for method in methods for each in _series(runs, method, x, y)))
        for x, y in AXES
    ]
    over = dict.fromkeys(each.band.of for panel in panels for each in panel.series if each.band is not None)
    bands = " or ".join(f"{of} ({'bootstrap' if of == HELDOUT_TEXT else WAY_OVER_SEEDS})" for of in over)
    caption = (
        f"Each mark is one SAE at {site}; lower and further left is better. Rings: no other SAE is better in both. "
        f"Bars: 95 % over held-out text. {f'Bands: 95 % over {bands}. ' if over else ''}"
        "A curve that is not monotone has no band."
    )
    return Chart(name, f"At {site}", caption, tuple(panels))


def _series(runs: Sequence[RunSummary], method: Method, x: str, y: str) -> Iterable[Series]:
    """A curve; where the method was trained at several learning rates, that of most of its runs, and the others as
    dots, or a curve for each rate if none has most.
    """
    own = sorted((run for run in runs if run.method == method), key=lambda run: value(run, x))
    best = front(runs, x, y)
    if not has_several_rates(own):
        yield from _curve(own, method, x, y, best, "", 0)
        return
    most = rate_of_most(own)
    rates = sorted({run.learning_rate or 0.0 for run in own}) if most is None else [most]
    for number, rate in enumerate(rates):
        of_rate = [run for run in own if (run.learning_rate or 0.0) == rate]
        yield from _curve(of_rate, method, x, y, best, f"learning rate {rate:g}", number)
    others = [run for run in own if (run.learning_rate or 0.0) not in rates]
    if others:
        marks = tuple(mark(run, x, y, front=run.folder in best) for run in others)
        yield Series(method, marks, "other learning rates", joined=False, rank=1)


def _curve(
    own: Sequence[RunSummary], method: Method, x: str, y: str, best: Container[str], label: str, rank: int
) -> Iterable[Series]:
    """Draw, from three seeds on, the curve of their means, with its band, and all runs as dots; otherwise the first
    seed's curve with its band, and the others as dots.
    """
    if not own:
        return
    seeds = sorted({run.seed for run in own})
    around = band(own, x, y)
    drawn = None if around is None else Band(_listed(around.x), _listed(around.low), _listed(around.high), around.over)
    marks = {seed: [mark(run, x, y, front=run.folder in best) for run in own if run.seed == seed] for seed in seeds}
    if around is not None:  # a line on the band's own interpolation, which straight ones between marks would leave
        over_text = around.over == HELDOUT_TEXT
        middle = {*zip(_listed(around.x), _listed(around.middle), strict=True)}
        middle |= {(each.x, each.y) for each in marks[seeds[0]]} if over_text else set()
        yield Series(method, tuple(Mark(*pair) for pair in sorted(middle)), label, band=drawn, marked=False, rank=rank)
        shown = marks[seeds[0]] if over_text else [each for group in marks.values() for each in group]
        yield Series(method, tuple(shown), label, joined=False, rank=rank)
        if not over_text:
            return
    else:
        yield Series(method, tuple(marks[seeds[0]]), label, rank=rank)
    if others := [each for seed in seeds[1:] for each in marks[seed]]:
        name = f"{label}, {OTHER_SEEDS}" if label else OTHER_SEEDS
        yield Series(method, tuple(others), name, joined=False, rank=max(rank, 1))


def _listed(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(each) for each in values)


def print_pareto(found: Sequence[Pareto], console: Console | None = None) -> None:
    """The runs and the ratios of every set."""
    print_sets(found, console, lambda one: [_points(one)], _findings)


def _points(one: Pareto) -> Grid:
    rates = any(has_several_rates([run for run in one.runs if run.method == method]) for method in one.methods)
    fronts = {x: front(one.runs, x, "ce_increase") for x in ("l0", "alive")}
    headings, rows = run_table(
        one.runs,
        *("kind", KNOB, "seed", *[("rate", lambda run: f"{run.learning_rate or 0:g}")] * rates),
        *("L0", "alive", "CE increase [95 %]", "KL"),
        ("front", lambda run: _FRONTS[run.folder in fronts["l0"], run.folder in fronts["alive"]]),
    )
    return Grid(headings, rows, title_of(one.setting), words=("front",))


_FRONTS = {(True, True): "both", (True, False): "L0", (False, True): "alive", (False, False): ""}
"""Label by whether a run lies on the front of CE increase over L0, and on that over alive features."""


def _findings(one: Pareto) -> list[Grid | str]:
    if not one.is_compared:
        return ["All SAEs of this setting are of one method: there is nothing to compare."]
    return [ratio_grid(one.summary), *(f"• {sentence}" for sentence in (*one.remarks, *one.summary.verdicts))]


def write_pareto(found: Sequence[Pareto], out: Path) -> Path:
    """`points` and `ratios` as CSV and parquet, `pareto-<n>.pdf` and `.png` for every set, and `pareto.html`, the page;
    where runs have prefixes, `prefixes` and `prefixes-<n>` besides.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    nested = [{**columns_of(one.setting), **row} for one in found for row in prefix_rows(one.runs)]
    return write_page(
        found,
        out,
        "pareto",
        title="Pareto curves",
        lead=f"{counted(found)}; only runs of one set are compared.",
        tables={"points": point_rows(found), "ratios": ratio_rows(found), **({"prefixes": nested} if nested else {})},
        charts=lambda one, number: [
            pareto_chart(one.runs, one.setting.site, f"pareto-{number}"),
            prefix_chart(one.runs, one.setting.site, f"prefixes-{number}"),
        ],
        parts=lambda one, _, figures: _parts(one, figures),
    )


def _parts(one: Pareto, figures: Sequence[Markup]) -> list[Markup]:
    grid = _points(one)
    words = [place for place, heading in enumerate(grid.headings) if place and heading in grid.words]
    runs = table(grid.headings, grid.rows, text=words)
    if not one.is_compared:
        return [*figures, runs]
    verdicts = bullets("verdicts", (*one.remarks, *one.summary.verdicts))
    return [verdicts, *figures, ratio_table(ratio_rows([one])), runs]


def card_parts(one: Pareto) -> Iterable[Markup]:
    """Show a set as a card: its curves, its runs, and what they come to."""
    yield box("scroll", [picture(pareto_chart(one.runs, one.setting.site, "pareto"))])
    grid = _points(one)
    yield table(grid.headings, grid.rows, text=(1, len(grid.headings) - 1))
    if one.is_compared:
        yield ratio_table(ratio_rows([one]))
    yield from (paragraph(each, "note") for each in _findings(one) if isinstance(each, str))


def ratio_table(rows: Iterable[Mapping[str, object]]) -> Markup:
    """Show `ratio_rows`: the figure with its interval, or why there is none; both ends of the range, and the range; the
    intervals over text and over seeds alone. The site is named where there are several.
    """
    cells, rows = [], list(rows)
    several = len({row["site"] for row in rows}) > 1
    base = ", ".join(dict.fromkeys(str(row.get("relative_to", "local")) for row in rows)) or "local"
    titles = {measure.key: measure.title for measure in MEASURES}
    for row in rows:
        ratio, reason = row["ratio"], row["reason"]
        whole, at_ends, text, seeds = (_ends(row, side) for side in ("", "ratio_at_ends.", "text.", "seeds."))
        numbers = (at_ends, _ends(row, "over.", "{:.3g} to {:.3g}", 1), text, seeds, row["seeds"])
        if reason:
            numbers = (Wide(str(reason), 6),) if row["ratio_at_ends.low"] is None else (Wide(str(reason), 1), *numbers)
        else:
            numbers = (whole, *numbers)
        share = f"{100 * ratio:.0f} %" if isinstance(ratio, float) else "–"
        kind = row.get("method", LABELS.get(str(row["kind"])))
        cells.append((titles[str(row["measure"])], *[str(row["site"])] * several, kind, share, *numbers))
    headings = (
        *(f"relative to {base}", *["site"] * several, "kind", "ratio", "95 %", "at both ends"),
        *("compared over", "95 % over text", "95 % over seeds", "seeds"),
    )
    return table(headings, cells, text=(1, 2) if several else (1,))


def _ends(row: Mapping[str, object], side: str, form: str = "{:.0f} to {:.0f}", unit: int = 100) -> str:
    low, high = row[f"{side}low"], row[f"{side}high"]
    return form.format(unit * low, unit * high) if isinstance(low, float) and isinstance(high, float) else "–"


NUMBERS = {"l0": "prefix_l0", "ce_increase": "prefix_ce_increase"}
"""Names of a prefix's numbers in `evaluation.json`, by those of the whole dictionary's."""
CE_INCREASE = Axis("CE increase, nats per token", from_zero=True)
PREFIX_AXES = (
    ("l0", Axis("L0 of the prefix: features per token", log=True)),
    ("length", Axis("features of the prefix", log=True)),
)
"""Names and axes of x, panel by panel."""
SEVERAL = "For several seeds, the line joins their means and the marks are single seeds. "


def prefix_rows(runs: Iterable[RunSummary]) -> list[dict[str, Any]]:
    """One row for each prefix of each run, the whole dictionary last, with 95 % intervals over held-out text."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        numbers = {**run.prefixes, run.d_sae: (run.l0, run.ce_increase)} if run.prefixes else {}
        for length, (l0, ce_increase) in numbers.items():
            row = {"kind": run.method.key, "method": run.method.label, **run.knob.columns, "seed": run.seed}
            row |= {"run": run.folder, "features": length, "l0": l0, "ce_increase": ce_increase}
            for name, of_prefix in NUMBERS.items():
                ends = run.intervals.get(name if length == run.d_sae else f"{of_prefix}.{length}")
                row |= dict(zip((f"{name}.low", f"{name}.high"), ends, strict=True)) if ends else {}
            rows.append(run.known(row))
    return rows


def prefix_chart(runs: Sequence[RunSummary], site: str, name: str) -> Chart:
    """CE increase against each prefix's L0, and against its number of features; a line for each setting of the knob. No
    run has prefixes: a chart that shows nothing.
    """
    nested = [run for run in runs if run.prefixes]
    alike: dict[Method, dict[tuple[Knob, tuple[int, ...]], list[RunSummary]]] = {m: {} for m in methods_of(nested)}
    for run in nested:
        alike[run.method].setdefault((run.knob, tuple(run.prefixes)), []).append(run)
    panels = [
        Panel(
            "",
            axis,
            CE_INCREASE,
            tuple(s for of in alike.values() for i, own in enumerate(of.values()) for s in _lines(x, own, i)),
        )
        for x, axis in PREFIX_AXES
    ]
    several = any(len(own) > 1 for of in alike.values() for own in of.values())
    caption = (
        f"Each line is a dictionary at {site}, spliced in by its first features alone, the others left out: from its "
        f"shortest prefix to the whole of it, which is the last mark. {SEVERAL if several else ''}Lower and further "
        "left is better. Bars: 95 % over held-out text."
    )
    return Chart(name, f"Prefixes at {site}", caption, tuple(panels))


def _lines(x: str, runs: Sequence[RunSummary], rank: int) -> Iterator[Series]:
    """One run's line with its marks; of several seeds that of their means, and all marks."""
    method, knob, marks = runs[0].method, runs[0].knob, [_marks(x, run) for run in runs]
    if len(runs) == 1:
        yield Series(method, marks[0], runs[0].point, rank=rank)
        return
    label = f"{knob}, {len(runs)} seeds"
    means = (Mark(fmean(m.x for m in at), fmean(m.y for m in at)) for at in zip(*marks, strict=True))
    yield Series(method, tuple(means), label, marked=False, rank=rank)
    yield Series(method, tuple(mark for own in marks for mark in own), label, joined=False, rank=rank)


def _marks(x: str, run: RunSummary) -> tuple[Mark, ...]:
    marks: list[Mark] = []
    for row in prefix_rows([run]):
        length, l0, ce_increase = row["features"], row["l0"], row["ce_increase"]
        hover = f"{run.title}\nthe first {length:,} of {run.d_sae:,} features\n"
        hover += minus(f"L0 {l0:.1f}, CE increase {ce_increase:+.3f}\n") + run.folder
        ends = {key: (row[f"{key}.low"], row[f"{key}.high"]) for key in NUMBERS if f"{key}.low" in row}
        across = (length, None) if x == "length" else (l0, ends.get("l0"))
        marks.append(Mark(float(across[0]), ce_increase, hover, across[1], ends.get("ce_increase")))
    return tuple(marks)
