"""Features explained by patterns (`features.patterns`), method by method.

Runs are compared where their recipes may be (see `pareto`) and their patterns were made alike, of the same text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from endwise.analysis import scored
from endwise.analysis.claims import Claim
from endwise.analysis.comparable import pairs_of, runs_in, with_settings
from endwise.analysis.scored import AT, PAIRS, ScoredSet, columns_of_scored
from endwise.analysis.sets import in_sets
from endwise.common.statistics import Floats
from endwise.evaluation.summary import RunSummary
from endwise.features.patterns.files import COUNTS, MEASURES, SCORES, Patterns
from endwise.features.patterns.run import find_patterns
from endwise.features.patterns.settings import PatternSettings
from endwise.models.language_model import LanguageModel
from endwise.runs.finding import Paths
from endwise.tokens import Corpora

JUDGED = "f1"
"""The score that claims rest on."""


@dataclass(frozen=True)
class PatternRun:
    """A run and the patterns of its features."""

    summary: RunSummary
    patterns: Patterns

    @property
    def names(self) -> tuple[str, ...]:
        return (*SCORES, *(f"{name}.random" for name in MEASURES))

    def values(self, name: str) -> Floats:
        return self.patterns.values(name)

    @property
    def features(self) -> int:
        """Features that are scored."""
        return len(scored.scores(self, JUDGED))


@dataclass(frozen=True, repr=False)
class PatternStudy(ScoredSet[PatternRun]):
    """The runs of one setting, explained alike."""

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.runs[0].patterns.about["settings"])

    @cached_property
    def claims(self) -> tuple[Claim, ...]:
        """Judge each pair of methods that has runs, at either similarity."""
        present = set(self.methods)
        return tuple(
            self.claim(
                f"At similar {AT[at]}, patterns predict {one.label}'s features better than {other.label}'s",
                None,
                at,
                (one, other),
                lambda each: each.low > 0,
                [JUDGED],
            )
            for at in AT
            for one, other in pairs_of(PAIRS, self.methods)
            if {one, other} <= present
        )


def patterns(
    paths: Paths,
    *,
    tokens: int | None = None,
    settings: PatternSettings | None = None,
    again: bool = False,
    model: LanguageModel | None = None,
    corpora: Corpora | None = None,
    display: bool = False,
) -> list[PatternStudy]:
    """Explain the features of runs by patterns, and compare what can be compared.

    Args:
        paths: evaluated run folders, or folders that hold some at any depth (a sweep's).
        tokens: as for `find_patterns`, with its errors, like all that follow.
        settings: of contexts, substitutes and controls.
        again: make whatever was made before.
        model: a loaded one to use instead of the recipes'.
        corpora: loaded token sequences, likewise.
        display: show progress on stderr.

    Raises:
        RunFolderError: there is no run, or one was not evaluated yet.
    """
    folders = runs_in(paths)
    summaries = with_settings(folders)
    found = find_patterns(
        folders, tokens=tokens, settings=settings, again=again, model=model, corpora=corpora, display=display
    )
    runs = [
        (setting, PatternRun(summary, found[folder]))
        for folder, (summary, setting) in zip(folders, summaries, strict=True)
    ]
    return [PatternStudy(*each) for each in in_sets(runs, _text)]


def _text(run: PatternRun) -> str:
    return str(run.patterns.about["settings"]["heldout"])


def feature_rows(found: Sequence[PatternStudy]) -> list[dict[str, Any]]:
    """One row per run and feature: its counts, its scores, and its pattern of the most contexts."""
    rows = []
    for run in (run for one in found for run in one.runs):
        table = run.patterns.scores.select(["feature", "control", *COUNTS, *SCORES]).to_pylist()
        for row in (row for row in table if not row.pop("control")):
            first = next(iter(run.patterns.texts.get(row["feature"], ())), None)
            rows.append({**columns_of_scored(run), **row, "pattern": first})
    return rows


def mean_rows(found: Sequence[PatternStudy]) -> list[dict[str, Any]]:
    """One row per run and score: the mean over scored features or random directions, with its interval; beside it the
    share of drawn contexts that a suffix serves.
    """

    def served(run: PatternRun, name: str) -> dict[str, Any]:
        control = ".random" if name.endswith(".random") else ""
        sampled = np.nansum(run.values(f"sampled{control}"))
        return {"served": float(np.nansum(run.values(f"served{control}")) / max(1.0, sampled))}

    return scored.mean_rows(found, served)
