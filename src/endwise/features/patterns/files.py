"""Patterns that a run keeps of its features: the folder `patterns/` in the run's own.

patterns.parquet  one row per pattern, by feature, those of most contexts first
scores.parquet    one row per feature, then one per random direction; what was not measured is null
patterns.json     with which settings, of which SAE and text; written last, so a folder that has it is whole
parts/            patterns of some features each, while the others are looked for
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from endwise.common.errors import FormatError
from endwise.common.files import expanded, read_format, write_json
from endwise.common.remedies import unreadable
from endwise.common.showing import Shown
from endwise.common.statistics import Floats
from endwise.common.tables import write_parquet
from endwise.features.patterns.trie import Pattern
from endwise.runs.finding import check_same_weights

PATTERNS_FOLDER = "patterns"
PATTERNS_FORMAT = 1
PATTERN_SCHEMA = pa.schema(
    {
        "feature": pa.int32(),
        "tokens": pa.list_(pa.list_(pa.int32())),  # from the first to the last, those that serve; none: any does
        "activation": pa.float64(),  # mean over its contexts
        "contexts": pa.int32(),
        "text": pa.string(),  # for a reader
    }
)
COUNTS = ("firings", "sampled", "served", "patterns", "fired", "predicted", "both")
"""Firings in the first half; contexts drawn of them, and those that a suffix serves; patterns; and in the second half
tokens at which it fires, at which a pattern fits, and both."""
MEASURES = ("f1", "precision", "recall", "correlation", "explained")
SCORES = (*MEASURES, "f1.shuffled", "correlation.shuffled")
SCORE_SCHEMA = pa.schema(
    {
        "feature": pa.int32(),
        "control": pa.string(),  # empty, or `random`: a random direction's
        **dict.fromkeys(COUNTS, pa.int64()),
        **dict.fromkeys(SCORES, pa.float64()),
    }
)


@dataclass(frozen=True, repr=False)
class Patterns(Shown):
    """All patterns of a run, and how well they predict."""

    patterns: Mapping[int, Sequence[Pattern]]
    """Patterns by feature, those of most contexts first; of features that have any."""
    texts: Mapping[int, Sequence[str]]
    """The same for a reader."""
    scores: pa.Table
    """`SCORE_SCHEMA`"""
    about: Mapping[str, Any]
    """Content of `patterns.json`."""

    @classmethod
    def of(
        cls, patterns: Sequence[Pattern], texts: Sequence[str], scores: pa.Table, about: Mapping[str, Any]
    ) -> "Patterns":
        """Patterns by feature, each with its text."""
        own: dict[int, list[Pattern]] = {}
        in_words: dict[int, list[str]] = {}
        for each, text in zip(patterns, texts, strict=True):
            own.setdefault(each.feature, []).append(each)
            in_words.setdefault(each.feature, []).append(text)
        return cls(own, in_words, scores, about)

    def shown_facts(self) -> dict[str, object]:
        return {"": f"{sum(map(len, self.patterns.values())):,} of {len(self.patterns):,} features"}

    def values(self, name: str) -> Floats:
        """A column of `scores` of every feature, `[d_sae]`; with `.random` after it of the random directions. NaN where
        it was not measured.
        """
        column, control = (name.removesuffix(".random"), "random") if name.endswith(".random") else (name, "")
        wanted = self.scores["control"].to_numpy() == control
        return self.scores[column].to_numpy().astype(np.float64)[wanted]


def read_patterns(run: str | Path) -> Patterns | None:
    """The patterns of a run's features; None if there are none.

    Raises:
        FormatError: they are there, but are not what `endwise patterns` writes, or the SAE has other weights now.
    """
    run = expanded(run)
    folder = run / PATTERNS_FOLDER
    about_file = folder / "patterns.json"
    if not about_file.exists():
        return None
    try:
        about = read_format(about_file, PATTERNS_FORMAT)
        scores = parquet.read_table(folder / "scores.parquet").select(SCORE_SCHEMA.names).cast(SCORE_SCHEMA)
        rows = parquet.read_table(folder / "patterns.parquet").cast(PATTERN_SCHEMA).to_pylist()
        found = Patterns.of([_pattern(row) for row in rows], [str(row["text"]) for row in rows], scores, about)
        own = [row for row, control in enumerate(scores["control"].to_pylist()) if not control]
        if scores["feature"].to_pylist()[: len(own)] != own or len(own) != about["d_sae"]:
            raise ValueError(f"scores.parquet must have a row for each of {about['d_sae']} features, in order")
        weights = about["settings"]["weights"]
    except (OSError, pa.ArrowException, FormatError, KeyError, TypeError, ValueError) as error:
        raise unreadable(folder, error) or FormatError(
            f"{folder} is not what endwise patterns writes ({error}). Make them again with --again."
        ) from None
    check_same_weights(run, weights, "explained by patterns", f"Make them again with --again, or move {folder} away.")
    return found


def write_patterns(run: Path, made: Patterns) -> None:
    """Each file whole or not at all; the parts go.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    folder = run / PATTERNS_FOLDER
    with suppress(OSError):
        (folder / "patterns.json").unlink()
    rows = [(each, text) for f in made.patterns for each, text in zip(made.patterns[f], made.texts[f], strict=True)]
    write_parquet(pattern_table([each for each, _ in rows], [text for _, text in rows]), folder / "patterns.parquet")
    write_parquet(made.scores, folder / "scores.parquet")
    write_json(folder / "patterns.json", {"format": PATTERNS_FORMAT, **made.about})
    shutil.rmtree(folder / "parts", ignore_errors=True)


def pattern_table(patterns: Sequence[Pattern], texts: Sequence[str] | None = None) -> pa.Table:
    columns = {
        "feature": [each.feature for each in patterns],
        "tokens": [[sorted(label or ()) for label in each.labels] for each in patterns],
        "activation": [each.activation for each in patterns],
        "contexts": [each.contexts for each in patterns],
        "text": texts or [None] * len(patterns),
    }
    return pa.table(columns, schema=PATTERN_SCHEMA)


def _pattern(row: Mapping[str, Any]) -> Pattern:
    labels = tuple(frozenset(tokens) or None for tokens in row["tokens"])
    return Pattern(row["feature"], labels, float(row["activation"]), int(row["contexts"]))


@dataclass(frozen=True)
class PatternParts:
    """Patterns of blocks of features, on the disk as soon as they are found."""

    run: Path
    settings: Mapping[str, Any]
    """Skips patterns made with other settings."""

    def load(self, block: range) -> list[Pattern] | None:
        """Load patterns; None where there are none of these settings."""
        try:
            table = parquet.read_table(self._file(block))
            same = json.loads((table.schema.metadata or {})[b"endwise"]) == self.settings
            return [_pattern(row) for row in table.cast(PATTERN_SCHEMA).to_pylist()] if same else None
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
            return None

    def save(self, block: range, patterns: Sequence[Pattern]) -> None:
        """
        Raises:
            RunFolderError: the folder cannot be written.
        """
        about = {b"endwise": json.dumps(self.settings).encode()}
        write_parquet(pattern_table(patterns).replace_schema_metadata(about), self._file(block))

    def _file(self, block: range) -> Path:
        return self.run / PATTERNS_FOLDER / "parts" / f"{block.start}-{block.stop}.parquet"
