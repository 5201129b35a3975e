"""The training loop: one clean pass serves every SAE in training, each with its own objective, optimiser and folder."""

import os
import re
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from endwise.axes import Tokens
from endwise.checkpoints import read_checkpoint
from endwise.dictionaries import ReluSAE
from endwise.errors import ConfigError, DataError, Interrupted, RunFolderError, TrainingStopped
from endwise.evaluation import measure
from endwise.files import write_json
from endwise.group import Group, Member, Run
from endwise.kernels import has_fast_bfloat16
from endwise.language_model import Clean, LanguageModel
from endwise.model_loading import find_device, load_model
from endwise.objectives import build_objective
from endwise.progress import Display
from endwise.recipes import find_recipe
from endwise.run_config import EvaluationConfig, RunConfig, TrainingConfig
from endwise.run_folder import RunFolder
from endwise.sites import Site
from endwise.tokens import BatchOrder, Corpora, TokenBatch, corpora_for, read_ahead
from endwise.trainee import Trainee

SCHEDULED_METRICS = ("ce_increase", "kl", "l0", "explained_variance.per_token")


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
    model, the data, `training.tokens` or `training.batch`. One that cannot go on (a number is not finite, its folder
    cannot be written, its own part runs out of memory) is saved and left behind; the others train to their end.

    Raises:
        SomeFailed: one or more of several failed; the error carries the finished runs (of a single recipe its own
            error is raised).
        EndwiseError: see `train`; what all share failed, which stops and saves all.
    """
    first = _shared_recipe(configs)
    model = model or _load_model(first)
    tail = tail_model(model, first.training)
    context = corpora.train.context if corpora is not None else first.data.context or model.context
    if context is None:
        raise ConfigError("The model names no longest context. Set data.context, the tokens per sequence.")
    steps = _steps(configs, context)
    group = Group(_new_member(config, model, steps, context, resume) for config in configs)
    corpora = corpora or corpora_for(
        model,
        first.data,
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
    _enter(group, corpora, resume)
    _run(model, tail, group, corpora, order, steps, display)
    return group.runs()


def _load_model(config: RunConfig) -> LanguageModel:
    settings = config.model.model_dump()
    if config.model.dtype is None and config.training.precision == "mixed":
        settings["dtype"] = "bfloat16" if find_device(config.model.device).type == "cuda" else None
    return load_model(**settings)


def _new_member(config: RunConfig, model: LanguageModel, steps: int, context: int, resume: bool) -> Member:
    folder = RunFolder(config.out or default_folder(config))
    trainee = new_trainee(config, model, steps)
    if resume:
        folder.check_exists()
    else:
        folder.check_free()
    return Member(config, trainee, folder, sae_metadata(config, model, context))


def new_trainee(config: RunConfig, model: LanguageModel, steps: int) -> Trainee:
    """The untrained SAE of a recipe, with its objective and optimiser."""
    site = model.site(config.site)
    width = model.width(site)
    objective = build_objective(config.objective, model, site)
    d_sae = config.dictionary.features(width)
    _check_memory(width, d_sae)
    sae = ReluSAE(width, d_sae, seed=config.seed).to(model.device)
    return Trainee(sae, site, objective, config.training, steps)


def _check_memory(width: int, d_sae: int) -> None:
    """An SAE is made in the machine's memory, wherever it then goes; a system that lends more than it has would be
    stopped by its kernel, without a word.
    """
    needed = 2 * width * d_sae * torch.float32.itemsize
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else needed
    if needed > memory:
        raise ConfigError(
            f"dictionary asks for {d_sae:,} features at a site of width {width:,}, whose weights alone take "
            f"{needed / 2**30:,.0f} GiB; this machine has {memory / 2**30:,.0f}. Lower dictionary.size or "
            "dictionary.ratio."
        )


def default_folder(config: RunConfig) -> Path:
    """`runs/<model>-<site>-<kind>-<coefficient>-seed<n>`."""
    model = re.sub(r"[^A-Za-z0-9._-]+", "_", Path(config.model.name).name)[:80]
    coefficient = f"{config.objective.sparsity.coefficient:g}"
    site = Site.parse(config.site).name
    return Path("runs") / f"{model}-{site}-{config.objective.kind}-{coefficient}-seed{config.seed}"


def _shared_recipe(configs: Sequence[RunConfig]) -> RunConfig:
    if not configs:
        raise ConfigError("There is no recipe to train.")
    first = configs[0]
    for other in configs[1:]:
        if _common(other) != _common(first):
            raise ConfigError(
                "SAEs trained together must agree in model, data, training.tokens, training.batch, "
                "training.accumulation and training.precision; train the others on their own."
            )
    folders = [config.out or default_folder(config) for config in configs]
    if len(set(folders)) < len(folders):
        raise ConfigError("Two SAEs trained together have the same folder; set `out` of each.")
    return first


def _common(config: RunConfig) -> tuple[object, ...]:
    training = config.training
    return config.model, config.data, training.tokens, training.batch, training.accumulation, training.precision


def _steps(configs: Sequence[RunConfig], context: int) -> int:
    """The number of steps; checks that one step and one evaluation get whole sequences."""
    training = configs[0].training
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


def _enter(group: Group, corpora: Corpora, resume: bool) -> None:
    """Starts every member's folder, or takes it up."""
    description = corpora.describe()
    for member in group.members:
        if resume:
            _reenter(member, description)
        else:
            member.folder.create(member.config)
            write_json(member.folder.data_file, description)
    if len({member.trainee.step for member in group.members}) > 1:
        raise RunFolderError("The runs stand at different steps and cannot go on together; resume each on its own.")


