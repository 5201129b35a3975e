"""Scores of features as violins and as tables, of every question that compares runs by them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from markupsafe import Markup

from endwise.analysis.claims import Claim, claim_list
from endwise.analysis.over_seeds import bracketed
from endwise.analysis.scored import At, ScoreDifference, ScoredRun, ScoredSet, mean
from endwise.analysis.sets import KNOB, Column, Table, run_table, title_of
from endwise.common.html import paragraph, table
from endwise.common.terminal import Grid
from endwise.common.text import minus
from endwise.figures.charts import Axis, Panel, Series
from endwise.figures.violins import violin

S = TypeVar("S", bound=ScoredRun)
DIFFERENCE_HEADINGS = ("kinds", "similar", "seed", "score", "features", "difference", "p")
NOTE = (
    "Means, and differences of means over equally many features, of one run per kind, one seed per row, with "
    "95\N{NO-BREAK SPACE}% bootstrap intervals over features; p by a two-sided permutation test. Verdicts rest on "
    "the mean over three seeds or more, with an interval that holds features and seeds."
)


def panels(
    found: ScoredSet[S],
    at: At,
    names: Iterable[str],
    titles: Callable[[str], tuple[str, str]],
    hovers: Callable[[S, str], Sequence[str]],
) -> tuple[Panel, ...]:
    """A panel for each score: a violin for each kind, of the runs that are closest.

    Args:
        titles: a score's head, and what its axis says.
        hovers: the text of each feature that has the score.
    """
    chosen = found.closest(at)
    kinds = tuple(run.summary.method.label for run in chosen)
    made = []
    for name in names:
        title, axis = titles(name)
        series = [each for place, run in enumerate(chosen) for each in _violin(run, name, place, hovers(run, name))]
        made.append(Panel(title, Axis("", categories=kinds), Axis(axis), tuple(series)))
    return tuple(made)


def _violin(run: ScoredRun, name: str, place: int, hovers: Sequence[str]) -> list[Series]:
    average, values = mean(run, name), run.values(name)
    hover = "" if average is None else f"{run.summary.method.label}, mean {bracketed(average)}"
    return violin(run.summary.method, float(place), values[values == values], hovers, average, hover)


def listing(runs: Iterable[S], features: Callable[[S], int]) -> str:
    """Words of a caption on the runs."""
    return ", ".join(
        f"{run.summary.method.label} {run.summary.knob} "
        + minus(f"(CE {run.summary.ce_increase:+.3f}, L0 {run.summary.l0:.1f}, {features(run)} features)")
        for run in runs
    )


def mean_table(
    found: ScoredSet[S], names: Iterable[str], features: Callable[[S], int], controls: Iterable[str] = ()
) -> Table:
    """The means of scores with their intervals, and of controls without, which so are narrow enough for a terminal."""

    def average(name: str) -> Column:
        return name, lambda run: bracketed(mean(run, name))

    def control(name: str) -> Column:
        return name.partition(".")[2], lambda run: bracketed(mean(run, name), ".2f").partition(" ")[0]

    counted = ("features", lambda run: str(features(run)))
    means = (*map(average, names), *map(control, controls))
    return run_table(found.runs, "kind", KNOB, "seed", "CE +", "L0", counted, *means)


def difference_cells(each: ScoreDifference[Any]) -> tuple[str, ...]:
    kinds = f"{each.run.summary.method.label} − {each.other.summary.method.label}"
    seed = str(each.run.summary.seed)
    similar = {"ce_increase": "CE +", "l0": "L0"}[each.at]
    return kinds, similar, seed, each.name, str(each.features), bracketed(each.difference, "+.2f"), f"{each.p:.2g}"


def parts_of(
    one: ScoredSet[S], claims: Iterable[Claim], figures: Iterable[Markup], features: Callable[[S], int], *notes: str
) -> list[Markup]:
    """The part of a page on a set; notes are what a reader must know of these scores besides."""
    return [
        claim_list(claims),
        *figures,
        table(*mean_table(one, one.names, features)),
        table(DIFFERENCE_HEADINGS, map(difference_cells, one.differences), text=(1, 3)),
        *(paragraph(note, "note") for note in (NOTE, *notes)),
    ]


def grids(one: ScoredSet[S], names: Iterable[str], features: Callable[[S], int], unit: str) -> Iterator[Grid | str]:
    """Tables for a terminal: the means of some scores with those of their controls, and the differences."""
    yield title_of(one.setting)
    names = list(names)
    for name in names:
        controls = [each for each in one.names if each.startswith(f"{name}.")]
        title = f"{name}{unit}, and that of its controls" if controls else f"{name}{unit}"
        yield Grid(*mean_table(one, [name], features, controls), title)
    if cells := [difference_cells(each) for each in one.differences if each.name in names]:
        yield Grid(DIFFERENCE_HEADINGS, cells, "Differences of means, seed by seed, over features")
