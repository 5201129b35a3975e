"""Scores of patterns as violins, as tables on a terminal, and as a page."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from endwise.analysis.claims import claim_lines
from endwise.analysis.pages import print_sets, write_page
from endwise.analysis.patterns.study import JUDGED, PatternRun, PatternStudy, feature_rows, mean_rows
from endwise.analysis.scored import AT, At, difference_rows
from endwise.analysis.scored_page import grids, listing, panels, parts_of
from endwise.figures.charts import Chart
from endwise.figures.violins import OUTLINED

DRAWN = (JUDGED, f"{JUDGED}.shuffled", f"{JUDGED}.random", "correlation")
SHOWN = (JUDGED, "explained", "correlation")
"""Scores that a terminal shows."""
_TITLES = {"": "own patterns", "shuffled": "another feature's", "random": "random directions"}
_LOCAL = (
    "A pattern is a few tokens and ends where the feature fires: these scores favour features that follow from the "
    "last few tokens, whatever else they do."
)


def score_chart(found: PatternStudy, at: At, name: str) -> Chart:
    """The scores of each kind's features, of the runs that are closest; beside them their controls."""
    chosen, least = found.closest(at), found.settings["least"]
    caption = (
        f"For each kind, the SAE of seed {chosen[0].summary.seed} whose {AT[at]} is closest to the others' at "
        f"{found.setting.site}: {listing(chosen, _features)}. Each mark is a feature that fires {least} times "
        f"or more in each half of the text. The outline (of {OUTLINED} features or more) is a Gaussian kernel density, "
        "the hollow mark the mean."
    )
    title = f"How well patterns predict where features fire, at similar {AT[at]}"
    return Chart(name, title, caption, panels(found, at, DRAWN, _titles, _hovers))


def _features(run: PatternRun) -> int:
    return run.features


def _titles(score: str) -> tuple[str, str]:
    name, _, control = score.partition(".")
    return _TITLES[control], {"f1": "F1"}.get(name, name)


def _hovers(run: PatternRun, score: str) -> list[str]:
    values = run.values(score)
    return [
        f"{_which(run, score, number)}: {values[number]:.2f}" for number in np.flatnonzero(~np.isnan(values)).tolist()
    ]


def _which(run: PatternRun, score: str, number: int) -> str:
    if score.endswith(".random"):
        return f"random direction {number}"
    first = next(iter(run.patterns.texts.get(number, ())), "no pattern")
    return f"feature {number}, {first}"


def print_patterns(found: Sequence[PatternStudy], console: Console | None = None) -> None:
    """Means of each run, differences of kinds, and what they show, in 80 columns."""
    print_sets(found, console, lambda one: grids(one, SHOWN, _features, ""), lambda one: claim_lines(one.claims))


def write_patterns_page(found: Sequence[PatternStudy], out: Path) -> Path:
    """Tables `features`, `means` and `differences` as CSV and parquet, every figure as PDF and PNG, and
    `patterns.html`, the page.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    runs = [run for one in found for run in one.runs]
    return write_page(
        found,
        out,
        "patterns",
        title="Features explained by patterns",
        lead=f"{sum(map(_features, runs)):,} features of {len(runs)} sparse autoencoders, predicted by the few tokens "
        "that make them fire; only runs of one set are compared.",
        tables={"features": feature_rows(found), "means": mean_rows(found), "differences": difference_rows(found)},
        charts=lambda one, number: [score_chart(one, at, f"scores-{at}-{number}") for at in AT],
        parts=lambda one, _, figures: parts_of(one, one.claims, figures, _features, _LOCAL),
    )
