"""Scores of explanations as violins, as tables on a terminal, and as a page."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from endwise.analysis.claims import claim_lines
from endwise.analysis.interpretability.study import ExplainedRun, Interpretability, feature_rows, mean_rows
from endwise.analysis.pages import print_sets, write_page
from endwise.analysis.scored import AT, At, difference_rows
from endwise.analysis.scored_page import grids, listing, panels, parts_of
from endwise.features.explanations import CONTROLS, Explanation
from endwise.figures.charts import Chart
from endwise.figures.violins import OUTLINED

LONGEST = 240
"""Characters of an explanation in a figure."""
_TITLES = {"": "own explanation", "shuffled": "another feature's", "random": "of random texts"}


def score_chart(found: Interpretability, at: At, name: str) -> Chart:
    """Figure 9: the scores of each kind's features, of the runs that are closest; beside them their controls."""
    names = [f"{scorer}.{control}".rstrip(".") for scorer in found.own_names for control in CONTROLS]
    chosen = found.closest(at)
    caption = (
        f"For each kind, the SAE of seed {chosen[0].summary.seed} whose {AT[at]} is closest to the others' at "
        f"{found.setting.site}: {listing(chosen, _features)}. Each mark is a feature; 0.5 is chance. The outline (of "
        f"{OUTLINED} features or more) is a Gaussian kernel density, the hollow mark the mean. Explained by "
        f"{found.about.get('model')}, scored by {found.about.get('scorer_model')}."
    )
    drawn = panels(found, at, [each for each in names if each in found.names], _titles, _hovers)
    return Chart(name, f"How well explanations predict features, at similar {AT[at]}", caption, drawn)


def _features(run: ExplainedRun) -> int:
    return len(run.explanations.rows)


def _titles(score: str) -> tuple[str, str]:
    scorer, _, control = score.partition(".")
    return _TITLES[control], f"{scorer}: balanced accuracy"


def _hovers(run: ExplainedRun, score: str) -> list[str]:
    rows = [each for each in run.explanations.rows if each.value(score) is not None]
    return [f"feature {each.feature}: {each.value(score):.2f}\n{_text(each, score)}" for each in rows]


def _text(each: Explanation, score: str) -> str:
    """The explanation that was scored, where it is the feature's own or of random texts."""
    if score.endswith(".shuffled"):
        return "with another feature's explanation"
    text = (each.random_text or "") if score.endswith(".random") else each.text
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def print_interpretability(found: Sequence[Interpretability], console: Console | None = None) -> None:
    """Means of each run, differences of kinds, and what they show, in 80 columns."""
    print_sets(
        found,
        console,
        lambda one: grids(one, one.own_names, _features, ": balanced accuracy"),
        lambda one: claim_lines(one.claims),
    )


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
        parts=lambda one, _, figures: parts_of(one, one.claims, figures, _features),
    )
