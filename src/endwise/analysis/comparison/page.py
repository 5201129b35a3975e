"""The comparison as one HTML file that needs nothing else: no network, no script, no font, no image beside it."""

from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path

from endwise.analysis.comparison import svg as figures
from endwise.analysis.comparison.comparison import Summary
from endwise.analysis.ratios import MEASURES, NAMES, Ratio, times
from endwise.analysis.sets import remark_list
from endwise.common.files import expanded, write_atomic
from endwise.common.text import model_title
from endwise.config.method import LOCAL, PRESET_METHODS, Method
from endwise.evaluation.summary import RunSummary, knob_labels, later_mse, layer_label
from endwise.figures.page import escape, page, template
from endwise.figures.style import style_of


def write_report(summary: Summary, path: Path | str) -> None:
    """Writes the page, whole or not at all.

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
        legend=figures.legend(_shown(summary)),
        pareto_l0=figures.pareto(summary, "l0", "pareto-l0"),
        pareto_l0_words=escape(_pareto_words(summary, "l0")),
        pareto_alive=figures.pareto(summary, "alive", "pareto-alive"),
        pareto_alive_words=escape(_pareto_words(summary, "alive")),
        downstream=figures.downstream(summary, "downstream-mse"),
        downstream_words=escape(_downstream_words(summary)),
        similar=_similar_table(summary),
        ratios=_ratios_table(summary),
        ratios_note=_ratios_note(),
        runs=_runs_table(summary),
        scale=_scale(summary),
        d_sae=_span([run.d_sae for run in summary.runs]),
        alive_tokens=_span([run.alive_tokens for run in summary.runs]),
        resamples=f"{summary.resamples:,}",
        made="\n".join(f"<dt>{escape(term)}</dt><dd>{words}</dd>" for term, words in _made(summary)),
    )
    local = summary.baseline == LOCAL
    title = f"{'End-to-end and local s' if local else 'S'}parse autoencoders, compared"
    return page(title=title, eyebrow=_eyebrow(summary), lead=_lead(summary), body=content)


def _eyebrow(summary: Summary) -> str:
    model = f"{escape(model_title(summary.model))} · " if summary.model else ""
    return f"{model}<code>{escape(summary.site)}</code>"


def _lead(summary: Summary) -> str:
    count, tokens = len(summary.runs), _span([run.tokens for run in summary.runs])
    return (
        f"{count} sparse autoencoders of {_span([run.d_sae for run in summary.runs])} features and "
        f"{len(summary.methods)} kinds, each "
        f"trained on {tokens} tokens, then spliced into the model and measured on text that none of them has seen."
    )


def _tiles(summary: Summary) -> Iterable[str]:
    base = summary.baseline
    for method in summary.compared:
        ratio = summary.features_at_equal_ce[method.key]
        yield _tile(method, base, ratio, f"of {escape(base.label)}’s features per token, at the same CE increase")
    e2e, e2e_ds = PRESET_METHODS["e2e"], PRESET_METHODS["e2e_ds"]
    if base == LOCAL:
        ratio = summary.downstream.get("e2e_ds/e2e", Ratio(None, reason="not both kinds were run"))
        yield _tile(e2e_ds, e2e, ratio, "of e2e’s error in the later layers, at the same CE increase")


def _shown(summary: Summary) -> list[Method]:
    """What legends list: the baseline and what is related to it."""
    return sorted([summary.baseline, *summary.compared], key=lambda method: method.place)


def _knobs(summary: Summary) -> str:
    """What runs of one method differ in, as the head of a column."""
    return escape(knob_labels(summary.runs))


def _tile(method: Method, reference: Method, ratio: Ratio, what: str) -> str:
    return (
        f'<div class="tile" style="--c:var(--{style_of(method)})"><div class="who">{figures.swatch(method)}'
        f"<span>{escape(method.label)} <span>against {escape(reference.label)}</span></span></div>"
        f'<p class="number">{_number(ratio)}</p>'
        f'<p class="range">{_range_words(ratio)}</p><p class="what">{what}</p></div>'
    )


def _number(ratio: Ratio) -> str:
    """The figure; where curves cross, what it is at both ends."""
    if not ratio.crossings or ratio.at_ends is None:
        return _percent(ratio.estimate)
    return f"{100 * ratio.at_ends[0]:.0f}–{_percent(ratio.at_ends[1])}"


def _range_words(ratio: Ratio) -> str:
    if ratio.interval is None:
        return f"no {'one number' if ratio.estimate is None else 'interval'}: {escape(ratio.reason or '')}"
    low, high = ratio.interval
    words = f"95&nbsp;% interval {100 * low:.1f} to {100 * high:.1f}&nbsp;%"
    if not ratio.holds_seeds:
        return f"{words}, over text alone: {escape(ratio.rests_on)}"
    return f"{words}: a difference is not shown" if low <= 1 <= high else words


def _pareto_words(summary: Summary, against: str) -> str:
    parts = []
    for method, runs in groupby(summary.runs, key=lambda run: run.method):
        points = ", ".join(f"{run.ce_increase:+.3f} at {getattr(run, against):,.4g}" for run in runs)
        parts.append(f"{method.label}: {points}")
    return f"CE increase in nats per token against {NAMES[against]}. " + "; ".join(parts) + "."


def _downstream_words(summary: Summary) -> str:
    parts = []
    for run in summary.similar:
        points = ", ".join(f"{mse:.3g} at {layer_label(site)}" for site, mse in run.downstream_mse.items())
        parts.append(f"{run.method.label} (CE increase {run.ce_increase:+.3f}): {points or 'no later layer'}")
    return "Downstream mean squared error by later layer. " + "; ".join(parts) + "."


def _similar_table(summary: Summary) -> str:
    rows = []
    for run in summary.similar:
        mse = later_mse(run)
        rows.append(
            f'<tr><th scope="row">{_named(run.method)}</th><td>{run.knob.value:g}</td><td>{run.ce_increase:+.3f}</td>'
            f"<td>{run.l0:.1f}</td><td>{'–' if mse is None else f'{mse:.3g}'}</td></tr>"
        )
    ratios = [
        f"<dt>{' : '.join(escape(summary.method(key).label) for key in pair.split('/'))}</dt><dd>{_factor(ratio)}</dd>"
        for pair, ratio in summary.downstream.items()
    ]
    return (
        '<div class="inner" tabindex="0" role="region" aria-label="The runs compared downstream"><table>'
        f"{_head('kind', _knobs(summary), 'CE increase', 'L0', 'mean MSE')}<tbody>{''.join(rows)}</tbody></table></div>"
        '<p class="note">Ratio of downstream MSE, geometric mean over later layers, with its 95&nbsp;% interval:</p>'
        f'<dl class="ratios">{"".join(ratios)}</dl>'
    )


def _ratios_table(summary: Summary) -> str:
    rows = []
    for measure in MEASURES:
        for index, method in enumerate(summary.compared):
            ratio = summary.ratios[measure.key][method.key]
            what = f"{NAMES[measure.of]} at equal {NAMES[measure.at]}" if index == 0 else ""
            start = (
                f'<tr class="first"><th scope="rowgroup" rowspan="{len(summary.compared)}">{what}</th>'
                if what
                else "<tr>"
            )
            rows.append(f'{start}<td class="text">{_named(method)}</td>{_ratio_cells(ratio)}</tr>')
    head = _head(
        "", "kind", f"of {escape(summary.baseline.label)}’s", "at both ends", "compared over", "seeds", text=(1,)
    )
    return f"<table>{head}<tbody>{''.join(rows)}</tbody></table>"


def _ratio_cells(ratio: Ratio) -> str:
    if ratio.at_ends is None or ratio.over is None:
        return f'<td>–</td><td class="words" colspan="3">{escape(ratio.reason or "")}</td>'
    ends = (
        "no interval" if ratio.interval is None else f"{100 * ratio.interval[0]:.1f} to {100 * ratio.interval[1]:.1f}"
    )
    if ratio.crossings:
        ends = f"equal at {', '.join(map(_short, ratio.crossings))}"
    title = "" if ratio.reason is None else f' title="{escape(ratio.reason)}"'
    return (
        f"<td{title}>{_percent(ratio.estimate)}<small>{ends}</small></td>"
        f"<td>{' to '.join(_percent(end) for end in ratio.at_ends)}</td>"
        f"<td>{_short(ratio.over[0])} to {_short(ratio.over[1])}</td><td>{ratio.seeds}</td>"
    )


def _ratios_note() -> str:
    return (
        "Each ratio is the exponential of the mean difference of two curves, logarithms interpolated linearly "
        "between neighbouring runs, at 20 levels spread evenly on a logarithmic scale over the range that both "
        "cover. Nothing is extrapolated. Where the curves cross there is no one number. Intervals hold held-out text, "
        "and seeds where there are three or more. Alive "
        "features are counted over the whole held-out text, so resampling keeps their number fixed."
    )


def _runs_table(summary: Summary) -> str:
    base = summary.baseline
    costs = [run.seconds / run.tokens for run in summary.runs if run.method == base and run.seconds > 0]
    reference = (sum(costs) / len(costs), base.label) if costs else None
    seeds = len({run.seed for run in summary.runs}) > 1
    groups = []
    for _, runs in groupby(summary.runs, key=lambda run: run.method):
        rows = [_run_row(run, reference, seeds, first=index == 0) for index, run in enumerate(runs)]
        groups.append(f"<tbody>{''.join(rows)}</tbody>")
    head = _head(
        "kind",
        _knobs(summary),
        *["seed"] * seeds,
        "L0",
        "alive",
        "CE increase",
        "KL",
        "expl. var.<small>per token</small>",
        "expl. var.<small>pooled</small>",
        "later MSE<small>mean</small>",
        "training",
        "folder",
        text=(10 + seeds,),
    )
    return f"<table>{head}{''.join(groups)}</table>"


def _run_row(run: RunSummary, reference: tuple[float, str] | None, seeds: bool, first: bool) -> str:
    pooled = run.explained_variances.get("pooled")
    mse = later_mse(run)
    cost = ""
    if reference is not None:
        cost = f"<small>{run.seconds / run.tokens / reference[0]:.1f} × {escape(reference[1])}</small>"
    cells = [
        f"{run.knob.value:g}",
        *[str(run.seed)] * seeds,
        f"{run.l0:.1f}{_ends(run, 'l0', '.1f')}",
        f"{run.alive:,}<small>{100 * run.alive / run.d_sae:.0f}&nbsp;%</small>",
        f"{run.ce_increase:+.3f}{_ends(run, 'ce_increase', '.3f')}",
        f"{run.kl:.3f}{_ends(run, 'kl', '.3f')}",
        f"{run.explained_variance:.3f}{_ends(run, 'explained_variance.per_token', '.3f')}",
        "–" if pooled is None else f"{pooled:.3f}{_ends(run, 'explained_variance.pooled', '.3f')}",
        "–" if mse is None else f"{mse:.3g}",
        f"{_duration(run.seconds)}{cost}",
    ]
    body = "".join(f"<td>{cell}</td>" for cell in cells)
    start = '<tr class="first">' if first else "<tr>"
    folder = f'<td class="text"><code>{escape(run.folder)}</code></td>'
    return f'{start}<th scope="row">{_named(run.method)}</th>{body}{folder}</tr>'


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
        named = [f"{name}&nbsp;{version}" for name, version in _escaped(packages)]
        yield "versions", ", ".join([f"python&nbsp;{escape(str(environment.get('python', '')))}", *named])
    if "platform" in environment:
        yield "platform", escape(str(environment["platform"]))
    yield "numbers", "<code>summary.json</code> beside this page, and <code>evaluation.json</code> in each run's folder"


def _escaped(packages: Mapping[str, object]) -> Iterable[tuple[str, str]]:
    return ((escape(str(name)), escape(str(version))) for name, version in packages.items() if version is not None)


def _head(*headings: str, text: tuple[int, ...] = ()) -> str:
    cells = [
        f'<th scope="col"{" class=text" if index in text else ""}>{heading}</th>' if heading else "<td></td>"
        for index, heading in enumerate(headings)
    ]
    return f"<thead><tr>{''.join(cells)}</tr></thead>"


def _named(method: Method) -> str:
    return f'<span class="kind">{figures.swatch(method)}{escape(method.label)}</span>'


def _ends(run: RunSummary, metric: str, form: str) -> str:
    ends = run.intervals.get(metric)
    return "" if ends is None else f"<small>{format(ends[0], form)} to {format(ends[1], form)}</small>"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f}&nbsp;%"


def _short(value: float) -> str:
    """Three significant digits, never an exponent for what is large."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _factor(ratio: Ratio) -> str:
    if ratio.estimate is None:
        return escape(ratio.reason or "")
    ends = "" if ratio.interval is None else f" [{times(ratio.interval[0])}, {times(ratio.interval[1])}]"
    return f"{times(ratio.estimate)} ×{ends}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f}&nbsp;s"
    if seconds < 5400:
        return f"{seconds / 60:.1f}&nbsp;min"
    return f"{seconds / 3600:.1f}&nbsp;h"


def _span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
