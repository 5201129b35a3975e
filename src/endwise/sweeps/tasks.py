"""Tasks: runs that share a pass, carried out wherever an engine puts them, in any state that an earlier end left."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from endwise.common.errors import EndwiseError, FolderTaken, FormatError, Interrupted, ProcessLost, RunFolderError
from endwise.config.fields import identity, shared
from endwise.config.places import PlacesConfig, Recipe
from endwise.config.run import RunConfig
from endwise.evaluation.evaluate import evaluate
from endwise.evaluation.finished import unfinished
from endwise.evaluation.provenance import check_texts, pinned
from endwise.formats import format_at
from endwise.models.language_model import LanguageModel
from endwise.models.loading import find_device, load_model
from endwise.runs.folder import RunFolder
from endwise.runs.several import place_folders
from endwise.tokens import Corpora
from endwise.training.members import SomeFailed
from endwise.training.setup import corpora_of, model_for
from endwise.training.targets import held_out_wanted
from endwise.training.train import train_places, train_together

MEASURED = ("ce_increase", "l0", "alive")
"""Numbers that every evaluation holds."""


@dataclass(frozen=True)
class Outcome:
    """Outcome of a run."""

    folder: Path
    error: str | None = None
    """Reason why it has not ended; None: it is trained and measured."""
    taken: bool = False
    """Another process is at work on it."""


Task = tuple[Recipe, ...]
"""Recipes, each with its folder, whose SAEs train in one pass: of one place, or one of several."""


def tasks_of(configs: Iterable[Recipe], together: int) -> list[Task]:
    """Group what can train in one pass: one kind at one site of one model, on the same batches; a run of several
    places is a pass by itself.

    Runs of several kinds could share a pass too; but then a local run would be charged for the end-to-end ones' time.
    """
    groups: dict[str, list[Recipe]] = {}
    for config in configs:
        if isinstance(config, PlacesConfig):
            groups[str(folder_of(config))] = [config]
            continue
        alike = (shared(config), config.place, config.objective_name, config.evaluation.model_dump_json())
        groups.setdefault(repr(alike), []).append(config)
    return [
        tuple(group[start : start + together]) for group in groups.values() for start in range(0, len(group), together)
    ]


def folder_of(config: Recipe) -> Path:
    assert config.out is not None, "the recipes of a sweep are placed"
    return config.out


def is_trained(config: Recipe) -> bool:
    """Return whether the folder holds the SAEs that the recipe asks for, trained to their last step.

    Raises:
        RunFolderError: it holds the run of another recipe, or what it holds cannot be read.
        FormatError: the SAE in it is damaged.
    """
    folder = RunFolder(folder_of(config))
    if not folder.has_run():
        return False
    kept, start = folder.recipe(), config.init_from
    if start is not None and kept.init_from is not None and kept.init_from.name == start.name:
        kept = kept.model_copy(update={"init_from": start})  # the same, as a folder that was moved has it
    fitting = config.model_copy(update={"evaluation": config.evaluation.within(kept.evaluation.needed)})
    if identity(kept) not in (identity(config), identity(fitting)):
        raise RunFolderError(f"{folder.path} holds the run of another recipe than its name says. Remove it.")
    # What is detected is whole: a process that was killed before has saved none.
    parts = zip(place_folders(folder.path, config), config.recipes, strict=True)
    return all(format_at(path / "sae") is not None and unfinished(path, recipe) is None for path, recipe in parts)


def is_finished(config: Recipe) -> bool:
    """Return whether the run is trained and measured.

    Raises:
        EndwiseError: see `is_trained`.
    """
    return is_trained(config) and evaluation_of(config) is not None


def evaluation_of(config: Recipe) -> dict[str, Any] | None:
    """Read what the run measured; None where that is not there, is damaged, or is of other weights than its SAE has
    now, since it can be measured again.
    """
    try:
        evaluation = RunFolder(folder_of(config)).measured() or {}
    except (FormatError, RunFolderError):
        return None
    numbers, intervals = [evaluation.get(name) for name in MEASURED], evaluation.get("intervals")
    whole = all(isinstance(number, int | float) for number in numbers)
    return evaluation if whole and isinstance(intervals, dict) and MEASURED[0] in intervals else None


@dataclass
class ModelCache:
    """The model and the sequences that the latest task used, kept for the next."""

    load_for_training: Callable[[Recipe], LanguageModel] = model_for
    _model: tuple[object, LanguageModel] | None = field(default=None)
    _corpora: tuple[object, Corpora] | None = field(default=None)

    def clear(self) -> None:
        self._model = self._corpora = None

    def model(self, config: Recipe) -> LanguageModel:
        """Load the model as training asks for it."""
        return self._load((config.model, config.training.precision), lambda: self.load_for_training(config))

    def exact_model(self, config: Recipe) -> LanguageModel:
        """Load the model as `evaluate` does, whatever the precision of training."""
        if config.training.precision == "exact" or find_device(config.model.device).type == "cpu":
            return self.model(config)
        return self._load((config.model, "exact"), lambda: load_model(**config.model.model_dump()))

    def _load(self, key: object, load: Callable[[], LanguageModel]) -> LanguageModel:
        if self._model is None or self._model[0] != key:
            self._model = None  # freed before the next is loaded
            self._model = (key, load())
        return self._model[1]

    def corpora(self, config: Recipe) -> Corpora:
        held = held_out_wanted(config, config.data.context or self.model(config).context)
        key = (config.model, config.data, config.training.tokens, config.evaluation, held)
        if self._corpora is None or self._corpora[0] != key:
            self._corpora = None
            self._corpora = (key, corpora_of([config], self.model(config)))
        return self._corpora[1]


def train_recipes(configs: Sequence[Recipe], **options: Any) -> None:
    """Train a task's SAEs, as `train_together` or `train_places`."""
    for config in configs:
        if isinstance(config, PlacesConfig):
            train_places(config, **options)
    if alone := [config for config in configs if isinstance(config, RunConfig)]:
        train_together(alone, **options)


