"""The study's figures as descriptions: what stands on which axis, with which intervals."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from endwise.analysis.norms import BINS, Norms
from endwise.analysis.run_summary import KINDS, LABELS, RunSummary, layer_label
from endwise.report.charts import Axis, Chart, Mark, Panel, Series
from endwise.report.pareto import AXIS, described, mark, value
from endwise.reproduction.mitigations import WAYS, CostPoint, Mitigations, Way

CE, L0 = AXIS["ce_increase"], AXIS["l0"]
TEXT = "Bars are 95 % intervals over held-out text."


def downstream(similar: Mapping[str, Sequence[RunSummary]]) -> Chart:
    """Figures 2 and 6: one panel a site, of its runs at similar CE increase."""
    panels = []
    for site, runs in similar.items():
        later = list(dict.fromkeys(name for run in runs for name in run.downstream_mse))
        series = [
            Series(
                run.kind,
                tuple(
                    Mark(
                        float(later.index(name)),
                        mse,
                        described(run),
                        y_ends=run.intervals.get(f"downstream_mse.{name}"),
                    )
                    for name, mse in run.downstream_mse.items()
                ),
            )
            for run in runs
        ]
        x = Axis("later residual stream, by the block it enters", categories=tuple(map(layer_label, later)))
        panels.append(Panel(site, x, Axis("mean squared error per dimension", log=True), tuple(series)))
    caption = f"Downstream MSE of the runs of each kind whose CE increases are closest to each other. {TEXT}"
    return Chart("downstream", "Error in the later layers, at similar CE increase", caption, tuple(panels))


def explained_variance(runs: Sequence[RunSummary], site: str) -> Chart:
    """Figure 12, at the SAE's own site: raw, and after LayerNorm without its affine part."""
    forms = {"per_token": "raw", "per_token_layernorm": "after LayerNorm"}
    panels = [
        Panel(words, L0, Axis("explained variance, per token"), _by_kind(runs, "l0", f"explained_variance.{form}"))
        for form, words in forms.items()
    ]
    caption = f"Mean over tokens of 1 − ‖â − a‖² / ‖a − mean‖² at {site}. {TEXT}"
    return Chart("explained_variance", "How much of the activation is reconstructed", caption, tuple(panels))


def norms(measured: Mapping[str, Norms], similar: Sequence[RunSummary], site: str) -> Chart:
    """Figure 10: one panel a kind."""
    panels = []
    x, y = Axis("length of the activation, ‖a‖", log=True), Axis("length of the reconstruction, ‖â‖", log=True)
    for run in similar:
        if run.folder not in measured:
            continue
        sample = measured[run.folder].sample
        later = tuple(Mark(a, b, f"position {position}") for position, a, b in sample if position and b > 0)
        first = tuple(Mark(a, b, "position 0") for position, a, b in sample if not position and b > 0)
        series = (
            Series(run.kind, later, "other positions", joined=False),
            Series(run.kind, first, "position 0", joined=False, rank=1),
        )
        panels.append(Panel(LABELS[run.kind], x, y, tuple(each for each in series if each.marks), diagonal=True))
    caption = f"Length (L2) of the reconstruction over that of the activation at {site}, one dot a held-out token."
    return Chart("norms", "How long reconstructions are", caption, tuple(panels))


def cosines(measured: Mapping[str, Norms], similar: Sequence[RunSummary], site: str) -> Chart:
    """Figure 11."""
    centres = (np.arange(BINS) + 0.5) * 2 / BINS - 1
    runs = [run for run in similar if run.folder in measured]
    counts = [np.array(measured[run.folder].histogram, dtype=float) for run in runs]
    first = max(0, min((int(np.argmax(each > 0)) for each in counts), default=0) - 1)
    series = []
    for run, each in zip(runs, counts, strict=True):
        shares = 100 * each / max(each.sum(), 1)
        bins = list(zip(centres, shares, strict=True))[first:]  # below, where no token is, there is nothing to see
        marks = [Mark(float(x), float(y), f"{LABELS[run.kind]}: {y:.1f} % about {x:.3f}") for x, y in bins]
        series.append(Series(run.kind, tuple(marks)))
    panel = Panel(site, Axis("cosine between a and â"), Axis("share of tokens, %", from_zero=True), tuple(series))
    caption = "Held-out tokens by the cosine between the activation and its reconstruction; position 0 left out."
    return Chart("cosines", "Which way reconstructions point", caption, (panel,))


