"""Lengths, directions and later layers of runs: figures, tables on a terminal, and a page."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from rich.console import Console

from endwise.analysis.claims import claim_lines, claim_list
from endwise.analysis.comparable import baseline_of, columns_of, methods_of
from endwise.analysis.directions import reconstruction
from endwise.analysis.directions.norms import COLUMNS
from endwise.analysis.directions.study import Directions
from endwise.analysis.over_seeds import bracketed, interval_columns, rests_on
from endwise.analysis.pages import print_sets, write_page
from endwise.analysis.sets import KNOB, Column, columns_of_run, counted, run_table, title_of
from endwise.common.html import table
from endwise.common.terminal import Grid
from endwise.evaluation.summary import RunSummary, layer_label, what_varies
from endwise.figures.charts import Axis, Chart, Mark, Panel, Series

CORRELATION = Axis("correlation of ⟨a, v⟩ and ⟨â, v⟩")
UNEXPLAINED = Axis("unexplained share of the variance along v", log=True)
KL_PER_VARIANCE = Axis("the same KL / variance along v", log=True)
KL = Axis("KL(original ‖ resample-ablated), nats per token", log=True)


def reconstructed_directions(found: Directions, name: str) -> Chart:
    """Figure 21: how each kind reconstructs each principal direction, of the runs at similar CE increase."""
    x = Axis("principal direction v, by variance", log=True)
    panels = [
        Panel("", x, CORRELATION, tuple(_by_direction(found, run, "correlation") for run in found.similar)),
        Panel("", x, UNEXPLAINED, tuple(_by_direction(found, run, "unexplained") for run in found.similar)),
    ]
    caption = (
        f"Principal directions of the activations at {found.setting.site}, numbered from 1, position 0 and document "
        "starts left out. Unexplained: Σ(⟨a, v⟩ − ⟨â, v⟩)² over the variance; above 1, the mean would be nearer. "
        f"{_seed(found)}"
    )
    return Chart(name, "How each direction is reconstructed", caption, tuple(panels))


def _seed(found: Directions) -> str:
    return f"One run per kind, of seed {found.similar[0].seed}."


def _by_direction(found: Directions, run: RunSummary, what: str) -> Series:
    of = found.measured[run.folder]
    values = of.correlation.estimate if what == "correlation" else 1 - of.explained_variance.estimate
    marks = [
        Mark(float(index + 1), float(y), _hover(found, run, index)) for index, y in enumerate(values) if np.isfinite(y)
    ]
    return Series(run.method, tuple(marks), joined=False)


def used_directions(found: Directions, name: str) -> Chart:
    """Figures 22 and 23: what is reconstructed, and what is dropped beyond the baseline, over what the model uses."""
    base = next(run for run in found.similar if run.method == baseline_of(methods_of(found.similar)))
    panels = [Panel("", KL, CORRELATION, tuple(_by_use(found, run) for run in found.similar))]
    if others := [run for run in found.similar if run.method != base.method]:
        dropped = Axis(f"{base.method.label}'s correlation − the kind's")
        for x in (KL, KL_PER_VARIANCE):
            series = tuple(_by_use(found, run, base, x is KL_PER_VARIANCE) for run in others)
            panels.append(Panel("", x, dropped, series))
    caption = (
        f"Each dot is a principal direction of the activations at {found.setting.site}. Across: the KL when every "
        "token's component along it is replaced by another token's, as it is and by the direction's variance. Up: how "
        f"well an SAE reconstructs that component, and how much less well than {base.method.label}. {_seed(found)}"
    )
    shown = tuple(panel for panel in panels if any(series.marks for series in panel.series))
    return Chart(name, "What is reconstructed, and what the model uses", caption, shown)


def _by_use(found: Directions, run: RunSummary, base: RunSummary | None = None, by_variance: bool = False) -> Series:
    """A run's correlations, or by how much they are below the baseline's."""
    of = found.measured[run.folder]
    across = of.kl.estimate / np.maximum(of.variance, np.finfo(float).tiny) if by_variance else of.kl.estimate
    up = of.correlation.estimate
    if base is not None:
        up = found.measured[base.folder].correlation.estimate - up
    marks = tuple(
        Mark(float(x), float(y), _hover(found, run, index))
        for index, (x, y) in enumerate(zip(across, up, strict=True))
        if np.isfinite(x) and np.isfinite(y)
    )
    return Series(run.method, marks, joined=False)


def _hover(found: Directions, run: RunSummary, index: int) -> str:
    of = found.measured[run.folder]
    kl = of.kl
    used = (
        f"\nKL {kl.estimate[index]:.4g} [{kl.low[index]:.3g}, {kl.high[index]:.3g}]"
        if np.isfinite(kl.estimate[index])
        else ""
    )
    return (
        f"{run.method.label}, {run.knob}, direction {index + 1}\n"
        f"{of.variance_share[index]:.3%} of the variance\n"
        f"correlation {of.correlation.estimate[index]:.3f}, explained {of.explained_variance.estimate[index]:.3f}{used}"
    )


def charts_of(found: Directions, number: int) -> list[Chart]:
    """Every figure of a set."""
    site, similar = found.setting.site, found.similar
    return [
        reconstruction.norms(found.norms, similar, site, f"norms-{number}"),
        reconstruction.cosines(found.norms, similar, site, f"cosines-{number}"),
        reconstructed_directions(found, f"directions-{number}"),
        used_directions(found, f"use-{number}"),
        reconstruction.downstream({site: similar}, f"downstream-{number}"),
        reconstruction.downstream_of_all(found.runs, site, f"downstream-all-{number}"),
        reconstruction.explained_variance(found.runs, site, f"explained-variance-{number}"),
    ]


def print_directions(found: Sequence[Directions], console: Console | None = None) -> None:
    """The runs of every set, and what shows of the paper's claims."""
    print_sets(found, console, lambda one: [_runs(one)], lambda one: claim_lines(one.claims))


