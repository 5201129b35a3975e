"""Lengths, directions and later layers of runs: figures, tables on a terminal, and a page."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from endwise.analysis import directions as analysis
from endwise.analysis.directions import Directions
from endwise.analysis.over_seeds import OverSeeds, rests_on
from endwise.analysis.run_summary import LABELS, RunSummary, later_mse, layer_label, remarks_of
from endwise.files import write_atomic
from endwise.reading import expanded
from endwise.report import reconstruction
from endwise.report.charts import Axis, Chart, Mark, Panel, Series
from endwise.report.claims import claim_list
from endwise.report.interactive import div
from endwise.report.printed import save
from endwise.report.sets import counted, models_of, remark_list, show_claims, show_remarks, title_of
from endwise.report.shell import escape, page, table
from endwise.statistics import Interval
from endwise.tabular import write_table
from endwise.terminal import Grid, show

CORRELATION = Axis("correlation of ⟨a, v⟩ and ⟨â, v⟩")
UNEXPLAINED = Axis("unexplained share of the variance along v", log=True)
DROPPED = Axis("local's correlation − the kind's")
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
    return f"Of each kind one run, of seed {found.similar[0].seed}."


def _by_direction(found: Directions, run: RunSummary, what: str) -> Series:
    of = found.measured[run.folder]
    values = of.correlation.estimate if what == "correlation" else 1 - of.explained_variance.estimate
    marks = [
        Mark(float(index + 1), float(y), _told(found, run, index)) for index, y in enumerate(values) if np.isfinite(y)
    ]
    return Series(run.kind, tuple(marks), joined=False)


def used_directions(found: Directions, name: str) -> Chart:
    """Figures 22 and 23: what is reconstructed, and what is dropped beyond local, over what the model uses."""
    by_kind = {run.kind: run for run in found.similar}
    panels = [Panel("", KL, CORRELATION, tuple(_by_use(found, run) for run in found.similar))]
    if "local" in by_kind:
        others = [run for kind, run in by_kind.items() if kind != "local"]
        for x in (KL, KL_PER_VARIANCE):
            series = tuple(_by_use(found, run, by_kind["local"], x is KL_PER_VARIANCE) for run in others)
            panels.append(Panel("", x, DROPPED, series))
    caption = (
        f"One dot a principal direction of the activations at {found.setting.site}. Across: the KL when every token's "
        "component along it is replaced by another token's, as it is and by the direction's variance. Up: how well an "
        f"SAE reconstructs that component, and how much less well than local. {_seed(found)}"
    )
    shown = tuple(panel for panel in panels if any(series.marks for series in panel.series))
    return Chart(name, "What is reconstructed, and what the model uses", caption, shown)


def _by_use(found: Directions, run: RunSummary, local: RunSummary | None = None, by_variance: bool = False) -> Series:
    """A run's correlations, or by how much they are below local's."""
    of = found.measured[run.folder]
    across = of.kl.estimate / np.maximum(of.variance, np.finfo(float).tiny) if by_variance else of.kl.estimate
    up = of.correlation.estimate
    if local is not None:
        up = found.measured[local.folder].correlation.estimate - up
    marks = tuple(
        Mark(float(x), float(y), _told(found, run, index))
        for index, (x, y) in enumerate(zip(across, up, strict=True))
        if np.isfinite(x) and np.isfinite(y)
    )
    return Series(run.kind, marks, joined=False)


def _told(found: Directions, run: RunSummary, index: int) -> str:
    of = found.measured[run.folder]
    kl = of.kl
    used = (
        f"\nKL {kl.estimate[index]:.4g} [{kl.low[index]:.3g}, {kl.high[index]:.3g}]"
        if np.isfinite(kl.estimate[index])
        else ""
    )
    return (
        f"{LABELS[run.kind]}, λ {run.coefficient:g}, direction {index + 1}\n"
        f"{of.variance_share[index]:.3%} of the variance\n"
        f"correlation {of.correlation.estimate[index]:.3f}, explained {of.explained_variance.estimate[index]:.3f}{used}"
    )


def charts_of(found: Directions, number: int) -> list[Chart]:
    """Every figure of a set; those of which nothing was measured are left out."""
    site, similar = found.setting.site, found.similar
    drawn = [
        reconstruction.norms(found.norms, similar, site, f"norms-{number}"),
        reconstruction.cosines(found.norms, similar, site, f"cosines-{number}"),
        reconstructed_directions(found, f"directions-{number}"),
        used_directions(found, f"use-{number}"),
        reconstruction.downstream({site: similar}, f"downstream-{number}"),
        reconstruction.downstream_of_all(found.runs, site, f"downstream-all-{number}"),
        reconstruction.explained_variance(found.runs, site, f"explained-variance-{number}"),
    ]
    return [chart for chart in drawn if any(panel.series for panel in chart.panels)]


def print_directions(found: Sequence[Directions], console: Console | None = None) -> None:
    """The runs of every set, and what shows of the paper's claims."""
    console = console or Console()
    for one in found:
        show(_runs(one), console)
        show_remarks(remarks_of(one.runs), console)
        show_claims(one.claims, console)


def _runs(one: Directions) -> Grid:
    rows = []
    for run in one.runs:
        norms, of, mse = one.norms[run.folder], one.follows.get(run.folder), later_mse(run)
        rows.append(
            (
                LABELS[run.kind],
                f"{run.coefficient:g}",
                str(run.seed),
                f"{run.ce_increase:+.3f}",
                f"{norms.ratio.estimate:.3f}",
                f"{norms.cosine.estimate:.3f}",
                "–" if of is None else f"{of.rank.estimate:.2f}",
                "–" if mse is None else f"{mse:.3g}",
            )
        )
    headings = ("kind", "λ", "seed", "CE", "‖â‖/‖a‖", "cosine", "use rank", "later MSE")
    return Grid(headings, rows, title_of(one.setting))