def _reenter(member: Member, data: Mapping[str, Any]) -> None:
    """Takes a started run up where its latest checkpoint left it."""
    folder, trainee = member.folder, member.trainee
    if folder.config().model_copy(update={"out": member.config.out}) != member.config:
        raise RunFolderError(
            f"{folder.path} was started with another recipe than this one. Resume with its own config.yaml."
        )
    folder.check_same_data(data)
    latest = folder.latest_checkpoint()
    if latest is not None:
        trainee.restore(read_checkpoint(latest))
    folder.cut_after(trainee.step)


def _run(
    model: LanguageModel,
    tail: LanguageModel,
    group: Group,
    corpora: Corpora,
    order: BatchOrder,
    steps: int,
    display: bool,
) -> None:
    """Trains every member to its last step and saves it."""
    config = group.members[0].config.training
    first = group.members[0].trainee.step
    remaining = range(first, steps)
    with (
        Display(steps, first, config.batch * corpora.train.context, display) as shown,
        _polite_stop() as stop_asked,
        read_ahead(corpora.train, map(order.__getitem__, remaining), model.device) as batches,
    ):
        group.shown = shown
        try:
            for step, batch in zip(remaining, batches, strict=True):
                trainees = [member.trainee for member in group.members]
                take_step(model, trainees, batch, config.accumulation, group.failed, tail)
                done = step + 1
                _record(model, group, corpora, done, done == steps, shown)
                shown.advance(done)
                if stop_asked() and done < steps:
                    group.each(Member.save)
                    raise Interrupted(f"Stopped as asked, saved at step {done}. {group.how_to_go_on()}")
            group.each(Member.save)
            group.share_time()
        except TrainingStopped:
            raise
        except DataError as error:
            group.save_what_can_be()
            kept = ", ".join(str(member.folder.path) for member in group.members)
            raise TrainingStopped(f"{error} The last good state is saved in {kept}.") from None
        except Exception:
            group.save_what_can_be()
            raise


Failed = Callable[[Trainee, Exception, bool], None]


def take_step(
    model: LanguageModel,
    trainees: Sequence[Trainee],
    batch: TokenBatch,
    accumulation: int = 1,
    failed: Failed | None = None,
    tail: LanguageModel | None = None,
) -> None:
    """One optimiser step of every trainee on one batch, in `accumulation` passes of equal numbers of sequences.

    Args:
        tail: the model that runs everything after the sites (`tail_model`); unset: `model` itself.
        failed: told of an error in one trainee's own part, with whether its weights are still those of the step before;
            that trainee takes no further part in the step. Unset: the error is raised.
    """
    tail = tail or model
    tokens_in_step = batch.mask.sum()
    left = list(trainees)
    _each(left, failed, Trainee.begin_step)
    size = len(batch.tokens) // accumulation
    for start in range(0, len(batch.tokens), size):
        rows = slice(start, start + size)
        clean, mask = _clean_passes(model, tail, trainees, batch.tokens[rows]), batch.mask[rows]
        _each(left, failed, lambda each: each.accumulate(tail, clean[each.site], mask, tokens_in_step))  # noqa: B023
    _each(left, failed, lambda each: each.finish_step(tokens_in_step, batch.tokens.numel()), whole=False)


def tail_model(model: LanguageModel, config: TrainingConfig) -> LanguageModel:
    """What runs the model after the sites in the precision asked for: the model itself, or its copy in bf16.

    Raises:
        ConfigError: exact precision is asked of a model in half precision.
    """
    if model.dtype in (torch.float32, torch.float64):
        if config.precision == "exact":
            return model
        if model.device.type == "cpu" and not has_fast_bfloat16(model.device):
            warnings.warn(
                "training.precision=mixed on a processor that does not multiply bf16 matrices in hardware is many "
                "times slower than training.precision=exact.",
                stacklevel=2,
            )
        return model.in_bfloat16()
    if config.precision == "exact":
        raise ConfigError(
            f"training.precision is exact, which needs a model in float32, but {model.name} is in {model.dtype}. "
            "Leave model.dtype unset, or set training.precision=mixed."
        )
    return model


