"""`find_patterns`: patterns of the features of finished runs and how well they predict, resumed where stopped."""

import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from endwise.common.counting import counting
from endwise.common.errors import ConfigError, DataError, FormatError, Interrupted
from endwise.common.files import expanded, held, read_format
from endwise.common.stopping import polite_stop
from endwise.config.run import RunConfig
from endwise.dictionaries import SAE
from endwise.evaluation.finished import load_sae, sharing_groups
from endwise.evaluation.provenance import corpora_of_runs, heldout_fingerprint, model_of
from endwise.features.harvest.top_tokens import written
from endwise.features.patterns.files import (
    MEASURES,
    PATTERNS_FOLDER,
    PATTERNS_FORMAT,
    SCORE_SCHEMA,
    PatternParts,
    Patterns,
    read_patterns,
    write_patterns,
)
from endwise.features.patterns.sampling import Advance, ContextSample, Half, sample
from endwise.features.patterns.scores import Predicted, PredictedSums, exchanged
from endwise.features.patterns.settings import PatternSettings
from endwise.features.patterns.short_texts import ShortTexts
from endwise.features.patterns.substitution import Substitutes, generalised
from endwise.features.patterns.suffixes import shortest_suffixes
from endwise.features.patterns.trie import Label, Pattern, Tries, merged
from endwise.features.patterns.watching import Watched
from endwise.models.language_model import LanguageModel
from endwise.models.sites import Place
from endwise.runs.folder import RunFolder
from endwise.tokens import Corpora, Corpus

BLOCK = 128
"""Features that are looked at together, and saved."""
SHOWN = 6
"""Tokens of one place that a pattern's text names."""


def find_patterns(
    runs: Sequence[str | Path],
    *,
    tokens: int | None = None,
    settings: PatternSettings | None = None,
    again: bool = False,
    model: LanguageModel | None = None,
    corpora: Corpora | None = None,
    display: bool = False,
    block: int = BLOCK,
) -> dict[Path, Patterns]:
    """Make patterns of every feature of finished runs from the first half of held-out text, score them on the second,
    and write `patterns/` into each run's folder. What was made with the same settings is read, what was stopped is
    resumed.

    Args:
        tokens: held-out tokens, instead of each recipe's `evaluation.tokens`.
        again: make whatever was made before.
        model: a loaded one to use instead of the recipes'.
        corpora: loaded token sequences, likewise.
        display: show progress on stderr.
        block: features that are looked at together, and kept as soon as their patterns are found.

    Raises:
        ConfigError: fewer than two sequences, which cannot be halved.
        RunFolderError: a folder is no run, holds no trained SAE yet, or another process is at it.
        DataError: the text is too short, or a latent is not finite.
        Interrupted: the user asked to stop; what was found is saved.
    """
    settings = settings or PatternSettings()
    configs = {path: RunFolder.config_of_trained(path) for path in map(expanded, runs)}
    wanted = {path: _settings(path, config, tokens, settings, corpora) for path, config in configs.items()}
    found = {} if again else {path: _made_before(path, wanted[path]) for path in configs}
    results = {path: old for path, old in found.items() if old is not None}
    for paths in sharing_groups({path: each for path, each in configs.items() if path not in results}, tokens):
        group = {path: configs[path] for path in paths}
        own = model_of(group, model)
        text = corpora_of_runs(group, own, corpora, evaluation_tokens=wanted[paths[0]]["tokens"]).heldout
        for path, config in group.items():
            made = Making(own, own.place(config.place), load_sae(path, config, own), text, settings, wanted[path])
            with held(
                path / f".{PATTERNS_FOLDER}.lock", f"Another process makes patterns of {path}. Wait for it to finish."
            ):
                results[path] = made.made(path, config.evaluation.batch, display, block)
                write_patterns(path, results[path])
    return {path: results[path] for path in configs}


