"""All that is decided before the first step: model, text, order, steps, and each recipe's SAE and folder."""

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from endwise.common.errors import ConfigError, DataError
from endwise.common.processes import World
from endwise.common.remarks import remarks_on
from endwise.common.terminal import note
from endwise.config.fields import differing, shared
from endwise.config.method import Knob
from endwise.config.places import PlacesConfig, Recipe
from endwise.config.run import RunConfig, TrainingConfig
from endwise.evaluation.provenance import naming_relative, pinned
from endwise.evaluation.text_check import tried_on
from endwise.models.language_model import LanguageModel
from endwise.models.loading import find_device, load_model
from endwise.models.sites import Place
from endwise.runs.folder import RunFolder
from endwise.runs.several import check_whole
from endwise.runs.trackers import Mirror
from endwise.tokens import BatchOrder, Corpora, Corpus, check_readable, corpora_for
from endwise.training.fitting import TrainingText, fit_first, measure_error_scales, measure_norms, measure_start
from endwise.training.group import Group
from endwise.training.kept_activations import KeptActivations, kept_for
from endwise.training.making import new_joint_trainee, new_trainee
from endwise.training.members import JointMember, Member
from endwise.training.resume import broadcast_state, share_out, start_or_resume
from endwise.training.step import tail_model
from endwise.training.targets import held_out_wanted
from endwise.training.trainee import Trainee

Resume = bool | Literal["if_started"]
"""Choice to resume the run in the recipe's folder; `if_started`: start it, unless it is there already."""


@dataclass(frozen=True)
class TrainingRequest:
    """Request that a call of `train_together` makes.

    Args:
        configs: recipes that agree in all that one pass shares.
        trainee: makes what trains one dictionary.
        member: holds one with its folder; another where nothing is kept of the runs.

    Raises:
        ConfigError: they do not agree, or two have one folder.
    """

    configs: Sequence[Recipe]
    resume: Resume = False
    from_step: int | None = None
    display: bool = True
    trainee: type[Trainee] = Trainee
    member: type[Member] = Member

    def __post_init__(self) -> None:
        _check_shared(self.configs)
        if self.from_step is not None and self.resume is False:
            raise ConfigError("from_step needs resume, since it names a checkpoint of a run that was started before.")

    @property
    def first(self) -> Recipe:
        """The recipe that stands for what all share."""
        return self.configs[0]


@dataclass(frozen=True)
class Prepared:
    """All that the loop needs."""

    model: LanguageModel
    tail: LanguageModel
    """Model that runs everything after the sites: `model`, or its copy in bf16."""
    group: Group
    corpora: Corpora
    order: BatchOrder
    steps: int
    display: bool
    world: World
    kept: KeptActivations | None = None


def prepare(
    request: TrainingRequest, world: World, claims: ExitStack, model: LanguageModel | None, corpora: Corpora | None
) -> Prepared:
    """Claim the folders, load model and text, make every SAE, and start or resume every run.

    Args:
        claims: holds the folders until it is closed.
        model: a loaded model to use instead of the recipes'.
        corpora: loaded token sequences to use instead of the recipes'.
    """
    first, configs, display = request.first, request.configs, request.display and world.is_first
    check_sharded(first, world.size, given=model)
    world = _grid(first, world)
    with world.together("claiming the run folders"):
        folders = [_claimed(config, world, claims, request.resume) for config in configs]
        settings = pinned(folders[0].path, first)
    settings = world.from_first(settings)
    with world.together("loading the model and the data"), naming_relative(folders[0].path, first):
        if model is None and corpora is None:  # what is wrong with the text is known before weights are read
            check_readable(first.data)
        model = model or model_for(settings)
        tail = tail_model(model, first.training)
        context = corpora.train.context if corpora is not None else first.data.context or model.context
        if context is None:
            raise ConfigError("The model names no longest context. Set data.context, the tokens per sequence.")
        steps = _steps(configs, context)
        group = Group(
            _new_member(request, config, folder, model, steps, context, world)
            for config, folder in zip(configs, folders, strict=True)
        )
        corpora = corpora or corpora_of([settings, *configs[1:]], model)
        for member in group.members:
            _measure_within(member, corpora.heldout, display)
        for each in (model, tail):
            each.attend_within(corpora.train.layout.ends)
        order = _order(first, corpora, steps)
    _check_same_text(corpora, world)
    with world.together("starting the run"):
        if world.is_first:
            start_or_resume(group, model, corpora, request.from_step)
        share_out(group, world)
        if world.replicas.is_first:
            _fit_new(group, TrainingText(model, corpora.train, order), display)
    broadcast_state(group, world)
    for part in (part for member in group.members for part in member.trainee.parts):
        part.sae.join(world)
    group.text = _text_tried(model, corpora, display, world)
    trainees = [member.trainee for member in group.members]
    kept = kept_for(first, model, tail, trainees, corpora.train, steps, world, display)
    if kept is not None:
        claims.callback(kept.close)
    return Prepared(model, tail, group, corpora, order, steps, display, world, kept)


