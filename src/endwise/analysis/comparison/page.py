"""The comparison as one HTML file that needs nothing else: no network, no font, no script or image beside it."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from endwise.analysis.comparison.comparison import Summary
from endwise.analysis.directions.reconstruction import downstream
from endwise.analysis.pareto.curves import rows_of_ratios
from endwise.analysis.pareto.page import pareto_chart, ratio_table
from endwise.analysis.ratios import Ratio, times
from endwise.analysis.sets import KNOB, measured, remark_list, run_table
from endwise.common.files import expanded, write_atomic
from endwise.common.text import model_title
from endwise.config.method import LOCAL, PRESET_METHODS, Method
from endwise.evaluation.summary import RunSummary
from endwise.figures.interactive import div, swatch
from endwise.figures.page import escape, page, table, template
from endwise.figures.style import style_of


def write_report(summary: Summary, path: Path | str) -> None:
    """Write the page, whole or not at all.

    Raises:
        RunFolderError: the file cannot be written.
    """
    write_atomic(expanded(path), report_html(summary).encode())


def report_html(summary: Summary) -> str:
    """The page's text. Everything that comes from a run is escaped."""
    content = template("endwise.analysis.comparison", "page.html").substitute(
        tiles="\n".join(_tiles(summary)),
        remarks=remark_list(summary.runs),
        verdicts="\n".join(f"<li>{escape(sentence)}</li>" for sentence in summary.verdicts),
        tradeoff=div(pareto_chart(summary.runs, summary.site, "pareto")),
        downstream=_downstream(summary),
        similar=_similar_table(summary),
        baseline=escape(summary.baseline.label),
        ratios=ratio_table([{"site": summary.site, **row} for row in rows_of_ratios(summary)]),
        runs=_runs_table(summary),
        scale=_scale(summary),
        d_sae=_span([run.d_sae for run in summary.runs]),
        alive_tokens=_span([run.alive_tokens for run in summary.runs]),
        resamples=f"{summary.resamples:,}",
        made="\n".join(f"<dt>{escape(term)}</dt><dd>{words}</dd>" for term, words in _made(summary)),
    )
    model = f"{escape(model_title(summary.model))} · " if summary.model else ""
    lead = (
        f"{len(summary.runs)} sparse autoencoders of {_span([run.d_sae for run in summary.runs])} features and "
        f"{len(summary.methods)} kinds, each trained on {_span([run.tokens for run in summary.runs])} tokens, then "
        "spliced into the model and measured on text that none of them has seen."
    )
    return page(
        title=f"{'End-to-end and local s' if summary.baseline == LOCAL else 'S'}parse autoencoders, compared",
        eyebrow=f"{model}<code>{escape(summary.site)}</code>",
        lead=lead,
        body=content,
        interactive=True,
    )


def _downstream(summary: Summary) -> str:
    chart = downstream({summary.site: summary.similar}, "downstream-mse")
    return div(chart) if chart.panels else '<p class="note">No later residual stream was measured.</p>'


def _tiles(summary: Summary) -> Iterable[str]:
    base = summary.baseline
    for method in (each for each in summary.compared if each in summary.methods):
        ratio = summary.features_at_equal_ce[method.key]
        yield _tile(method, base, ratio, f"of {escape(base.label)}’s features per token, at the same CE increase")
    e2e, e2e_ds = PRESET_METHODS["e2e"], PRESET_METHODS["e2e_ds"]
    if base == LOCAL and (ratio := summary.downstream.get("e2e_ds/e2e")):
        yield _tile(e2e_ds, e2e, ratio, "of e2e’s error in the later layers, at the same CE increase")


def _tile(method: Method, reference: Method, ratio: Ratio, what: str) -> str:
    return (
        f'<div class="tile" style="--c:var(--{style_of(method)})"><div class="who">{swatch(method)}'
        f"<span>{escape(method.label)} <span>against {escape(reference.label)}</span></span></div>"
        f'<p class="number">{_number(ratio)}</p>'
        f'<p class="range">{_range_words(ratio)}</p><p class="what">{what}</p></div>'
    )


def _number(ratio: Ratio) -> str:
    """The figure; where curves cross, what it is at both ends."""
    if ratio.crossings and ratio.at_ends is not None:
        return f"{100 * ratio.at_ends[0]:.0f}–{100 * ratio.at_ends[1]:.0f}&nbsp;%"
    return "–" if ratio.estimate is None else f"{100 * ratio.estimate:.0f}&nbsp;%"


def _range_words(ratio: Ratio) -> str:
    if ratio.interval is None:
        return f"no {'one number' if ratio.estimate is None else 'interval'}: {escape(ratio.reason or '')}"
    low, high = ratio.interval
    words = f"95&nbsp;% interval {100 * low:.1f} to {100 * high:.1f}&nbsp;%"
    if not ratio.holds_seeds:
        return f"{words}, over text alone: {escape(ratio.rests_on)}"
    return f"{words}: a difference is not shown" if low <= 1 <= high else words


def _similar_table(summary: Summary) -> str:
    ratios = [
        f"<dt>{' : '.join(escape(summary.method(key).label) for key in pair.split('/'))}</dt><dd>{_factor(ratio)}</dd>"
        for pair, ratio in summary.downstream.items()
    ]
    return (
        f"{table(*run_table(summary.similar, 'kind', KNOB, 'CE increase', 'L0', 'later MSE'))}"
        '<p class="note">Ratio of downstream MSE, geometric mean over later layers, with its 95&nbsp;% interval:</p>'
        f'<dl class="ratios">{"".join(ratios)}</dl>'
    )


def _factor(ratio: Ratio) -> str:
    if ratio.estimate is None:
        return escape(ratio.reason or "")
    ends = "" if ratio.interval is None else f" [{times(ratio.interval[0])}, {times(ratio.interval[1])}]"
    return f"{times(ratio.estimate)} ×{ends}"


def _runs_table(summary: Summary) -> str:
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
    known = [f"{ce - summary.clean_ce:+.3f} with the site {how}" for how, ce in bounds if ce is not None]
    return f"{words} For scale, the CE increase is {' and '.join(known)}." if known else words


def _made(summary: Summary) -> Iterable[tuple[str, str]]:
    if summary.command:
        yield "command", f"<code>{escape(summary.command)}</code>"
    yield "training seeds", escape(", ".join(str(seed) for seed in sorted({run.seed for run in summary.runs})))
    if summary.seconds is not None:
        yield "wall-clock in all", _duration(summary.seconds)
    environment = dict(summary.environment)
    packages = environment.get("packages")
    if isinstance(packages, Mapping):
        versions = {"python": environment.get("python", ""), **packages}
        told = [f"{escape(name)}&nbsp;{escape(version)}" for name, version in versions.items() if version is not None]
        yield "versions", ", ".join(told)
    if "platform" in environment:
        yield "platform", escape(environment["platform"])
    yield "numbers", "<code>summary.json</code> beside this page, and <code>evaluation.json</code> in each run's folder"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def _span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
