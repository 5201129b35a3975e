"""The training loop: one clean pass serves every SAE in training, each with its own objective, optimiser and folder."""

import re
import shlex
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from endwise.checkpoints import read_checkpoint, write_checkpoint
from endwise.dictionaries import SAE, ReluSAE
from endwise.errors import ConfigError, DataError, EndwiseError, Interrupted, RunFolderError, TrainingStopped
from endwise.evaluation import measure
from endwise.files import write_json
from endwise.language_model import LanguageModel
from endwise.model_loading import load_model
from endwise.objectives import build_objective
from endwise.progress import Display
from endwise.recipes import find_recipe
from endwise.run_config import EvaluationConfig, RunConfig
from endwise.run_folder import RunFolder
from endwise.sites import Site
from endwise.tokens import BatchOrder, Corpora, TokenBatch, load_corpora
from endwise.trainee import Trainee

SCHEDULED_METRICS = ("ce_increase", "kl", "l0", "explained_variance.per_token")


@dataclass(frozen=True)
class Run:
    """A trained SAE and where everything about it lies."""

    config: RunConfig
    sae: SAE
    folder: Path
    seconds: float
    """Wall-clock of training in this process, without evaluations; runs trained together split it equally."""


@dataclass(frozen=True)
class _Member:
    config: RunConfig
    trainee: Trainee
    folder: RunFolder
    metadata: dict[str, Any]


def train(
    config: RunConfig | Mapping[str, Any] | str | Path,
    *,
    model: LanguageModel | None = None,
    corpora: Corpora | None = None,
    resume: bool = False,
    display: bool = True,
) -> Run:
    """Trains one SAE as its recipe says.

    Args:
        config: a recipe: an object, a mapping of its fields, the path of a YAML file, or the name of one that ships.
        model: a loaded model to use instead of the recipe's.
        corpora: loaded token sequences to use instead of the recipe's.
        resume: go on from the last checkpoint of the run in the recipe's folder.

    Raises:
        EndwiseError: the recipe breaks a rule (before any training), or training cannot go on (after saving).
    """
    if isinstance(config, str | Path):
        config = RunConfig.read(find_recipe(str(config)))
    elif not isinstance(config, RunConfig):
        config = RunConfig.build(dict(config))
    return train_together([config], model=model, corpora=corpora, resume=resume, display=display)[0]


def train_together(
    configs: Sequence[RunConfig],
    *,
    model: LanguageModel | None = None,
    corpora: Corpora | None = None,
    resume: bool = False,
    display: bool = True,
) -> list[Run]:
    """Trains several SAEs of one model on the same batches; each ends as if it had been trained alone.

    The recipes may differ in site, dictionary, objective, seed, folder and in the optimiser's settings, not in the
    model, the data, `training.tokens` or `training.batch`.
    """
    first = _shared_recipe(configs)
    model = model or load_model(**first.model.model_dump())
    context = corpora.train.context if corpora is not None else first.data.context or model.context
    steps = _steps(configs, context)
    trainees = [new_trainee(config, model, steps) for config in configs]
    folders = [RunFolder(config.out or default_folder(config)) for config in configs]
    for folder in folders:
        if resume:
            folder.check_exists()
        else:
            folder.check_free()
    corpora = corpora or load_corpora(
        first.data,
        tokenizer=model.tokenizer,
        model_context=model.context,
        vocab_size=model.vocab_size,
        training_tokens=first.training.tokens,
        evaluation_tokens=max(
            max(config.evaluation.tokens, config.evaluation.during_training_tokens) for config in configs
        ),
    )
    order = BatchOrder(corpora.train, first.training.batch, first.data.seed, first.data.epochs)
    if len(order) < steps:
        raise DataError(
            f"training.tokens asks for {steps} steps, but {corpora.train.name} has text for {len(order)}. "
            "Set data.epochs, or lower training.tokens."
        )
    members = [
        _Member(config, trainee, folder, sae_metadata(config, model, corpora))
        for config, trainee, folder in zip(configs, trainees, folders, strict=True)
    ]
    for member in members:
        if resume:
            _reenter(member, corpora)
        else:
            _start(member, corpora)
    seconds = _run(model, members, corpora, order, steps, display) / len(members)
    return [Run(member.config, member.trainee.sae, member.folder.path, seconds) for member in members]


