"""One optimiser step of every SAE in training: the clean pass that all share, then each one's own part."""

import warnings
from collections.abc import Callable, Sequence

import torch

from endwise.common.axes import Tokens
from endwise.common.errors import ConfigError, ElsewhereFailed, ProcessLost
from endwise.common.processes import ALONE, World
from endwise.config.run import TrainingConfig
from endwise.kernels import has_fast_bfloat16
from endwise.models.language_model import Clean, LanguageModel
from endwise.models.sites import Site
from endwise.models.splicing import clean_by_tail
from endwise.tokens import TokenBatch
from endwise.training.joint import AnyTrainee
from endwise.training.kept_activations import KeptActivations, reads_splice
from endwise.training.outliers import CountedTokens

Failed = Callable[[AnyTrainee, Exception, bool], None]


def take_step(
    model: LanguageModel,
    trainees: Sequence[AnyTrainee],
    batch: TokenBatch,
    accumulation: int = 1,
    failed: Failed | None = None,
    tail: LanguageModel | None = None,
    world: World = ALONE,
    kept: KeptActivations | None = None,
) -> None:
    """One optimiser step of every trainee on one batch, in `accumulation` passes of equal numbers of sequences.

    Args:
        batch: with several processes, this one's share of it.
        tail: the model that runs everything after the sites (`tail_model`); unset: `model` itself.
        failed: called with an error in one trainee's own part, and whether its weights are still those of the step
            before; that trainee takes no further part in the step. Unset: the error is raised.
        kept: clean passes that are on the disk, for a pass that no trainee continues after the sites.

    Raises:
        ProcessLost: another process is gone; every trainee's weights are those of the step before.
    """
    tail = tail or model
    tokens_in_step, positions = batch.mask.sum(), world.replicas.total(batch.tokens.numel())
    world.replicas.add([tokens_in_step])
    left, counted = list(trainees), dict[AnyTrainee, CountedTokens]()
    size, taking = -(-len(batch.tokens) // accumulation), left
    while taking:
        counted |= {trainee: CountedTokens(trainee) for trainee in taking}
        begun = tuple(taking)
        _each(taking, failed, lambda each: each.begin_step())
        for start in range(0, len(batch.tokens), size):
            rows = slice(start, start + size)
            clean, mask = clean_passes(model, tail, trainees, batch.tokens[rows], kept), batch.mask[rows]
            masks = {each: counted[each].of_these(clean[each.site], mask) for each in taking}
            _each(taking, failed, lambda each: each.accumulate(tail, clean[each.site], masks[each], tokens_in_step))  # noqa: B023
        left = [each for each in left if each in taking or each not in begun]
        taking = _settle(left, trainees, failed, world)
    if world.size > 1:
        for each in left:  # all of them before any takes its step, so that a lost process finds them at one step
            each.add_up(world.replicas)
            counted[each].add_up(world.replicas)
    _each(left, failed, lambda each: each.finish_step(counted[each].settle(tokens_in_step), positions), whole=False)


def _settle(
    left: list[AnyTrainee], trainees: Sequence[AnyTrainee], failed: Failed | None, world: World
) -> list[AnyTrainee]:
    """Take out those that failed in another process, whose share of the gradient is missing; and return those whose
    passes have to be taken again, since some of their pairs are missing in any process.
    """
    missing = [[part.rooms.settle() for part in each.parts] for each in trainees if each in left]
    cut = dict(zip(left, map(any, missing), strict=True))
    flags = world.any([each not in left for each in trainees] + [cut.get(each, False) for each in trainees])
    for trainee, gone in zip(trainees, flags[: len(trainees)], strict=True):
        if gone and trainee in left:
            left.remove(trainee)
            error = ElsewhereFailed()
            if failed is None:
                raise error
            failed(trainee, error, True)
    return [each for each, again in zip(trainees, flags[len(trainees) :], strict=True) if again and each in left]


def tail_model(
    model: LanguageModel, config: TrainingConfig, is_fast: Callable[[torch.device], bool] = has_fast_bfloat16
) -> LanguageModel:
    """Return what runs the model after the sites in the precision asked for: the model itself, or its copy in bf16.

    Args:
        is_fast: whether a processor multiplies bf16 matrices in hardware.

    Raises:
        ConfigError: exact precision is asked of a model in half precision.
    """
    if model.dtype in (torch.float32, torch.float64):
        if config.precision == "exact":
            return model
        if model.device.type == "cpu" and not is_fast(model.device):
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


def clean_passes(
    model: LanguageModel,
    tail: LanguageModel,
    trainees: Sequence[AnyTrainee],
    tokens: Tokens,
    kept: KeptActivations | None = None,
) -> dict[Site, Clean]:
    """Return, by the site that is written, what the trainees there are compared with.

    One pass for all; with another model for the tail, the model up to the last site and the tail from each site on, so
    that the tail's own rounding is on both sides of every comparison.
    """
    sites = {trainee.site for trainee in trainees}
    needs = {site: [trainee for trainee in trainees if trainee.site == site] for site in sites}
    later = {site: {s for trainee in needs[site] for s in trainee.later_sites} for site in sites}
    final = {site: any(trainee.objective.final for trainee in needs[site]) for site in sites}
    local = {site for trainee in trainees for site in trainee.sites}
    if kept is not None and not any(reads_splice(trainee.objective) or trainee.later_sites for trainee in trainees):
        return dict.fromkeys(sites, kept.clean(tokens))
    if tail is model:
        clean = model.clean(tokens, record=local.union(*later.values()), final=any(final.values()))
        return dict.fromkeys(sites, clean)
    head = model.clean(tokens, record=local)
    return {site: clean_by_tail(tail, head, site, tuple(later[site]), final[site]) for site in sites}


def _each(left: list[AnyTrainee], failed: Failed | None, act: Callable[[AnyTrainee], None], whole: bool = True) -> None:
    """Do something with every trainee that is left, and take out those that fail at it."""
    for trainee in tuple(left):
        try:
            act(trainee)
        except ProcessLost:
            raise
        except Exception as error:
            if failed is None:
                raise
            left.remove(trainee)
            failed(trainee, error, whole)
