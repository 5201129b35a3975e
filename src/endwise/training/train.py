"""Train SAEs: prepare, then run the loop."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from endwise.common.errors import TrainingStopped, out_of_memory
from endwise.common.processes import joined
from endwise.common.seeds import shared_generators
from endwise.config.recipes import find_recipe
from endwise.config.run import RunConfig
from endwise.models.language_model import LanguageModel
from endwise.tokens import Corpora
from endwise.training.loop import run_loop
from endwise.training.members import Run
from endwise.training.setup import Resume, TrainingRequest, prepare


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
    request = TrainingRequest(configs, resume, from_step, display)
    with joined() as world, shared_generators(request.first.seed), _memory_named(), ExitStack() as claims:
        prepared = prepare(request, world, claims, model, corpora)
        run_loop(prepared)
        return prepared.group.runs()


@contextmanager
def _memory_named() -> Iterator[None]:
    """An allocation that fails becomes an error that says what to lower."""
    try:
        yield
    except Exception as error:
        if isinstance(error, TrainingStopped) or (named := out_of_memory(error)) is None:
            raise
        raise named from error
