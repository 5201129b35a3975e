"""Writes what a study found: tables, figures and the page that joins them."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from endwise.analysis.claims import Claim
from endwise.analysis.directions import reconstruction
from endwise.analysis.directions.reconstruction import TEXT, of_method
from endwise.analysis.pareto.page import AXIS, described, mark, pareto_chart, value
from endwise.common.files import write_atomic
from endwise.common.tables import write_table
from endwise.config.method import PRESET_METHODS
from endwise.config.objective import KINDS
from endwise.evaluation.summary import RunSummary
from endwise.figures.charts import Axis, Chart, Mark, Panel, Series
from endwise.figures.print import save
from endwise.paper.costs import as_rows
from endwise.paper.findings import Findings, MeasuredStudy, find, norm_rows, ratio_rows, run_rows, variant_rows
from endwise.paper.mitigations import WAYS, CostPoint, Mitigations, Way
from endwise.paper.page import report
from endwise.paper.runs import StudyRuns
from endwise.paper.study_claims import claims

Charts = Mapping[str, Sequence[Chart]]


def write(made: StudyRuns, out: Path, command: str) -> list[Claim]:
    """Everything that the finished runs show, in `tables/`, `figures/` and `report.html`; the claims' verdicts."""
    found = find(made, out)
    judged = claims(found)
    for name, rows in tables(found, judged).items():
        if rows:
            write_table(rows, out / "tables" / name)
    drawn = charts(found)
    for group in drawn.values():
        for chart in group:
            save(chart, out / "figures")
    write_atomic(out / "report.html", report(found, drawn, judged, command).encode())
    return judged


def tables(found: Findings, judged: Sequence[Claim]) -> dict[str, list[dict[str, Any]]]:
    """Make tables by name. All but `costs` and `costs_of_variants` are the same however often a study was interrupted:
    these two hold wall-clock.
    """
    return {
        "runs": run_rows(found),
        "ratios": ratio_rows(found),
        "claims": [vars(claim) for claim in judged if not claim.timed],
        "similar": list(_similar_rows(found)),
        "norms": norm_rows(found),
        "variants": [point.to_row() for point in found.points],
        "variant_ratios": variant_rows(found),
        "costs": as_rows(found.made.costs),
        "costs_of_variants": [{**point.to_row(), "seconds": point.variant.seconds} for point in found.points],
    }


def _similar_rows(found: Findings) -> Iterator[dict[str, Any]]:
    for what, by_site in {"ce_increase": found.similar_ce, "l0": found.similar_l0}.items():
        for site, runs in by_site.items():
            for run in runs:
                names = ("kind", "coefficient", "l0", "alive", "ce_increase")
                yield {"similar": what, "site": site, **{name: getattr(run, name) for name in names}}


def charts(found: Findings) -> Charts:
    """Make charts by the report's section."""
    site = found.made.experiments.study.site
    curves = [run for run in found.summaries("curves") if run.site == site]
    similar = found.similar_ce.get(site, ())
    rates = [(run.config.training.learning_rate, run.summary) for run in _rates_tried(found, site)]
    middles: dict[str, float] = {kind: found.middle_coefficient(kind) for kind in found.made.experiments.study.kinds}
    single = [(rate, run) for rate, run in rates if run.coefficient == middles[run.kind]]
    drawn: dict[str, list[Chart]] = {
        "tradeoff": [
            pareto_chart(summary.runs, at, f"pareto-{number}")
            for number, (at, summary) in enumerate(found.sites.items(), 1)
        ],
        "downstream": [reconstruction.downstream(found.similar_ce), reconstruction.explained_variance(curves, site)],
        "norms": [reconstruction.norms(found.norms, similar, site), reconstruction.cosines(found.norms, similar, site)],
        "ablations": [learning_rates(single, site), *_ablations(found, site)],
        "cost": [] if found.mitigations is None else training_cost(found.mitigations, site),
    }
    return {
        section: [chart for chart in group if any(panel.series for panel in chart.panels)]
        for section, group in drawn.items()
    }


def _rates_tried(found: Findings, site: str) -> list[MeasuredStudy]:
    """Every site has its own: a curve through the runs of several would be of none."""
    return [run for run in found.experiments["learning_rates"] if run.summary.site == site]


def _ablations(found: Findings, site: str) -> Iterator[Chart]:
    rates: dict[str, list[RunSummary]] = {}
    for run in sorted(_rates_tried(found, site), key=lambda each: each.config.training.learning_rate):
        rates.setdefault(f"{run.config.training.learning_rate:g}", []).append(run.summary)
    if len(rates) > 1:
        caption = "The inner part of each kind's curve, trained with several learning rates."
        yield variants("rates", "Curves by learning rate", list(rates.items()), site, caption)
    captions: dict[Way, tuple[str, str, str]] = {
        "dictionary": ("sizes", "Dictionary size", "Curves of dictionaries of several sizes."),
        "tokens": ("lengths", "Training length", "Curves after training on several numbers of tokens."),
        "start": ("starts", "Start", "Curves of SAEs that began with random weights, and with those of a local SAE."),
    }
    for way, (name, title, caption) in captions.items():
        labelled: dict[str, list[RunSummary]] = {}
        for point in found.points:
            if point.variant.way == way:
                labelled.setdefault(point.variant.label, []).extend(point.variant.runs)
        yield variants(name, title, list(labelled.items()), site, caption)
    seeds: dict[str, list[RunSummary]] = {}
    for run in [*found.summaries("curves"), *found.summaries("seeds")]:
        if run.site == site:
            seeds.setdefault(f"seed {run.seed}", []).append(run)
    if len(seeds) > 1:
        yield variants("seeds", "Seeds", list(seeds.items()), site, "The same curves from several seeds.")


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
    caption = f"One run per rate, with the middle coefficient of each kind, at {site}. {TEXT}"
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
