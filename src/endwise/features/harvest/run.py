"""`harvest`: one pass over the text for all runs of a model, from wherever each was interrupted."""

import shlex
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from endwise.common.counting import counting
from endwise.common.errors import ConfigError, DataError, Interrupted
from endwise.common.files import expanded, held, remove_partials
from endwise.common.processes import joined
from endwise.common.showing import Several
from endwise.common.stopping import polite_stop
from endwise.config.run import RunConfig
from endwise.dictionaries import SAE
from endwise.evaluation.finished import load_sae, sharing_groups
from endwise.evaluation.provenance import model_of
from endwise.features.harvest.files import write_harvest
from endwise.features.harvest.gathering import Gathered, Kept, share_of_tokens
from endwise.features.harvest.parts import Parts, Saver
from endwise.features.harvest.request import Request, Text
from endwise.features.harvest.results import HARVEST_FORMAT, Harvest, read_harvest
from endwise.features.importance_table import FeatureImportance, read_measured
from endwise.models.language_model import LanguageModel
from endwise.models.sites import Place
from endwise.runs.finding import Paths, trained_runs
from endwise.runs.folder import RunFolder
from endwise.tokens import Corpora, Corpus

LONG_TEXT, LONG_TEXT_EVERY = 64, 2
"""Batches of a text beyond which the CE is attributed in every second one: it takes longer than all else."""

OF_RUN = "text_of_run"
"""The setting that holds the fingerprint of the run's own text: of one that is streamed, what is read may be more or
less than that, with a fingerprint of its own.
"""


def harvest(
    runs: Paths,
    *,
    tokens: int | None = None,
    text: Text | str = "heldout",
    kept: Kept | None = None,
    importance: bool = True,
    shards: int = 1,
    shard: int = 0,
    again: bool = False,
    model: LanguageModel | None = None,
    corpora: Corpora | None = None,
    save_seconds: float = 30.0,
    display: bool = False,
) -> dict[Path, Harvest | None]:
    """Gather what every feature of finished runs does on a text, and write `harvest/` into each run's folder.

    A run that was harvested with the same settings is read, not harvested again; one that was interrupted is resumed
    and ends in the same files.

    Args:
        runs: run folders, or folders of them; those of one model and one corpus share every clean pass.
        tokens: positions to read, in whole sequences from the text's beginning; None: each recipe's
            `evaluation.tokens`, or all of a text of one's own.
        text: the recipe's held-out or training text, or the source of another (as `data.source`).
        kept: how much to keep of every feature.
        importance: where it was not measured (`endwise importance`), attribute the CE in the same pass, which takes
            the spliced pass forward and backward besides; of a text of more than `LONG_TEXT` batches in every second.
        shards: number of even parts of the text, of which one is read.
        shard: its number, from 0; who comes last joins all. Processes of `torchrun` are shards by themselves.
        again: harvest whatever was harvested before.
        model: a loaded one to use instead of the recipes'.
        corpora: loaded token sequences, likewise.
        save_seconds: between two savings of what is gathered; 0: after every batch.
        display: show progress on stderr.

    Returns:
        For each run its harvest; None while other shards are missing.

    Raises:
        ConfigError: less than one sequence, or no such shard.
        RunFolderError: a folder is not a run, holds no trained SAE yet, or is being harvested.
        DataError: the text is too short, or a latent is not finite.
        Interrupted: the user asked to stop; what was gathered is saved.
    """
    with joined() as world:
        if world.size > 1 and shards > 1:
            raise ConfigError(f"{world.size} processes under torchrun are as many shards; leave out --shards {shards}.")
        if world.size > 1:
            shards, shard, display = world.size, world.rank, display and world.is_first
        request = Request(tokens, _read(text), kept or Kept(), importance, shards, shard)
        configs = {path: RunFolder.config_of_trained(path) for path in trained_runs(runs)}
        texts = {path: request.fingerprint(path, corpora) for path in configs}
        settings = {path: {**request.settings(path, each), OF_RUN: texts[path]} for path, each in configs.items()}
        results = {} if again else _earlier(settings, texts)
        for paths in sharing_groups({path: each for path, each in configs.items() if path not in results}, tokens):
            group = _group({path: configs[path] for path in paths}, request, settings, model, corpora)
            results |= group.harvest(save_seconds, display)
        world.total(0)  # returns when all have come here, the one that joins the shards among them
        return Several({path: results[path] or (read_harvest(path) if world.size > 1 else None) for path in configs})


