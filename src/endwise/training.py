"""The training loop: one clean pass serves every SAE in training, each with its own objective, optimiser and folder."""

import re
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from endwise.checkpoints import read_checkpoint, write_checkpoint
from endwise.dictionaries import SAE, ReluSAE
from endwise.errors import ConfigError, DataError, Interrupted, RunFolderError, TrainingStopped
from endwise.evaluation import measure
from endwise.language_model import LanguageModel
from endwise.model_loading import load_model
from endwise.objectives import build_objective
from endwise.progress import Display
from endwise.recipes import find_recipe
from endwise.run_config import RunConfig
from endwise.run_folder import RunFolder
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
    """Wall-clock of training in this process; runs trained together split it equally."""


@dataclass(frozen=True)
class _Member:
    config: RunConfig
    trainee: Trainee
    folder: RunFolder


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
    corpora = corpora or load_corpora(
        first.data,
        tokenizer=model.tokenizer,
        model_context=model.context,
        vocab_size=model.vocab_size,
        training_tokens=first.training.tokens,
        evaluation_tokens=max(config.evaluation.during_training_tokens for config in configs),
    )
    steps = _steps(first, corpora.train.context)
    trainees = [new_trainee(config, model, steps) for config in configs]
    members = [
        _Member(config, trainee, _enter_folder(config, trainee, resume))
        for config, trainee in zip(configs, trainees, strict=True)
    ]
    started = time.monotonic()
    _run(model, members, corpora, steps, display)
    seconds = (time.monotonic() - started) / len(members)
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


def _steps(config: RunConfig, context: int) -> int:
    per_step = config.training.batch * context
    if config.training.tokens < per_step:
        raise ConfigError(
            f"training.tokens is {config.training.tokens}, but one step alone takes {per_step} "
            f"(training.batch {config.training.batch} × context {context}). Raise the one or lower the others."
        )
    return config.training.tokens // per_step


def _enter_folder(config: RunConfig, trainee: Trainee, resume: bool) -> RunFolder:
    path = config.out or default_folder(config)
    if not resume:
        return RunFolder.create(path, config)
    folder = RunFolder.open(path)
    if folder.config().model_copy(update={"out": config.out}) != config:
        raise RunFolderError(f"{path} was started with another recipe than this one. Resume with its own config.yaml.")
    latest = folder.latest_checkpoint()
    if latest is not None:
        trainee.restore(read_checkpoint(latest))
    folder.cut_after(trainee.step)
    return folder


def _run(model: LanguageModel, members: list[_Member], corpora: Corpora, steps: int, display: bool) -> None:
    config = members[0].config.training
    order = BatchOrder(corpora.train, config.batch, members[0].config.data.seed, members[0].config.data.epochs)
    first = members[0].trainee.step
    if any(member.trainee.step != first for member in members):
        raise RunFolderError("The runs stand at different steps and cannot go on together; resume each on its own.")
    with Display(steps, first, config.batch * corpora.train.context, display) as shown, _polite_stop() as stop_asked:
        try:
            for step in range(first, steps):
                batch = corpora.train.batch(order[step]).to(model.device)
                take_step(model, [member.trainee for member in members], batch, config.accumulation)
                done = step + 1
                for member in members:
                    _record(model, member, corpora, done, steps, shown)
                shown.advance(done)
                if stop_asked() and done < steps:
                    raise Interrupted(_save_all(members, "Stopped as asked, saved"))
        except Interrupted:
            raise
        except (TrainingStopped, DataError) as error:
            raise TrainingStopped(f"{error} {_save_all(members, 'The last good state is saved')}") from None
    _save_all(members, "Done")


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


def _record(model: LanguageModel, member: _Member, corpora: Corpora, done: int, steps: int, shown: Display) -> None:
    config, trainee, folder = member.config.training, member.trainee, member.folder
    last = done == steps
    evaluates = last or (config.evaluate_every is not None and done % config.evaluate_every == 0)
    saves = config.checkpoint_every is not None and done % config.checkpoint_every == 0
    if not (evaluates or saves or done == 1 or done % config.log_every == 0):
        return
    line: dict[str, Any] = trainee.report()
    if evaluates:
        settings = member.config.evaluation
        tokens = min(settings.during_training_tokens, settings.tokens)
        brief = settings.model_copy(update={"tokens": tokens, "bootstrap": 1})
        evaluation = measure(model, {"sae": (trainee.site, trainee.sae)}, corpora.heldout, brief)["sae"]
        line["heldout"] = {name: evaluation[name] for name in SCHEDULED_METRICS}
    folder.append(folder.metrics_file, line)
    folder.append(folder.timings_file, {"step": done, **shown.timing(done)})
    shown.show(member.config, line)
    if saves:
        _save(member)


def _save(member: _Member) -> None:
    """The SAE as it is used, and what training goes on from."""
    config, trainee, folder = member.config, member.trainee, member.folder
    trainee.sae.save(folder.sae, sae_metadata(config, trainee.step))
    path = folder.checkpoints / f"step-{trainee.step:09d}.safetensors"
    write_checkpoint(path, trainee.tensors(), trainee.counters())
    folder.drop_checkpoints_before(path)


def _save_all(members: list[_Member], why: str) -> str:
    for member in members:
        _save(member)
    commands = "; ".join(f"endwise train --resume {shlex.quote(str(member.folder.path))}" for member in members)
    return f"{why} at step {members[0].trainee.step}. Go on with: {commands}"


def sae_metadata(config: RunConfig, step: int) -> dict[str, Any]:
    """What SAELens wants to know of an SAE, and under `endwise` how ours was trained."""
    return {
        "model_name": config.model.name,
        "model_class_name": "AutoModelForCausalLM",
        "hook_name": config.site,
        "hook_head_index": None,
        "context_size": config.data.context,
        "prepend_bos": config.data.prepend_bos,
        "dataset_path": config.data.source,
        "endwise": {
            "kind": config.objective.kind,
            "sparsity_coefficient": config.objective.sparsity.coefficient,
            "seed": config.seed,
            "step": step,
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
