"""Making of what is trained: each recipe's dictionary with its first weights, its objective and its optimiser."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from endwise.common.errors import ConfigError, FormatError, HubError, SiteError
from endwise.common.hub import shown
from endwise.common.machine import available_memory, size_text
from endwise.common.processes import ALONE, World
from endwise.config.dictionary import ARCHITECTURES
from endwise.config.places import PlacesConfig
from endwise.config.run import RunConfig
from endwise.dictionaries import SAE
from endwise.dictionaries.normed import normed, taken_over
from endwise.evaluation.provenance import report_once
from endwise.formats import metadata_at
from endwise.models.language_model import LanguageModel
from endwise.models.sites import ARROW, Place
from endwise.training.course import Phase
from endwise.training.joint import JointTrainee
from endwise.training.objectives import OF_ONE, OF_THE_PASS, Objective, SiteTerm, Term, build_objective
from endwise.training.trainee import Trainee


def phases_of(config: RunConfig, model: LanguageModel, kinds: tuple[type[Term], ...] = OF_ONE) -> list[Phase]:
    """Return the phases of a recipe for one place.

    Args:
        kinds: of terms; the others are left out.

    Raises:
        ConfigError, SiteError: see `build_objective`.
    """
    written = model.place(config.place).writes
    return _phases(config, [build_objective(each.objective, model, written, kinds) for each in config.in_phases])


def pass_phases(config: PlacesConfig, model: LanguageModel) -> list[Phase]:
    """Variant of `phases_of` for the pass in which several places are spliced jointly."""
    written = [place.writes for place in sorted(model.place(recipe.place) for recipe in config.recipes)]
    objectives = [
        build_objective(each.objective, model, written[0], OF_THE_PASS, written[-1]) for each in config.in_phases
    ]
    return _phases(config, objectives)


def _phases(config: RunConfig | PlacesConfig, objectives: Sequence[Objective]) -> list[Phase]:
    if not config.phases:
        return [Phase(objective) for objective in objectives]
    return [
        Phase(objective, own.share, own.learning_rate, own.warmup, own.optimizer == "fresh")
        for own, objective in zip(config.phases, objectives, strict=True)
    ]


def new_joint_trainee(config: PlacesConfig, model: LanguageModel, steps: int) -> JointTrainee:
    """The SAEs that a joint recipe's training begins with.

    Raises:
        ConfigError, FormatError: see `new_trainee`; or a dictionary that chooses among all tokens of a pass would see
            some of them at a time.
    """
    recipes = sorted(config.recipes, key=lambda recipe: model.place(recipe.place))
    phases = pass_phases(config, model)
    parts = [new_trainee(each, model, steps, phases_of(each, model, (SiteTerm,))) for each in recipes]
    training = config.training
    microbatch, whole = training.microbatch, training.batch // training.accumulation
    if any(recipe.dictionary.batchwise for recipe in recipes[1:]):
        if microbatch is not None and microbatch < whole:
            raise ConfigError(
                f"training.microbatch is {microbatch}, but a dictionary that comes after another one is of an "
                "architecture that chooses among all tokens of a step, and encodes inside the spliced pass. Leave it "
                "unset: all sequences go through that pass at once."
            )
        microbatch = whole
    return JointTrainee(parts, phases, config.inputs, microbatch)


def new_trainee(
    config: RunConfig,
    model: LanguageModel,
    steps: int,
    phases: Sequence[Phase] | None = None,
    kind: type[Trainee] = Trainee,
    world: World = ALONE,
) -> Trainee:
    """The SAE that a recipe's training begins with, with its objective and optimiser.

    Args:
        phases: others than the recipe's.
        world: processes among whose shards the features are shared out.

    Raises:
        ConfigError: `init_from` holds an SAE of another shape, or the machine has no memory for one of the size asked.
        FormatError: `init_from` holds no SAE.
    """
    place = model.place(config.place)
    width = model.width(place.reads)
    phases = phases or phases_of(config, model)
    d_sae = config.dictionary.features(width)
    _check_memory(width, d_sae)
    for sparsity in (phase.objective.sparsity for phase in config.in_phases):
        if sparsity is not None and (sparsity.target_l0 or 0) > d_sae:
            raise ConfigError(
                f"objective.sparsity.target_l0 is {sparsity.target_l0:g}, more than the {d_sae} features there are. "
                "Lower it, or raise dictionary.size."
            )
    if config.init_from is None:
        sae = new_dictionary(config, model, place)
    else:
        sae = _taken_over(config, width, model.width(place.writes), d_sae)
    sae.leave_out_above(None if config.data.leave_out_norms is None else math.nan)  # to be measured
    return kind(sae.split(world.one_replica).to(model.device), place, phases, config.training, steps)


def new_dictionary(config: RunConfig, model: LanguageModel, place: Place) -> SAE:
    """Make the dictionary of a recipe, with its first weights.

    Raises:
        ConfigError: the place's two sites are of two widths, and the architecture writes as wide as it reads.
    """
    architecture = ARCHITECTURES[config.dictionary.architecture]
    d_in, d_out = model.width(place.reads), model.width(place.writes)
    if architecture.two_widths:
        return normed(architecture.build(config.dictionary, d_in, config.seed, d_out=d_out), config.dictionary)
    if d_out != d_in:
        raise ConfigError(
            f"site {place.reads.name} has width {d_in} and writes {place.writes.name} has width {d_out}, but a "
            f"{config.dictionary.architecture} dictionary writes as wide as it reads. Choose sites of one width."
        )
    return architecture.build(config.dictionary, d_in, config.seed)


def _taken_over(config: RunConfig, width: int, d_out: int, d_sae: int) -> SAE:
    """The SAE in `init_from`, made ready for training."""
    assert config.init_from is not None
    start = shown(config.init_from)
    try:
        sae = SAE.load(config.init_from)
    except (FormatError, HubError) as error:
        raise type(error)(f"init_from: {error}") from None
    if (sae.d_in, sae.d_sae) != (width, d_sae):
        raise ConfigError(
            f"init_from: the SAE in {start} has {sae.d_sae:,} features of width {sae.d_in:,}, but "
            f"dictionary and site ask for {d_sae:,} of width {width:,}. Set dictionary.size={sae.d_sae}, or choose the "
            "site that it was trained at."
        )
    if sae.d_out != d_out:
        raise ConfigError(
            f"init_from: the dictionary in {start} writes width {sae.d_out:,}, but {config.written} has "
            f"{d_out:,}. Choose the site that it was trained to write."
        )
    _report_other_place(config, start)
    try:
        return taken_over(sae, config.dictionary, config.seed)
    except ConfigError as error:
        raise ConfigError(f"init_from: {start}: {error}") from None


def _report_other_place(config: RunConfig, start: str) -> None:
    """Report a start that was trained at another place, as far as its file says."""
    metadata = metadata_at(Path(start))
    read = str(metadata.get("hook_name"))
    try:
        kept = Place.parse(f"{read}{ARROW}{metadata.get('hook_name_out') or read}")
        here = Place.parse(config.place)
    except SiteError:  # by another name than ours, which says nothing
        return
    if [site.stream for site in kept.sites] != [site.stream for site in here.sites]:
        message = f"init_from: {start} was trained at {kept}, and would continue at {here}."
        report_once(f"{message} If not meant, correct site.")


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