def _read(text: Text | str) -> Text:
    return text if text == "heldout" or text == "train" else expanded(text)


def _earlier(
    settings: Mapping[Path, Mapping[str, Any]], texts: Mapping[Path, str | None]
) -> dict[Path, Harvest | None]:
    """The harvests of before that will do, by run."""
    found = {path: read_harvest(path) for path in settings}
    return {path: old for path, old in found.items() if old and _serves(old, settings[path], texts[path])}


def _serves(old: Harvest, settings: Mapping[str, Any], fingerprint: str | None) -> bool:
    """True if a harvest is what the settings ask for, of the text with that fingerprint; one that has importances,
    wherever from, has what is asked.
    """
    before: Mapping[str, Any] = old.about.get("settings", {})
    read = old.about.get("corpus", {}).get("fingerprint")
    if fingerprint is not None and fingerprint not in (before.get(OF_RUN), read):
        return False
    aside = {"importance": None, OF_RUN: None}
    same = {**before, **aside} == {**settings, **aside}
    return same and (before.get("importance") != "none" or settings["importance"] == "none")


@dataclass(frozen=True)
class _Harvested:
    """One run of a group."""

    config: RunConfig
    place: Place
    sae: SAE
    parts: Parts
    measured: FeatureImportance | None


def _group(
    configs: Mapping[Path, RunConfig],
    request: Request,
    settings: Mapping[Path, Mapping[str, Any]],
    model: LanguageModel | None,
    corpora: Corpora | None,
) -> "_Group":
    first = next(iter(configs.values()))
    model = model_of(configs, model)
    corpus = request.corpus(model, configs, corpora)
    sequences = request.sequences(corpus, first)
    runs = {}
    for path, config in configs.items():
        of_text = {**settings[path], "fingerprint": corpus.fingerprint(), "sequences": sequences}
        found = read_measured(path) if settings[path]["importance"] == "measured" else None
        runs[path] = _Harvested(
            config,
            model.place(config.place),
            load_sae(path, config, model),
            Parts(path, of_text, request.shards),
            None if found is None else found.importance,
        )
    return _Group(model, corpus, sequences, first.evaluation.batch, request, settings, runs)


