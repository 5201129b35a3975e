"""The geometry of dictionaries as tables on a terminal, as files, and as a page."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from rich.console import Console

from endwise.analysis.claims import claim_lines, claim_list
from endwise.analysis.geometry import tables
from endwise.analysis.geometry.feature_map import FeatureMap, map_columns, region_rows, run_names
from endwise.analysis.geometry.figures import chosen, kind_cosines, own_cosines, threshold_curves, trade_offs
from endwise.analysis.geometry.geometry import Geometry
from endwise.analysis.geometry.geometry_claims import claims, signed
from endwise.analysis.geometry.similarity import mean_of
from endwise.analysis.geometry.stability import THRESHOLD
from endwise.analysis.over_seeds import bracketed
from endwise.analysis.pages import print_sets, write_page
from endwise.analysis.sets import KNOB, run_table, title_of
from endwise.common.files import expanded
from endwise.common.html import Wide, paragraph, table
from endwise.common.statistics import LEAST_SEEDS
from endwise.common.tables import write_columns, write_table
from endwise.common.terminal import Grid
from endwise.config.method import Method
from endwise.evaluation.summary import RunSummary
from endwise.figures.charts import Axis, Chart, Mark, Note, Panel, Series
from endwise.figures.interactive import div
from endwise.figures.print import save

Row = Mapping[str, Any]


def print_geometry(found: Sequence[Geometry], console: Console | None = None) -> None:
    """The mean cosines of every run, and the verdicts, on a terminal or into a plain pipe."""
    print_sets(found, console, lambda one: [_runs(one)], lambda one: claim_lines(claims(one)))


def _runs(one: Geometry) -> Grid:
    def mean(run: RunSummary) -> str:
        return bracketed(mean_of(one.within[run.folder]) if run.folder in one.within else None)

    columns = ("kind", KNOB, "seed", "L0", "alive", "CE increase")
    within = ("greatest cosine within [95 % over features]", mean)
    return Grid(*run_table(one.runs, *columns, within), title_of(one.setting))


def write_geometry(
    found: Sequence[Geometry], out: Path, *, threshold: float = THRESHOLD, maps: Mapping[int, FeatureMap] | None = None
) -> Path:
    """Tables as CSV and parquet (`within`, `pairs`, `differences`, and `features` with every alive feature; with
    several seeds `seeds` and `recurrence`; where importance is known, `stable_function`), figures as PDF and PNG, and
    `geometry.html`, the page.

    Args:
        threshold: the cosine at which a feature counts as found again.
        maps: by place in `found`, maps of their features, which become `map-<n>` and `map-<n>-regions`.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    out = expanded(out)
    sets = [_rows(one, threshold) for one in found]
    listed = {name: [row for rows in sets for row in rows[name]] for name in (sets[0] if sets else ())}
    write_columns(tables.feature_columns(found, threshold), out / "features")

    def parts(one: Geometry, number: int, figures: Sequence[Markup]) -> Iterator[Markup]:
        yield claim_list(claims(one))
        yield paragraph(f"{_INTERVALS} {chosen(one.similar)}", "note")
        yield from figures
        if maps and (drawn := maps.get(number - 1)) is not None:
            yield from write_feature_map(drawn, out, f"map-{number}")
        for name, (title, columns, text) in _TABLES.items():
            if rows := sets[number - 1][name]:
                headings = [heading for heading, _ in columns]
                yield table(headings, [_cells(row, columns) for row in rows], text=text, title=title)

    lead = (
        f"{sum(len(one.runs) for one in found)} dictionaries in {len(found)} {'set' if len(found) == 1 else 'sets'}; "
        "only dictionaries of one set are compared. Every number is over alive features: those that fired at least "
        "once on the held-out text."
    )
    return write_page(
        found,
        out,
        "geometry",
        title="Geometry of dictionaries",
        lead=lead,
        tables={name: rows for name, rows in listed.items() if rows},
        charts=_charts,
        parts=parts,
    )


def _rows(found: Geometry, threshold: float) -> dict[str, Sequence[Row]]:
    """Make all rows, by the name of the table."""
    return {
        "within": tables.within_rows(found),
        "pairs": tables.pair_rows(found, threshold),
        "differences": tables.difference_rows(found),
        "seeds": tables.seed_rows(found),
        "recurrence": tables.recurrence_rows(found),
        "stable_function": tables.function_rows(found, threshold),
    }


