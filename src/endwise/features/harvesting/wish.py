"""What is asked of a harvest: which text, how much of it, and what to keep."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from endwise.errors import ConfigError, DataError
from endwise.features.harvesting.gathering import Kept
from endwise.features.importance import read_measured
from endwise.features.same_weights import weights_digest
from endwise.language_model import LanguageModel
from endwise.run_config import DataConfig, RunConfig
from endwise.tokens import Corpora, Corpus, corpora_for

Text = Literal["heldout", "train"] | Path


@dataclass(frozen=True)
class Wish:
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
        """Equal settings give equal files."""
        digest = weights_digest(path)
        return {
            "tokens": self.tokens if isinstance(self.text, Path) else self.tokens or config.evaluation.tokens,
            "text": str(self.text),
            "batch": config.evaluation.batch,
            "kept": asdict(self.kept),
            "importance": _source_of_importance(path, digest, self.importance),
            "weights": digest,
        }

    def corpus(self, model: LanguageModel, config: RunConfig, corpora: Corpora | None) -> Corpus:
        tokens = self.tokens or config.evaluation.tokens
        if isinstance(self.text, Path):
            return _own_corpus(model, config.data, self.text, self.tokens)
        corpora = corpora or corpora_for(
            model,
            config.data,
            training_tokens=max(config.training.tokens, tokens if self.text == "train" else 0),
            evaluation_tokens=tokens if self.text == "heldout" else config.evaluation.tokens,
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


def _source_of_importance(path: Path, digest: str, wanted: bool) -> str:
    measured = read_measured(path)
    if measured is not None and measured.settings.get("weights") == digest:
        return "measured"
    return "attributed" if wanted else "none"


def _own_corpus(model: LanguageModel, data: DataConfig, source: Path, tokens: int | None) -> Corpus:
    """The whole of a text of one's own, packed as the recipe's: as the held-out side, which is not divided."""
    context = data.context or 1
    own = DataConfig.build({**data.model_dump(), "heldout": str(source), "heldout_split": None}, "the harvest's text")
    return corpora_for(model, own, training_tokens=context, evaluation_tokens=tokens or context).heldout
