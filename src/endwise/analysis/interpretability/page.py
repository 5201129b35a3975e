"""Scores of explanations as violins, as tables on a terminal, and as a page."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console

from endwise.analysis.claims import claim_list
from endwise.analysis.interpretability.study import (
    AT,
    At,
    ExplainedRun,
    Interpretability,
    ScoreDifference,
    difference_rows,
    feature_rows,
    mean_rows,
)
from endwise.analysis.over_seeds import bracketed
from endwise.analysis.pages import print_sets, write_page
from endwise.analysis.sets import KNOB, Column, Table, claim_lines, run_table, title_of
from endwise.common.terminal import Grid
from endwise.features.explanations import CONTROLS, Explanation
from endwise.figures.charts import Axis, Chart, Panel, Series
from endwise.figures.page import table
from endwise.figures.violins import OUTLINED, violin

LONGEST = 240
"""Characters of an explanation in a figure."""
_TITLES = {"": "own explanation", "shuffled": "another feature's", "random": "of random texts"}


def score_chart(found: Interpretability, at: At, name: str) -> Chart:
    """Figure 9: the scores of each kind's features, of the runs that are closest; beside them their controls."""
    chosen = found.closest(at)
    kinds = tuple(run.summary.method.label for run in chosen)
    panels = []
    for scorer in found.own_names:
        for control in CONTROLS:
            score = f"{scorer}.{control}" if control else scorer
            if score in found.names:
                series = [each for place, run in enumerate(chosen) for each in _violin(run, score, place)]
                axis = Axis(f"{scorer}: balanced accuracy")
                panels.append(Panel(_TITLES[control], Axis("", categories=kinds), axis, tuple(series)))
    told = ", ".join(
        f"{run.summary.method.label} {run.summary.knob} (CE {run.summary.ce_increase:+.3f}, "
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
    told = "" if mean is None else f"{run.summary.method.label}, mean {bracketed(mean)}"
    return violin(run.summary.method, float(place), run.scores(score), hovers, mean, told)


def _text(each: Explanation, score: str) -> str:
    """The explanation that was scored, where it is the feature's own or of random texts."""
    if score.endswith(".shuffled"):
        return "with another feature's explanation"
    text = (each.random_text or "") if score.endswith(".random") else each.text
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _mean_table(found: Interpretability, names: Iterable[str], controls: Iterable[str] = ()) -> Table:
    """The means of scores with their intervals, and of controls without, which so are narrow enough for a terminal."""

    def mean(name: str) -> Column:
        return name, lambda run: bracketed(run.mean(name))

    def control(name: str) -> Column:
        return name.partition(".")[2], lambda run: bracketed(run.mean(name), ".2f").partition(" ")[0]

    features = ("features", lambda run: str(len(run.explanations.rows)))
    means = (*map(mean, names), *map(control, controls))
    return run_table(found.runs, "kind", KNOB, "seed", "CE +", "L0", features, *means)


_DIFFERENCE_HEADINGS = ("kinds", "similar", "seed", "score", "features", "difference", "p")


def _difference_cells(each: ScoreDifference) -> tuple[str, ...]:
    kinds = f"{each.run.summary.method.label} − {each.other.summary.method.label}"
    seed = str(each.run.summary.seed)
    similar = {"ce_increase": "CE +", "l0": "L0"}[each.at]
    return kinds, similar, seed, each.name, str(each.features), bracketed(each.difference, "+.2f"), f"{each.p:.2g}"


def print_interpretability(found: Sequence[Interpretability], console: Console | None = None) -> None:
    """Means of each run, differences of kinds, and what they show, in 80 columns."""
    print_sets(found, console, _grids, lambda one: claim_lines(one.claims))


def _grids(one: Interpretability) -> Iterator[Grid | str]:
    yield title_of(one.setting)
    for scorer in one.own_names:
        controls = [name for name in one.names if name.startswith(f"{scorer}.")]
        yield Grid(*_mean_table(one, [scorer], controls), f"{scorer}: balanced accuracy, and that of its controls")
    if one.differences:
        differences = list(map(_difference_cells, one.differences))
        yield Grid(_DIFFERENCE_HEADINGS, differences, "Differences of means, seed by seed, over features")


def write_interpretability(found: Sequence[Interpretability], out: Path) -> Path:
    """Tables `features`, `means` and `differences` as CSV and parquet, every figure as PDF and PNG, and
    `interpretability.html`, the page.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    runs = [run for one in found for run in one.runs]
    features = sum(len(run.explanations.rows) for run in runs)
    return write_page(
        found,
        out,
        "interpretability",
        title="Interpretability of features",
        lead=f"{features:,} features of {len(runs)} sparse autoencoders, explained by a language model; only runs of "
        "one set are compared.",
        tables={"features": feature_rows(found), "means": mean_rows(found), "differences": difference_rows(found)},
        charts=lambda one, number: [score_chart(one, at, f"scores-{at}-{number}") for at in AT],
        parts=lambda one, _, figures: [
            claim_list(one.claims),
            figures,
            table(*_mean_table(one, one.names)),
            table(_DIFFERENCE_HEADINGS, map(_difference_cells, one.differences), text=(1, 3)),
            _NOTE,
        ],
    )


_NOTE = (
    '<p class="note">Means, and differences of means over equally many features, of one run a kind and one seed a row, '
    "with 95&nbsp;% bootstrap intervals over features; p by a two-sided permutation test. Verdicts rest on the mean "
    "over three seeds or more, with an interval that holds features and seeds.</p>"
)
