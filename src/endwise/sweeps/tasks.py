"""Tasks: runs that share a pass, carried out wherever an engine puts them, in any state that an earlier end left."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from endwise.errors import EndwiseError, Interrupted, ProcessLost, RunFolderError
from endwise.group import SomeFailed
from endwise.language_model import LanguageModel
from endwise.run_config import RunConfig
from endwise.run_evaluation import evaluate, unfinished
from endwise.run_folder import RunFolder
from endwise.tokens import Corpora
from endwise.training import corpora_of, model_for, train_together


@dataclass(frozen=True)
class Outcome:
    """What became of a run."""

    folder: Path
    error: str | None = None
    """Why it has not ended; None: it is trained and measured."""


Task = tuple[RunConfig, ...]
"""Recipes, each with its folder, whose SAEs train in one pass."""


def tasks_of(configs: Iterable[RunConfig], together: int) -> list[Task]:
    """Groups what can train in one pass: one kind at one site of one model, on the same batches.

    Runs of several kinds could share a pass too; but then a local run would be charged for the end-to-end ones' time.
    """
    groups: dict[str, list[RunConfig]] = {}
    for config in configs:
        training = config.training
        shared = (config.model.model_dump_json(), config.data.model_dump_json(), config.site, config.objective.kind)
        length = (training.tokens, training.batch, training.accumulation, training.precision)
        groups.setdefault(repr((shared, length, config.evaluation.model_dump_json())), []).append(config)
    return [
        tuple(group[start : start + together]) for group in groups.values() for start in range(0, len(group), together)
    ]


def folder_of(config: RunConfig) -> Path:
    assert config.out is not None, "the recipes of a sweep are placed"
    return config.out


def is_trained(config: RunConfig) -> bool:
    """Whether the folder holds the SAE that the recipe asks for, trained to its last step.

    Raises:
        RunFolderError: it holds the run of another recipe.
    """
    folder = RunFolder(folder_of(config))
    if not folder.has_run():
        return False
    if folder.config().model_copy(update={"out": config.out}) != config:
        raise RunFolderError(f"{folder.path} holds the run of another recipe than its name says. Remove it.")
    return folder.sae.exists() and unfinished(folder.path, config) is None


def is_finished(config: RunConfig) -> bool:
    """Whether the run is trained and measured.

    Raises:
        RunFolderError: see `is_trained`.
    """
    return is_trained(config) and RunFolder(folder_of(config)).evaluation_file.exists()


@dataclass
class Loaded:
    """The model and the sequences that the latest task used, kept for the next."""

    _model: tuple[object, LanguageModel] | None = field(default=None)
    _corpora: tuple[object, Corpora] | None = field(default=None)

    def model(self, config: RunConfig) -> LanguageModel:
        key = (config.model, config.training.precision)
        if self._model is None or self._model[0] != key:
            self._model = self._corpora = None  # freed before the next is loaded
            self._model = (key, model_for(config))
        return self._model[1]

    def corpora(self, config: RunConfig) -> Corpora:
        key = (config.model, config.data, config.training.tokens, config.evaluation)
        if self._corpora is None or self._corpora[0] != key:
            self._corpora = (key, corpora_of([config], self.model(config)))
        return self._corpora[1]


def carry_out(task: Task, loaded: Loaded | None = None) -> list[Outcome]:
    """Trains what is not trained, each run from its last checkpoint, and measures what is not measured.

    A run that fails leaves the others to their end; where all of a task fail together, each is tried on its own.

    Raises:
        Interrupted: the user, or the scheduler, asked to stop; the state is saved.
    """
    loaded = loaded or Loaded()
    errors: dict[Path, str] = {}
    waiting: list[RunConfig] = []
    for config in task:
        try:
            if not is_trained(config):
                waiting.append(config)
        except EndwiseError as error:
            errors[folder_of(config)] = str(error)
    for group in _standing_together(waiting):
        errors |= _train(group, loaded)
    unmeasured = [config for config in task if folder_of(config) not in errors and not is_finished(config)]
    errors |= _measure(unmeasured, loaded) if unmeasured else {}
    return [Outcome(folder_of(config), errors.get(folder_of(config))) for config in task]


def _standing_together(configs: Sequence[RunConfig]) -> list[list[RunConfig]]:
    """Splits recipes into those whose runs can be taken up from one step; a process that was killed between two saves
    leaves some behind.
    """
    left = {folder_of(config): set(RunFolder(folder_of(config)).saved_steps()) or {0} for config in configs}
    groups: list[list[RunConfig]] = []
    while left:
        step = min(max(steps) for steps in left.values())
        chosen = [folder for folder, steps in left.items() if step in steps]
        groups.append([config for config in configs if folder_of(config) in chosen])
        for folder in chosen:
            del left[folder]
    return groups


def _train(configs: list[RunConfig], loaded: Loaded) -> dict[Path, str]:
    """Why each run failed that did."""
    try:
        shared: dict[str, Any] = {"model": loaded.model(configs[0]), "corpora": loaded.corpora(configs[0])}
        train_together(configs, **shared, resume="if_started", display=False)
    except SomeFailed as some:
        return {failure.folder: str(failure) for failure in some.failures}
    except (Interrupted, ProcessLost):
        raise
    except Exception as error:  # noqa: BLE001  Whatever it is, the sweep's other runs are not to suffer from it.
        return _each_alone(_train, configs, loaded, error)
    return {}


def _measure(configs: list[RunConfig], loaded: Loaded) -> dict[Path, str]:
    """Why each run could not be measured that could not."""
    try:
        shared: dict[str, Any] = {"model": loaded.model(configs[0]), "corpora": loaded.corpora(configs[0])}
        evaluate([folder_of(config) for config in configs], **shared)
    except Exception as error:  # noqa: BLE001  As above.
        return _each_alone(_measure, configs, loaded, error)
    return {}


def _each_alone(act: "_Act", configs: list[RunConfig], loaded: Loaded, error: Exception) -> dict[Path, str]:
    """What failed for all, tried with each alone, so that the fault of one ends its own run only."""
    if len(configs) > 1:
        return {folder: told for config in configs for folder, told in act([config], loaded).items()}
    told = " ".join(str(error).split())
    return {folder_of(configs[0]): told if isinstance(error, EndwiseError) else f"{type(error).__name__}: {told}"}


_Act = Callable[[list[RunConfig], Loaded], dict[Path, str]]