def _charts(found: Geometry, number: int) -> Iterator[Chart]:
    yield own_cosines(found, f"cosines-{number}")
    yield kind_cosines(found, f"kinds-{number}")
    yield trade_offs(found, f"within-{number}")
    if (curves := threshold_curves(found, f"recurrence-{number}")) is not None:
        yield curves


_INTERVALS = (
    "Intervals are 95 %. Of one run they are over features: a bootstrap that draws its alive features with "
    "replacement, apart from other runs' (numbers of the same features together); such intervals say nothing about "
    "another training seed. Of kinds, which are compared seed by seed, they hold features and seeds where there are "
    "three seeds or more; no verdict rests on fewer. “Among equally many” thins the larger dictionary at random to the "
    "size of the smaller: with more features, the nearest is nearer."
)

Column = tuple[str, Any]
"""A heading, and what makes the cell of a row."""


def _cells(row: Row, columns: Sequence[Column]) -> list[object]:
    """Show the reason for a missing number in its place."""
    cells = [make(row) for _, make in columns]
    wide = next((place for place, cell in enumerate(cells) if isinstance(cell, Wide)), None)
    return cells if wide is None else [*cells[: wide + 1], *cells[wide + cells[wide].columns :]]


def _seeds(row: Row) -> str:
    """Say how many; with one or two, that the interval does not hold them."""
    held = "" if row["seeds"] >= LEAST_SEEDS else "; over features alone"
    varied = f" ({row['seeds_vary']})" if row["seeds_vary"] else ""
    return f"{row['seeds']}{varied}{held}"


def _ends(name: str, form: str = "{:.3f} [{:.3f}, {:.3f}]", unit: int = 1) -> Callable[[Row], str]:
    """Cells of a number and its interval."""
    keys = (name, f"{name}.low", f"{name}.high")
    return lambda row: "–" if row.get(name) is None else form.format(*(unit * row[key] for key in keys))


def _number(name: str) -> Callable[[Row], str]:
    return lambda row: "–" if row.get(name) is None else f"{row[name]:.3f}"


def _signed(row: Row) -> str:
    low, high = row["difference.low"], row["difference.high"]
    return "–" if low is None else f"[{signed(low)}, {signed(high)}]"


def _named(row: Row) -> str:
    return f"{row['kind']}, {_whole(row['knob'])}"


def _which(row: Row) -> str:
    return _seeded(_named(row), row["seed"])


def _seeded(name: str, seed: int | None) -> str:
    return name if seed is None else f"{name}, {_whole(f'seed {seed}')}"


def _whole(setting: str) -> str:
    """The setting, whose number stays on one line with its name."""
    return "\N{NO-BREAK SPACE}".join(setting.rsplit(" ", 1))


_DIFFERENCES: Sequence[Column] = (
    ("mean greatest cosine", lambda row: row["measure"]),
    ("of", lambda row: f"{row['a']} − {row['b']}"),
    ("difference", lambda row: Wide(row["reason"], 4) if row["reason"] else signed(row["difference"])),
    ("95 % over features and seeds", _signed),
    ("seeds", _seeds),
    ("", lambda row: "paired" if row["paired"] else ""),
)
_PAIRS: Sequence[Column] = (
    ("features of", _which),
    ("nearest in", lambda row: _seeded(row["nearest_in.kind"], row["nearest_in.seed"])),
    ("pair", lambda row: row["relation"]),
    ("greatest cosine [95 % over features]", _ends("mean")),
    ("median", _number("q50")),
    ("one to one: mean (at most)", lambda row: f"{row['matched.mean']:.3f} ({row['matched.bound']:.3f})"),
    ("of these above threshold", lambda row: f"{100 * row['matched.share']:.0f} %"),
)
_SEEDS: Sequence[Column] = (
    ("kind", _named),
    ("seeds", _seeds),
    ("within [95 % over features and seeds]", _ends("within")),
    ("across seeds [the same]", _ends("across_seeds")),
)
_PERCENT = ("{:.0f} % [{:.0f}, {:.0f}]", 100)
_FUNCTION: Sequence[Column] = (
    ("run", _which),
    ("stable features [95 % over features]", _ends("stable_features", *_PERCENT)),
    ("their share of importance [95 %]", _ends("importance_of_stable", *_PERCENT)),
    ("Spearman of cosine and importance [95 %]", _ends("spearman")),
)
_WITHIN: Sequence[Column] = (
    ("run", _which),
    ("L0", lambda row: f"{row['l0']:.1f}"),
    ("alive", lambda row: f"{row['alive']:,}"),
    ("CE increase", lambda row: f"{row['ce_increase']:+.3f}"),
    ("mean [95 % over features]", _ends("mean")),
    ("5 % of features below", _number("q05")),
    ("median", _number("q50")),
    ("5 % above", _number("q95")),
)
_TABLES = {
    "differences": ("Differences between kinds", _DIFFERENCES, (1, 4, 5)),
    "pairs": ("Two dictionaries", _PAIRS, (1, 2)),
    "seeds": ("Seeds", _SEEDS, (1,)),
    "stable_function": ("What stable features carry", _FUNCTION, ()),
    "within": ("Within each dictionary", _WITHIN, ()),
}
"""Title, columns, and which of these hold text."""