def learning_rates(runs: Sequence[tuple[float, RunSummary]], site: str) -> Chart:
    """What the learning rate does, at one coefficient a kind."""
    rate = Axis("learning rate", log=True)
    axes = {"l0": Axis("L0: features per token", log=True), "ce_increase": CE, "alive": Axis("alive features")}
    panels = []
    for metric, y in axes.items():
        series = [
            Series(
                kind,
                tuple(
                    Mark(rate_of, value(run, metric), described(run), y_ends=run.intervals.get(metric))
                    for rate_of, run in sorted(runs, key=lambda each: each[0])
                    if run.kind == kind
                ),
            )
            for kind in KINDS
        ]
        panels.append(Panel("", rate, y, tuple(each for each in series if each.marks)))
    caption = f"One run a rate, with the middle coefficient of each kind, at {site}. {TEXT}"
    return Chart("learning_rates", "Learning rate", caption, tuple(panels))


def variants(
    name: str, title: str, labelled: Sequence[tuple[str, Sequence[RunSummary]]], site: str, caption: str
) -> Chart:
    """Curves of runs that differ in one thing, one panel a kind."""
    panels = []
    for kind in KINDS:
        series = [
            Series(kind, tuple(mark(run, "l0", "ce_increase") for run in _ordered(runs, kind)), label, rank=rank)
            for rank, (label, runs) in enumerate(labelled)
            if _ordered(runs, kind)
        ]
        if series:
            panels.append(Panel(LABELS[kind], L0, CE, tuple(series)))
    return Chart(name, title, f"{caption} At {site}. {TEXT}", tuple(panels))


def training_cost(found: Mitigations, site: str) -> list[Chart]:
    """CE increase at equal L0 over the total cost, in tokens and in seconds: a chart for each way to lower it."""
    return [_cost(found, way, site) for way in WAYS if any(point.variant.way == way for point in found.points)]


def _cost(found: Mitigations, way: Way, site: str) -> Chart:
    axes = {"tokens": Axis("training tokens in all", log=True), "seconds": Axis("training time in all, s", log=True)}
    panels = []
    for unit, x in axes.items():
        series: list[Series] = []
        for kind in KINDS:
            points = [point for point in found.of(kind, way) if point.ce_increase is not None]
            if way != "start":
                series.append(Series(kind, tuple(_cost_mark(point, unit) for point in points)))
                continue
            for label, started in {"from local": True, "from random weights": False}.items():
                chosen = tuple(_cost_mark(p, unit) for p in points if p.variant.started == started)
                series.append(Series(kind, chosen, label, joined=started, rank=0 if started else 1))
        panels.append(Panel("", x, CE, tuple(each for each in series if each.marks)))
    caption = f"CE increase at L0 {found.l0:.0f} at {site}; a local phase before an end-to-end one is counted. {TEXT}"
    return Chart(f"cost_{way}", f"What training costs: {WAYS[way]}", caption, tuple(panels))


def _cost_mark(point: CostPoint, unit: str) -> Mark:
    variant, ce = point.variant, point.ce_increase
    assert ce is not None
    words = f"{LABELS[variant.kind]}, {variant.label}\n{variant.tokens:,} tokens, {variant.seconds:.0f} s"
    return Mark(float(getattr(variant, unit)), ce.estimate, words, y_ends=(ce.low, ce.high))


def _by_kind(runs: Sequence[RunSummary], x: str, y: str) -> tuple[Series, ...]:
    series = [Series(kind, tuple(mark(run, x, y) for run in _ordered(runs, kind))) for kind in KINDS]
    return tuple(each for each in series if each.marks)


def _ordered(runs: Iterable[RunSummary], kind: str) -> list[RunSummary]:
    return sorted((run for run in runs if run.kind == kind), key=lambda run: run.l0)