def _clean_passes(
    model: LanguageModel, tail: LanguageModel, trainees: Sequence[Trainee], tokens: Tokens
) -> dict[Site, Clean]:
    """By site, what the trainees there are compared with.

    One pass for all; with another model for the tail, the model up to the last site and the tail from each site on, so
    that the tail's own rounding is on both sides of every comparison.
    """
    sites = {trainee.site for trainee in trainees}
    needs = {site: [trainee.objective for trainee in trainees if trainee.site == site] for site in sites}
    later = {site: {s for objective in needs[site] for s in objective.sites} for site in sites}
    final = {site: any(objective.final for objective in needs[site]) for site in sites}
    if tail is model:
        clean = model.clean(tokens, record=sites.union(*later.values()), final=any(final.values()))
        return dict.fromkeys(sites, clean)
    head, passes = model.clean(tokens, record=sites), {}
    for site in sites:
        with torch.no_grad():
            after = tail.replay(head, {site: head.activations[site]}, record=later[site], final=final[site])
        passes[site] = Clean(tokens, head.activations | after.activations, after.final)
    return passes


def _each(left: list[Trainee], failed: Failed | None, act: Callable[[Trainee], None], whole: bool = True) -> None:
    """Does something with every trainee that is left, and takes out those that fail at it."""
    for trainee in tuple(left):
        try:
            act(trainee)
        except Exception as error:
            if failed is None:
                raise
            left.remove(trainee)
            failed(trainee, error, whole)


def _record(model: LanguageModel, group: Group, corpora: Corpora, done: int, last: bool, shown: Display) -> None:
    """What is due after a step: lines of metrics, evaluations, checkpoints."""
    lines: dict[Path, dict[str, Any]] = {}
    group.each(partial(_report, lines, done, last))
    evaluated = [m for m in group.members if last or _due(m.config.training.evaluate_every, done)]
    if evaluated:
        with shown.paused():
            _evaluate_briefly(model, group, evaluated, corpora, lines)
    reported = [m for m in group.members if m.folder.path in lines]
    group.each(partial(_write_line, lines, shown, done), reported)


def _report(lines: dict[Path, dict[str, Any]], done: int, last: bool, member: Member) -> None:
    config = member.config.training
    intervals = (config.log_every, config.evaluate_every, config.checkpoint_every)
    if last or done == 1 or any(_due(every, done) for every in intervals):
        lines[member.folder.path] = member.trainee.report()


def _write_line(lines: dict[Path, dict[str, Any]], shown: Display, done: int, member: Member) -> None:
    folder, line = member.folder, lines[member.folder.path]
    folder.append(folder.metrics_file, line)
    folder.append(folder.timings_file, {"step": done, **shown.timing(done)})
    shown.show(folder.path, member.config, line)
    if _due(member.config.training.checkpoint_every, done):
        member.save()


def _due(every: int | None, done: int) -> bool:
    return every is not None and done % every == 0


def _evaluate_briefly(
    model: LanguageModel, group: Group, members: list[Member], corpora: Corpora, lines: dict[Path, dict[str, Any]]
) -> None:
    """Adds the metrics of `SCHEDULED_METRICS`, on a little held-out text, to the members' lines.

    Members with equal settings share its passes. Where that fails each is measured alone, so that the fault (an SAE
    that is infinite on held-out text) ends its own run only.
    """
    groups: dict[EvaluationConfig, list[Member]] = {}
    for member in members:
        settings = member.config.evaluation
        tokens = min(settings.during_training_tokens, settings.tokens)
        groups.setdefault(settings.model_copy(update={"tokens": tokens, "bootstrap": 1}), []).append(member)

    def evaluate(brief: EvaluationConfig, sharing: list[Member]) -> None:
        saes = {str(m.folder.path): (m.trainee.site, m.trainee.sae) for m in sharing}
        for path, evaluation in measure(model, saes, corpora.heldout, brief, baselines=False).items():
            lines[Path(path)]["heldout"] = {name: evaluation[name] for name in SCHEDULED_METRICS}

    for brief, sharing in groups.items():
        if len(sharing) > 1:
            with suppress(Exception):
                evaluate(brief, sharing)
                continue
        group.each(lambda member, brief=brief: evaluate(brief, [member]), sharing)


def sae_metadata(config: RunConfig, model: LanguageModel, context: int) -> dict[str, Any]:
    """What SAELens wants to know of an SAE (with `HookedTransformer` it reads our site names, and takes the model as it
    is on the hub), and under `endwise` how ours was trained.
    """
    return {
        "model_name": model.name,
        "model_class_name": "HookedTransformer",
        "hook_name": config.site,
        "hook_head_index": None,
        "context_size": context,
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
