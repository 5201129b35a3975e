"""Results that a harvest keeps of a run's features: the folder `harvest/` in the run's own.

harvest.json        what was harvested and from which text; written last, so a folder that has it is whole
features.parquet    one row per feature, in their order
contexts.parquet    the texts in which features fire, sorted by feature, then group, then rank, in many row groups, so
                    that one feature's texts are read without most others'
vocabulary.parquet  how each token is written by itself
tokenizer.json      how tokens are written together, where the model's tokenizer can be kept so

Positions are those of the sequences that the model saw, a prepended BOS included; sequences are numbered as in the
corpus, so that a context can be found again.
"""

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

from endwise.common.errors import FormatError, RunFolderError
from endwise.common.files import expanded, read_format
from endwise.common.remedies import unreadable
from endwise.common.showing import Shown
from endwise.common.text import printable
from endwise.features.token_texts import Decode, pieces
from endwise.runs.finding import check_same_weights
from endwise.runs.folder import RunFolder

if TYPE_CHECKING:
    from endwise.features.harvest.feature import HarvestedFeature

HARVEST_FOLDER = "harvest"
HARVEST_FORMAT = 1
TOKENIZER_FILE = "tokenizer.json"

TOP = -1
"""The group of the contexts with the greatest activations; groups 0, 1, … are quantiles, the lowest first."""

FEATURE_SCHEMA = pa.schema(
    {
        "feature": pa.int32(),
        "firings": pa.int64(),  # tokens that count at which it is not 0
        "density": pa.float64(),  # firings / tokens that count
        "mean_active": pa.float32(),  # over its firings; null where it never fired
        "max_active": pa.float32(),
        "histogram": pa.list_(pa.int64()),  # firings by activation, in the bins of `histogram_edges`
        "histogram_edges": pa.list_(pa.float32()),  # one more than bins
        "boosted": pa.list_(pa.int32()),  # tokens whose logits its direction raises most, the greatest first
        "boosted_logits": pa.list_(pa.float32()),
        "suppressed": pa.list_(pa.int32()),
        "suppressed_logits": pa.list_(pa.float32()),
        "co_firing": pa.list_(pa.int32()),  # features that fire at the same tokens most, by `co_firing_jaccard`
        "co_firing_jaccard": pa.list_(pa.float32()),  # tokens at which both fire / at which either does
        "ce_second": pa.float64(),  # `FeatureImportance.ce_second`; null where it was not measured
        "ce": pa.float64(),  # `FeatureImportance.ce`
    }
)
CONTEXT_SCHEMA = pa.schema(
    {
        "feature": pa.int32(),
        "group": pa.int8(),  # TOP, or the quantile
        "rank": pa.int16(),  # within the group, the greatest activation first
        "sequence": pa.int64(),
        "position": pa.int32(),  # of the token at which it fires, in the sequence
        "activation": pa.float32(),  # there
        "start": pa.int32(),  # of the first token kept, in the sequence
        "tokens": pa.list_(pa.int32()),
        "activations": pa.list_(pa.float32()),  # the feature's, at each of these tokens
    }
)
VOCABULARY_SCHEMA = pa.schema({"token": pa.int32(), "text": pa.string()})


@dataclass(frozen=True, repr=False)
class Context:
    """A stretch of text around a token at which a feature fires."""

    feature: int
    group: int
    """`TOP`, or the quantile of the feature's activations that it was drawn from."""
    rank: int
    sequence: int
    position: int
    """Position of the token at which it fires, in the sequence."""
    activation: float
    start: int
    """Position of the first token kept, in the sequence."""
    tokens: tuple[int, ...]
    activations: tuple[float, ...]
    """The feature's, at each of these tokens."""

    written: Callable[[Sequence[int]], list[str]] | None = field(default=None, compare=False)
    """Writes tokens as text; None: where it comes from has no words for them."""

    @property
    def peak(self) -> int:
        """Number of the token in `tokens` at which it fires."""
        return self.position - self.start

    @property
    def texts(self) -> list[str]:
        """One text per token."""
        return [f"{token} " for token in self.tokens] if self.written is None else self.written(self.tokens)

    def __repr__(self) -> str:
        texts = self.texts
        marked = f"{''.join(texts[: self.peak])}«{texts[self.peak]}»{''.join(texts[self.peak + 1 :])}"
        where = f"sequence {self.sequence}, position {self.position}"
        return printable(f"Context(feature {self.feature}: {self.activation:.3g} at {where}: {marked!r})")


