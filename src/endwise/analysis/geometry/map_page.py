"""A map of features as a figure, as tables, and as a part of a page."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from markupsafe import Markup

from endwise.analysis.geometry.feature_map import FeatureMap, map_columns, region_rows, run_names
from endwise.common.html import table
from endwise.common.tables import write_columns, write_table
from endwise.config.method import Method
from endwise.figures.charts import Axis, Chart, Mark, Note, Panel, Series
from endwise.figures.interactive import div
from endwise.figures.print import save

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
    every = "" if step == 1 else f" Every {step}. feature is shown; the table has all."
    caption = (
        "The alive features of all runs by their decoder directions: UMAP with the cosine distance, its seed fixed. "
        "Numbers are regions that HDBSCAN found on the map. The axes have no unit; only neighbourhood means something."
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