def _fit_new(group: Group, text: TrainingText, display: bool) -> None:
    """Do what is fitted to activations before the first step."""
    new = [member for member in group.members if member.trainee.step == 0]
    group.each(partial(measure_norms, text, display=display), new)
    group.each(partial(measure_error_scales, text), new)
    group.each(partial(fit_first, text), new)
    group.each(partial(measure_start, text, display=display), new)


def _check_shared(configs: Sequence[Recipe]) -> None:
    if not configs:
        raise ConfigError("There is no recipe to train.")
    first = configs[0]
    for other in configs[1:]:
        if apart := differing(shared(first), shared(other)):
            raise ConfigError(
                "SAEs trained together must agree in model, data, training.tokens, training.batch, "
                f"training.accumulation and training.precision, but differ in {', '.join(apart)}; train the others on "
                "their own."
            )
    folders = [config.out or default_folder(config) for config in configs]
    if len(set(folders)) < len(folders):
        raise ConfigError("Two SAEs trained together have the same folder; set `out` of each.")


def _grid(config: Recipe, world: World) -> World:
    """The processes, with those that share the features of a dictionary."""
    shards = config.training.shards
    if world.size % shards:
        raise ConfigError(
            f"training.shards is {shards}, among which features are shared out, and {world.size} is not a multiple of "
            f"it. Start {shards} processes, or more (torchrun --nproc-per-node={shards}), or set training.shards=1."
        )
    if world.size // shards > config.training.batch:
        raise ConfigError(
            f"training.batch is {config.training.batch}, fewer sequences than the {world.size // shards} processes "
            "that share them. Raise it, or start fewer processes."
        )
    return world.split(shards)


def check_sharded(
    config: Recipe, processes: int, device: torch.device | None = None, given: LanguageModel | None = None
) -> None:
    """
    Args:
        device: one that takes the place of the recipe's.
        given: a loaded model that is used instead of the recipe's.

    Raises:
        ConfigError: the model is to be sharded, and cannot be.
    """
    settings, why = config.model, ""
    if not settings.sharded:
        return
    if processes == 1:
        why = "there is one process only. Start several (docs/scaling.md)"
    elif (shards := config.training.shards) > 1:
        why = f"training.shards={shards} divides its dictionary, and not both can be divided. Set training.shards=1"
    elif given is not None:
        why = f"{given.name} was loaded whole. Let the recipe load it"
    elif settings.quantization is not None:
        why = f"weights packed by {settings.quantization} cannot be divided. Unset model.quantization"
    elif config.training.precision == "mixed" and _dtype(config, device) in (None, "float32"):
        why = "training.precision=mixed copies a model in float32. Set model.dtype=bfloat16"
    if why:
        raise ConfigError(f"model.sharded divides a model among processes as it is loaded, but {why}, or unset it.")


def _claimed(config: Recipe, world: World, claims: ExitStack, resume: Resume) -> RunFolder:
    """The recipe's folder, held for this run and found fit for it, before anything long is begun."""
    folder = RunFolder(config.out or default_folder(config))
    if world.is_first:
        check_whole(folder.path)
        if resume is True:
            folder.check_exists()
        claims.enter_context(folder.claimed())
        folder.mirror = claims.enter_context(Mirror.named(config.trackers))
        if resume is False or not folder.has_run():
            folder.check_free()
    return folder


def steps_of(training: TrainingConfig, context: int) -> int:
    """
    Raises:
        ConfigError: `training.tokens` are fewer than one step takes.
    """
    per_step = training.batch * context
    if training.tokens < per_step:
        raise ConfigError(
            f"training.tokens is {training.tokens}, but one step alone takes {per_step} "
            f"(training.batch {training.batch} × context {context}). Raise the one or lower the others."
        )
    return training.tokens // per_step


def _steps(configs: Sequence[Recipe], context: int) -> int:
    """The number of steps; checks that one evaluation gets whole sequences too."""
    steps = steps_of(configs[0].training, context)
    for config in configs:
        for key in ("tokens", "during_training_tokens"):
            if (tokens := getattr(config.evaluation, key)) < context:
                raise ConfigError(f"evaluation.{key} is {tokens}, but one sequence alone has {context}. Raise it.")
    return steps


def model_for(config: Recipe) -> LanguageModel:
    """The language model of a recipe, in the precision that its training asks for."""
    return load_model(**config.model.model_dump(exclude={"dtype"}), dtype=_dtype(config))


def _dtype(config: Recipe, device: torch.device | None = None) -> str | None:
    if config.model.dtype is None and config.training.precision == "mixed":
        return "bfloat16" if (device or find_device(config.model.device)).type == "cuda" else None
    return config.model.dtype


def corpora_of(configs: Sequence[Recipe], model: LanguageModel) -> Corpora:
    """The sequences that recipes of one `data` section and one length are trained and measured on."""
    first, context = configs[0], configs[0].data.context or model.context
    held, least = (max(held_out_wanted(each, context, least=least) for each in configs) for least in (False, True))
    data, trained = first.data, first.training.tokens
    return corpora_for(model, data, training_tokens=trained, evaluation_tokens=held, least_evaluation_tokens=least)


