"""The training loop: one clean pass serves every SAE in training, each with its own objective, optimiser and folder."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from endwise.common.errors import (
    ConfigError,
    TrainingStopped,
    out_of_memory,
)
from endwise.common.processes import joined
from endwise.common.seeds import shared_generators
from endwise.config.recipes import find_recipe
from endwise.config.run import RunConfig
from endwise.evaluation.provenance import naming_relative, pinned
from endwise.models.language_model import LanguageModel
from endwise.tokens import Corpora
from endwise.training.loop import _run
from endwise.training.members import Group, Member, Run
from endwise.training.resume import enter, spread
from endwise.training.setup import (
    Resume,
    _check_same_text,
    _check_shares,
    _claimed,
    _less_its_start,
    _order,
    _shared_recipe,
    _steps,
    _text_tried,
    corpora_of,
    model_for,
    new_trainee,
    sae_metadata,
)
from endwise.training.step import tail_model


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


@contextmanager
def _memory_named() -> Iterator[None]:
    """An allocation that fails becomes an error that says what to lower."""
    try:
        yield
    except Exception as error:
        if isinstance(error, TrainingStopped) or (named := out_of_memory(error)) is None:
            raise
        raise named from error