@dataclass(frozen=True)
class _Group:
    """Runs of one model and one corpus."""

    model: LanguageModel
    corpus: Corpus
    sequences: int
    batch: int
    request: Request
    settings: Mapping[Path, Mapping[str, Any]]
    runs: Mapping[Path, _Harvested]

    def harvest(self, save_seconds: float, display: bool) -> dict[Path, Harvest | None]:
        shard, shards = self.request.shard, self.request.shards
        with ExitStack() as claims:
            for run in self.runs.values():
                claims.enter_context(run.parts.claimed(shard))
                if shards == 1:  # of processes that were killed; other shards' are left alone while they write
                    remove_partials(run.parts.folder)
            gathered = self._gather(Saver(save_seconds), display)
            for path, each in gathered.items() if shards > 1 else ():
                self.runs[path].parts.save(shard, each, self._span(shard).stop)
            return {path: self._finish(path, each) for path, each in gathered.items()}

    def _span(self, shard: int) -> range:
        """Return a shard's batches of the text."""
        batches, shards = -(-self.sequences // self.batch), self.request.shards
        return range(batches * shard // shards, batches * (shard + 1) // shards)

    @property
    def _co_firing_share(self) -> float:
        return share_of_tokens(self.sequences * self.corpus.context)

    def _empty(self, path: Path) -> Gathered:
        attribute = self.settings[path]["importance"] == "attributed"
        return Gathered(self.runs[path].sae, self.request.kept, self._co_firing_share, attribute=attribute)

    def _gather(self, saver: Saver, display: bool) -> dict[Path, Gathered]:
        """The pass over this shard's batches; those that a run has gathered already do not count for it again."""
        gathered, span = {path: self._empty(path) for path in self.runs}, self._span(self.request.shard)
        starts: dict[Path, int] = {}
        for path, run in self.runs.items():
            saved = run.parts.load(self.request.shard, gathered[path])
            starts[path] = span.start if saved is None else saved
            if saved is None:
                gathered[path] = self._empty(path)
        numbers = range(min(starts.values()), span.stop)
        with counting("harvest", self._sequences_of(numbers), display) as advance, polite_stop() as asked_to_stop:
            for number in numbers:
                behind = [path for path, start in starts.items() if start <= number]
                self._read(number, {path: gathered[path] for path in behind})
                advance(self._sequences_of(range(number, number + 1)))
                if saver.due or asked_to_stop():
                    with saver.saving():
                        for path in behind:
                            self.runs[path].parts.save(self.request.shard, gathered[path], number + 1)
                if asked_to_stop():
                    again = f"endwise harvest {shlex.join(map(str, self.runs))}"
                    raise Interrupted(f"Stopped; what was gathered is saved. Resume with the same command: {again}")
        return gathered

    def _sequences_of(self, batches: range) -> int:
        return max(0, min(batches.stop * self.batch, self.sequences) - batches.start * self.batch)

    def _read(self, number: int, gathered: Mapping[Path, Gathered]) -> None:
        rows = range(number * self.batch, min((number + 1) * self.batch, self.sequences))
        text = self.corpus.batch(rows).to(self.model.device)
        sites = {site for path in gathered for site in self.runs[path].place.sites}
        self.model.attend_within(self.corpus.layout.ends)
        clean = self.model.clean(text.tokens, record=sites)
        attribute = self.sequences <= LONG_TEXT * self.batch or number % LONG_TEXT_EVERY == 0
        numbers = torch.arange(rows.start, rows.stop, device=self.model.device)
        for path, each in gathered.items():
            with _naming(path):
                each.add(self.model, clean, self.runs[path].place, text.mask, numbers, attribute)

    def _finish(self, path: Path, own: Gathered) -> Harvest | None:
        """Join the shards, if all are there, and write the files; of two who come last, the first."""
        run, shards = self.runs[path], self.request.shards
        with held(path / ".harvest.lock"):  # not in the folder of the parts, which the first to join them removes
            others = [shard for shard in range(shards) if shard != self.request.shard]
            if any(run.parts.next_batch(shard) != self._span(shard).stop for shard in others):
                return None
            for shard in others:
                other = self._empty(path)
                run.parts.load(shard, other)
                own.merge(other)
            write_harvest(path, own, self.model, self.corpus, run.measured, self._about(path, own))
            run.parts.remove()
        return read_harvest(path)

    def _about(self, path: Path, gathered: Gathered) -> dict[str, Any]:
        run = self.runs[path]
        return {
            "format": HARVEST_FORMAT,
            "model": self.model.name,
            "site": run.place.name,
            "kind": run.config.objective_name,
            "seed": run.config.seed,
            "d_sae": run.sae.d_sae,
            "tokens": gathered.tokens,
            "predictions": int(gathered.counts[1]),
            "attributed_predictions": int(gathered.counts[2]),
            "sequences": self.sequences,
            "context": self.corpus.context,
            "corpus": self.corpus.describe(),
            "co_firing_share": self._co_firing_share,
            "weights": self.settings[path]["weights"],
            "settings": self.settings[path],
        }


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DataError(f"{path} cannot be harvested: {error}") from None