SHOWN = 6000
"""Features that a figure shows at most, spread evenly over each run; the table has all."""
LISTED = 40
"""Regions that the page lists at most, the largest."""


def write_feature_map(of: FeatureMap, out: Path, name: str) -> tuple[Markup, Markup]:
    """`<name>` and `<name>-regions` as CSV and parquet, `<name>.pdf` and `.png`; returns the figure and its table for a
    page.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    write_columns(map_columns(of), out / name)
    write_table(region_rows(of), out / f"{name}-regions")
    chart = map_chart(of, name)
    save(chart, out)
    return div(chart), _regions(of)


def map_chart(of: FeatureMap, name: str, shown: int = SHOWN) -> Chart:
    """Figures 19 and 20, of `shown` features at most; every one with what is known of it."""
    step = -(-len(of.run) // shown)
    ranks: dict[Method, int] = {}
    series = []
    for number, run in enumerate(of.runs):
        rank = ranks[run.method] = ranks.get(run.method, -1) + 1
        label = run.point if sum(run.method == one.method for one in of.runs) > 1 else ""
        marks = tuple(_marks(of, number, step))
        series.append(Series(run.method, marks, label, joined=False, rank=rank))
    centres = [np.median(of.places[of.region == region], axis=0) for region in range(1, of.regions + 1)]
    notes = tuple(Note(float(x), float(y), str(region)) for region, (x, y) in enumerate(centres, 1))
    every = "" if step == 1 else f" One in {step} features is shown; the table has all."
    caption = (
        "The alive features of all runs by their decoder directions: UMAP with the cosine distance, its seed fixed. "
        "Numbers are regions that HDBSCAN found on the map. The axes have no unit; only neighbourhoods mean something."
        f"{every}"
    )
    panel = Panel("", Axis("UMAP 1"), Axis("UMAP 2"), tuple(series), notes=notes)
    return Chart(name, "A map of the features", caption, (panel,), large=True)


def _marks(of: FeatureMap, number: int, step: int) -> Iterator[Mark]:
    name = run_names(of.runs)[number]
    for index in np.flatnonzero(of.run == number)[::step]:
        region = of.region[index]
        lines = [f"{name}, feature {of.features[index]}", f"fires on {100 * of.density[index]:.3g} % of tokens"]
        if not np.isnan(of.importance[index]):
            lines.append(f"importance {of.importance[index]:.3g} nats per token")
        if of.tokens is not None:
            lines.append(f"raises {'  '.join(of.tokens[index])}")
        lines.append(f"region {region}" if region else "in no region")
        yield Mark(float(of.places[index, 0]), float(of.places[index, 1]), "\n".join(lines))


def _regions(of: FeatureMap) -> Markup:
    names = run_names(of.runs)
    headings = ["region", "features", *(f"of {name}" for name in names), "median density"]
    *regions, outside = region_rows(of)
    rows = []
    for row in [*regions[:LISTED], outside]:
        median = row["density.median"]
        cells = [str(row["region"]) if row["region"] else "none", f"{row['features']:,}"]
        cells += [f"{row[f'{name}.features']:,} ({100 * row[f'{name}.share_of_region']:.0f} %)" for name in names]
        cells.append("–" if median is None else f"{100 * median:.3g} %")
        rows.append([*cells, row["tokens"]] if of.tokens is not None else cells)
    if of.tokens is not None:
        headings.append("tokens that its features raise more often than others")
    note = "" if of.regions <= LISTED else f"The {LISTED} largest of {of.regions} regions."
    return table(headings, rows, text=(len(names) + 3,), title=f"Regions of the map of {', '.join(names)}", note=note)
