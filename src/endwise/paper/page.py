"""The study's report: verdicts first, then every figure and table, on one page that needs nothing else."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from endwise.analysis import published as paper
from endwise.analysis.claims import Claim, claim_list
from endwise.analysis.pareto.page import ratio_table
from endwise.analysis.sets import remark_list
from endwise.common.text import model_title
from endwise.config.objective import LABELS
from endwise.evaluation.summary import RunSummary, layer_label
from endwise.figures.charts import Chart
from endwise.figures.interactive import div
from endwise.figures.page import escape, page, table
from endwise.paper.costs import as_rows
from endwise.paper.findings import Findings, norm_rows, ratio_rows


def report(found: Findings, charts: Mapping[str, Sequence[Chart]], made: Sequence[Claim], command: str) -> str:
    """The page. `charts` are those of each section."""
    sections = [
        _section("verdicts", "What shows, and what does not", _remarks(found) + claim_list(made)),
        _section("tradeoff", "What a feature buys", _figures(charts["tradeoff"]) + ratio_table(ratio_rows(found))),
        _section("similar", "Runs at similar CE increase, and at similar L0", _similar(found)),
        _section("downstream", "What stays of the later layers", _figures(charts["downstream"])),
        _section("norms", "Lengths and directions", _figures(charts["norms"]) + _norms(found)),
        _section("ablations", "Learning rate, size, length, seeds", _figures(charts["ablations"])),
        _section("cost", "What training costs", _figures(charts["cost"]) + _costs(found)),
        _section("made", "How this was made", _made(found, command)),
    ]
    study = found.made.experiments.study
    model = model_title(study.recipe.get("model", {}).get("name", "embedded"))
    lead = (
        f"Every quantitative experiment of the paper that needs no reader of features, on {escape(model)}: "
        f"{len({run.summary.folder for runs in found.experiments.values() for run in runs})} sparse autoencoders, "
        f"{found.made.plan.tokens:,} training tokens each unless a figure says otherwise, measured on held-out text."
    )
    title = "End-to-end sparse dictionary learning, reproduced"
    return page(title=title, eyebrow=escape(model), lead=lead, body="\n".join(sections), interactive=True)


def _remarks(found: Findings) -> str:
    runs = {run.summary.folder: run.summary for runs in found.experiments.values() for run in runs}
    return remark_list(runs.values())


def _section(name: str, title: str, body: str) -> str:
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{title}</h2>\n{body}\n</section>'


def _figures(charts: Iterable[Chart]) -> str:
    return "\n".join(map(div, charts))


def _similar(found: Findings) -> str:
    parts = []
    sets = {
        "Similar CE increase": (found.similar_ce, paper.SIMILAR_CE),
        "Similar L0": (found.similar_l0, paper.SIMILAR_L0),
    }
    headings = ("site", "kind", "λ", "L0", "alive", "CE increase")
    for words, (ours, published) in sets.items():
        rows = [_row(f"here, layer {layer_label(site)}", run) for site, runs in ours.items() for run in runs]
        rows += [_row(f"paper, layer {row.layer}", row) for row in published]
        parts.append(f"<h3>{words}</h3>{table(headings, rows, text=(1,))}")
    return "".join(parts)


def _row(where: str, run: RunSummary | paper.Published) -> tuple[object, ...]:
    return (
        where,
        LABELS[run.kind],
        f"{run.coefficient:g}",
        f"{run.l0:.1f}",
        f"{run.alive:,}",
        f"{run.ce_increase:+.3f}",
    )


def _norms(found: Findings) -> str:
    rows: list[tuple[object, ...]] = [
        (f"here, layer {layer_label(row['site'])}", LABELS[row["kind"]], *(_number(row, name) for name in _NORMS))
        for row in norm_rows(found)
    ]
    rows += [
        (f"paper, layer {layer}", LABELS[kind], f"{ratio:.2f}", "", "", "")
        for kind, ratios in paper.NORM_RATIO.items()
        for layer, ratio in zip(paper.LAYERS, ratios, strict=True)
    ]
    headings = ("site", "kind", "‖â‖/‖a‖", "at position 0", "at document starts", "cosine of a and â")
    note = "The first and the last column leave out position 0 and document starts; the paper's leaves out position 0."
    return table(headings, rows, text=(1,)) + f'<p class="note">{note}</p>'


_NORMS = ("ratio", "ratio_at_0", "ratio_at_starts", "cosine")


def _number(row: Mapping[str, Any], name: str) -> str:
    return f"{row[name]:.3f} [{row[f'{name}.low']:.3f}, {row[f'{name}.high']:.3f}]" if name in row else "–"


def _costs(found: Findings) -> str:
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
    for kind in ("local", "e2e", "e2e_ds"):
        for layer, hours, ratio in zip(
            paper.LAYERS, paper.TRAINING_HOURS[kind], paper.cost_relative_to_local(kind), strict=True
        ):
            rows.append((f"paper, layer {layer}", LABELS[kind], "60 per dimension", f"{hours:.1f} h", f"{ratio:.2f}"))
    note = "Each kind trained alone, one after another; wall-clock, so unlike all other numbers not the same each time."
    return (
        table(("site", "kind", "dictionary", "training", "relative to local"), rows, text=(1, 2))
        + f'<p class="note">{note}</p>'
    )


def _microseconds(row: Mapping[str, Any]) -> str:
    low, high = row["low"], row["high"]
    ends = "" if low is None or high is None else f" [{1e6 * low:.0f}, {1e6 * high:.0f}]"
    return f"{1e6 * row['seconds_per_token']:.0f}{ends} µs per token"


def _made(found: Findings, command: str) -> str:
    study, plan = found.made.experiments.study, found.made.plan
    facts = [
        ("command", f"<code>{escape(command)}</code>"),
        ("training tokens", f"{plan.tokens:,} a run" + (f", to fit {escape(plan.budget)}" if plan.budget else "")),
        ("learning rates", escape("; ".join(_rates(found, site) for site in found.made.rates))),
        ("seeds", f"{study.seeds} {_SEEDS}"),
        ("left out", escape(", ".join(plan.left_out) or "nothing")),
        ("failed", escape("; ".join(f"{path.name}: {why}" for path, why in found.made.failures.items()) or "no run")),
        (
            "tables",
            "<code>tables/</code> beside this page, CSV and parquet; <code>figures/</code>, PDF and PNG",
        ),
        (
            "not covered",
            (
                "geometry of the dictionaries and automated interpretability, which have commands of their own: "
                "<code>endwise geometry</code>, <code>endwise compare-explanations</code>"
            ),
        ),
    ]
    return "<dl>" + "".join(f"<dt>{term}</dt><dd>{words}</dd>" for term, words in facts) + "</dl>"


_SEEDS = (
    "of the curves and of starts from local, each of initialisation and order of the text; one of sizes, lengths and "
    "learning rates, on which no verdict rests"
)


def _rates(found: Findings, site: str) -> str:
    study = found.made.experiments.study
    told = [
        f"{LABELS[kind]} {rate:g} of {'/'.join(f'{each:g}' for each in study.kind(kind, site).learning_rates)}"
        for kind, rate in found.made.rates[site].items()
    ]
    return f"layer {layer_label(site)}: {', '.join(told)}, chosen on held-out text that no other number here is of"
