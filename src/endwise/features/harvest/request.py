"""Requests for a harvest: which text, how much of it, and what to keep."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from endwise.common.digests import of_file, of_files
from endwise.common.errors import ConfigError, DataError
from endwise.common.files import expanded, there_is
from endwise.common.remedies import reason, remedy
from endwise.config.run import DataConfig, RunConfig
from endwise.evaluation.provenance import corpora_of_runs
from endwise.features.harvest.gathering import Kept
from endwise.features.importance_table import read_measured
from endwise.models.language_model import LanguageModel
from endwise.runs.folder import RunFolder
from endwise.tokens import Corpora, Corpus, corpora_for
from endwise.tokens.folders import files_below
from endwise.tokens.loading import EMBEDDED
from endwise.tokens.sources import commit_on_hub

Text = Literal["heldout", "train"] | Path


@dataclass(frozen=True)
class Request:
    tokens: int | None
    text: Text
    kept: Kept
    importance: bool
    shards: int
    shard: int

    def __post_init__(self) -> None:
        if not 0 <= self.shard < self.shards:
            raise ConfigError(
                f"shard must be at least 0 and below shards; given shard {self.shard} of {self.shards}. Change one."
            )

    def settings(self, path: Path, config: RunConfig) -> dict[str, Any]:
        """Equal settings give equal files.

        Raises:
            DataError: a text of one's own cannot be read.
        """
        digest = RunFolder(path).weights_digest()
        own = {"content": _content(self.text, config.data)} if isinstance(self.text, Path) else {}
        return {
            **own,
            "tokens": self.tokens if isinstance(self.text, Path) else self.tokens or config.evaluation.tokens,
            "text": str(self.text),
            "batch": config.evaluation.batch,
            "kept": asdict(self.kept),
            "importance": _source_of_importance(path, digest, self.importance),
            "weights": digest,
        }

    def fingerprint(self, path: Path, corpora: Corpora | None) -> str | None:
        """Return `Corpus.fingerprint` of the text that is wanted, where it is a run's own or of loaded corpora."""
        if isinstance(self.text, Path):
            return None
        return RunFolder(path).fingerprint(self.text) if corpora is None else getattr(corpora, self.text).fingerprint()

    def corpus(self, model: LanguageModel, configs: Mapping[Path, RunConfig], corpora: Corpora | None) -> Corpus:
        """
        Raises:
            RunFolderError, DataError: see `corpora_of_runs`.
        """
        config = next(iter(configs.values()))
        tokens = self.tokens or config.evaluation.tokens
        if isinstance(self.text, Path):
            return _own_corpus(model, config.data, self.text, self.tokens)
        corpora = corpora_of_runs(
            configs,
            model,
            corpora,
            training_tokens=tokens if self.text == "train" else 0,
            evaluation_tokens=tokens if self.text == "heldout" else config.evaluation.tokens,
            side=self.text,
        )
        return corpora.heldout if self.text == "heldout" else corpora.train

    def sequences(self, corpus: Corpus, config: RunConfig) -> int:
        whole = self.tokens is None and isinstance(self.text, Path)
        tokens = corpus.tokens if whole else self.tokens or config.evaluation.tokens
        sequences = tokens // corpus.context
        if not sequences:
            raise ConfigError(
                f"A harvest takes at least one sequence of {corpus.context} tokens; {tokens} were asked for. Raise "
                "tokens."
            )
        if len(corpus) < sequences:
            raise DataError(
                f"{corpus.name} has {len(corpus)} sequences of {corpus.context} tokens, fewer than the {sequences} "
                f"asked for. Lower tokens to {corpus.tokens}, or take other text (--train, --corpus)."
            )
        return sequences


def _content(text: Path, data: DataConfig) -> str | None:
    """The digest of a file or a folder; of a data set on the hub its commit, None where that cannot be learnt."""
    place, name = expanded(str(text)), str(text)
    if name == EMBEDDED:
        return None
    try:
        if there_is(place):
            return of_file(place) if place.is_file() else of_files(files_below(place), place)
    except OSError as error:
        raise DataError(f"Cannot read {place}: {reason(error)}. {remedy(error)}") from None
    return commit_on_hub(name, data.revision if name == data.source else None)


def _source_of_importance(path: Path, digest: str, wanted: bool) -> str:
    measured = read_measured(path)
    own_text = RunFolder(path).fingerprint("heldout")
    known = {} if measured is None else measured.settings
    if measured is not None and (known.get("weights"), known.get("heldout")) == (digest, own_text):
        return "measured"
    return "attributed" if wanted else "none"


def _own_corpus(model: LanguageModel, data: DataConfig, source: Path, tokens: int | None) -> Corpus:
    """The whole of a text of one's own, packed as the recipe's: as the held-out side, which is not divided."""
    context = data.context or 1
    own = DataConfig.build({**data.model_dump(), "heldout": str(source), "heldout_split": None}, "the harvest's text")
    return corpora_for(model, own, training_tokens=context, evaluation_tokens=tokens or context).heldout