def write_directions(found: Sequence[Directions], out: Path) -> Path:
    """Tables (`norms`, `directions`, `downstream`, `use`, `contrasts`, `claims`) as CSV and parquet, figures as PDF
    and PNG, and `directions.html`, the page.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    out = expanded(out)
    tables = {
        "norms": analysis.norm_rows(found),
        "directions": analysis.direction_rows(found),
        "downstream": analysis.downstream_rows(found),
        "use": analysis.use_rows(found),
        "contrasts": analysis.contrast_rows(found),
        "claims": analysis.claim_rows(found),
    }
    for name, rows in tables.items():
        if rows:
            write_table(rows, out / name)
    sections = []
    for number, one in enumerate(found, 1):
        charts = charts_of(one, number)
        for chart in charts:
            save(chart, out)
        sections.append(_section(one, charts))
    path = out / "directions.html"
    runs = sum(len(one.runs) for one in found)
    lead = f"{counted(runs, len(found))}, measured on held-out text; only runs of one set are compared."
    title = "Lengths, directions and later layers"
    content = page(
        title=title,
        eyebrow=models_of(one.setting for one in found),
        lead=lead,
        body="\n".join(sections),
        interactive=True,
    )
    write_atomic(path, content.encode())
    return path


def _section(one: Directions, charts: Sequence[Chart]) -> str:
    head = f'<h2>{escape(one.setting.site)}</h2><p class="lead">{escape(one.setting)}.</p>' + remark_list(one.runs)
    figures = "\n".join(map(div, charts))
    parts = (claim_list(one.claims), _norm_table(one), _use_table(one), _later_table(one), figures)
    return f"<section>{head}{''.join(parts)}</section>"


def _norm_table(one: Directions) -> str:
    """Table 5."""
    rows = []
    for run in one.runs:
        norms = one.norms[run.folder]
        lengths = (norms.ratio, norms.ratio_at_0, norms.ratio_at_starts, norms.cosine)
        rows.append((*_named(one, run), f"{run.ce_increase:+.3f}", *map(_interval, lengths)))
    headings = (
        "kind",
        "λ",
        "seed",
        "CE increase",
        "‖â‖/‖a‖",
        "at position 0",
        "at document starts",
        "cosine of a and â",
    )
    note = (
        "One row a run, of one seed; 95 % intervals over held-out text. The first and the last of the measured columns "
        "leave out position 0 and document starts. * at similar CE, of its seed."
    )
    return f'<h3>Lengths</h3>{table(headings, rows)}<p class="note">{note}</p>'


def _use_table(one: Directions) -> str:
    rows = [
        (*_named(one, run), of.directions, _interval(of.rank), _interval(of.given_variance))
        for run in one.runs
        if (of := one.follows.get(run.folder)) is not None
    ]
    pairs = [
        (
            f"{LABELS[each.kind]} − {LABELS[each.reference]}",
            rests_on(each.runs),
            *map(_interval, (each.rank, each.given_variance, each.dropped, each.dropped_given_variance)),
        )
        for each in one.contrasts
    ]
    if not rows:
        return ""
    headings = ("kind", "λ", "seed", "directions", "rank correlation with use", "given variance")
    differences = (
        "at similar CE, seed by seed",
        "seeds",
        "rank correlation with use",
        "given variance",
        "use of what it drops",
        "given variance",
    )
    note = (
        "Rank correlation over directions of how well a direction is reconstructed and the KL when it is "
        "resample-ablated. 95 % intervals: of a run, over directions; of two kinds, over directions and seeds where "
        "there are three seeds or more, otherwise over directions alone. The use of what it drops is the rank "
        "correlation of that KL with how much worse the first kind reconstructs than the second: below 0, it drops "
        "what the model uses less. Given variance: the same with the directions' variance taken out (partial rank "
        "correlation)."
    )
    both = table(headings, rows) + (table(differences, pairs, text=(1,)) if pairs else "")
    return f'<h3>Directions and their use</h3>{both}<p class="note">{note}</p>'


def _later_table(one: Directions) -> str:
    later = list(dict.fromkeys(site for run in one.similar for site in run.downstream_mse))
    rows = [
        (LABELS[run.kind], f"{run.ce_increase:+.3f}", *(_later_cell(run, site) for site in later))
        for run in one.similar
    ]
    if not later:
        return ""
    headings = ("kind", "CE increase", *map(layer_label, later))
    seed = f"seed {one.similar[0].seed}"
    return f"<h3>Later layers at similar CE, {seed}: mean squared error / cosine</h3>{table(headings, rows)}"


def _later_cell(run: RunSummary, site: str) -> str:
    if site not in run.downstream_mse:
        return "–"
    cosine = run.downstream_cosine.get(site)
    return f"{run.downstream_mse[site]:.3g}" + ("" if cosine is None else f" / {cosine:.3f}")


def _named(one: Directions, run: RunSummary) -> tuple[str, str, str]:
    marked = "*" if any(run in runs for runs in one.by_seed.values()) else ""
    return f"{LABELS[run.kind]}{marked}", f"{run.coefficient:g}", str(run.seed)


def _interval(interval: Interval | OverSeeds | None) -> str:
    if isinstance(interval, OverSeeds):
        return interval.told()
    return "–" if interval is None else f"{interval.estimate:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
