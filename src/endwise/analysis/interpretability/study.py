"""Interpretability of features, method by method: how well explanations by a language model predict them.

Runs are compared where their recipes may be (see `pareto`) and their explanations were made and scored alike.
"""

import json
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from endwise.analysis import scored
from endwise.analysis.claims import Claim
from endwise.analysis.comparable import runs_in, with_settings
from endwise.analysis.over_seeds import OverSeeds
from endwise.analysis.scored import At, ScoredSet, columns_of_scored
from endwise.analysis.sets import in_sets
from endwise.common.errors import RunFolderError
from endwise.common.files import expanded
from endwise.common.statistics import Floats
from endwise.config.method import LOCAL, PRESET_METHODS
from endwise.evaluation.summary import RunSummary
from endwise.features.explanations import Explanations, read_explanations

MARGIN = 0.05
"""Difference in balanced accuracy within which two means count as equal."""


@dataclass(frozen=True)
class ExplainedRun:
    """A run and its explanations."""

    summary: RunSummary
    explanations: Explanations

    @property
    def names(self) -> tuple[str, ...]:
        return self.explanations.names

    def values(self, name: str) -> Floats:
        """Return a score of every explained feature; NaN where one does not have it."""
        found = (each.value(name) for each in self.explanations.rows)
        return np.array([np.nan if value is None else value for value in found], dtype=np.float64)


@dataclass(frozen=True, repr=False)
class Interpretability(ScoredSet[ExplainedRun]):
    """The runs of one setting, explained alike."""

    @property
    def about(self) -> dict[str, Any]:
        """The settings of their explanations."""
        return dict(self.runs[0].explanations.about["settings"])

    @cached_property
    def claims(self) -> tuple[Claim, ...]:
        """Verdicts on the paper's §3.3: what its figure 9 and table 4 say of e2e+ds and local."""
        return (
            self._claim(
                "At similar CE increase, features of e2e+ds are not less interpretable than local's",
                "e2e+ds − local, by simulation: +0.08 (p .006), +0.10 (p below .001), +0.02 (p .41), layers 2, 6, 10",
                "ce_increase",
                lambda each: each.low > -MARGIN,
            ),
            self._claim(
                "At similar CE increase, features of e2e+ds are more interpretable than local's",
                "so at layers 2 and 6, not at 10",
                "ce_increase",
                lambda each: each.low > 0,
            ),
            self._claim(
                "At similar L0, features of e2e+ds and of local are equally interpretable",
                "no difference at any layer",
                "l0",
                lambda each: each.low > -MARGIN and each.high < MARGIN,
            ),
        )

    def _claim(self, claim: str, published: str, at: At, holds: Callable[[OverSeeds], bool]) -> Claim:
        return self.claim(claim, published, at, (PRESET_METHODS["e2e_ds"], LOCAL), holds)


def interpretability(paths: Iterable[str | Path]) -> list[Interpretability]:
    """Compare explained runs, in as many sets as can be compared.

    Args:
        paths: evaluated run folders, or folders that hold some at any depth; below a folder, runs that were not
            explained are passed over.

    Raises:
        RunFolderError: there is no run, one that is named was not measured or not explained.
        FormatError: what a run holds cannot be read.
    """
    named = [expanded(path) for path in paths]
    folders = runs_in(named)
    read = {folder: read_explanations(folder) for folder in folders}
    explained = {folder: found for folder, found in read.items() if found is not None}
    missing = [folder for folder in folders if folder not in explained and folder in named]
    if missing or not explained:
        which = missing[0] if missing else named[0]
        raise RunFolderError(
            f"{which} was not explained yet. Explain it: endwise explain {shlex.quote(str(which))} --endpoint URL "
            "--model NAME"
        )
    runs = [
        (setting, ExplainedRun(summary, explained[Path(summary.folder)]))
        for summary, setting in with_settings(list(explained))
    ]
    return [Interpretability(*each) for each in in_sets(runs, _conditions)]


def _conditions(run: ExplainedRun) -> str:
    """Name what must agree for scores to be compared: models, prompts, texts, numbers of items; not the endpoint."""
    about = run.explanations.about
    return json.dumps([about.get(name) for name in ("settings", "prompts", "corpus")], sort_keys=True)


def feature_rows(found: Sequence[Interpretability]) -> list[dict[str, Any]]:
    """One row per run and explained feature: the explanation and every score."""
    rows = []
    for run in (run for one in found for run in one.runs):
        for each in run.explanations.rows:
            row = {**columns_of_scored(run), "feature": each.feature, "explanation": each.text}
            for name in run.explanations.names:
                score = each.scores.get(name)
                row |= {name: None if score is None else score.value}
                row |= {f"{name}.failed": None if score is None else score.failed}
            rows.append(row)
    return rows


def mean_rows(found: Sequence[Interpretability]) -> list[dict[str, Any]]:
    """One row per run and score: the mean over features with its interval, and how many items had no answer."""

    def items(run: ExplainedRun, name: str) -> dict[str, Any]:
        found = [each.scores[name] for each in run.explanations.rows if name in each.scores]
        return {"answered": sum(each.answered for each in found), "failed": sum(each.failed for each in found)}

    return scored.mean_rows(found, items)
