"""The comparison as one HTML file that needs nothing else: no network, no font, no script or image beside it."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from markupsafe import Markup

from endwise.analysis.comparison.comparison import Summary
from endwise.analysis.directions.reconstruction import downstream
from endwise.analysis.pareto.curves import rows_of_ratios
from endwise.analysis.pareto.page import pareto_chart, ratio_table
from endwise.analysis.ratios import Ratio, times
from endwise.analysis.sets import KNOB, measured, remark_list, run_table
from endwise.common.files import expanded, write_atomic
from endwise.common.html import PARTS, paragraph, part, table
from endwise.common.text import minus, model_title
from endwise.config.method import LOCAL, PRESET_METHODS, Method
from endwise.evaluation.summary import RunSummary
from endwise.figures.interactive import div, swatch
from endwise.figures.page import page
from endwise.figures.style import style_of


def write_report(summary: Summary, path: Path | str) -> None:
    """Write the page, whole or not at all.

    Raises:
        RunFolderError: the file cannot be written.
    """
    write_atomic(expanded(path), report_html(summary).encode())


def report_html(summary: Summary) -> str:
    """The page's text. Everything that comes from a run is escaped."""
    lead = (
        f"{len(summary.runs)} sparse autoencoders of {_span([run.d_sae for run in summary.runs])} features and "
        f"{len(summary.methods)} kinds, each trained on {_span([run.tokens for run in summary.runs])} tokens, then "
        "spliced into the model and measured on text that none of them has seen."
    )
    later = downstream({summary.site: summary.similar}, "downstream-mse")
    return page(
        template="analysis/comparison/page.html.j2",
        title=f"{'End-to-end and local s' if summary.baseline == LOCAL else 'S'}parse autoencoders, compared",
        eyebrow=model_title(summary.model),
        place=summary.site,
        lead=lead,
        summary=summary,
        headlines=list(_tiles(summary)),
        remarks=remark_list(summary.runs),
        tradeoff=div(pareto_chart(summary.runs, summary.site, "pareto")),
        downstream=div(later) if later.panels else paragraph("No later residual stream was measured.", "note"),
        similar=table(*run_table(summary.similar, "kind", KNOB, "CE increase", "L0", "later MSE")),
        factors=[
            (" : ".join(summary.method(key).label for key in pair.split("/")), _factor(ratio))
            for pair, ratio in summary.downstream.items()
        ],
        ratios=ratio_table([{"site": summary.site, **row} for row in rows_of_ratios(summary)]),
        runs=_runs_table(summary),
        scale=_scale(summary),
        d_sae=_span([run.d_sae for run in summary.runs]),
        alive_tokens=_span([run.alive_tokens for run in summary.runs]),
        made=list(_made(summary)),
    )


def _tiles(summary: Summary) -> Iterator[tuple[object, ...]]:
    base = summary.baseline
    for method in (each for each in summary.compared if each in summary.methods):
        ratio = summary.features_at_equal_ce[method.key]
        yield _tile(method, base, ratio, f"of {base.label}’s features per token, at the same CE increase")
    e2e, e2e_ds = PRESET_METHODS["e2e"], PRESET_METHODS["e2e_ds"]
    if base == LOCAL and (ratio := summary.downstream.get("e2e_ds/e2e")):
        yield _tile(e2e_ds, e2e, ratio, "of e2e’s error in the later layers, at the same CE increase")


def _tile(method: Method, reference: Method, ratio: Ratio, what: str) -> tuple[object, ...]:
    """A number, its range in words, what it is, and whom it is of."""
    look = {"style": style_of(method), "swatch": swatch(method), "name": method.label, "other": reference.label}
    return _number(ratio), _range_words(ratio), what, look


def _number(ratio: Ratio) -> str:
    """The figure; where curves cross, what it is at both ends."""
    if ratio.crossings and ratio.at_ends is not None:
        return f"{100 * ratio.at_ends[0]:.0f}–{100 * ratio.at_ends[1]:.0f}\N{NO-BREAK SPACE}%"
    return "–" if ratio.estimate is None else f"{100 * ratio.estimate:.0f}\N{NO-BREAK SPACE}%"


def _range_words(ratio: Ratio) -> str:
    if ratio.interval is None:
        return f"no {'one number' if ratio.estimate is None else 'interval'}: {ratio.reason or ''}"
    low, high = ratio.interval
    words = f"95\N{NO-BREAK SPACE}% interval {100 * low:.1f} to {100 * high:.1f}\N{NO-BREAK SPACE}%"
    if not ratio.holds_seeds:
        return f"{words}, over text alone: {ratio.rests_on}"
    return f"{words}: a difference is not shown" if low <= 1 <= high else words


def _factor(ratio: Ratio) -> str:
    if ratio.estimate is None:
        return ratio.reason or ""
    ends = "" if ratio.interval is None else f" [{times(ratio.interval[0])}, {times(ratio.interval[1])}]"
    return f"{times(ratio.estimate)} ×{ends}"


def _runs_table(summary: Summary) -> Markup:
    base = summary.baseline
    costs = [run.seconds / run.tokens for run in summary.runs if run.method == base and run.seconds > 0]

    def training(run: RunSummary) -> str:
        of_base = f" ({run.seconds / run.tokens / (sum(costs) / len(costs)):.1f} × {base.label})" if costs else ""
        return f"{_duration(run.seconds)}{of_base}"

    headings, rows = run_table(
        summary.runs,
        *("kind", KNOB, *["seed"] * (len({run.seed for run in summary.runs}) > 1)),
        ("L0", measured("l0", ".1f")),
        ("alive", lambda run: f"{run.alive:,} ({100 * run.alive / run.d_sae:.0f} %)"),
        ("CE increase", measured("ce_increase", ".3f")),
        ("KL", measured("kl", ".3f")),
        ("expl. var. per token", measured("explained_variance.per_token", ".3f")),
        ("expl. var. pooled", measured("explained_variance.pooled", ".3f")),
        *("later MSE", ("training", training), ("folder", lambda run: run.folder)),
    )
    return table(headings, rows, text=(len(headings) - 1,))


def _scale(summary: Summary) -> str:
    words = f"The model's own cross-entropy is {summary.clean_ce:.3f} nats per token."
    bounds = [("at its mean", summary.mean_ablated_ce), ("at zero", summary.zero_ablated_ce)]
    known = [minus(f"{ce - summary.clean_ce:+.3f} with the site {how}") for how, ce in bounds if ce is not None]
    return f"{words} For scale, the CE increase is {' and '.join(known)}." if known else words


def _made(summary: Summary) -> Iterator[tuple[str, str]]:
    if summary.command:
        yield "command", part(PARTS, "code", summary.command)
    yield "training seeds", ", ".join(str(seed) for seed in sorted({run.seed for run in summary.runs}))
    if summary.seconds is not None:
        yield "wall-clock in all", _duration(summary.seconds)
    environment = dict(summary.environment)
    packages = environment.get("packages")
    if isinstance(packages, Mapping):
        versions = {"python": environment.get("python", ""), **packages}
        named = [f"{name}\N{NO-BREAK SPACE}{version}" for name, version in versions.items() if version is not None]
        yield "versions", ", ".join(named)
    if "platform" in environment:
        yield "platform", environment["platform"]
    files = "<code>summary.json</code> beside this page, and <code>evaluation.json</code> in each run's folder"
    yield "numbers", Markup(files)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def _span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
