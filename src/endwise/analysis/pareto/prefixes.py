"""Prefixes, the first features of a dictionary spliced alone: a curve for each run that has such prefixes."""

from collections.abc import Iterable, Sequence
from typing import Any

from endwise.analysis.comparable import methods_of
from endwise.config.method import Method
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
            rows.append(row)
    return rows


def prefix_chart(runs: Sequence[RunSummary], site: str, name: str) -> Chart:
    """CE increase against each prefix's L0, and against its number of features; a line a run. No run has prefixes: a
    chart that shows nothing.
    """
    nested = [run for run in runs if run.prefixes]
    of_method = [(method, [run for run in nested if run.method == method]) for method in methods_of(nested)]
    panels = [
        Panel("", axis, CE_INCREASE, tuple(_line(x, m, run, i) for m, own in of_method for i, run in enumerate(own)))
        for x, axis in AXES
    ]
    caption = (
        f"Each line is one dictionary at {site}, spliced in by its first features alone, the others left out: from its "
        "shortest prefix to the whole of it, which is the last mark. Lower and further left is better. Bars: 95 % over "
        "held-out text."
    )
    return Chart(name, f"Prefixes at {site}", caption, tuple(panels))


def _line(x: str, method: Method, run: RunSummary, rank: int) -> Series:
    marks = []
    for row in prefix_rows([run]):
        length, l0, ce_increase = row["features"], row["l0"], row["ce_increase"]
        hover = f"{method.label}, {run.knob}, seed {run.seed}\nthe first {length:,} of {run.d_sae:,} features\n"
        hover += f"L0 {l0:.1f}, CE increase {ce_increase:+.3f}\n{run.folder}"
        ends = {key: (row[f"{key}.low"], row[f"{key}.high"]) for key in NUMBERS if f"{key}.low" in row}
        across = (length, None) if x == "length" else (l0, ends.get("l0"))
        marks.append(Mark(float(across[0]), ce_increase, hover, across[1], ends.get("ce_increase")))
    return Series(method, tuple(marks), f"{run.knob}, seed {run.seed}", rank=rank)
