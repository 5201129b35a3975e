"""The importance of features as figures, as a table on a terminal, and as a page."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from endwise.analysis.claims import claim_lines, claim_list
from endwise.analysis.importance.concentration import CARRIED, cumulative_share
from endwise.analysis.importance.study import (
    ESTIMATES,
    ImportanceStudy,
    ImportantRun,
    Order,
    ablation_rows,
    claim_rows,
    curve_of,
    faithfulness_rows,
    feature_rows,
    run_rows,
    share_intervals,
)
from endwise.analysis.over_seeds import bracketed
from endwise.analysis.pages import print_sets, write_page
from endwise.analysis.sets import KNOB, Table, counted, run_table, title_of
from endwise.common.html import table
from endwise.common.statistics import Interval
from endwise.common.terminal import Grid
from endwise.common.text import minus
from endwise.figures.charts import Axis, Band, Chart, Mark, Panel, Series

MOST_MARKS = 1500
"""Features of a run in a scatter plot."""
_CARRIED = f"{100 * CARRIED:.0f} %"
MOST_POINTS = 160
"""Points of a curve over ranks."""


def importance_charts(study: ImportanceStudy, number: int) -> list[Chart]:
    """Every figure of a study; names end in its number."""
    return [
        faithfulness_chart(study, f"faithfulness-{number}"),
        concentration_chart(study, f"concentration-{number}"),
        cumulative_chart(study, f"cumulative-{number}"),
        density_chart(study, f"density-{number}"),
        agreement_chart(study, f"agreement-{number}"),
    ]


def faithfulness_chart(study: ImportanceStudy, name: str) -> Chart:
    """Figure 24 as a curve: the share of the model's behaviour that the first n features carry."""
    x, y = Axis("features kept", log=True), Axis("share of behaviour", from_zero=True)
    panels = tuple(
        Panel(title, x, y, tuple(_faithfulness(run, order) for run in study.similar))
        for order, title in _ORDER_TITLES.items()
    )
    caption = (
        f"{_where(study)} Only n features are kept, the others zeroed: those most important by the second-order "
        "estimate, those of the largest first-order estimate, or as many drawn at random. The share is 1 with the "
        "model's own activation and 0 with the site at its mean. Features are ranked on one half of the held-out "
        "sequences and measured on the other."
    )
    return Chart(name, "What the most important features carry", caption, panels)


_ORDER_TITLES = {"second": "by importance", "first": "by first-order estimate", "random": "at random"}


def _faithfulness(run: ImportantRun, order: str) -> Series:
    kept, ce = curve_of(run.measured.faithfulness, order)
    ends = share_intervals(run.measured.faithfulness, ce)
    marks = tuple(
        Mark(float(n), each.estimate, f"{run.summary.title}\n{n:,} features: {bracketed(each)}")
        for n, each in zip(kept.tolist(), ends, strict=True)
        if n > 0
    )
    band = Band(tuple(map(float, kept)), tuple(e.low for e in ends), tuple(e.high for e in ends), "held-out text")
    return Series(run.summary.method, marks, band=band)


def concentration_chart(study: ImportanceStudy, name: str) -> Chart:
    """All runs: on how few features each rests, against how much of the model it keeps."""

    def panel(label: str, count: Callable[[ImportantRun], Interval]) -> Panel:
        series = []
        for method in dict.fromkeys(run.summary.method for run in study.runs):
            own = sorted((r for r in study.runs if r.summary.method == method), key=lambda r: r.summary.ce_increase)
            marks = tuple(_run_mark(run, count(run)) for run in own if count(run).estimate > 0)
            seeds = len({run.summary.seeds for run in own})
            series.append(Series(method, marks, joined=seeds == 1))
        return Panel("", Axis("CE increase, nats per token", from_zero=True), Axis(label, log=True), tuple(series))

    panels = (
        panel(f"features that carry {_CARRIED}", lambda run: run.carrying),
        panel("features with half of the importance", lambda run: Interval(run.half, run.half, run.half)),
    )
    caption = (
        f"Each mark is one SAE at {study.setting.site}. Left: the least number of features, taken by importance, that "
        f"carries {_CARRIED} of what the whole SAE carries. Right: the least number that holds half of the summed "
        "importance (second-order estimate)."
    )
    return Chart(name, "On how few features it rests", caption, panels)


