"""Pareto curves as figures, as tables on a terminal, and as a page."""

from collections.abc import Container, Iterable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from endwise.analysis.pareto import (
    AXES,
    HELDOUT_TEXT,
    Pareto,
    band,
    front,
    has_several_rates,
    point_rows,
    rate_of_most,
    ratio_rows,
)
from endwise.analysis.ratios import MEASURES, NAMES, percent
from endwise.analysis.run_summary import KINDS, LABELS, RunSummary, remarks_of
from endwise.files import write_atomic
from endwise.reading import expanded
from endwise.report.charts import Axis, Band, Chart, Mark, Panel, Series
from endwise.report.interactive import div
from endwise.report.printed import save
from endwise.report.sets import counted, models_of, remark_list, show_remarks, title_of
from endwise.report.shell import Wide, escape, page, table
from endwise.tabular import write_table
from endwise.terminal import Grid, show

WAY_OVER_SEEDS = "Student's t"
OTHER_SEEDS = "other seeds"
"""What the runs are called that lie beside the curve of the first seed."""
AXIS = {
    "l0": Axis("L0: features per token", log=True),
    "alive": Axis("alive features", log=True),
    "ce_increase": Axis("CE increase, nats per token", from_zero=True),
    "kl": Axis("KL(original ‖ spliced), nats per token", from_zero=True),
}


def described(run: RunSummary) -> str:
    """What a run is and what it measured, line by line."""
    return "\n".join(
        [
            f"{LABELS[run.kind]}, λ {run.coefficient:g}, seed {run.seed}",
            run.site,
            f"{run.tokens:,} training tokens, {run.d_sae:,} features",
            *([] if run.learning_rate is None else [f"learning rate {run.learning_rate:g}"]),
            f"L0 {run.l0:.1f}, {run.alive:,} alive",
            f"CE increase {run.ce_increase:+.3f}, KL {run.kl:.3f}",
            run.folder,
        ]
    )


def mark(run: RunSummary, x: str, y: str, *, front: bool = False) -> Mark:
    """A run as a point of a figure."""
    return Mark(value(run, x), value(run, y), described(run), run.intervals.get(x), run.intervals.get(y), front)


def value(run: RunSummary, metric: str) -> float:
    """A run's number by its name in `evaluation.json`."""
    group, _, form = metric.partition(".")
    return float(run.explained_variances[form]) if group == "explained_variance" else float(getattr(run, metric))


def pareto_chart(runs: Sequence[RunSummary], site: str, name: str) -> Chart:
    """Figures 1, 4 and 5: CE increase against L0 and against alive features, KL against L0."""
    panels = [
        Panel("", AXIS[x], AXIS[y], tuple(each for kind in KINDS for each in _series(runs, kind, x, y)))
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


def _series(runs: Sequence[RunSummary], kind: str, x: str, y: str) -> Iterable[Series]:
    """A curve; where the kind was trained at several learning rates, that of most of its runs, and the others as dots,
    or a curve for each rate if none has most.
    """
    own = sorted((run for run in runs if run.kind == kind), key=lambda run: value(run, x))
    best = front(runs, x, y)
    if not has_several_rates(own):
        yield from _curve(own, kind, x, y, best, "", 0)
        return
    most = rate_of_most(own)
    rates = sorted({run.learning_rate or 0.0 for run in own}) if most is None else [most]
    for number, rate in enumerate(rates):
        of_rate = [run for run in own if (run.learning_rate or 0.0) == rate]
        yield from _curve(of_rate, kind, x, y, best, f"learning rate {rate:g}", number)
    others = [run for run in own if (run.learning_rate or 0.0) not in rates]
    if others:
        marks = tuple(mark(run, x, y, front=run.folder in best) for run in others)
        yield Series(kind, marks, "other learning rates", joined=False, rank=1)


def _curve(
    own: Sequence[RunSummary], kind: str, x: str, y: str, best: Container[str], label: str, rank: int
) -> Iterable[Series]:
    """With three seeds or more the curve of their means, with its band, and all runs as dots; otherwise the first
    seed's curve with its band, and the others as dots.
    """
    if not own:
        return
    seeds = sorted({run.seed for run in own})
    around = band(own, x, y)
    drawn = None if around is None else Band(_listed(around.x), _listed(around.low), _listed(around.high), around.over)
    marks = {seed: [mark(run, x, y, front=run.folder in best) for run in own if run.seed == seed] for seed in seeds}
    if around is not None and around.over != HELDOUT_TEXT:
        middle = tuple(Mark(*pair) for pair in zip(_listed(around.x), _listed(around.middle), strict=True))
        yield Series(kind, middle, label, band=drawn, marked=False, rank=rank)
        yield Series(kind, tuple(each for group in marks.values() for each in group), label, joined=False, rank=rank)
        return
    yield Series(kind, tuple(marks[seeds[0]]), label, band=drawn, rank=rank)
    if others := [each for seed in seeds[1:] for each in marks[seed]]:
        told = f"{label}, {OTHER_SEEDS}" if label else OTHER_SEEDS
        yield Series(kind, tuple(others), told, joined=False, rank=max(rank, 1))


def _listed(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(each) for each in values)


def print_pareto(found: Sequence[Pareto], console: Console | None = None) -> None:
    """The runs and the ratios of every set."""
    console = console or Console()
    for one in found:
        show(_points(one), console)
        show_remarks(remarks_of(one.runs), console)
        if not one.is_compared:
            show("Without local SAEs and others of this setting there is nothing to compare.", console)
            continue
        show(_ratios(one), console)
        for sentence in (*one.remarks, *one.summary.verdicts):
            show(f"• {sentence}", console)


def _points(one: Pareto) -> Grid:
    rates = any(has_several_rates([run for run in one.runs if run.kind == kind]) for kind in KINDS)
    fronts = {x: front(one.runs, x, "ce_increase") for x in ("l0", "alive")}
    rows = []
    for run in one.runs:
        ends = run.intervals.get("ce_increase")
        rows.append(
            [
                LABELS[run.kind],
                f"{run.coefficient:g}",
                str(run.seed),
                *[f"{run.learning_rate or 0:g}"] * rates,
                f"{run.l0:.1f}",
                f"{run.alive:,}",
                f"{run.ce_increase:+.3f}" + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else ""),
                f"{run.kl:.3f}",
                _FRONTS[run.folder in fronts["l0"], run.folder in fronts["alive"]],
            ]
        )
    headings = ("kind", "λ", "seed", *["rate"] * rates, "L0", "alive", "CE increase [95 %]", "KL", "front")
    return Grid(headings, rows, title_of(one.setting), words=("front",))


