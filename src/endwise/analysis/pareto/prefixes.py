"""Prefixes, the first features of a dictionary spliced alone: a curve for each run that has such prefixes."""

from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean
from typing import Any

from endwise.analysis.comparable import methods_of
from endwise.common.text import minus
from endwise.config.method import Knob, Method
from endwise.evaluation.summary import RunSummary
from endwise.figures.charts import Axis, Chart, Mark, Panel, Series

NUMBERS = {"l0": "prefix_l0", "ce_increase": "prefix_ce_increase"}
"""Names of a prefix's numbers in `evaluation.json`, by those of the whole dictionary's."""
CE_INCREASE = Axis("CE increase, nats per token", from_zero=True)
AXES = (
    ("l0", Axis("L0 of the prefix: features per token", log=True)),
    ("length", Axis("features of the prefix", log=True)),
)
"""Names and axes of x, panel by panel."""
SEVERAL = "Of several seeds the line is that of their means, and the marks are theirs. "


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
            rows.append(run.told(row))
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
        for x, axis in AXES
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