def cumulative_chart(study: ImportanceStudy, name: str) -> Chart:
    """Share of the summed importance by rank."""
    series = []
    for run in study.similar:
        held = cumulative_share(run.measured.importance.ce_second)[: max(1, run.measured.importance.alive)]
        ranks = np.unique(np.geomspace(1, len(held), min(MOST_POINTS, len(held))).round().astype(int))
        marks = tuple(Mark(float(rank), float(held[rank - 1])) for rank in ranks)
        series.append(Series(run.summary.method, marks, marked=False))
    panel = Panel(
        "", Axis("features, by rank", log=True), Axis("share of summed importance", from_zero=True), tuple(series)
    )
    return Chart(name, "Importance by rank", _where(study), (panel,))


def density_chart(study: ImportanceStudy, name: str) -> Chart:
    """Importance against how often a feature fires, one panel a kind."""
    x, y = Axis("density: share of tokens", log=True), Axis("importance, nats per token", log=True)
    panels = tuple(
        Panel(run.summary.method.label, x, y, (Series(run.summary.method, _densities(run), joined=False),))
        for run in study.similar
    )
    caption = (
        f"{_where(study)} Importance: the second-order estimate of the CE's rise when the feature is zeroed. Each mark "
        f"is a feature whose estimate is above 0; of more than {MOST_MARKS:,}, as many evenly spaced by rank."
    )
    return Chart(name, "Importance and density", caption, panels)


def _densities(run: ImportantRun) -> tuple[Mark, ...]:
    found = run.measured.importance
    order = np.argsort(-found.ce_second, kind="stable")[: int((found.ce_second > 0).sum())]
    places = np.unique(np.linspace(0, len(order) - 1, min(MOST_MARKS, len(order))).astype(int)) if len(order) else []
    return tuple(
        Mark(
            float(found.firings[feature] / found.tokens),
            float(found.ce_second[feature]),
            f"feature {feature}, rank {place + 1:,}\nfires on {found.firings[feature]:,} of {found.tokens:,} tokens\n"
            + minus(
                f"CE {found.ce_second[feature]:+.2e} nats per token; to first order {found.ce[feature]:+.2e} ± "
                f"{found.ce_se[feature]:.1e}"
            ),
        )
        for place, feature in ((int(p), int(order[p])) for p in places)
    )


def agreement_chart(study: ImportanceStudy, name: str) -> Chart:
    """Both estimates against exact ablation, on a diagonal, one panel a kind."""
    panels = []
    for order in ESTIMATES:
        x = Axis(f"{order}-order estimate, nats per token", log=True)
        y = Axis("exact CE rise, nats per token", log=True)
        for run in study.similar:
            groups = _agreements(run, order)
            series = tuple(
                Series(run.summary.method, marks, label, joined=False, rank=rank)
                for rank, (label, marks) in enumerate(groups.items())
            )
            panels.append(Panel(run.summary.method.label, x, y, series, diagonal=True))
    hidden = ", ".join(
        f"{run.summary.method.label} {order} order "
        f"{len(run.measured.ablations.features) - sum(map(len, _agreements(run, order).values()))}"
        for order in ESTIMATES
        for run in study.similar
    )
    caption = (
        f"{_where(study)} Each mark is one feature of the sample, on the second half of the held-out sequences. Exact: "
        "the feature is zeroed in the spliced pass. On the dashed line the two are equal. Not drawn, because the "
        f"estimate or the rise is not above 0: {hidden}."
    )
    return Chart(name, "Estimates and exact ablation", caption, tuple(panels))