def _settings(
    path: Path, config: RunConfig, tokens: int | None, settings: PatternSettings, corpora: Corpora | None
) -> dict[str, Any]:
    """Equal ones give equal patterns."""
    return {
        **settings.to_json(),
        "tokens": tokens or config.evaluation.tokens,
        "weights": RunFolder(path).weights_digest(),
        "heldout": heldout_fingerprint(path, corpora),
    }


def _made_before(path: Path, settings: Mapping[str, Any]) -> Patterns | None:
    """Patterns of other settings, weights or text are not used."""
    with suppress(FileNotFoundError, FormatError, ValueError):
        if read_format(path / PATTERNS_FOLDER / "patterns.json", PATTERNS_FORMAT).get("settings") == settings:
            return read_patterns(path)
    return None


@dataclass(frozen=True)
class Making:
    """The patterns of one SAE on one text."""

    model: LanguageModel
    place: Place
    sae: SAE
    corpus: Corpus
    settings: PatternSettings
    record: Mapping[str, Any]
    """All that the patterns depend on."""

    def made(self, run: Path, batch: int, display: bool = False, block: int = BLOCK) -> Patterns:
        """Make and score them.

        Args:
            run: the folder in which those of each block are kept as soon as they are found.
            batch: sequences that are read at a time.
            block: features that are looked at together.
        """
        first, second = self._halves(batch)
        settings = self._fitting(first)
        watched = Watched.of(self.model, self.place, self.sae, settings.random, settings.seed)
        with counting("contexts of features", len(first.sequences), display) as advance:
            found = sample(watched, first, settings, advance)
        texts = ShortTexts(found.watched, first.before)
        with counting("patterns", found.watched.count, display, unit="features") as advance:
            patterns = self._patterns(PatternParts(run, self.record), found, texts, settings, block, advance)
        own = [each for each in patterns if each.feature < self.sae.d_sae]
        of = exchanged(np.unique([each.feature for each in own]).astype(np.int64), found.watched.count, settings.seed)
        with counting("predicting", len(second.sequences), display) as advance:
            predicted = self._predict(found.watched, patterns, second, of, advance)
        scores = score_table(found, patterns, *predicted, settings)
        texts_of_own = [_text(each.labels, self.model) for each in own]
        return Patterns.of(own, texts_of_own, scores, self._about(first, second, predicted[0].tokens))

    def _halves(self, batch: int) -> tuple[Half, Half]:
        sequences = self.record["tokens"] // self.corpus.context
        if sequences < 2:
            raise ConfigError(
                f"Patterns are made from one half of the held-out sequences and scored on the other, so they take at "
                f"least two of {self.corpus.context} tokens: raise tokens from {self.record['tokens']} to "
                f"{2 * self.corpus.context} or more."
            )
        if len(self.corpus) < sequences:
            raise DataError(
                f"{self.corpus.name} has {len(self.corpus)} sequences of {self.corpus.context} held-out tokens, fewer "
                f"than the {sequences} asked for. Lower tokens to {self.corpus.tokens}."
            )
        half = (sequences + 1) // 2
        return Half(self.corpus, range(half), batch), Half(self.corpus, range(half, sequences), batch)

    def _fitting(self, text: Half) -> PatternSettings:
        """Adapt the settings: suffixes no longer than the model takes, behind what stands before them."""
        most = (self.model.context or self.settings.longest) - len(text.before)
        return replace(self.settings, longest=max(1, min(self.settings.longest, most)))

    def _patterns(
        self,
        parts: PatternParts,
        found: ContextSample,
        texts: ShortTexts,
        settings: PatternSettings,
        block: int,
        advance: Advance,
    ) -> list[Pattern]:
        """Patterns of everything watched, block by block; those that were found before are read.

        Raises:
            Interrupted: the user asked to stop.
        """
        substitutes = Substitutes.of(self.model, found.unigrams, settings)
        patterns: list[Pattern] = []
        with polite_stop() as asked_to_stop:
            for start in range(0, found.watched.count, block):
                features = range(start, min(start + block, found.watched.count))
                known = parts.load(features)
                if known is None:
                    known = patterns_of(features, found, texts, substitutes, settings)
                    parts.save(features, known)
                patterns += known
                advance(len(features))
                if asked_to_stop():
                    again = f"endwise patterns {shlex.quote(str(parts.run))}"
                    raise Interrupted(f"Stopped; what was found is saved. Resume with the same command: {again}")
        return patterns

    def _predict(
        self, watched: Watched, patterns: Sequence[Pattern], text: Half, of: NDArray[np.int64], advance: Advance
    ) -> tuple[Predicted, Predicted]:
        """Sums over the second half, with patterns of a feature's own and with another's."""
        tries = Tries(patterns, self.model.vocab_size)
        own, others = PredictedSums(watched.count), PredictedSums(watched.count, of)
        for numbers, batch in text.batches(self.model, advance):
            read, mask = watched.read(batch.tokens, batch.mask)
            firings = watched.firings(read, mask, numbers)
            matches = tries.matches(batch.tokens.cpu().numpy(), text.first)
            for sums in (own, others):
                sums.add(firings, matches, mask.flatten().cpu().numpy())
        return own.result(), others.result()

    def _about(self, first: Half, second: Half, tokens: int) -> dict[str, Any]:
        return {
            "model": self.model.name,
            "site": self.place.name,
            "d_sae": self.sae.d_sae,
            "corpus": self.corpus.describe(),
            "sequences": [len(first.sequences), len(second.sequences)],
            "predicted_tokens": tokens,
            "settings": self.record,
        }


