"""Survey of a sweep before anything is trained: where its points stand, and which are bound to fail."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from endwise.common.errors import ConfigError, ModelError, SiteError
from endwise.config.places import PlacesConfig
from endwise.config.run import ModelConfig
from endwise.models.language_model import LanguageModel
from endwise.runs.folder import RunFolder
from endwise.sweeps.point_progress import PointProgress, runs_of
from endwise.sweeps.points import Point, points_of
from endwise.sweeps.sweep_config import SweepConfig, as_sweep
from endwise.sweeps.tasks import folder_of, is_trained, tasks_of
from endwise.training.making import pass_phases, phases_of
from endwise.training.planning.memory_trace import MemoryTrace
from endwise.training.planning.outline import outline_model


@dataclass(frozen=True)
class PointStatus:
    """Next act of a sweep for a point."""

    point: Point
    folder: Path
    """Folder of the run that is next, or of the one that is finished."""
    state: str
    passes: int | None = None
    """The number of the pass in which it would be trained or measured; equal numbers share one."""


def survey(config: SweepConfig | Mapping[str, Any] | str | Path) -> list[PointStatus]:
    """Report where every point of a sweep stands; nothing is trained or written.

    Raises:
        ConfigError: see `sweep`.
    """
    config = as_sweep(config)
    progress = [PointProgress(point, config.out, config.search) for point in points_of(config)]
    due = [each for each in progress if each.due() is not None]
    find_faults(due)
    due = [each for each in due if each.error is None]
    rounds = ([each for each in due if each.on_trial], [each for each in due if not each.on_trial])
    tasks = [task for one in rounds for task in tasks_of(runs_of(one), config.together)]
    numbers = {folder_of(run): number for number, task in enumerate(tasks, 1) for run in task}
    return [
        PointStatus(each.point, each.folder, _state(each), numbers.get(each.folder) if each.error is None else None)
        for each in progress
    ]


def _state(progress: PointProgress) -> str:
    if progress.error is not None:
        return f"failed: {progress.error}"
    if progress.result is not None:
        return "finished"
    assert progress.run is not None
    steps = RunFolder(progress.folder).saved_steps()
    trial = "trial, " if progress.on_trial else ""
    if is_trained(progress.run):
        return f"{trial}to be measured"
    return f"{trial}saved at step {steps[-1]}" if steps else f"{trial}to be started"


def find_faults(due: Iterable[PointProgress]) -> None:
    """End the points of which it is known already that their model has no such site, so that nobody waits for it.

    A model that cannot be outlined here may yet be loaded where the run is carried out.
    """
    models: dict[ModelConfig, LanguageModel | None] = {}
    for each in due:
        config = each.point.config
        if config.model not in models:
            models[config.model] = _outlined(config.model)
        model = models[config.model]
        if model is None:
            continue
        try:
            for recipe in config.recipes:
                model.place(recipe.place)
            if isinstance(config, PlacesConfig) and config.joint:
                pass_phases(config, model)
                continue
            for recipe in config.recipes:
                phases_of(recipe, model)
        except (ConfigError, SiteError) as error:
            each.error = str(error)


def _outlined(config: ModelConfig) -> LanguageModel | None:
    try:
        return outline_model(config, torch.float32, MemoryTrace())
    except ModelError:
        return None