@dataclass(frozen=True, repr=False)
class Harvest(Shown):
    """A run's harvest, opened; contexts are read when asked for."""

    folder: Path
    """`RUN/harvest`"""
    about: Mapping[str, Any]
    """Content of `harvest.json`: at least `format`, `model`, `site`, `kind`, `d_sae`, `tokens` (those that count),
    `context` (positions per sequence), `corpus` (`Corpus.describe`), `weights` (SHA-256 of the SAE's), `settings`."""
    features: pa.Table
    """`FEATURE_SCHEMA`; row i is feature i."""

    @property
    def d_sae(self) -> int:
        return self.features.num_rows

    def feature(self, number: int) -> "HarvestedFeature":
        """Return one feature, which shows itself in a notebook.

        Raises:
            ConfigError: there is none of that number.
        """
        from endwise.features.harvest.feature import HarvestedFeature

        return HarvestedFeature.of(self, number)

    def shown_facts(self) -> Mapping[str, object]:
        alive, about = int((self.firings > 0).sum()), self.about
        place = {"at": about.get("site", ""), "of": about.get("model", "")}
        return {**place, "alive": f"{alive:,} of {self.d_sae:,}", "tokens": f"{about['tokens']:,}"}

    def shown_parts(self) -> Iterable[str]:
        from endwise.features.harvest.feature import overview

        return overview(self)

    def column(self, name: str) -> NDArray[Any]:
        """A column of numbers of `features`, `[d_sae]`; NaN for what is not there."""
        return self.features[name].to_numpy()

    @property
    def firings(self) -> NDArray[np.int64]:
        return self.column("firings")

    @cached_property
    def vocabulary(self) -> list[str]:
        """Texts of the tokens, by their numbers."""
        return _read(self.folder / "vocabulary.parquet", VOCABULARY_SCHEMA)["text"].to_pylist()

    def written(self, tokens: Sequence[int]) -> list[str]:
        """One text per token, which joined are what the model's tokenizer makes of them all; in a harvest without
        `tokenizer.json`, each as it is written by itself.
        """
        if self._decode is None:
            return [self.vocabulary[token] for token in tokens]
        return pieces(tokens, self._decode, self.vocabulary.__getitem__)

    @cached_property
    def _decode(self) -> Decode | None:
        from tokenizers import Tokenizer

        path = self.folder / TOKENIZER_FILE
        if not path.exists():
            return None
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # noqa: BLE001  which is all that it raises
            raise _broken(path, error) from None
        return lambda tokens: tokenizer.decode(list(tokens), skip_special_tokens=False)

    def contexts(self, feature: int) -> list[Context]:
        """One feature's, by group and rank; none where it never fired."""
        return next((contexts for _, contexts in self.all_contexts([feature])), [])

    def all_contexts(self, features: Sequence[int] | None = None) -> Iterator[tuple[int, list[Context]]]:
        """Each feature that fired with its contexts, ascending, without holding more than a row group of them.

        Args:
            features: only these.
        """
        wanted = None if features is None else {int(feature) for feature in features}
        path = self.folder / "contexts.parquet"
        try:
            with parquet.ParquetFile(path) as file:
                yield from _by_feature(_rows(file, wanted), self.written)
        except (OSError, pa.ArrowException) as error:
            raise unreadable(path, error) or _broken(path, error) from None


def read_harvest(run: str | Path) -> Harvest | None:
    """A run's harvest; None if there is none.

    Raises:
        FormatError: it is there, but is not what `endwise harvest` writes.
    """
    folder = expanded(run) / HARVEST_FOLDER
    about_file = folder / "harvest.json"
    if not about_file.exists():
        return None
    try:
        about = read_format(about_file, HARVEST_FORMAT)
        d_sae = int(about["d_sae"])
        if type(about["tokens"]) is not int:
            raise TypeError(f"tokens must be a number, not {about['tokens']!r:.40}")
    except (FormatError, KeyError, TypeError, ValueError) as error:
        raise _broken(about_file, error) from None
    features = _read(folder / "features.parquet", FEATURE_SCHEMA)
    if features["feature"].to_pylist() != list(range(d_sae)):
        raise _broken(folder / "features.parquet", f"it must have a row for each of {d_sae} features, in order")
    return Harvest(folder, about, features)


def open_harvest(run: Path) -> Harvest:
    """A run's harvest, which must be there and of the SAE as it is now.

    Raises:
        RunFolderError: there is none, or no run.
        FormatError: see `read_harvest`; or the SAE has other weights now.
    """
    harvest = read_harvest(run)
    name = shlex.quote(str(run))
    if harvest is None:
        RunFolder.open(run)
        raise RunFolderError(f"{run} was not harvested yet. Harvest it: endwise harvest {name}")
    again = f"Harvest again: endwise harvest --again {name}"
    check_same_weights(run, harvest.about.get("weights"), "harvested", again)
    return harvest


def _read(path: Path, schema: pa.Schema) -> pa.Table:
    try:
        return parquet.read_table(path).select(schema.names).cast(schema)
    except (OSError, KeyError, pa.ArrowException) as error:
        raise unreadable(path, error) or _broken(path, error) from None


def _rows(file: parquet.ParquetFile, wanted: set[int] | None) -> Iterator[Mapping[str, Any]]:
    for group in range(file.num_row_groups):
        span = file.metadata.row_group(group).column(0).statistics
        if wanted is not None and span is not None and not any(span.min <= each <= span.max for each in wanted):
            continue
        for row in file.read_row_group(group, columns=CONTEXT_SCHEMA.names).to_pylist():
            if wanted is None or row["feature"] in wanted:
                yield row


def _by_feature(
    rows: Iterator[Mapping[str, Any]], written: Callable[[Sequence[int]], list[str]]
) -> Iterator[tuple[int, list[Context]]]:
    kept: list[Context] = []
    for row in rows:
        lists: dict[str, Any] = {name: tuple(row[name]) for name in ("tokens", "activations")}
        context = Context(**{**row, **lists}, written=written)
        if kept and kept[0].feature != context.feature:
            yield kept[0].feature, kept
            kept = []
        kept.append(context)
    if kept:
        yield kept[0].feature, kept


def _broken(path: Path, why: object) -> FormatError:
    run = path.parent.parent
    return FormatError(
        f"{path} is not what a harvest writes ({why}). Harvest again: endwise harvest --again {shlex.quote(str(run))}"
    )
