"""The geometry of dictionaries as tables on a terminal, as files, and as a page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from endwise.analysis.claims import claim_list
from endwise.analysis.geometry import tables
from endwise.analysis.geometry.feature_map import FeatureMap
from endwise.analysis.geometry.figures import chosen, kind_cosines, own_cosines, threshold_curves, trade_offs
from endwise.analysis.geometry.geometry import Geometry
from endwise.analysis.geometry.geometry_claims import claims, signed
from endwise.analysis.geometry.map_page import write_feature_map
from endwise.analysis.geometry.similarity import mean_of
from endwise.analysis.geometry.stability import THRESHOLD
from endwise.analysis.sets import models_of, remark_list, show_claims, title_of
from endwise.common.files import expanded, write_atomic
from endwise.common.remarks import show_remarks
from endwise.common.statistics import LEAST_SEEDS
from endwise.common.tables import write_columns, write_table
from endwise.common.terminal import Grid, show
from endwise.evaluation.summary import knob_labels, remarks_of
from endwise.figures.charts import Chart
from endwise.figures.interactive import div
from endwise.figures.page import Wide, escape, page, table
from endwise.figures.print import save

Row = Mapping[str, Any]


def print_geometry(found: Sequence[Geometry], console: Console | None = None) -> None:
    """The mean cosines of every run, and the verdicts, on a terminal or into a plain pipe."""
    console = console or Console()
    for one in found:
        rows = []
        for run in one.runs:
            mean = mean_of(one.within[run.folder]) if run.folder in one.within else None
            rows.append(
                (
                    run.method.label,
                    f"{run.knob.value:g}",
                    str(run.seed),
                    f"{run.l0:.1f}",
                    f"{run.alive:,}",
                    f"{run.ce_increase:+.3f}",
                    "–" if mean is None else f"{mean.estimate:.3f} [{mean.low:.3f}, {mean.high:.3f}]",
                )
            )
        headings = (
            "kind",
            knob_labels(one.runs),
            "seed",
            "L0",
            "alive",
            "CE increase",
            "greatest cosine within [95 % over features]",
        )
        show(Grid(headings, rows, title_of(one.setting)), console)
        show_remarks(remarks_of(one.runs), console)
        show_claims(claims(one), console)


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
    for name in sets[0] if sets else ():
        if listed := [row for rows in sets for row in rows[name]]:
            write_table(listed, out / name)
    write_columns(tables.feature_columns(found, threshold), out / "features")
    sections = []
    for number, (one, rows) in enumerate(zip(found, sets, strict=True), 1):
        charts = _charts(one, number)
        for chart in charts:
            save(chart, out)
        drawn = (maps or {}).get(number - 1)
        map_of_features = "" if drawn is None else write_feature_map(drawn, out, f"map-{number}")
        sections.append(_section(one, charts, map_of_features, rows))
    path = out / "geometry.html"
    runs = sum(len(one.runs) for one in found)
    lead = (
        f"{runs} dictionaries in {len(found)} {'set' if len(found) == 1 else 'sets'}; only dictionaries of one set are "
        "compared. Every number is over alive features: those that fired at least once on the held-out text."
    )
    body = "\n".join(sections)
    content = page(
        title="Geometry of dictionaries",
        eyebrow=models_of(one.setting for one in found),
        lead=lead,
        body=body,
        interactive=True,
    )
    write_atomic(path, content.encode())
    return path


def _rows(found: Geometry, threshold: float) -> dict[str, Sequence[Row]]:
    """By the name of the table."""
    return {
        "within": tables.within_rows(found),
        "pairs": tables.pair_rows(found, threshold),
        "differences": tables.difference_rows(found),
        "seeds": tables.seed_rows(found),
        "recurrence": tables.recurrence_rows(found),
        "stable_function": tables.function_rows(found, threshold),
    }


def _charts(found: Geometry, number: int) -> list[Chart]:
    charts = [
        own_cosines(found, f"cosines-{number}"),
        kind_cosines(found, f"kinds-{number}"),
        trade_offs(found, f"within-{number}"),
    ]
    if (curves := threshold_curves(found, f"recurrence-{number}")) is not None:
        charts.append(curves)
    return [chart for chart in charts if any(panel.series for panel in chart.panels)]


def _section(found: Geometry, charts: Sequence[Chart], map_of_features: str, rows: Mapping[str, Sequence[Row]]) -> str:
    parts = [
        f'<h2>{escape(found.setting.site)}</h2><p class="lead">{escape(found.setting)}.</p>' + remark_list(found.runs),
        claim_list(claims(found)),
        f'<p class="note">{escape(_INTERVALS)} {escape(chosen(found.similar))}</p>',
        *map(div, charts),
        map_of_features,
        *(_table(title, rows[name], columns, text) for name, (title, columns, text) in _TABLES.items()),
    ]
    return f"<section>{''.join(parts)}</section>"


_INTERVALS = (
    "Intervals are 95 %. Of one run they are over features: a bootstrap that draws its alive features with "
    "replacement, apart from other runs' (numbers of the same features together); such intervals say nothing of "
    "another training seed. Of kinds, which are compared seed by seed, they hold features and seeds where there are "
    "three seeds or more; no verdict rests on fewer. “Among equally many” thins the larger dictionary at random to the "
    "size of the smaller: with more features about, the nearest is nearer."
)

Column = tuple[str, Any]
"""A heading, and what makes the cell of a row."""


def _table(title: str, rows: Sequence[Row], columns: Sequence[Column], text: tuple[int, ...]) -> str:
    if not rows:
        return ""
    headings = [heading for heading, _ in columns]
    return f"<h3>{title}</h3>{table(headings, [_cells(row, columns) for row in rows], text=text)}"


def _cells(row: Row, columns: Sequence[Column]) -> list[object]:
    """A reason why there is nothing to tell takes the place of what cannot be told."""
    cells = [make(row) for _, make in columns]
    wide = next((place for place, cell in enumerate(cells) if isinstance(cell, Wide)), None)
    return cells if wide is None else [*cells[: wide + 1], *cells[wide + cells[wide].columns :]]


def _seeds(row: Row) -> str:
    """How many; with one or two, that the interval does not hold them."""
    held = "" if row["seeds"] >= LEAST_SEEDS else "; over features alone"
    varied = f" ({row['seeds_vary']})" if row["seeds_vary"] else ""
    return f"{row['seeds']}{varied}{held}"


def _mean(row: Row) -> str:
    return _with_ends(row, "mean")


def _with_ends(row: Row, name: str, form: str = "{:.3f}") -> str:
    if row.get(name) is None:
        return "–"
    return f"{form} [{form}, {form}]".format(*(row[key] for key in (name, f"{name}.low", f"{name}.high")))


def _number(row: Row, name: str) -> str:
    return "–" if row.get(name) is None else f"{row[name]:.3f}"


def _percents(row: Row, name: str) -> str:
    if row.get(name) is None:
        return "–"
    return "{:.0f} % [{:.0f}, {:.0f}]".format(*(100 * row[key] for key in (name, f"{name}.low", f"{name}.high")))


def _signed(row: Row, name: str) -> str:
    low, high = row[f"{name}.low"], row[f"{name}.high"]
    return "–" if low is None else f"[{signed(low)}, {signed(high)}]"


def _named(row: Row) -> str:
    return f"{row['kind']}, {row['knob']}"


_DIFFERENCES: Sequence[Column] = (
    ("mean greatest cosine", lambda row: row["measure"]),
    ("less", lambda row: f"{row['a']} − {row['b']}"),
    ("difference", lambda row: Wide(row["reason"], 4) if row["reason"] else signed(row["difference"])),
    ("95 % over features and seeds", lambda row: _signed(row, "difference")),
    ("seeds", _seeds),
    ("", lambda row: "paired" if row["paired"] else ""),
)
_PAIRS: Sequence[Column] = (
    ("features of", lambda row: f"{_named(row)}, seed {row['seed']}"),
    ("nearest in", lambda row: row["nearest_in.kind"]),
    ("", lambda row: row["relation"]),
    ("greatest cosine [95 % over features]", _mean),
    ("median", lambda row: _number(row, "q50")),
    ("one to one: mean (at most)", lambda row: f"{row['matched.mean']:.3f} ({row['matched.bound']:.3f})"),
    ("of these above threshold", lambda row: f"{100 * row['matched.share']:.0f} %"),
)
_SEEDS: Sequence[Column] = (
    ("kind", _named),
    ("seeds", _seeds),
    ("within [95 % over features and seeds]", lambda row: _with_ends(row, "within")),
    ("across seeds [the same]", lambda row: _with_ends(row, "across_seeds")),
)
_FUNCTION: Sequence[Column] = (
    ("run", lambda row: f"{_named(row)}, seed {row['seed']}"),
    ("stable features [95 % over features]", lambda row: _percents(row, "stable_features")),
    ("their share of importance [95 %]", lambda row: _percents(row, "importance_of_stable")),
    ("Spearman of cosine and importance [95 %]", lambda row: _with_ends(row, "spearman")),
)
_WITHIN: Sequence[Column] = (
    ("run", lambda row: f"{_named(row)}, seed {row['seed']}"),
    ("L0", lambda row: f"{row['l0']:.1f}"),
    ("alive", lambda row: f"{row['alive']:,}"),
    ("CE increase", lambda row: f"{row['ce_increase']:+.3f}"),
    ("mean [95 % over features]", _mean),
    ("5 % of features below", lambda row: _number(row, "q05")),
    ("median", lambda row: _number(row, "q50")),
    ("5 % above", lambda row: _number(row, "q95")),
)
_TABLES = {
    "differences": ("Differences between kinds", _DIFFERENCES, (1, 4, 5)),
    "pairs": ("Two dictionaries", _PAIRS, (1, 2)),
    "seeds": ("Seeds", _SEEDS, (1,)),
    "stable_function": ("What stable features carry", _FUNCTION, ()),
    "within": ("Within each dictionary", _WITHIN, ()),
}
"""Title, columns, and which of these hold text."""
