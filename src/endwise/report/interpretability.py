"""Scores of explanations as violins, as tables on a terminal, and as a page."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from endwise.analysis.interpretability import (
    AT,
    At,
    Difference,
    ExplainedRun,
    Interpretability,
    difference_rows,
    feature_rows,
    mean_rows,
)
from endwise.analysis.run_summary import LABELS, remarks_of
from endwise.features.explanations import CONTROLS, Explanation
from endwise.files import write_atomic
from endwise.reading import expanded
from endwise.report.charts import Axis, Chart, Panel, Series
from endwise.report.claims import claim_list
from endwise.report.interactive import div
from endwise.report.printed import save
from endwise.report.sets import models_of, remark_list, show_claims, show_remarks, title_of
from endwise.report.shell import escape, page, table
from endwise.report.violins import OUTLINED, violin
from endwise.statistics import Interval
from endwise.tabular import write_table
from endwise.terminal import Grid, show

LONGEST = 240
"""Characters of an explanation in a figure."""
_TITLES = {"": "own explanation", "shuffled": "another feature's", "random": "of random texts"}


def score_chart(found: Interpretability, at: At, name: str) -> Chart:
    """Figure 9: the scores of each kind's features, of the runs that are closest; beside them their controls."""
    chosen = found.similar(at)
    kinds = tuple(LABELS[run.summary.kind] for run in chosen)
    panels = []
    for scorer in found.own_names:
        for control in CONTROLS:
            score = f"{scorer}.{control}" if control else scorer
            if score in found.names:
                series = [each for place, run in enumerate(chosen) for each in _violin(run, score, place)]
                axis = Axis(f"{scorer}: balanced accuracy")
                panels.append(Panel(_TITLES[control], Axis("", categories=kinds), axis, tuple(series)))
    told = ", ".join(
        f"{LABELS[run.summary.kind]} λ {run.summary.coefficient:g} (CE {run.summary.ce_increase:+.3f}, "
        f"L0 {run.summary.l0:.1f}, {len(run.explanations.rows)} features)"
        for run in chosen
    )
    caption = (
        f"Of each kind the SAE of seed {chosen[0].summary.seed} whose {AT[at]} is closest to the others' at "
        f"{found.setting.site}: {told}. Each mark is a feature; 0.5 is chance. The outline (of {OUTLINED} features or "
        "more) is a Gaussian kernel density, the hollow mark the mean. Explained by "
        f"{found.about.get('model')}, scored by {found.about.get('scorer_model')}."
    )
    return Chart(name, f"How well explanations predict features, at similar {AT[at]}", caption, tuple(panels))


def _violin(run: ExplainedRun, score: str, place: int) -> list[Series]:
    rows = [each for each in run.explanations.rows if each.value(score) is not None]
    hovers = [f"feature {each.feature}: {each.value(score):.2f}\n{_text(each, score)}" for each in rows]
    mean = run.mean(score)
    told = "" if mean is None else f"{LABELS[run.summary.kind]}, mean {_interval(mean)}"
    return violin(run.summary.kind, float(place), run.scores(score), hovers, mean, told)


def _text(each: Explanation, score: str) -> str:
    """The explanation that was scored, where it is the feature's own or of random texts."""
    if score.endswith(".shuffled"):
        return "with another feature's explanation"
    text = (each.random_text or "") if score.endswith(".random") else each.text
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


_HEADINGS = ("kind", "λ", "seed", "CE +", "L0", "features")


