"""The training loop: one clean pass serves every SAE in training, each with its own objective, optimiser and folder."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from endwise.dictionaries import SAE, ReluSAE
from endwise.distributed import World, joined
from endwise.errors import (
    ConfigError,
    DataError,
    FormatError,
    Interrupted,
    OutOfMemory,
    ProcessLost,
    TrainingStopped,
    out_of_memory,
)
from endwise.evaluation import measure
from endwise.group import Group, Member, Run
from endwise.language_model import LanguageModel
from endwise.machine import available_memory, size_text
from endwise.model_loading import find_device, load_model
from endwise.objectives import build_objective
from endwise.progress import Display
from endwise.recipes import find_recipe
from endwise.remarks import remarks_on
from endwise.resuming import enter, spread
from endwise.run_config import EvaluationConfig, RunConfig
from endwise.run_folder import RunFolder
from endwise.seeds import shared_generators
from endwise.sites import Site
from endwise.standing import naming_relative, pinned
from endwise.step import tail_model, take_step
from endwise.stopping import polite_stop
from endwise.terminal import show
from endwise.text_check import tried_on
from endwise.tokens import BatchOrder, Corpora, corpora_for, read_ahead
from endwise.trainee import Trainee

SCHEDULED_METRICS = ("ce_increase", "kl", "l0", "explained_variance.per_token")

Resume = bool | Literal["if_started"]
"""Whether to go on with the run in the recipe's folder; `if_started`: start it, unless it is there already."""


def train(
    config: RunConfig | Mapping[str, Any] | str | Path,
    *,
    model: LanguageModel | None = None,
    corpora: Corpora | None = None,
    resume: Resume = False,
    from_step: int | None = None,
    display: bool = True,
) -> Run:
    """Trains one SAE as its recipe says. Under `torchrun` all its processes train that one SAE (docs/scaling.md).

    Args:
        config: a recipe: an object, a mapping of its fields, the path of a YAML file, or the name of one that ships.
        model: a loaded model to use instead of the recipe's.
        corpora: loaded token sequences to use instead of the recipe's.
        resume: go on from the last checkpoint of the run in the recipe's folder, which on a CPU ends in the same bits
            as if it had never stopped. `if_started`: start it, unless it is there already.
        from_step: go on from the checkpoint of this step instead, 0 for the beginning; what came after is done again.

    Raises:
        EndwiseError: the recipe breaks a rule (before any training), or training cannot go on (after saving).
    """
    if isinstance(config, str | Path):
        config = RunConfig.read(find_recipe(str(config)))
    elif not isinstance(config, RunConfig):
        config = RunConfig.build(dict(config))
    settings: dict[str, Any] = {"resume": resume, "from_step": from_step, "display": display}
    return train_together([config], model=model, corpora=corpora, **settings)[0]


