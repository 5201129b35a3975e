"""Train SAEs: prepare, then run the loop."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from endwise.common.errors import ConfigError, TrainingStopped, out_of_memory
from endwise.common.processes import joined
from endwise.common.seeds import shared_generators
from endwise.common.terminal import printing_once
from endwise.config.adopted import refuse_adopted
from endwise.config.places import PlacesConfig, build_recipe, read_recipe
from endwise.config.recipes import find_recipe
from endwise.config.run import RunConfig
from endwise.models.language_model import LanguageModel
from endwise.runs.folder import RunFolder
from endwise.runs.several import place_folder
from endwise.tokens import Corpora
from endwise.training.loop import run_loop
from endwise.training.members import PlacesRun, Run
from endwise.training.resume import start_apart
from endwise.training.setup import Resume, TrainingRequest, default_folder, prepare

OneRecipe = RunConfig | Mapping[str, Any] | str | Path


def train(
    config: OneRecipe,
    *,
    model: LanguageModel | None = None,
    corpora: Corpora | None = None,
    resume: Resume = False,
    from_step: int | None = None,
    display: bool = True,
) -> Run:
    """Train one SAE as its recipe says. Under `torchrun` all its processes train that one SAE (docs/scaling.md).

    Args:
        config: a recipe: an object, a mapping of its fields, the path of a YAML file, or the name of one that ships.
        model: a loaded model to use instead of the recipe's.
        corpora: loaded token sequences to use instead of the recipe's.
        resume: start from the last checkpoint of the run in the recipe's folder, which on a CPU ends in the same bits
            as if it had never stopped. `if_started`: start it, unless it is there already.
        from_step: start from the checkpoint of this step instead, 0 for the beginning; what came after is done again.

    Raises:
        EndwiseError: the recipe breaks a rule (before any training), or training cannot continue (after saving).
    """
    settings: dict[str, Any] = {"resume": resume, "from_step": from_step, "display": display}
    return train_together([config], model=model, corpora=corpora, **settings)[0]


def as_recipe(config: OneRecipe) -> RunConfig:
    """Read a recipe from what a caller may give: an object, a mapping of its fields, a path, or a name.

    Raises:
        ConfigError: it breaks a rule, or is one for several places.
    """
    if isinstance(config, str | Path):
        recipe = read_recipe(find_recipe(str(config)))
    elif isinstance(config, RunConfig | Mapping):
        recipe = config if isinstance(config, RunConfig) else build_recipe(config)
    else:
        raise ConfigError(f"A recipe is a mapping of its fields, a path, or a name; given {type(config).__name__}.")
    if isinstance(recipe, PlacesConfig):
        raise ConfigError("The recipe has `places`, several of them. Give it to endwise.train_places.")
    return recipe


def train_together(
    configs: Sequence[OneRecipe],
    *,
    model: LanguageModel | None = None,
    corpora: Corpora | None = None,
    resume: Resume = False,
    from_step: int | None = None,
    display: bool = True,
) -> list[Run]:
    """Train several SAEs of one model on the same batches; each ends as if it had been trained alone.

    The recipes may differ in site, dictionary, objective, seed, folder and in the optimiser's settings, not in the
    model, the data, `training.tokens` or `training.batch`. One that cannot continue (a number is not finite, its folder
    cannot be written, its own part runs out of memory) is saved and left behind; the others train to their end.

    Raises:
        SomeFailed: one or more of several failed; the error carries the finished runs (of a single recipe its own
            error is raised).
        EndwiseError: see `train`; what all share failed, which stops and saves all.
    """
    recipes = [as_recipe(config) for config in configs]
    runs = trained(TrainingRequest(recipes, resume, from_step, display), model, corpora)
    return [run for run in runs if isinstance(run, Run)]


def train_places(
    config: PlacesConfig | Mapping[str, Any] | str | Path,
    *,
    model: LanguageModel | None = None,
    corpora: Corpora | None = None,
    resume: Resume = False,
    from_step: int | None = None,
    display: bool = True,
) -> PlacesRun:
    """Train SAEs at several places of one model, as one recipe says: jointly, or each as it would be alone.

    Args:
        config: a recipe with `places`: an object, a mapping of its fields, or the path of a YAML file.
        model: see `train`, as for those below.
        corpora: loaded token sequences.
        resume: start from the last checkpoint.
        from_step: start from the checkpoint of this step instead.

    Raises:
        SomeFailed: some of several that are not trained jointly failed.
        EndwiseError: see `train`.
    """
    if isinstance(config, str | Path):
        config = PlacesConfig.read(find_recipe(str(config)))
    elif not isinstance(config, PlacesConfig):
        config = PlacesConfig.build(dict(config))
    if config.joint:
        (run,) = trained(TrainingRequest([config], resume, from_step, display), model, corpora)
        assert isinstance(run, PlacesRun)
        return run
    folder = RunFolder(config.out or default_folder(config))
    recipes = {recipe.place: (recipe, place_folder(folder.path, recipe)) for recipe in config.recipes}
    with joined() as world:
        with world.together("starting the run"):
            if world.is_first:
                start_apart(folder, config, resume)
        request = TrainingRequest(
            [recipe.model_copy(update={"out": path}) for recipe, path in recipes.values()], resume, from_step, display
        )
        runs = {run.config.place: run for run in trained(request, model, corpora) if isinstance(run, Run)}
    saes = {place: runs[place].sae for place in recipes}
    folders = {place: path for place, (_, path) in recipes.items()}
    return PlacesRun(config, saes, folder.path, folders, sum(run.seconds for run in runs.values()))


def trained(
    request: TrainingRequest, model: LanguageModel | None = None, corpora: Corpora | None = None
) -> list[Run | PlacesRun]:
    """Prepare what a request asks for, and train it.

    Args:
        model, corpora: see `train`.

    Raises:
        SomeFailed, EndwiseError: see `train_together`.
    """
    for config in request.configs:
        refuse_adopted(config)
    with joined() as world, shared_generators(request.first.seed), ExitStack() as claims, printing_once():
        try:
            prepared = prepare(request, world, claims, model, corpora)
            run_loop(prepared)
            return prepared.group.runs()
        except Exception as error:  # an allocation that fails becomes an error that says what to lower
            if isinstance(error, TrainingStopped) or (named := out_of_memory(error)) is None:
                raise
            raise named from error
