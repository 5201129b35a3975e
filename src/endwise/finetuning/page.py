"""The report of a finetuning: one HTML file that needs nothing else."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from endwise.common.text import model_title
from endwise.config.method import Method
from endwise.figures.charts import Axis, Chart, Mark, Panel, Series
from endwise.figures.interactive import div
from endwise.figures.page import page
from endwise.finetuning.moved import QUANTILES
from endwise.finetuning.result import Finetuned
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
    course, moved = (
        div(chart) if any(panel.series for panel in chart.panels) else ""
        for chart in (_course(of, metrics), _moved(of))
    )
    return page(
        "finetuning/page.html.j2",
        title="An SAE, tuned on what the model predicts",
        lead=f"{Path(*Path(of.source.name).parts[-2:])}, {of.source.format_name}: tuned on "
        f"{of.config.training.tokens:,} tokens, and measured before and after on the same held-out text.",
        of=of,
        model=model_title(of.config.model.name),
        tiles=_tiles(of.text),
        texts={"text like that it was tuned on": of.text, **of.others},
        course=course,
        moved=moved,
        quantiles=list(_quantiles(of)),
        facts=list(_facts(of)),
    )


def _tiles(text: BeforeAfter) -> tuple[tuple[str, str, str], ...]:
    """Number, its range, and what it is."""
    ratio = text.ce_increase
    return (
        (f"{ratio.estimate:.0%}", f"95 % [{ratio.low:.0%}, {ratio.high:.0%}] over text", "of the CE increase is left"),
        (f"{text.l0:.1%}", f"{text.before['l0']:.1f} → {text.after['l0']:.1f}", "of the L0 that it had"),
    )


def _quantiles(of: Finetuned) -> Iterator[tuple[str, ...]]:
    """Headings, then the rows."""
    yield "", *(f"{share:.0%}" for share in QUANTILES)
    for name, cosines in (("decoder", of.moved.decoder), ("encoder", of.moved.encoder)):
        yield f"{name}, cosine", *(f"{value:.3f}" for value in of.moved.quantiles(cosines).values())


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
        f"Short evaluations in training, on the first {tokens:,} held-out tokens; the first mark is the SAE as it "
        f"came, on {of.text.before.tokens:,}. One run."
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
    yield f"It came as {of.source.format_name} from {of.source.name}, read as {of.source.rule}."
    yield f"In SAELens's layout: {of.folder / 'sae'}"
    yield f"Given back as it came: {of.given_back}" if of.given_back else str(of.refused)
    training = of.config.training
    yield (
        f"Objective {of.config.objective_name}, learning rate {training.learning_rate:g} falling on a line to 0, "
        f"{training.batch} sequences of {of.config.data.context} tokens a step."
    )