def _mean_table(found: Interpretability) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Every score with its interval."""
    rows = [(*_run_cells(run), *(_mean(run, name) for name in found.names)) for run in found.runs]
    return (*_HEADINGS, *found.names), rows


def _scorer_table(found: Interpretability, scorer: str) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """One scorer's, narrow enough for a terminal: intervals of the features' own explanations only."""
    controls = [name for name in CONTROLS if name and f"{scorer}.{name}" in found.names]
    rows = []
    for run in found.runs:
        means = (run.mean(f"{scorer}.{control}") for control in controls)
        rows.append(
            (*_run_cells(run), _mean(run, scorer), *("–" if each is None else f"{each.estimate:.2f}" for each in means))
        )
    return (*_HEADINGS, scorer, *controls), rows


def _run_cells(run: ExplainedRun) -> tuple[str, ...]:
    s = run.summary
    head = (LABELS[s.kind], f"{s.coefficient:g}", str(s.seed), f"{s.ce_increase:+.3f}", f"{s.l0:.1f}")
    return (*head, str(len(run.explanations.rows)))


def _mean(run: ExplainedRun, name: str) -> str:
    mean = run.mean(name)
    return "–" if mean is None else _interval(mean)


_DIFFERENCE_HEADINGS = ("kinds", "similar", "seed", "score", "features", "difference", "p")


def _difference_cells(each: Difference) -> tuple[str, ...]:
    kinds = f"{LABELS[each.run.summary.kind]} − {LABELS[each.other.summary.kind]}"
    seed = str(each.run.summary.seed)
    similar = {"ce_increase": "CE +", "l0": "L0"}[each.at]
    return kinds, similar, seed, each.name, str(each.features), _interval(each.difference, "+.2f"), f"{each.p:.2g}"


def _interval(each: Interval, form: str = ".3f") -> str:
    return f"{each.estimate:{form}} [{each.low:{form}}, {each.high:{form}}]"


def print_interpretability(found: Sequence[Interpretability], console: Console | None = None) -> None:
    """Means of each run, differences of kinds, and what they show, in 80 columns."""
    console = console or Console()
    for one in found:
        show(title_of(one.setting), console)
        for scorer in one.own_names:
            headings, rows = _scorer_table(one, scorer)
            show(Grid(headings, rows, f"{scorer}: balanced accuracy, and that of its controls"), console)
        if one.differences:
            differences = [_difference_cells(each) for each in one.differences]
            show(Grid(_DIFFERENCE_HEADINGS, differences, "Differences of means, seed by seed, over features"), console)
        show_remarks(remarks_of(run.summary for run in one.runs), console)
        show_claims(one.claims, console)


def write_interpretability(found: Sequence[Interpretability], out: Path) -> Path:
    """Tables `features`, `means` and `differences` as CSV and parquet, every figure as PDF and PNG, and
    `interpretability.html`, the page.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    out = expanded(out)
    tables = {"features": feature_rows(found), "means": mean_rows(found), "differences": difference_rows(found)}
    for name, rows in tables.items():
        write_table(rows, out / name)
    sections = []
    for number, one in enumerate(found, 1):
        charts = [score_chart(one, at, f"scores-{at}-{number}") for at in AT]
        for chart in charts:
            save(chart, out)
        sections.append(_section(one, charts))
    runs = sum(len(one.runs) for one in found)
    features = sum(len(run.explanations.rows) for one in found for run in one.runs)
    content = page(
        title="Interpretability of features",
        eyebrow=models_of(one.setting for one in found),
        lead=f"{features:,} features of {runs} sparse autoencoders, explained by a language model; only runs of one "
        "set are compared.",
        body="\n".join(sections),
        interactive=True,
    )
    path = out / "interpretability.html"
    write_atomic(path, content.encode())
    return path


def _section(one: Interpretability, charts: Sequence[Chart]) -> str:
    head = f'<h2>{escape(one.setting.site)}</h2><p class="lead">{escape(one.setting)}.</p>'
    head += remark_list(run.summary for run in one.runs)
    means = table(*_mean_table(one))
    differences = table(_DIFFERENCE_HEADINGS, map(_difference_cells, one.differences), text=(1, 3))
    note = (
        '<p class="note">Means, and differences of means over equally many features, of one run a kind and one seed a '
        "row, with 95&nbsp;% bootstrap intervals over features; p by a two-sided permutation test. Verdicts rest on "
        "the mean over three seeds or more, with an interval that holds features and seeds.</p>"
    )
    return f"<section>{head}{claim_list(one.claims)}{''.join(map(div, charts))}{means}{differences}{note}</section>"
