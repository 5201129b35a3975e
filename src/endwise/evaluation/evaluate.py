"""Evaluates run folders: reads their SAEs, measures those of one model together, writes the numbers beside them."""

import csv
import io
import json
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file

from endwise.common.counting import showing_progress
from endwise.common.errors import ConfigError, DataError, FormatError
from endwise.common.files import write_json
from endwise.common.processes import World, joined
from endwise.common.remedies import unreadable
from endwise.common.showing import Several
from endwise.common.tensor_files import write_tensors
from endwise.config.adopted import AdoptedConfig
from endwise.config.places import PlacesConfig, Recipe
from endwise.config.run import EvaluationConfig, RunConfig
from endwise.dictionaries import SAE
from endwise.evaluation.finished import load_sae, named, sharing_groups
from endwise.evaluation.measure import Evaluation, Sums, measure
from endwise.evaluation.provenance import corpora_of_runs, model_of, report_once
from endwise.evaluation.together import measure_together
from endwise.models.language_model import LanguageModel
from endwise.runs.finding import Paths, trained_runs
from endwise.runs.folder import RunFolder, weights_of
from endwise.runs.several import place_folders
from endwise.runs.trackers import Mirror
from endwise.tokens import Corpora, Corpus

SUMS_FILE = "evaluation_sums.safetensors"
FIRINGS_FILE = "evaluation_firings.safetensors"


def evaluate(
    runs: Paths,
    *,
    model: LanguageModel | None = None,
    corpora: Corpora | None = None,
    tokens: int | None = None,
    display: bool = False,
) -> dict[Path, Evaluation]:
    """Measure finished runs on held-out text and write `evaluation.json` into each; under `torchrun` its processes
    share the work.

    Args:
        runs: run folders, or folders that hold some; those of one model and one corpus share every clean pass. Of a
            run of several places each is measured alone, in its own folder, and all together (`JointEvaluation`), in
            the run's.
        model: a loaded one to use instead of the recipes'.
        corpora: loaded token sequences, likewise.
        tokens: held-out tokens, instead of each recipe's `evaluation.tokens`.
        display: show how far it is.

    Raises:
        RunFolderError: a folder is not a run, holds no trained SAE yet, or stands on other text or another model.
        FormatError: an SAE is not what its training wrote.
    """
    paths = trained_runs(runs)
    several = {path: each for path in paths if isinstance(each := RunFolder.open(path).recipe(), PlacesConfig)}
    of_places = {path: place_folders(path, several[path]) for path in several}
    alone = list(dict.fromkeys(each for path in paths for each in of_places.get(path, [path])))
    configs = {path: RunFolder.config_of_trained(path) for path in alone}
    results: dict[Path, Evaluation] = {}
    with joined() as world, showing_progress(display):
        for group in sharing_groups(configs, tokens):
            measured = _evaluate_group({path: configs[path] for path in group}, model, corpora, tokens, world)
            for path, evaluation in measured.items() if world.is_first else ():
                write_evaluation(RunFolder(path), configs[path], evaluation)
            results |= measured
        for path, recipe in several.items():
            own = {each: configs[each] for each in of_places[path]}
            results[path] = _evaluate_together(RunFolder(path), own, model, corpora, tokens, world)
            if world.is_first:
                write_evaluation(RunFolder(path), recipe, results[path])
    return Several({each: results[each] for path in paths for each in [*of_places.get(path, []), path]})


def write_evaluation(folder: RunFolder, config: Recipe, evaluation: Evaluation) -> None:
    """`evaluation.json`, the per-sequence sums that paired comparisons are made of, and each feature's firings."""
    sums = {name: torch.from_numpy(values) for name, values in evaluation.sums.items()}
    seeds = {"seeds": config.seeds}
    firings = {"firings": torch.from_numpy(evaluation.firings)}
    write_tensors(folder.path / SUMS_FILE, sums, {"endwise": json.dumps(seeds)})
    write_tensors(folder.path / FIRINGS_FILE, firings, {"endwise": json.dumps(seeds)})
    record = {**named(config), **seeds, **evaluation.to_json(), "weights": weights_of(folder.path)}
    write_json(folder.evaluation_file, record)
    _mirror(folder, config, record)


def _mirror(folder: RunFolder, config: Recipe, record: dict[str, Any]) -> None:
    """Send an evaluation to the run's trackers, as far as they are to be had here."""
    try:
        mirror = Mirror.named(config.trackers)
    except ConfigError as error:
        report_once(str(error))
        return
    with mirror:
        mirror.started(config, folder.path, None)
        mirror.line("evaluation", record)