def train_together(
    configs: Sequence[RunConfig],
    *,
    model: LanguageModel | None = None,
    corpora: Corpora | None = None,
    resume: Resume = False,
    from_step: int | None = None,
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
    if from_step is not None and resume is False:
        raise ConfigError("from_step needs resume, since it names a checkpoint of a run that was started before.")
    with joined() as world, shared_generators(first.seed), _memory_named(), ExitStack() as claims:
        _check_shares(first, world)
        with world.together("claiming the run folders"):
            folders = [_claimed(config, world, claims, resume) for config in configs]
            settings = pinned(folders[0].path, first)
        settings = world.from_first(settings)
        with world.together("loading the model and the data"), naming_relative(folders[0].path, first):
            model = model or model_for(settings)
            tail = tail_model(model, first.training)
            context = corpora.train.context if corpora is not None else first.data.context or model.context
            if context is None:
                raise ConfigError("The model names no longest context. Set data.context, the tokens per sequence.")
            steps = _steps(configs, context)
            group = Group(
                Member(
                    config,
                    new_trainee(_less_its_start(config, folder, from_step), model, steps),
                    folder,
                    sae_metadata(config, model, context),
                )
                for config, folder in zip(configs, folders, strict=True)
            )
            corpora = corpora or corpora_of([settings, *configs[1:]], model)
            order = _order(first, corpora, steps)
        _check_same_text(corpora, world)
        with world.together("starting the run"):
            if world.is_first:
                enter(group, model, corpora, from_step)
        spread(group, world)
        group.text = _text_tried(model, corpora, display, world)
        _run(model, tail, group, corpora, order, steps, display, world)
        return group.runs()


def _text_tried(model: LanguageModel, corpora: Corpora, display: bool, world: World) -> dict[str, Any]:
    """Measures the model on a little of the text, and says at once what speaks against it."""
    record: dict[str, Any] = {}
    with world.together("trying the model on the text"):
        if world.is_first:
            record = tried_on(model, corpora.heldout)
            for remark in remarks_on(record):
                show(f"! {remark}", Console(stderr=True, quiet=not display))
    return record


def _check_shares(config: RunConfig, world: World) -> None:
    if world.size > config.training.batch:
        raise ConfigError(
            f"training.batch is {config.training.batch}, fewer sequences than the {world.size} processes that share "
            "them. Raise it, or start fewer processes."
        )


def _check_same_text(corpora: Corpora, world: World) -> None:
    described = world.gather({side: getattr(corpora, side).fingerprint() for side in ("train", "heldout")})
    if any(other != described[0] for other in described):
        raise DataError(
            f"The processes hold different text ({', '.join(str(each) for each in described)}). Give all of them the "
            "same files, or one data.cache, and a data set on the hub its data.revision."
        )


def _claimed(config: RunConfig, world: World, claims: ExitStack, resume: Resume) -> RunFolder:
    """The recipe's folder, held for this run and found fit for it, before anything long is begun."""
    folder = RunFolder(config.out or default_folder(config))
    if world.is_first:
        if resume is True:
            folder.check_exists()
        claims.enter_context(folder.claimed())
        if resume is False or not folder.has_run():
            folder.check_free()
    return folder


def corpora_of(configs: Sequence[RunConfig], model: LanguageModel) -> Corpora:
    """The sequences that recipes of one `data` section and one length are trained and measured on."""
    evaluation_tokens = max(each.evaluation.needed for each in configs)
    training = configs[0].training
    return corpora_for(model, configs[0].data, training_tokens=training.tokens, evaluation_tokens=evaluation_tokens)


def _order(config: RunConfig, corpora: Corpora, steps: int) -> BatchOrder:
    order = BatchOrder(corpora.train, config.training.batch, config.data.seed, config.data.epochs)
    if len(order) < steps:
        raise DataError(
            f"training.tokens asks for {steps} steps, but {corpora.train.name} has text for {len(order)}. "
            "Set data.epochs, or lower training.tokens."
        )
    return order


def model_for(config: RunConfig) -> LanguageModel:
    """The language model of a recipe, in the precision that its training asks for."""
    settings = config.model.model_dump()
    if config.model.dtype is None and config.training.precision == "mixed":
        settings["dtype"] = "bfloat16" if find_device(config.model.device).type == "cuda" else None
    return load_model(**settings)


def new_trainee(config: RunConfig, model: LanguageModel, steps: int) -> Trainee:
    """The SAE that a recipe's training begins with, with its objective and optimiser.

    Raises:
        ConfigError: `init_from` holds an SAE of another shape, or the machine has no memory for one of the size asked.
        FormatError: `init_from` holds no SAE.
    """
    site = model.site(config.site)
    width = model.width(site)
    objective = build_objective(config.objective, model, site)
    d_sae = config.dictionary.features(width)
    _check_memory(width, d_sae)
    sae = ReluSAE(width, d_sae, seed=config.seed) if config.init_from is None else _taken_over(config, width, d_sae)
    return Trainee(sae.to(model.device), site, objective, config.training, steps)


def _less_its_start(config: RunConfig, folder: RunFolder, from_step: int | None) -> RunConfig:
    """The recipe without `init_from`, which may be gone or another by now, where a checkpoint holds the weights."""
    goes_on = from_step != 0 and bool(folder.saved_steps())
    return config.model_copy(update={"init_from": None}) if goes_on else config


def _taken_over(config: RunConfig, width: int, d_sae: int) -> ReluSAE:
    """The SAE in `init_from`, made ready for training."""
    assert config.init_from is not None
    try:
        sae = SAE.load(config.init_from)
    except FormatError as error:
        raise FormatError(f"init_from: {error}") from None
    if (sae.d_in, sae.d_sae) != (width, d_sae):
        raise ConfigError(
            f"init_from: the SAE in {config.init_from} has {sae.d_sae:,} features of width {sae.d_in:,}, but "
            f"dictionary and site ask for {d_sae:,} of width {width:,}. Set dictionary.size={sae.d_sae}, or choose the "
            "site that it was trained at."
        )
    if not isinstance(sae, ReluSAE):
        raise ConfigError(
            f"init_from: {config.init_from} holds a {sae.architecture} SAE; only ReLU ones can be trained."
        )
    return sae.to_train()


def _check_memory(width: int, d_sae: int) -> None:
    """An SAE is made in the machine's memory, wherever it then goes; a system that lends more than it has would be
    stopped by its kernel, without a word.
    """
    needed = 2 * width * d_sae * torch.float32.itemsize
    memory = available_memory()
    if memory is not None and needed > memory:
        raise ConfigError(
            f"dictionary asks for {d_sae:,} features at a site of width {width:,}, whose weights alone take "
            f"{size_text(needed)}; this machine has {size_text(memory)} free. Lower dictionary.size or "
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


def _run(
    model: LanguageModel,
    tail: LanguageModel,
    group: Group,
    corpora: Corpora,
    order: BatchOrder,
    steps: int,
    display: bool,
    world: World,
) -> None:
    """Trains every member to its last step and saves it."""
    config = group.members[0].config.training
    first = group.members[0].trainee.step
    remaining = range(first, steps)
    shares = (world.share(order[step]) for step in remaining)
    with (
        Display(steps, first, config.batch * corpora.train.context, display and world.is_first) as shown,
        polite_stop() as stop_asked,
        read_ahead(corpora.train, shares, model.device) as batches,
        _saving(group),
    ):
        group.shown = shown
        if any(member.line is not None for member in group.members):  # what a resumed run owes
            _record(model, group, corpora, first, shown, world)
        for step, batch in zip(remaining, batches, strict=True):
            trainees = [member.trainee for member in group.members]
            take_step(model, trainees, batch, config.accumulation, group.failed, tail, world)
            group.agree(world)
            done = step + 1
            _record(model, group, corpora, done, shown, world)
            shown.advance(done)
            if group.agree(world, stop_asked()) and done < steps:
                group.each(Member.save)
                raise Interrupted(f"Stopped as asked, saved at step {done}. {group.how_to_go_on()}")
        group.each(Member.save)
        group.share_time()


@contextmanager
def _memory_named() -> Iterator[None]:
    """An allocation that fails becomes an error that says what to lower."""
    try:
        yield
    except Exception as error:
        if isinstance(error, TrainingStopped) or (named := out_of_memory(error)) is None:
            raise
        raise named from error


@contextmanager
def _saving(group: Group) -> Iterator[None]:
    """Whatever ends training, every member's last good state is on the disk after it."""
    try:
        yield
    except ProcessLost as error:
        # On a GPU a step may be queued behind a sum that never comes: there is nothing to wait for, or to trust.
        saved = group.save_what_can_be() if group.device.type == "cpu" else "The last checkpoint is what is left."
        raise ProcessLost(f"{error} {saved}") from None
    except DataError as error:
        raise TrainingStopped(f"{error} {group.save_what_can_be()}") from None
    except TrainingStopped:
        raise
    except Exception as error:
        saved = group.save_what_can_be()
        if (named := out_of_memory(error)) is not None:
            raise OutOfMemory(f"{named} {saved}") from error
        raise


def _record(model: LanguageModel, group: Group, corpora: Corpora, done: int, shown: Display, world: World) -> None:
    """What is due after a step: lines of metrics, evaluations, checkpoints."""
    group.each(partial(_report, done))
    evaluated = [member for member in group.members if _evaluation_due(member, done)]
    if evaluated:
        with shown.paused():
            _evaluate_briefly(model, group, evaluated, corpora, world)
    group.each(partial(_write_line, shown, done), [m for m in group.members if m.line is not None])


def _evaluation_due(member: Member, done: int) -> bool:
    return member.line is not None and (member.at_end or _due(member.config.training.evaluate_every, done))


def _report(done: int, member: Member) -> None:
    config = member.config.training
    intervals = (config.log_every, config.evaluate_every, config.checkpoint_every)
    if member.line is None and (member.at_end or done == 1 or any(_due(every, done) for every in intervals)):
        member.line = {**member.trainee.report(), "seed": member.config.seed}


def _write_line(shown: Display, done: int, member: Member) -> None:
    folder, line = member.folder, member.line
    assert line is not None
    if member.writes:
        folder.append(folder.metrics_file, line)
    member.line, member.heldout = None, line.get("heldout", member.heldout)
    if not member.writes:
        return
    timing = shown.timing(done)
    timing["seconds"] += member.seconds_before
    folder.append(folder.timings_file, {"step": done, **timing, "seed": member.config.seed})
    shown.show(folder.path, member.config, line)
    if _due(member.config.training.checkpoint_every, done):
        member.save()


def _due(every: int | None, done: int) -> bool:
    return every is not None and done % every == 0


def _evaluate_briefly(
    model: LanguageModel,
    group: Group,
    members: list[Member],
    corpora: Corpora,
    world: World,
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

    measured = partial(measure, model, corpus=corpora.heldout, baselines=False, world=world)

    def evaluate(brief: EvaluationConfig, sharing: list[Member]) -> None:
        saes = {str(m.folder.path): (m.trainee.site, m.trainee.sae) for m in sharing}
        evaluations = measured(saes=saes, config=brief)
        for member in sharing:
            evaluation = evaluations[str(member.folder.path)]
            assert member.line is not None
            member.line["heldout"] = {name: evaluation[name] for name in SCHEDULED_METRICS}

    for brief, sharing in groups.items():
        if len(sharing) > 1:
            try:
                evaluate(brief, sharing)
                continue
            except ProcessLost:
                raise
            except Exception:  # noqa: BLE001  Each is measured alone below, and tells what is wrong with it.
                pass
        group.each(lambda member, brief=brief: evaluate(brief, [member]), sharing)


UNPROCESSED = {
    "fold_ln": False,
    "center_writing_weights": False,
    "center_unembed": False,
    "fold_value_biases": False,
    "refactor_factored_attn_matrices": False,
}
"""All that TransformerLens may do to a model's weights as it loads them, by its names."""


def sae_metadata(config: RunConfig, model: LanguageModel, context: int) -> dict[str, Any]:
    """What SAELens wants to know of an SAE, and under `endwise` how ours was trained.

    With `HookedTransformer` it reads our site names. What the SAE reads are the activations of the model as it is on
    the hub: SAELens says so when it loads one, and passes on that nothing in the weights is to be processed.
    """
    return {
        "model_name": model.name,
        "model_class_name": "HookedTransformer",
        "model_from_pretrained_kwargs": UNPROCESSED,
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