_Errors = dict[Path, Outcome]
"""Outcomes of the runs that failed, by their folders."""


@dataclass
class Worker:
    """Carries out tasks one after another, each with what the one before it left loaded.

    Args:
        train: as `train_together`, of recipes for several places too.
        measure: as `evaluate`.
    """

    train: Callable[..., object] = train_recipes
    measure: Callable[..., object] = evaluate
    loaded: ModelCache = field(default_factory=ModelCache)

    def carry_out(self, task: Task) -> list[Outcome]:
        """Train what is not trained, each run from its last checkpoint, and measure what is not measured.

        A run that fails leaves the others to their end; where all of a task fail together, smaller groups of them are
        tried, so that what is wrong with one ends its own run only.

        Raises:
            Interrupted: the user, or the scheduler, asked to stop; the state is saved.
        """
        waiting, errors = _sorted_out(task, is_trained)
        for group in _standing_together(waiting):
            errors |= self._train(group)
        trained = [config for config in task if folder_of(config) not in errors]
        unmeasured, unreadable = _sorted_out(trained, is_finished)
        errors |= unreadable
        errors |= self._measure(unmeasured) if unmeasured else {}
        return [errors.get(folder_of(config), Outcome(folder_of(config))) for config in task]

    def _train(self, configs: list[Recipe]) -> _Errors:
        try:
            first = pinned(folder_of(configs[0]), configs[0])
            loads: dict[str, Any] = {"model": self.loaded.model(first), "corpora": self.loaded.corpora(first)}
        except Exception as error:  # noqa: BLE001  Whatever it is, the sweep's other runs are not to suffer from it.
            return _failed(configs, error)
        try:
            for config in configs:  # what was measured of a run before its end is not what it ended with
                for path in (folder_of(config), *place_folders(folder_of(config), config)):
                    RunFolder(path).evaluation_file.unlink(missing_ok=True)
            self.train(configs, **loads, resume="if_started", display=False)
        except SomeFailed as some:  # each failure as its run would report it alone
            places = {path: config for config in configs for path in place_folders(folder_of(config), config)}
            by_run: dict[Path, list[str]] = {}
            for failure in some.failures:
                run = folder_of(places[failure.folder])
                where = "" if run == failure.folder else f"{failure.folder.name}: "
                by_run.setdefault(run, []).append(f"{where}{_line(failure.error)} {failure.kept}")
            return {run: Outcome(run, " ".join(lines)) for run, lines in by_run.items()}
        except (Interrupted, ProcessLost):
            raise
        except Exception as error:  # noqa: BLE001  As above.
            return _in_halves(self._train, configs, error)
        return {}

    def _measure(self, configs: list[Recipe]) -> _Errors:
        try:
            first = pinned(folder_of(configs[0]), configs[0])
            corpora = self.loaded.corpora(first)
            parts = [zip(place_folders(folder_of(each), each), each.recipes, strict=True) for each in configs]
            check_texts(dict(itertools.chain(*parts)), corpora, ["heldout"])
            folders = [folder_of(config) for config in configs]
            with ExitStack() as claims:  # so that of several sweeps one measures it
                for folder in folders:
                    claims.enter_context(RunFolder(folder).claimed())
                self.measure(folders, corpora=corpora, model=self.loaded.exact_model(first))
        except Exception as error:  # noqa: BLE001  As above.
            return _in_halves(self._measure, configs, error)
        return {}


def _in_halves(act: Callable[[list[Recipe]], _Errors], configs: list[Recipe], error: Exception) -> _Errors:
    """Try what failed for all with each half of them, down to the one whose fault it is."""
    if len(configs) == 1:
        return _failed(configs, error)
    middle = len(configs) // 2
    return act(configs[:middle]) | act(configs[middle:])


def _sorted_out(configs: Iterable[Recipe], done: Callable[[Recipe], bool]) -> tuple[list[Recipe], _Errors]:
    """Return tasks that are not done, and the faults of those whose state cannot be read."""
    waiting: list[Recipe] = []
    errors: _Errors = {}
    for config in configs:
        try:
            if not done(config):
                waiting.append(config)
        except EndwiseError as error:
            errors |= _failed([config], error)
    return waiting, errors


def _standing_together(configs: Sequence[Recipe]) -> list[list[Recipe]]:
    """Split recipes into those whose runs can be taken up from one step; a process that was killed between two saves
    leaves some behind.
    """
    left = {folder_of(config): set(RunFolder(folder_of(config)).saved_steps()) or {0} for config in configs}
    groups: list[list[Recipe]] = []
    while left:
        step = min(max(steps) for steps in left.values())
        chosen = [folder for folder, steps in left.items() if step in steps]
        groups.append([config for config in configs if folder_of(config) in chosen])
        for folder in chosen:
            del left[folder]
    return groups


def _failed(configs: Sequence[Recipe], error: Exception) -> _Errors:
    return {folder_of(each): Outcome(folder_of(each), _line(error), isinstance(error, FolderTaken)) for each in configs}


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, EndwiseError) else f"{type(error).__name__}: {text}"