def read_sums(path: Path) -> Sums:
    """The per-sequence sums of an evaluated run.

    Raises:
        FormatError: it has none, or they cannot be read.
    """
    return _read_tensors(path / SUMS_FILE)


def read_firings(path: Path) -> NDArray[np.int64]:
    """Read the number of held-out tokens (of `tokens` in `evaluation.json`) at which each feature fired, `[d_sae]`.

    Raises:
        FormatError: it has none, or they cannot be read.
    """
    file = path / FIRINGS_FILE
    firings = _read_tensors(file).get("firings")
    if firings is None or firings.ndim != 1 or firings.dtype != np.int64:
        raise FormatError(f"{file} does not hold one whole number for each feature. {_measure_again(path)}")
    return firings


def _read_tensors(file: Path) -> dict[str, NDArray[Any]]:
    try:
        return {name: tensor.numpy() for name, tensor in load_file(file).items()}
    except (OSError, SafetensorError, TypeError) as error:
        damaged = FormatError(f"{file} cannot be read ({error}). {_measure_again(file.parent)}")
        raise unreadable(file, error) or damaged from None


def _measure_again(run: Path) -> str:
    return f"Measure the run again: endwise evaluate {shlex.quote(str(run))}"


def evaluations_csv(configs: Mapping[Path, Recipe], evaluations: dict[Path, Evaluation]) -> str:
    """One line per run: estimates, and both ends of each 95 % interval."""
    rows: list[dict[str, Any]] = []
    for path, evaluation in evaluations.items():
        row: dict[str, Any] = {"run": str(path), **named(configs[path])}
        row |= {"d_sae": evaluation.d_sae, "alive": evaluation.alive, "tokens": evaluation.tokens}
        for name, interval in evaluation.metrics.items():
            row |= {name: interval.estimate, f"{name}.low": interval.low, f"{name}.high": interval.high}
        row |= {f"{name}_ce": value for name, value in vars(evaluation.baselines).items()}
        rows.append(row | {"remarks": " ".join(evaluation.remarks)})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _evaluate_group(
    configs: dict[Path, RunConfig],
    model: LanguageModel | None,
    corpora: Corpora | None,
    tokens: int | None,
    world: World,
) -> dict[Path, Evaluation]:
    settings = _settings(configs, tokens)
    model, heldout, loaded = _loaded(configs, model, corpora, settings, world)
    saes = {str(path): (model.place(configs[path].place), sae) for path, sae in loaded.items()}
    try:
        prefixes = {str(path): config.dictionary.prefixes(saes[str(path)][1].d_in) for path, config in configs.items()}
        measured = measure(model, saes, heldout, settings, prefixes=prefixes, world=world)
    except DataError as error:
        raise DataError(f"{', '.join(saes)} cannot be measured: {error}") from None
    adopted = {path: {"adopted": config.facts} for path, config in configs.items() if isinstance(config, AdoptedConfig)}
    return {path: _with_course(measured[str(path)], RunFolder(path), adopted.get(path, {})) for path in configs}


def _evaluate_together(
    folder: RunFolder,
    configs: dict[Path, RunConfig],
    model: LanguageModel | None,
    corpora: Corpora | None,
    tokens: int | None,
    world: World,
) -> Evaluation:
    settings = _settings(configs, tokens)
    model, heldout, loaded = _loaded(configs, model, corpora, settings, world)
    saes = {model.place(configs[path].place): sae for path, sae in loaded.items()}
    try:
        measured = measure_together(model, saes, heldout, settings, world=world)
    except DataError as error:
        raise DataError(f"{folder.path} cannot be measured: {error}") from None
    return _with_course(measured, folder)


def _settings(configs: dict[Path, RunConfig], tokens: int | None) -> EvaluationConfig:
    settings: EvaluationConfig = next(iter(configs.values())).evaluation
    if tokens is None:
        return settings
    return EvaluationConfig.build({**settings.model_dump(), "tokens": tokens}, "the evaluation")


def _loaded(
    configs: dict[Path, RunConfig],
    model: LanguageModel | None,
    corpora: Corpora | None,
    settings: EvaluationConfig,
    world: World,
) -> tuple[LanguageModel, Corpus, dict[Path, SAE]]:
    """The model, the held-out text, and each run's SAE."""
    with world.together("loading the model and the data"):
        model = model_of(configs, model)
        corpora = corpora_of_runs(configs, model, corpora, evaluation_tokens=settings.skip + settings.tokens)
        return model, corpora.heldout, {path: load_sae(path, config, model) for path, config in configs.items()}


def _with_course(evaluation: Evaluation, folder: RunFolder, further: Mapping[str, Any] | None = None) -> Evaluation:
    return replace(evaluation, facts={**evaluation.facts, "loss": folder.course(), **(further or {})})
