"""The report of a finetuning: one HTML file that needs nothing else."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from endwise.common.html import PARTS, bullets, part, table
from endwise.common.text import model_title
from endwise.config.method import Method
from endwise.figures.charts import Axis, Chart, Mark, Panel, Series
from endwise.figures.interactive import div
from endwise.figures.page import Section, page
from endwise.finetuning.result import QUANTILES, Finetuned
from endwise.finetuning.texts import BeforeAfter

BINS = 40
"""Bins of the histogram of cosines."""
COURSE = (("CE increase", "ce_increase", "nats per token"), ("KL", "kl", "nats per token"), ("L0", "l0", "features"))
"""Panels of the course on held-out text: title, column, unit."""


def report_html(of: Finetuned, metrics: Sequence[Mapping[str, Any]]) -> str:
    """Draw the page. Everything that comes from a file is escaped.

    Args:
        metrics: the lines of the run's metrics.jsonl.
    """
    sections: list[Section] = [
        ("On text like that it was tuned on", [_table(of.text)], ""),
        *((f"On {name}", [_table(each)], "") for name, each in of.others.items()),
        ("The course", _drawn(_course(of, metrics)), ""),
        ("How far features moved", [*_drawn(_moved(of)), _quantiles(of)], ""),
        ("The SAE", [bullets("verdicts", _facts(of))], ""),
    ]
    return page(
        title="An SAE, tuned on what the model predicts",
        eyebrow=model_title(of.config.model.name),
        place=of.config.place,
        lead=f"{Path(*Path(of.source.name).parts[-2:])}, {of.source.format_name}: tuned on "
        f"{of.config.training.tokens:,} tokens, and measured before and after on the same held-out text.",
        parts=[_tiles(of.text), bullets("remarks", of.remarks, "note")],
        sections=sections,
    )


def _tiles(text: BeforeAfter) -> Markup:
    left, l0 = text.ce_increase, f"{text.before['l0']:.1f} → {text.after['l0']:.1f}"
    ends = f"95 % [{left.low:.0%}, {left.high:.0%}] over text"
    shown = [(f"{left.estimate:.0%}", ends, "of the CE increase is left", None)]
    return part(PARTS, "tiles", [*shown, (f"{text.l0:.1%}", l0, "of the L0 that it had", None)])


def _table(text: BeforeAfter) -> Markup:
    return table(("", "before", "after"), text.rows())


def _drawn(chart: Chart) -> list[Markup]:
    return [div(chart)] if any(panel.series for panel in chart.panels) else []


def _quantiles(of: Finetuned) -> Markup:
    rows = [
        (f"{name}, cosine", *(f"{value:.3f}" for value in of.moved.quantiles(cosines).values()))
        for name, cosines in (("decoder", of.moved.decoder), ("encoder", of.moved.encoder))
    ]
    return table(("", *(f"{share:.0%}" for share in QUANTILES)), rows)


def _course(of: Finetuned, metrics: Sequence[Mapping[str, Any]]) -> Chart:
    method, lines = Method.of(of.config), [line for line in metrics if "heldout" in line]
    panels = []
    for title, name, unit in COURSE:
        marks = (
            Mark(0.0, of.text.before[name]),
            *(Mark(float(line["tokens"]), line["heldout"][name]) for line in lines),
        )
        axes = Axis("training tokens"), Axis(f"{title}, {unit}")
        panels.append(Panel(title, *axes, (Series(method, marks),) if lines else ()))
    tokens = of.config.evaluation.during_training_tokens
    caption = (
        f"Short evaluations in training, on the first {tokens:,} held-out tokens; the first mark is the original "
        f"SAE, on {of.text.before.tokens:,}. One run."
    )
    return Chart("course", "The course of tuning", caption, tuple(panels))


def _moved(of: Finetuned) -> Chart:
    method = Method.of(of.config)
    panels = tuple(
        Panel(title, Axis("cosine with its start"), Axis("features", from_zero=True), tuple(_bars(method, cosines, of)))
        for title, cosines in (("Decoder", of.moved.decoder), ("Encoder", of.moved.encoder))
    )
    caption = f"Cosine of each feature's direction with its start, of the {of.moved.fired.sum():,} that fired."
    return Chart("moved", "How far features moved", caption, panels)


def _bars(method: Method, cosines: np.ndarray, of: Finetuned) -> Iterator[Series]:
    known = cosines[of.moved.fired & np.isfinite(cosines)]
    if len(known):
        counts, edges = np.histogram(known, BINS, (min(float(known.min()), 0.9), 1.0 + 1e-6))
        centres = (edges[:-1] + edges[1:]) / 2
        yield Series(
            method, tuple(Mark(float(x), float(y)) for x, y in zip(centres, counts, strict=True)), marked=False
        )


def _facts(of: Finetuned) -> Iterator[str]:
    yield f"The original: {of.source.format_name} from {of.source.name}, read as {of.source.rule}."
    yield f"In SAELens's layout: {of.folder / 'sae'}"
    yield f"In its own format: {of.given_back}" if of.given_back else str(of.refused)
    training = of.config.training
    yield (
        f"Objective {of.config.objective_name}, learning rate {training.learning_rate:g} falling linearly to 0, "
        f"{training.batch} sequences of {of.config.data.context} tokens a step."
    )
