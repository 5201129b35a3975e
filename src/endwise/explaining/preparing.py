"""From runs' harvests to the texts that will be shown and asked about, before anything is paid."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from endwise.common.errors import DataError, RunFolderError
from endwise.common.files import expanded
from endwise.explaining.rendering import Writer
from endwise.explaining.samples import ScoringSample, Sizes, Text, pool_features, pool_of, random_sample, sample_of
from endwise.explaining.selecting import Choice, parse_features
from endwise.explaining.settings import Settings
from endwise.features.harvest.results import Context, Harvest, open_harvest
from endwise.runs.folder import RunFolder

Say = Callable[[str], None]
"""Tells the user a sentence."""


def unsaid(text: str) -> None:
    """Tells nobody."""


SPARE = 2
"""Candidates that are read for each feature that is wanted, since some have too few texts."""


@dataclass(frozen=True)
class PreparedRun:
    """What will be asked about one run."""

    run: Path
    harvest: Harvest
    writer: Writer
    samples: tuple[ScoringSample, ...]
    """By feature, ascending."""
    random: tuple[ScoringSample, ...]
    """Random texts in the place of some of these features."""
    left_out: dict[int, str]
    """Features that were to be explained and cannot be, with the reason."""

    def first(self, count: int, order: Sequence[int]) -> "PreparedRun":
        """Only the first `count` features of an order."""
        kept = set(order[:count])
        samples = tuple(each for each in self.samples if each.feature in kept)
        random = tuple(each for each in self.random if each.feature in kept)
        return PreparedRun(self.run, self.harvest, self.writer, samples, random, self.left_out)


def prepare(runs: Iterable[Path], settings: Settings, say: Say = unsaid) -> list[PreparedRun]:
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
            say(f"{least:,} features of each run are explained, not {choice.count:,}: no more have texts enough.")
        return [each.first(least, order) for each, order in found]
    return [each for each, _ in found]


def _prepared(run: Path, choice: Choice, settings: Settings) -> tuple[PreparedRun, list[int]]:
    """With the features that have texts enough, those first that are wanted most."""
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
        contexts = _contexts(harvest, part if pool else [*part, *of_pool])
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


def _contexts(harvest: Harvest, features: Sequence[int]) -> dict[int, list[Context]]:
    return dict(harvest.all_contexts(features))