def _agreements(run: ImportantRun, order: Order) -> dict[str, tuple[Mark, ...]]:
    """List, by how they were chosen, the features of which both numbers have a logarithm."""
    found = run.measured.ablations
    estimates = getattr(found, f"{ESTIMATES[order]}_ce")
    groups: dict[str, list[Mark]] = {"at random": [], "by rank": []}
    for row in np.flatnonzero((estimates > 0) & (found.ce > 0)):
        exact, estimated = float(found.ce[row]), float(estimates[row])
        hover = minus(f"estimated {estimated:+.2e}\nexact {exact:+.2e} ± {found.ce_se[row]:.1e}")
        chosen = "by rank" if found.by_rank[row] else "at random"
        groups[chosen].append(Mark(estimated, exact, f"feature {found.features[row]}\n{hover}"))
    return {label: tuple(marks) for label, marks in groups.items()}


def _run_mark(run: ImportantRun, count: Interval) -> Mark:
    hover = f"{run.summary.title}\n{count.estimate:,.0f} features"
    ends = (count.low, count.high) if count.high > count.low else None
    return Mark(run.summary.ce_increase, count.estimate, f"{hover}\n{run.summary.folder}", y_ends=ends)


def _where(study: ImportanceStudy) -> str:
    """Say what the figures of single runs show."""
    chosen = ", ".join(
        f"{run.summary.method.label} {run.summary.knob} (CE {minus(f'{run.summary.ce_increase:+.3f}')})"
        for run in study.similar
    )
    seed = f"of seed {study.similar[0].summary.seed} whose CE increase is closest to the others'"
    return f"For each kind, the SAE {seed} at {study.setting.site}: {chosen}."


def print_importance(studies: Sequence[ImportanceStudy], console: Console | None = None) -> None:
    """One row per run, then what the measurements show."""
    print_sets(studies, console, lambda study: [_grid(study)], lambda study: claim_lines(study.claims))


def _grid(study: ImportanceStudy) -> Grid:
    headings, rows = _runs(study)
    short = [(*cells, str(rank).partition(" ")[0]) for *cells, rank in rows]  # its interval is on the page
    return Grid(headings, short, title_of(study.setting))


def _runs(study: ImportanceStudy) -> Table:
    def carrying(run: ImportantRun) -> str:
        return "–" if np.isnan(run.carrying.estimate) else bracketed(run.carrying, ",.0f")

    return run_table(
        study.runs,
        *("kind", KNOB, "seed", "CE +"),
        ("alive", lambda run: f"{run.measured.importance.alive:,}"),
        ("half in", lambda run: f"{run.half:,.0f}"),
        (f"{_CARRIED} in", carrying),
        ("Spearman", lambda run: bracketed(run.agreement("second")["spearman"], ".2f")),
    )


def write_importance(studies: Sequence[ImportanceStudy], out: Path) -> Path:
    """Tables `features`, `ablations`, `faithfulness`, `runs` and `claims` as CSV and parquet, every figure as PDF and
    PNG, and `importance.html`, the page.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    return write_page(
        studies,
        out,
        "importance",
        title="Importance of features",
        lead=f"{counted(studies)}; only runs of one set are compared.",
        tables={
            "features": feature_rows(studies),
            "ablations": ablation_rows(studies),
            "faithfulness": faithfulness_rows(studies),
            "runs": run_rows(studies),
            "claims": claim_rows(studies),
        },
        charts=importance_charts,
        parts=lambda study, _, figures: [claim_list(study.claims), *figures, table(*_runs(study), note=_NOTE)],
    )


_NOTE = (
    f"One row per run, of one seed: the interval of “{_CARRIED} in” is over held-out text, that of "
    "Spearman’s correlation with exact ablation over the ablated features. Verdicts rest on intervals that hold the "
    "seeds too."
)