def new_trainee(config: RunConfig, model: LanguageModel, steps: int) -> Trainee:
    """The untrained SAE of a recipe, with its objective and optimiser."""
    site = model.site(config.site)
    width = model.width(site)
    objective = build_objective(config.objective, model, site)
    sae = ReluSAE(width, config.dictionary.features(width), seed=config.seed).to(model.device)
    return Trainee(sae, site, objective, config.training, steps)


def default_folder(config: RunConfig) -> Path:
    """`runs/<model>-<site>-<kind>-<coefficient>-seed<n>`."""
    model = re.sub(r"[^A-Za-z0-9._-]+", "_", Path(config.model.name).name)
    coefficient = f"{config.objective.sparsity.coefficient:g}"
    return Path("runs") / f"{model}-{config.site}-{config.objective.kind}-{coefficient}-seed{config.seed}"


def _shared_recipe(configs: Sequence[RunConfig]) -> RunConfig:
    if not configs:
        raise ConfigError("There is no recipe to train.")
    first = configs[0]
    for other in configs[1:]:
        if _common(other) != _common(first):
            raise ConfigError(
                "SAEs trained together must agree in model, data, training.tokens, training.batch and "
                "training.accumulation; train the others on their own."
            )
    folders = [config.out or default_folder(config) for config in configs]
    if len(set(folders)) < len(folders):
        raise ConfigError("Two SAEs trained together have the same folder; set `out` of each.")
    return first


def _common(config: RunConfig) -> tuple[object, ...]:
    training = config.training
    return config.model, config.data, training.tokens, training.batch, training.accumulation


def _steps(configs: Sequence[RunConfig], context: int | None) -> int:
    """The number of steps; checks that one step and one evaluation get whole sequences."""
    training = configs[0].training
    if context is None:
        raise ConfigError("The model names no longest context. Set data.context, the tokens per sequence.")
    per_step = training.batch * context
    if training.tokens < per_step:
        raise ConfigError(
            f"training.tokens is {training.tokens}, but one step alone takes {per_step} "
            f"(training.batch {training.batch} × context {context}). Raise the one or lower the others."
        )
    for config in configs:
        for key in ("tokens", "during_training_tokens"):
            if (tokens := getattr(config.evaluation, key)) < context:
                raise ConfigError(f"evaluation.{key} is {tokens}, but one sequence alone has {context}. Raise it.")
    return training.tokens // per_step


def _start(member: _Member, corpora: Corpora) -> None:
    member.folder.create(member.config)
    write_json(member.folder.data_file, corpora.describe())


def _reenter(member: _Member, corpora: Corpora) -> None:
    """Takes a started run up where its latest checkpoint left it."""
    folder, trainee = member.folder, member.trainee
    if folder.config().model_copy(update={"out": member.config.out}) != member.config:
        raise RunFolderError(
            f"{folder.path} was started with another recipe than this one. Resume with its own config.yaml."
        )
    folder.check_same_data(corpora.describe())
    latest = folder.latest_checkpoint()
    if latest is not None:
        trainee.restore(read_checkpoint(latest))
    folder.cut_after(trainee.step)


def _run(
    model: LanguageModel, members: list[_Member], corpora: Corpora, order: BatchOrder, steps: int, display: bool
) -> float:
    """Trains to the last step; returns the seconds spent in training alone, without evaluations."""
    config = members[0].config.training
    first = members[0].trainee.step
    if any(member.trainee.step != first for member in members):
        raise RunFolderError("The runs stand at different steps and cannot go on together; resume each on its own.")
    with Display(steps, first, config.batch * corpora.train.context, display) as shown, _polite_stop() as stop_asked:
        try:
            for step in range(first, steps):
                batch = corpora.train.batch(order[step]).to(model.device)
                take_step(model, [member.trainee for member in members], batch, config.accumulation)
                done = step + 1
                _record(model, members, corpora, done, done == steps, shown)
                shown.advance(done)
                if stop_asked() and done < steps:
                    _save_all(members)
                    raise Interrupted(f"Stopped as asked, saved at step {done}. Go on with: {_go_on_with(members)}")
        except Interrupted:
            raise
        except (TrainingStopped, DataError) as error:
            _save_all(members)
            kept = ", ".join(str(member.folder.path) for member in members)
            raise TrainingStopped(f"{error} The last good state is saved in {kept}.") from None
        except Exception:
            with suppress(EndwiseError):
                _save_all(members)
            raise
        _save_all(members)
        return shown.timing(steps)["seconds"]