_FRONTS = {(True, True): "both", (True, False): "L0", (False, True): "alive", (False, False): ""}
"""Whether a run lies on the front of CE increase over L0, and on that over alive features."""


def _ratios(one: Pareto) -> Grid:
    kinds = [kind for kind in KINDS[1:] if any(run.kind == kind for run in one.runs)]
    rows = []
    for measure in MEASURES:
        cells = [one.ratios[measure.key, kind] for kind in kinds]
        words = [percent(ratio) if ratio.at_ends else f"– ({ratio.reason})" for ratio in cells]
        rows.append([f"{NAMES[measure.of]} at equal {NAMES[measure.at]}", *words])
    return Grid(("", *(LABELS[kind] for kind in kinds)), rows, "relative to local [95 %]")


def write_pareto(found: Sequence[Pareto], out: Path) -> Path:
    """`points` and `ratios` as CSV and parquet, `pareto-<n>.pdf` and `.png` for every set, and `pareto.html`, the page.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    out = expanded(out)
    write_table(point_rows(found), out / "points")
    write_table(ratio_rows(found), out / "ratios")
    sections = []
    for number, one in enumerate(found, 1):
        chart = pareto_chart(one.runs, one.setting.site, f"pareto-{number}")
        save(chart, out)
        sections.append(_section(one, chart))
    runs = sum(len(one.runs) for one in found)
    path = out / "pareto.html"
    lead = f"{counted(runs, len(found))}; only runs of one set are compared."
    content = page(
        title="Pareto curves",
        eyebrow=models_of(one.setting for one in found),
        lead=lead,
        body="\n".join(sections),
        interactive=True,
    )
    write_atomic(path, content.encode())
    return path


def _section(one: Pareto, chart: Chart) -> str:
    head = f'<h2>{escape(one.setting.site)}</h2><p class="lead">{escape(one.setting)}.</p>' + remark_list(one.runs)
    if not one.is_compared:
        return f"<section>{head}{div(chart)}</section>"
    sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in (*one.remarks, *one.summary.verdicts))
    table_of_ratios = ratio_table(ratio_rows([one]))
    return f'<section>{head}<ul class="verdicts">{sentences}</ul>{div(chart)}{table_of_ratios}</section>'


def ratio_table(rows: Iterable[dict[str, object]]) -> str:
    """Of `ratio_rows`: the figure with its interval, or why there is none; both ends of the range; the intervals over
    text and over seeds alone.
    """
    cells = []
    for row in rows:
        ratio, reason = row["ratio"], row["reason"]
        whole, text, seeds, at_ends = (
            _ends(row[f"{side}low"], row[f"{side}high"]) for side in ("", "text.", "seeds.", "ratio_at_ends.")
        )
        measure = next(each for each in MEASURES if each.key == row["measure"])
        what = f"{NAMES[measure.of]} at equal {NAMES[measure.at]}"
        said = f"{100 * ratio:.0f} %" if isinstance(ratio, float) else "–"
        numbers = (said, whole, at_ends, text, seeds, row["seeds"]) if not reason else (said, Wide(str(reason), 5))
        cells.append((what, str(row["site"]), LABELS[str(row["kind"])], *numbers))
    headings = (
        *("relative to local", "site", "kind", "ratio", "95 %", "at both ends"),
        *("95 % over text", "95 % over seeds", "seeds"),
    )
    return table(headings, cells, text=(1, 2))


def _ends(low: object, high: object) -> str:
    return f"{100 * low:.0f} to {100 * high:.0f}" if isinstance(low, float) and isinstance(high, float) else "–"
