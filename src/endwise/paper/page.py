"""The study's report: verdicts first, then every figure and table, on one page that needs nothing else."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from endwise.analysis import published as paper
from endwise.analysis.claims import Claim, claim_list
from endwise.analysis.directions.norms import COLUMNS
from endwise.analysis.over_seeds import bracketed
from endwise.analysis.pareto.page import ratio_table
from endwise.analysis.sets import remark_list
from endwise.common.html import PARTS, part, table
from endwise.common.text import model_title
from endwise.config.objective import LABELS
from endwise.evaluation.summary import RunSummary, layer_label
from endwise.figures.charts import Chart
from endwise.figures.interactive import div
from endwise.figures.page import Section, page
from endwise.paper.costs import as_rows
from endwise.paper.findings import Findings, ratio_rows


def report(found: Findings, charts: Mapping[str, Sequence[Chart]], made: Sequence[Claim], command: str) -> str:
    """The page. `charts` are those of each section."""
    figures = {section: list(map(div, drawn)) for section, drawn in charts.items()}
    runs = {run.summary.folder: run.summary for runs in found.experiments.values() for run in runs}
    sections: list[Section] = [
        ("What the results show", [remark_list(runs.values()), claim_list(made)], "verdicts"),
        ("CE increase against features", [*figures["tradeoff"], ratio_table(ratio_rows(found))], "tradeoff"),
        ("Runs at similar CE increase, and at similar L0", list(_similar(found)), "similar"),
        ("Error in the later layers", figures["downstream"], "downstream"),
        ("Lengths and directions", [*figures["norms"], _norms(found)], "norms"),
        ("Learning rate, size, length, seeds", figures["ablations"], "ablations"),
        ("Cost of training", [*figures["cost"], _costs(found)], "cost"),
        ("How this was made", [part(PARTS, "terms", _made(found, command))], "made"),
    ]
    model = model_title(found.made.experiments.study.recipe.get("model", {}).get("name", "embedded"))
    lead = (
        f"Every quantitative experiment of the paper that needs no reader of features, on {model}: "
        f"{len(runs)} sparse autoencoders, {found.made.plan.tokens:,} training tokens each unless a figure says "
        "otherwise, measured on held-out text."
    )
    title = "End-to-end sparse dictionary learning, reproduced"
    return page(title=title, eyebrow=model, lead=lead, sections=sections)


def _similar(found: Findings) -> Iterator[Markup]:
    sets = {
        "Similar CE increase": (found.similar_ce, paper.SIMILAR_CE),
        "Similar L0": (found.similar_l0, paper.SIMILAR_L0),
    }
    for words, (ours, published) in sets.items():
        rows: list[tuple[str, RunSummary | paper.Published]] = []
        rows += [(f"here, layer {layer_label(site)}", run) for site, runs in ours.items() for run in runs]
        rows += [(f"paper, layer {row.layer}", row) for row in published]
        cells = [
            (where, LABELS[of.kind], f"{of.coefficient:g}", f"{of.l0:.1f}", f"{of.alive:,}", f"{of.ce_increase:+.3f}")
            for where, of in rows
        ]
        headings = ("site", "kind", "λ", "L0", "alive", "CE increase")
        yield table(headings, cells, text=(1,), title=words)


def _norms(found: Findings) -> Markup:
    rows: list[tuple[str, ...]] = []
    for site, run in found.with_norms:
        intervals = (getattr(found.norms[run.folder], name) for name in COLUMNS.values())
        rows.append((f"here, layer {layer_label(site)}", LABELS[run.kind], *map(bracketed, intervals)))
    rows += [
        (f"paper, layer {layer}", LABELS[kind], f"{ratio:.2f}", "", "", "")
        for kind, ratios in paper.NORM_RATIO.items()
        for layer, ratio in zip(paper.LAYERS, ratios, strict=True)
    ]
    note = "The first and the last column leave out position 0 and document starts; the paper's leaves out position 0."
    return table(("site", "kind", *COLUMNS), rows, text=(1,), note=note)


def _costs(found: Findings) -> Markup:
    rows: list[tuple[object, ...]] = [
        (
            f"here, layer {layer_label(row['site'])}",
            LABELS[row["kind"]],
            "as in the study" if row["ratio"] is None else f"{row['ratio']:g} per dimension",
            _microseconds(row),
            f"{row['relative_to_local']:.2f}",
        )
        for row in as_rows(found.made.costs)
    ]
    for kind, hours in paper.TRAINING_HOURS.items():
        for layer, taken, ratio in zip(paper.LAYERS, hours, paper.cost_relative_to_local(kind), strict=True):
            rows.append((f"paper, layer {layer}", LABELS[kind], "60 per dimension", f"{taken:.1f} h", f"{ratio:.2f}"))
    note = "Each kind trained alone, one after another; wall-clock, which unlike all other numbers varies each time."
    headings = ("site", "kind", "dictionary", "training", "relative to local")
    return table(headings, rows, text=(1, 2), note=note)


def _microseconds(row: Mapping[str, Any]) -> str:
    low, high = row["low"], row["high"]
    ends = "" if low is None or high is None else f" [{1e6 * low:.0f}, {1e6 * high:.0f}]"
    return f"{1e6 * row['seconds_per_token']:.0f}{ends} µs per token"


def _made(found: Findings, command: str) -> list[tuple[str, str]]:
    study, plan = found.made.experiments.study, found.made.plan
    return [
        ("command", part(PARTS, "code", command)),
        ("training tokens", f"{plan.tokens:,} a run" + (f", to fit {plan.budget}" if plan.budget else "")),
        ("learning rates", "; ".join(_rates(found, site) for site in found.made.rates)),
        ("seeds", f"{study.seeds} {_SEEDS}"),
        ("left out", ", ".join(plan.left_out) or "nothing"),
        ("failed", "; ".join(f"{path.name}: {why}" for path, why in found.made.failures.items()) or "no run"),
        ("tables", _TABLES),
        ("not covered", _NOT_COVERED),
    ]


_TABLES = Markup("<code>tables/</code> beside this page, CSV and parquet; <code>figures/</code>, PDF and PNG")
_NOT_COVERED = Markup(
    "geometry of the dictionaries and automated interpretability, which have commands of their own: "
    "<code>endwise geometry</code>, <code>endwise compare-explanations</code>"
)

_SEEDS = (
    "of the curves and of starts from local, each of initialisation and order of the text; one of sizes, lengths and "
    "learning rates, on which no verdict rests"
)


def _rates(found: Findings, site: str) -> str:
    study = found.made.experiments.study
    parts = [
        f"{LABELS[kind]} {rate:g} of {'/'.join(f'{each:g}' for each in study.kind(kind, site).learning_rates)}"
        for kind, rate in found.made.rates[site].items()
    ]
    return (
        f"layer {layer_label(site)}: {', '.join(parts)}, chosen on held-out text that nothing else here is measured on"
    )