def take_step(model: LanguageModel, trainees: Sequence[Trainee], batch: TokenBatch, accumulation: int = 1) -> None:
    """One optimiser step of every trainee on one batch, in `accumulation` passes of equal numbers of sequences."""
    record = {site for trainee in trainees for site in (trainee.site, *trainee.objective.sites)}
    final = any(trainee.objective.final for trainee in trainees)
    tokens_in_step = batch.mask.sum()
    for trainee in trainees:
        trainee.begin_step()
    size = len(batch.tokens) // accumulation
    for start in range(0, len(batch.tokens), size):
        rows = slice(start, start + size)
        clean = model.clean(batch.tokens[rows], record=record, final=final)
        for trainee in trainees:
            trainee.accumulate(model, clean, batch.mask[rows], tokens_in_step)
    for trainee in trainees:
        trainee.finish_step(tokens_in_step, batch.tokens.numel())


def _record(
    model: LanguageModel, members: list[_Member], corpora: Corpora, done: int, last: bool, shown: Display
) -> None:
    """What is due after a step: lines of metrics, evaluations, checkpoints."""
    lines: list[tuple[_Member, dict[str, Any]]] = []
    evaluated: list[_Member] = []
    for member in members:
        config = member.config.training
        evaluates = last or _due(config.evaluate_every, done)
        if evaluates or done == 1 or _due(config.log_every, done) or _due(config.checkpoint_every, done):
            lines.append((member, member.trainee.report()))
            evaluated += [member] * evaluates
    heldout: dict[Path, dict[str, float]] = {}
    if evaluated:
        with shown.paused():
            heldout = _brief_evaluations(model, evaluated, corpora)
    for member, line in lines:
        folder = member.folder
        if folder.path in heldout:
            line["heldout"] = heldout[folder.path]
        folder.append(folder.metrics_file, line)
        folder.append(folder.timings_file, {"step": done, **shown.timing(done)})
        shown.show(member.config, line)
        if _due(member.config.training.checkpoint_every, done):
            _save(member)


def _due(every: int | None, done: int) -> bool:
    return every is not None and done % every == 0


def _brief_evaluations(model: LanguageModel, members: list[_Member], corpora: Corpora) -> dict[Path, dict[str, float]]:
    """The metrics of `SCHEDULED_METRICS` on a little held-out text; members with equal settings share its passes."""
    groups: dict[EvaluationConfig, dict[str, tuple[Site, SAE]]] = {}
    for member in members:
        settings = member.config.evaluation
        tokens = min(settings.during_training_tokens, settings.tokens)
        brief = settings.model_copy(update={"tokens": tokens, "bootstrap": 1})
        groups.setdefault(brief, {})[str(member.folder.path)] = (member.trainee.site, member.trainee.sae)
    return {
        Path(path): {name: evaluation[name] for name in SCHEDULED_METRICS}
        for brief, saes in groups.items()
        for path, evaluation in measure(model, saes, corpora.heldout, brief, baselines=False).items()
    }


def _save(member: _Member) -> None:
    """The SAE as it is used, and what training goes on from."""
    trainee, folder = member.trainee, member.folder
    metadata = {**member.metadata, "endwise": {**member.metadata["endwise"], "step": trainee.step}}
    trainee.sae.save(folder.sae, metadata)
    path = folder.checkpoints / f"step-{trainee.step:09d}.safetensors"
    write_checkpoint(path, trainee.tensors(), trainee.counters())
    folder.drop_old_checkpoints()


def _save_all(members: list[_Member]) -> None:
    for member in members:
        _save(member)


def _go_on_with(members: list[_Member]) -> str:
    return "; ".join(f"endwise train --resume {shlex.quote(str(member.folder.path))}" for member in members)


def sae_metadata(config: RunConfig, model: LanguageModel, corpora: Corpora) -> dict[str, Any]:
    """What SAELens wants to know of an SAE (with `HookedTransformer` it reads our site names, and takes the model as it
    is on the hub), and under `endwise` how ours was trained.
    """
    return {
        "model_name": model.name,
        "model_class_name": "HookedTransformer",
        "hook_name": config.site,
        "hook_head_index": None,
        "context_size": corpora.train.context,
        "prepend_bos": config.data.prepend_bos,
        "dataset_path": config.data.source,
        "endwise": {
            "kind": config.objective.kind,
            "sparsity_coefficient": config.objective.sparsity.coefficient,
            "seed": config.seed,
            "unit_norm_decoder": True,
        },
    }


@contextmanager
def _polite_stop() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C (or SIGTERM) into a question the loop asks after each step; the second acts at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(_number: int, _frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
