"""Explanations that a run keeps of its features: the folder `explanations/` in the run's own.

explanations.parquet  one row per explained feature, ascending; a score that was not measured is null
explanations.json     with which settings, of which SAE, and which features were left out, with the reason
answers.sqlite        every answer of the endpoint, so that no call is paid twice

The text of an explanation is a language model's: it is kept as it came, for a reader to escape.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from endwise.common.errors import FormatError
from endwise.common.files import expanded, read_format, write_json
from endwise.common.remedies import unreadable
from endwise.common.showing import Shown
from endwise.common.tables import write_parquet
from endwise.runs.finding import check_same_weights

EXPLANATIONS_FOLDER = "explanations"
EXPLANATIONS_FORMAT = 1

CONTROLS = ("", "shuffled", "random")
"""Ways of scoring a feature: with its own explanation; with another feature's; and, in its place, a set of random texts
with an explanation made of them."""
TEXT_COLUMNS = ("explanation", "explainer", "scorer", "random_explanation")


@dataclass(frozen=True)
class Score:
    """A balanced accuracy: the mean of the shares of positive and of negative items that were judged rightly."""

    value: float | None
    """0.5 is chance; None where no positive, or no negative, item was answered."""
    answered: int
    """Items."""
    failed: int
    """Items of calls that failed, or whose answer could not be read; they count neither way."""


@dataclass(frozen=True)
class Explanation:
    """One feature's."""

    feature: int
    text: str
    """Text as the model gave it: escape it wherever it is shown."""
    explainer: str
    """The model that wrote it."""
    scorer: str
    """The model that was asked with it."""
    scores: Mapping[str, Score] = field(default_factory=dict)
    """Scores by scorer and control, `detection`, `detection.shuffled`, `detection.random`, …; only those measured."""
    random_text: str | None = None
    """The explanation made of random texts, where that control was made."""

    def value(self, name: str) -> float | None:
        """A score by its name in `scores`; None where there is none."""
        return self.scores[name].value if name in self.scores else None

    @property
    def detection(self) -> float | None:
        """Balanced accuracy of telling, from the explanation alone, in which texts the feature fires."""
        return self.value("detection")

    @property
    def fuzzing(self) -> float | None:
        """Balanced accuracy of telling whether the tokens that are marked in a text are those at which it fires."""
        return self.value("fuzzing")


@dataclass(frozen=True, repr=False)
class Explanations(Shown):
    """Every explanation of a run."""

    rows: tuple[Explanation, ...]
    """Explanations by feature, ascending."""
    about: Mapping[str, Any]
    """Content of `explanations.json`."""

    def shown_facts(self) -> dict[str, object]:
        return {"features": f"{len(self.rows):,}", "scores": ", ".join(self.names)}

    @cached_property
    def _by_feature(self) -> dict[int, Explanation]:
        return {each.feature: each for each in self.rows}

    def of(self, feature: int) -> Explanation | None:
        """A feature's; None where it was not explained."""
        return self._by_feature.get(feature)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all scores that some feature has, in order."""
        return tuple(dict.fromkeys(name for each in self.rows for name in each.scores))


def read_explanations(run: Path) -> Explanations | None:
    """The explanations of a run's features; None if there are none.

    Raises:
        FormatError: they are there, but are not what `endwise explain` writes, or the SAE has other weights now.
    """
    folder = expanded(run) / EXPLANATIONS_FOLDER
    about_file = folder / "explanations.json"
    if not about_file.exists():
        return None
    try:
        about = read_format(about_file, EXPLANATIONS_FORMAT)
        table = parquet.read_table(folder / "explanations.parquet")
        rows = tuple(map(_explanation, table.to_pylist()))
    except (OSError, pa.ArrowException, FormatError, KeyError, TypeError, ValueError) as error:
        raise unreadable(folder, error) or FormatError(
            f"{folder} is not what endwise explain writes ({error}). Explain again: earlier answers are kept in "
            "answers.sqlite there and not paid for twice."
        ) from None
    features = [each.feature for each in rows]
    if features != sorted(set(features)):
        raise FormatError(f"{folder / 'explanations.parquet'} must have each feature once, ascending. Explain again.")
    if about.get("weights") is not None:
        again = f"Harvest and explain it again, or move {folder} away."
        check_same_weights(run, about["weights"], "explained", again)
    return Explanations(rows, about)


def write_explanations(run: Path, rows: Sequence[Explanation], about: Mapping[str, Any]) -> None:
    """The table first, then what it was made with, each whole or not at all.

    Raises:
        RunFolderError: the folder cannot be written; older explanations are untouched.
    """
    folder = run / EXPLANATIONS_FOLDER
    write_parquet(explanations_table(rows), folder / "explanations.parquet")
    write_json(folder / "explanations.json", {"format": EXPLANATIONS_FORMAT, **about})


def explanations_table(rows: Sequence[Explanation]) -> pa.Table:
    """`feature`, texts, and for each score `<name>`, `<name>.answered` and `<name>.failed`."""
    rows = sorted(rows, key=lambda each: each.feature)
    names = list(dict.fromkeys(name for each in rows for name in each.scores))
    columns: dict[str, Any] = {"feature": pa.array([each.feature for each in rows], pa.int32())}
    texts = [(each.text, each.explainer, each.scorer, each.random_text) for each in rows]
    for column, name in enumerate(TEXT_COLUMNS):
        columns[name] = pa.array([row[column] for row in texts], pa.string())
    for name in names:
        scores = [each.scores.get(name) for each in rows]
        columns[name] = pa.array([None if s is None else s.value for s in scores], pa.float64())
        columns[f"{name}.answered"] = pa.array([None if s is None else s.answered for s in scores], pa.int32())
        columns[f"{name}.failed"] = pa.array([None if s is None else s.failed for s in scores], pa.int32())
    return pa.table(columns)


def _explanation(row: Mapping[str, Any]) -> Explanation:
    names = [name.removesuffix(".answered") for name in row if name.endswith(".answered")]
    scores = {}
    for name in names:
        value, answered, failed = row[name], row[f"{name}.answered"], row[f"{name}.failed"]
        if answered is not None:
            scores[name] = Score(None if value is None else _share(value), int(answered), int(failed))
    text, explainer, scorer, random_text = (row[name] for name in TEXT_COLUMNS)
    if not all(isinstance(each, str) for each in (text, explainer, scorer)):
        raise TypeError("an explanation has no text, or no model")
    return Explanation(int(row["feature"]), text, explainer, scorer, scores, random_text)


def _share(value: float) -> float:
    if not (math.isfinite(value) and 0 <= value <= 1):
        raise ValueError(f"a score must lie in 0 to 1, not be {value!r:.40}")
    return float(value)
