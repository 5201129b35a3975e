"""The study's figures as descriptions: what stands on which axis, with which intervals."""

from collections.abc import Sequence

from endwise.analysis.directions.reconstruction import TEXT, of_method
from endwise.analysis.pareto.page import AXIS, described, mark, value
from endwise.config.method import PRESET_METHODS
from endwise.config.objective import KINDS
from endwise.evaluation.summary import RunSummary
from endwise.figures.charts import Axis, Chart, Mark, Panel, Series
from endwise.paper.mitigations import WAYS, CostPoint, Mitigations, Way

CE, L0 = AXIS["ce_increase"], AXIS["l0"]


def learning_rates(runs: Sequence[tuple[float, RunSummary]], site: str) -> Chart:
    """Draw what the learning rate does, at one coefficient a kind."""
    rate = Axis("learning rate", log=True)
    axes = {"l0": Axis("L0: features per token", log=True), "ce_increase": CE, "alive": Axis("alive features")}
    panels = []
    for metric, y in axes.items():
        series = [
            Series(
                method,
                tuple(
                    Mark(rate_of, value(run, metric), described(run), y_ends=run.intervals.get(metric))
                    for rate_of, run in sorted(runs, key=lambda each: each[0])
                    if run.method == method
                ),
            )
            for method in PRESET_METHODS.values()
        ]
        panels.append(Panel("", rate, y, tuple(each for each in series if each.marks)))
    caption = f"One run a rate, with the middle coefficient of each kind, at {site}. {TEXT}"
    return Chart("learning_rates", "Learning rate", caption, tuple(panels))


def variants(
    name: str, title: str, labelled: Sequence[tuple[str, Sequence[RunSummary]]], site: str, caption: str
) -> Chart:
    """Curves of runs that differ in one thing, one panel a kind."""
    panels = []
    for method in PRESET_METHODS.values():
        series = [
            Series(method, tuple(mark(run, "l0", "ce_increase") for run in of_method(runs, method)), label, rank=rank)
            for rank, (label, runs) in enumerate(labelled)
            if of_method(runs, method)
        ]
        if series:
            panels.append(Panel(method.label, L0, CE, tuple(series)))
    return Chart(name, title, f"{caption} At {site}. {TEXT}", tuple(panels))


def training_cost(found: Mitigations, site: str) -> list[Chart]:
    """CE increase at equal L0 over the total cost, in tokens and in seconds: a chart for each way to lower it."""
    return [_cost(found, way, site) for way in WAYS if any(point.variant.way == way for point in found.points)]


def _cost(found: Mitigations, way: Way, site: str) -> Chart:
    axes = {"tokens": Axis("training tokens in all", log=True), "seconds": Axis("training time in all, s", log=True)}
    panels = []
    for unit, x in axes.items():
        series: list[Series] = []
        for kind, method in zip(KINDS, PRESET_METHODS.values(), strict=True):
            points = [point for point in found.of(kind, way) if point.ce_increase is not None]
            if way != "start":
                series.append(Series(method, tuple(_cost_mark(point, unit) for point in points)))
                continue
            for label, started in {"from local": True, "from random weights": False}.items():
                chosen = tuple(_cost_mark(p, unit) for p in points if p.variant.started == started)
                series.append(Series(method, chosen, label, joined=started, rank=0 if started else 1))
        panels.append(Panel("", x, CE, tuple(each for each in series if each.marks)))
    caption = f"CE increase at L0 {found.l0:.0f} at {site}; a local phase before an end-to-end one is counted. {TEXT}"
    return Chart(f"cost_{way}", f"What training costs: {WAYS[way]}", caption, tuple(panels))


def _cost_mark(point: CostPoint, unit: str) -> Mark:
    variant, ce = point.variant, point.ce_increase
    assert ce is not None
    words = f"{PRESET_METHODS[variant.kind].label}, {variant.label}\n{variant.tokens:,} tokens, {variant.seconds:.0f} s"
    return Mark(float(getattr(variant, unit)), ce.estimate, words, y_ends=(ce.low, ce.high))