def _order(config: Recipe, corpora: Corpora, steps: int) -> BatchOrder:
    order = BatchOrder(corpora.train, config.training.batch, config.data.seed, config.data.epochs)
    if len(order) < steps:
        raise DataError(
            f"training.tokens asks for {steps} steps, but {corpora.train.name} has text for {len(order)}. "
            "Set data.epochs, or lower training.tokens."
        )
    return order


def _check_same_text(corpora: Corpora, world: World) -> None:
    described = world.gather({side: getattr(corpora, side).fingerprint() for side in ("train", "heldout")})
    if any(other != described[0] for other in described):
        raise DataError(
            f"The processes hold different text ({', '.join(str(each) for each in described)}). Give all of them the "
            "same files, or one data.cache, and a data set on the hub its data.revision."
        )


def _text_tried(model: LanguageModel, corpora: Corpora, display: bool, world: World) -> dict[str, Any]:
    """Measure the model on a little of the text, and say at once what speaks against it."""
    record: dict[str, Any] = {}
    with world.together("trying the model on the text"):
        if world.is_first:
            record = tried_on(model, corpora.heldout)
            for remark in remarks_on(record):
                note(f"! {remark}", display)
    return record


def _new_member(
    request: TrainingRequest,
    config: Recipe,
    folder: RunFolder,
    model: LanguageModel,
    steps: int,
    context: int,
    world: World,
) -> Member:
    """Make what is trained in a folder."""
    start = _less_its_start(config, folder, request.from_step)
    if isinstance(start, PlacesConfig):
        assert isinstance(config, PlacesConfig)
        recipes = sorted(config.recipes, key=lambda recipe: model.place(recipe.place))
        of_places = [sae_metadata(recipe, model, context) for recipe in recipes]
        trainee, first = new_joint_trainee(start, model, steps), world.is_first
        return JointMember(config, trainee, folder, of_places[0], first, recipes=recipes, of_places=of_places)
    assert isinstance(config, RunConfig)
    trainee = new_trainee(start, model, steps, kind=request.trainee, world=world)
    return request.member(config, trainee, folder, sae_metadata(config, model, context), world.is_first)


def _less_its_start(config: Recipe, folder: RunFolder, from_step: int | None) -> Recipe:
    """The recipe without `init_from` where a checkpoint holds the weights, else with the commit that the run pinned."""
    if from_step == 0 or not folder.saved_steps():
        return pinned(folder.path, config)
    if isinstance(config, PlacesConfig):
        places = [place.model_copy(update={"init_from": None}) for place in config.places]
        return config.model_copy(update={"places": tuple(places)})
    return config.model_copy(update={"init_from": None})


def _measure_within(member: Member, heldout: Corpus, display: bool) -> None:
    """Lower a default number of tokens to measure on to what is held out, and say so."""
    config, context = member.config, heldout.context
    others = held_out_wanted(config, context, least=True) - config.evaluation.least
    fitting = config.evaluation.within((heldout.tokens - others) // context * context)
    if fitting is not config.evaluation:
        member.measure(fitting)
        message = f"evaluation.tokens is {fitting.tokens:,}, all text that is held out (data.heldout gives more)."
        note(message, display)


def default_folder(config: Recipe) -> Path:
    """`runs/<model>-<site>-<kind>-<knob>-seed<n>`; for several places their number in place of site and knob."""
    model = re.sub(r"[^A-Za-z0-9._-]+", "_", Path(config.model.name).name)[:80]
    if isinstance(config, PlacesConfig):
        how = "joint" if config.joint else "apart"
        return Path("runs") / f"{model}-{len(config.places)}-places-{how}-{config.objective_name}-seed{config.seed}"
    knob = Knob.of(config).tag
    place = "-to-".join(site.name for site in Place.parse(config.place).sites)
    return Path("runs") / f"{model}-{place}-{config.objective_name}-{knob}-seed{config.seed}"


UNPROCESSED = {
    "fold_ln": False,
    "center_writing_weights": False,
    "center_unembed": False,
    "fold_value_biases": False,
    "refactor_factored_attn_matrices": False,
}
"""All that TransformerLens may do to a model's weights as it loads them, by its names."""


def sae_metadata(config: RunConfig, model: LanguageModel, context: int) -> dict[str, Any]:
    """Describe an SAE for SAELens, and under `endwise` how ours was trained.

    With `HookedTransformer` it reads our site names. What the SAE reads are the activations of the model as it is on
    the hub: SAELens says so when it loads one, and passes on that nothing in the weights is to be processed.
    """
    return {
        "model_name": model.name,
        "model_class_name": "HookedTransformer",
        "model_from_pretrained_kwargs": UNPROCESSED,
        "hook_name": config.site,
        **({"hook_name_out": config.written} if config.written != config.site else {}),
        "hook_head_index": None,
        "context_size": context,
        "prepend_bos": config.data.prepend_bos,
        "dataset_path": config.data.source,
        "endwise": {
            "kind": config.objective_name,
            "sparsity_coefficient": config.objective.coefficient,
            "seed": config.seed,
            "unit_norm_decoder": True,
        },
    }
