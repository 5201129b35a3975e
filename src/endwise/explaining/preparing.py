"""Path from runs' harvests to the texts that will be shown and asked about, before anything is paid.

Features to explain are given as `all`, `random:N`, `top:N`, or numbers and ranges.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from endwise.common.errors import ConfigError, DataError, RunFolderError
from endwise.common.files import expanded
from endwise.common.seeds import numpy_stream
from endwise.explaining.rendering import Writer
from endwise.explaining.samples import ScoringSample, Sizes, Text, pool_features, pool_of, random_sample, sample_of
from endwise.explaining.settings import Settings
from endwise.features.harvest.results import Harvest, open_harvest
from endwise.runs.folder import RunFolder

Say = Callable[[str], None]
"""Says a sentence to the user."""


def silent(text: str) -> None:
    """Say it to nobody."""


SPARE = 2
"""Candidates that are read for each feature that is wanted, since some have too few texts."""
_COUNTED = re.compile(r"(random|top):(\d{1,9})", re.ASCII)
_RANGE = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?", re.ASCII)
MOST_NAMED = 10_000_000


@dataclass(frozen=True)
class Choice:
    """A `--features` that was understood."""

    how: Literal["all", "random", "top", "named"]
    count: int | None = None
    """Number of features, for `random` and `top`."""
    named: tuple[int, ...] = ()

    def candidates(self, harvest: Harvest, seed: int) -> list[int]:
        """List features in the order in which they are taken, most wanted first; only named ones may never have fired.

        Raises:
            ConfigError: a named one does not exist, or importance was not measured.
        """
        if self.how == "named":
            if self.named[-1] >= harvest.d_sae:
                raise ConfigError(
                    f"--features names {max(self.named)}, but {harvest.folder.parent} has {harvest.d_sae:,} features, "
                    f"numbered from 0. Name others."
                )
            return list(self.named)
        alive = np.flatnonzero(harvest.firings > 0)
        if self.how == "all":
            return alive.tolist()
        if self.how == "random":
            return numpy_stream(seed, "features to explain").permutation(alive).tolist()
        importance = harvest.column("ce_second")[alive].astype(np.float64)
        if np.isnan(importance).all():
            raise ConfigError(
                f"--features top:N takes the most important, but the harvest of {harvest.folder.parent} has no "
                "importance. Measure it (endwise importance RUN), harvest again (endwise harvest --again RUN), or take "
                "random:N."
            )
        order = np.lexsort((alive, -np.nan_to_num(importance, nan=-np.inf)))
        return alive[order].tolist()


def parse_features(text: str) -> Choice:
    """
    Raises:
        ConfigError: it is none of the forms.
    """
    if text == "all":
        return Choice("all")
    if counted := _COUNTED.fullmatch(text):
        count = int(counted[2])
        if count:
            return Choice("random" if counted[1] == "random" else "top", count)
    ranges = [_RANGE.fullmatch(part.strip()) for part in text.split(",")]
    if not all(ranges):
        raise ConfigError(
            f"--features must be all, random:N, top:N, or numbers and ranges such as 1,5,10-20; given {text!r:.80}."
        )
    named: set[int] = set()
    for first, last in ((int(each[1]), int(each[2] or each[1])) for each in ranges if each):
        if last < first or last - first >= MOST_NAMED:
            raise ConfigError(f"--features {first}-{last} is no range of at most {MOST_NAMED:,} features. Correct it.")
        named.update(range(first, last + 1))
    return Choice("named", named=tuple(sorted(named)))


@dataclass(frozen=True)
class PreparedRun:
    """Questions that will be asked about one run."""

    run: Path
    harvest: Harvest
    writer: Writer
    samples: tuple[ScoringSample, ...]
    """Samples by feature, ascending."""
    random: tuple[ScoringSample, ...]
    """Random texts in the place of some of these features."""
    left_out: dict[int, str]
    """Features that were to be explained and cannot be, with the reason."""

    def first(self, count: int, order: Sequence[int]) -> "PreparedRun":
        """Keep only the first `count` features of an order."""
        kept = set(order[:count])
        samples, random = (tuple(s for s in each if s.feature in kept) for each in (self.samples, self.random))
        return replace(self, samples=samples, random=random)


def prepare(runs: Iterable[Path], settings: Settings, say: Say = silent) -> list[PreparedRun]:
    """Every run's features and texts; of `random:N` and `top:N` equally many in each run.

    Raises:
        RunFolderError: a folder is no run, or was not harvested.
        FormatError: a harvest cannot be read.
        ConfigError: `settings.features` does not fit.
        DataError: no feature of a run has texts enough.
    """
    choice = parse_features(settings.features)
    found = [_prepared(run, choice, settings) for run in dict.fromkeys(map(expanded, runs))]
    if not found:
        raise RunFolderError("There is no run to explain. Give run folders.")
    for each, _ in found:
        if not each.samples:
            why = next(iter(each.left_out.values()), "none ever fired")
            raise DataError(
                f"No feature of {each.run} can be explained: {why}. Harvest more text or more contexts, choose other "
                "features, or lower --scored."
            )
    least = min(len(each.samples) for each, _ in found)
    if choice.count is not None:
        if least < choice.count:
            say(f"{least:,} features of each run are explained, not {choice.count:,}: no more have enough texts.")
        return [each.first(least, order) for each, order in found]
    return [each for each, _ in found]


def _prepared(run: Path, choice: Choice, settings: Settings) -> tuple[PreparedRun, list[int]]:
    """Prepare a run with the features that have enough texts, those first that are wanted most."""
    RunFolder.open(run)
    harvest = open_harvest(run)
    candidates = choice.candidates(harvest, settings.seed)
    count = len(candidates) if choice.count is None else choice.count
    sizes = Sizes(settings.shown, settings.scored // 2)
    of_pool = pool_features(harvest, settings.seed)
    samples: dict[int, ScoringSample] = {}
    left_out: dict[int, str] = {}
    pool: list[Text] = []
    start = 0
    while len(samples) < count and start < len(candidates):
        part = candidates[start : start + SPARE * count]
        start += len(part)
        contexts = dict(harvest.all_contexts(part if pool else [*part, *of_pool]))
        pool = pool or pool_of(contexts, of_pool, settings.seed)
        for feature in part:
            if len(samples) == count:
                break
            sample = sample_of(feature, contexts.get(feature, ()), pool, sizes, settings.seed)
            if isinstance(sample, ScoringSample):
                samples[feature] = sample
            else:
                left_out[feature] = sample
    random = (random_sample(feature, pool, sizes, settings.seed) for feature in list(samples)[: settings.random])
    prepared = PreparedRun(
        run,
        harvest,
        Writer(harvest.vocabulary, harvest.written),
        tuple(samples[feature] for feature in sorted(samples)),
        tuple(each for each in random if each is not None),
        left_out,
    )
    return prepared, list(samples)