def patterns_of(
    features: range, found: ContextSample, texts: ShortTexts, substitutes: Substitutes, settings: PatternSettings
) -> list[Pattern]:
    """Patterns of some of what is watched, by feature, those of most contexts first."""
    some = slice(*np.searchsorted(found.features, [features.start, features.stop]))
    suffixes = shortest_suffixes(
        texts, found.features[some], found.activations[some], found.windows[some, -settings.longest :], settings.kept
    )
    made = [pattern for each in suffixes for pattern in generalised(texts, each, substitutes, settings)]
    return merged(made)


def score_table(
    found: ContextSample, patterns: Sequence[Pattern], own: Predicted, others: Predicted, settings: PatternSettings
) -> pa.Table:
    """`SCORE_SCHEMA`: of every feature, and of the random directions that were given a threshold."""
    count, d_sae = found.watched.count, found.watched.sae.d_sae
    number = np.arange(count)
    kept = (number < d_sae) | (found.firings > 0)
    scored = (found.firings >= settings.least) & (own.fired >= settings.least)
    shuffled = scored & (number < d_sae)
    of = np.array([each.feature for each in patterns], dtype=np.int64)
    served = np.bincount(of, [each.contexts for each in patterns], minlength=count)
    measures = {name: np.where(scored, getattr(own, name), np.nan) for name in MEASURES[:-1]}
    columns = {
        "feature": np.where(number < d_sae, number, number - d_sae),
        "control": np.where(number < d_sae, "", "random"),
        "firings": found.firings,
        "sampled": np.bincount(found.features, minlength=count),
        "served": served.astype(np.int64),
        "patterns": np.bincount(of, minlength=count),
        **{name: getattr(own, name) for name in ("fired", "predicted", "both")},
        **measures,
        "explained": np.where(scored, own.f1 >= settings.explained, np.nan),
        "f1.shuffled": np.where(shuffled, others.f1, np.nan),
        "correlation.shuffled": np.where(shuffled, others.correlation, np.nan),
    }
    return pa.table({name: pa.array(values[kept], from_pandas=True) for name, values in columns.items()}).cast(
        SCORE_SCHEMA
    )


def _text(labels: tuple[Label, ...], model: LanguageModel) -> str:
    """`[ the| a][any][ cat]`, of each place the tokens with the lowest numbers."""
    return "".join(f"[{'any' if label is None else _names(label, model)}]" for label in labels)


def _names(label: frozenset[int], model: LanguageModel) -> str:
    some = sorted(label)[:SHOWN]
    return "|".join([*(written(model, token) for token in some), *(["…"] if len(some) < len(label) else [])])