def _runs(one: Directions) -> Grid:
    def use_rank(run: RunSummary) -> str:
        of = one.follows.get(run.folder)
        return "–" if of is None else f"{of.rank.estimate:.2f}"

    headings, rows = run_table(
        one.runs,
        *("kind", KNOB, "seed", "CE"),
        ("‖â‖/‖a‖", lambda run: f"{one.norms[run.folder].ratio.estimate:.3f}"),
        ("cosine", lambda run: f"{one.norms[run.folder].cosine.estimate:.3f}"),
        ("use rank", use_rank),
        "later MSE",
    )
    return Grid(headings, rows, title_of(one.setting))


def write_directions(found: Sequence[Directions], out: Path) -> Path:
    """Tables (`norms`, `directions`, `downstream`, `use`, `contrasts`, `claims`) as CSV and parquet, figures as PDF
    and PNG, and `directions.html`, the page.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    rows_of = {
        "norms": norm_rows(found),
        "directions": direction_rows(found),
        "downstream": downstream_rows(found),
        "use": use_rows(found),
        "contrasts": contrast_rows(found),
        "claims": claim_rows(found),
    }
    return write_page(
        found,
        out,
        "directions",
        title="Lengths, directions and later layers",
        lead=f"{counted(found)}, measured on held-out text; only runs of one set are compared.",
        tables={name: rows for name, rows in rows_of.items() if rows},
        charts=charts_of,
        parts=lambda one, _, figures: [
            claim_list(one.claims),
            _norm_table(one),
            *_use_tables(one),
            *_later_table(one),
            *figures,
        ],
    )


def _norm_table(one: Directions) -> Markup:
    """Table 5."""

    def interval(heading: str) -> Column:
        return heading, lambda run: bracketed(getattr(one.norms[run.folder], COLUMNS[heading]))

    runs = run_table(one.runs, _kind(one), KNOB, "seed", "CE increase", *map(interval, COLUMNS))
    note = (
        "One row per run, of one seed; 95 % intervals over held-out text. The first and the last of the measured "
        "columns leave out position 0 and document starts. * at similar CE, of its seed."
    )
    return table(*runs, title="Lengths", note=note)


def _use_tables(one: Directions) -> Iterator[Markup]:
    known = [run for run in one.runs if run.folder in one.follows]
    if not known:
        return
    runs = run_table(
        known,
        *(_kind(one), KNOB, "seed"),
        ("directions", lambda run: str(one.follows[run.folder].directions)),
        ("rank correlation with use", lambda run: bracketed(one.follows[run.folder].rank)),
        ("given variance", lambda run: bracketed(one.follows[run.folder].given_variance)),
    )
    pairs = [
        (
            f"{each.method.label} − {each.reference.label}",
            rests_on(each.runs),
            *map(bracketed, (each.rank, each.given_variance, each.dropped, each.dropped_given_variance)),
        )
        for each in one.contrasts
    ]
    differences = (
        *("at similar CE, seed by seed", "seeds", "rank correlation with use", "given variance"),
        *("use of what it drops", "given variance"),
    )
    note = (
        "Rank correlation over directions of how well a direction is reconstructed and the KL when it is "
        "resample-ablated. 95 % intervals: of a run, over directions; of two kinds, over directions and seeds where "
        "there are three seeds or more, otherwise over directions alone. The use of what it drops is the rank "
        "correlation of that KL with how much worse the first kind reconstructs than the second: below 0, it drops "
        "what the model uses less. Given variance: the same with the directions' variance taken out (partial rank "
        "correlation)."
    )
    yield table(*runs, title="Directions and their use", note="" if pairs else note)
    if pairs:
        yield table(differences, pairs, text=(1,), note=note)


def _later_table(one: Directions) -> Iterator[Markup]:
    def later(site: str) -> Column:
        def cell(run: RunSummary) -> str:
            cosine = run.downstream_cosine.get(site)
            shown = "" if cosine is None else f" / {cosine:.3f}"
            return f"{run.downstream_mse[site]:.3g}{shown}" if site in run.downstream_mse else "–"

        return layer_label(site), cell

    sites = dict.fromkeys(site for run in one.similar for site in run.downstream_mse)
    if sites:
        title = f"Later layers at similar CE, seed {one.similar[0].seed}: mean squared error / cosine"
        yield table(*run_table(one.similar, "kind", "CE increase", *map(later, sites)), title=title)


def _kind(one: Directions) -> Column:
    """The method, marked where the run is one of those at similar CE increase."""
    similar = {run.folder for runs in one.by_seed.values() for run in runs}
    return "kind", lambda run: f"{run.method.label}{'*' if run.folder in similar else ''}"


def norm_rows(found: Sequence[Directions]) -> list[dict[str, Any]]:
    """One row a run: lengths and cosine, with position 0 and document starts apart."""
    return [{**_run_columns(one, run), **one.norms[run.folder].to_row()} for one, run in _each_run(found)]


def direction_rows(found: Sequence[Directions]) -> list[dict[str, Any]]:
    """One row for each run and direction, from the first, 0, on; nothing where a number is not defined."""
    rows = []
    for one, run in _each_run(found):
        of = one.measured[run.folder]
        common, shares = _run_columns(one, run), of.variance_share
        for index in range(len(shares)):
            row = {**common, "direction": index, "variance_share": float(shares[index])}
            for name in ("correlation", "explained_variance", "kl"):
                row |= interval_columns(name, getattr(of, name).of(index))
            rows.append(row)
    return rows


def downstream_rows(found: Sequence[Directions]) -> list[dict[str, Any]]:
    """One row for each run and later residual stream."""
    rows = []
    for one, run in _each_run(found):
        for later in run.downstream_mse:
            row = {**_run_columns(one, run), "later_site": later}
            for column, numbers in (("mse", run.downstream_mse), ("cosine", run.downstream_cosine)):
                low, high = run.intervals.get(f"downstream_{column}.{later}", (None, None))
                row |= {column: numbers.get(later), f"{column}.low": low, f"{column}.high": high}
            rows.append(row)
    return rows


def use_rows(found: Sequence[Directions]) -> list[dict[str, Any]]:
    """One row a run: how its reconstruction of directions follows their use."""
    rows = []
    for one, run in _each_run(found):
        if (of := one.follows.get(run.folder)) is not None:
            row = {**_run_columns(one, run), "directions": of.directions}
            rows.append(
                row | interval_columns("rank", of.rank) | interval_columns("rank_given_variance", of.given_variance)
            )
    return rows


def contrast_rows(found: Sequence[Directions]) -> list[dict[str, Any]]:
    """One row for each pair of methods, of their runs at similar CE increase: means over seeds."""
    return [
        {
            **columns_of(one.setting),
            "kind": each.method.key,
            "reference": each.reference.key,
            "seeds": each.rank.seeds,
            "seeds_vary": what_varies(each.runs) or None,
            **interval_columns("rank", each.rank),
            **interval_columns("rank_given_variance", each.given_variance),
            **interval_columns("dropped", each.dropped),
            **interval_columns("dropped_given_variance", each.dropped_given_variance),
        }
        for one in found
        for each in one.contrasts
    ]


def _each_run(found: Sequence[Directions]) -> Iterator[tuple[Directions, RunSummary]]:
    return ((one, run) for one in found for run in one.runs)


def _run_columns(one: Directions, run: RunSummary) -> dict[str, Any]:
    similar = any(run in runs for runs in one.by_seed.values())
    measured = {"at_similar_ce": similar, "ce_increase": run.ce_increase, "l0": run.l0, "run": run.folder}
    return run.known({**columns_of(one.setting), **columns_of_run(run), **measured})


def claim_rows(found: Sequence[Directions]) -> list[dict[str, Any]]:
    """One row for each claim of each set."""
    names = ("claim", "published", "ours", "verdict")
    return [
        {**columns_of(one.setting), **{name: getattr(claim, name) for name in names}}
        for one in found
        for claim in one.claims
    ]
