"""The training loop: one clean pass serves every SAE in training, each with its own objective, optimiser and folder."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from endwise.common.errors import DataError, Interrupted, OutOfMemory, ProcessLost, TrainingStopped, out_of_memory
from endwise.common.stopping import polite_stop
from endwise.config.run import EvaluationConfig
from endwise.evaluation.measure import Evaluation, measure
from endwise.evaluation.together import measure_together
from endwise.tokens import read_ahead
from endwise.training.display import Display
from endwise.training.fitting import TrainingText, fit_last, resample
from endwise.training.group import Group
from endwise.training.joint import JointTrainee
from endwise.training.members import Member
from endwise.training.resume import broadcast_state
from endwise.training.setup import Prepared
from endwise.training.step import take_step
from endwise.training.targets import meet_target, observe_increase, steering_of
from endwise.training.trainee import Trainee

SCHEDULED_METRICS = ("ce_increase", "kl", "l0", "explained_variance.per_token")


def run_loop(prepared: Prepared) -> None:
    """Train every member to its last step and save it."""
    model, group, world, steps = prepared.model, prepared.group, prepared.world, prepared.steps
    config = group.members[0].config.training
    first = group.members[0].trainee.step
    train, remaining = prepared.corpora.train, range(first, steps)
    shares = (world.replicas.share(prepared.order[step]) for step in remaining)
    with (
        Display(steps, first, config.batch * train.context, prepared.display) as shown,
        polite_stop() as stop_asked,
        read_ahead(train, shares, model.device) as batches,
        _saving(group),
    ):
        group.shown = shown
        if any(member.line is not None for member in group.members):  # a metrics line pending from before the resume
            _record(prepared, first, shown)
        for step, batch in zip(remaining, batches, strict=True):
            group.each(partial(observe_increase, model, prepared.corpora.heldout, world.replicas, step))
            trainees = [member.trainee for member in group.members]
            take_step(model, trainees, batch, config.accumulation, group.failed, prepared.tail, world, prepared.kept)
            group.agree(world)
            done = step + 1
            _fit_after(prepared, done)
            _record(prepared, done, shown)
            shown.advance(done)
            if group.agree(world, stop_asked()) and done < steps:
                group.each(Member.save)
                raise Interrupted(group.stopped(done))
        group.each(Member.save)
        group.share_time()
        for member in group.members:
            member.folder.mirror.ended("finished")


def _fit_after(prepared: Prepared, done: int) -> None:
    """Replace dead features where that is due after `done` steps; set thresholds after the last."""
    steps, tail = prepared.steps, prepared.tail
    _fit(
        prepared,
        lambda part: part.sae.wants_losses(steps).get(done, 0),
        "resampling dead features",
        lambda text, member: resample(text, tail, done, member),
    )
    if done == steps:
        _fit(prepared, lambda part: part.sae.last_tokens, "fitting thresholds", fit_last)
        met = lambda text, member: meet_target(text, prepared.corpora.heldout, prepared.display, member)  # noqa: E731
        _fit(prepared, steering_of, "meeting the target of sparsity", met)


def _fit(
    prepared: Prepared, due: Callable[[Trainee], Any], what: str, act: Callable[[TrainingText, Member], None]
) -> None:
    """Do what is fitted to activations in one process for all, where it is due for any dictionary."""
    group, world = prepared.group, prepared.world
    if not any(due(part) for member in group.members for part in member.trainee.parts):
        return
    with world.together(what):
        if world.replicas.is_first:
            group.each(partial(act, TrainingText(prepared.model, prepared.corpora.train, prepared.order)))
    broadcast_state(group, world)


@contextmanager
def _saving(group: Group) -> Iterator[None]:
    """Whatever ends training, every member's last good state is on the disk after it."""
    try:
        yield
    except ProcessLost as error:
        # On a GPU a step may be queued behind a sum that never comes: there is nothing to wait for, or to trust.
        saved = group.save_what_can_be() if group.device.type == "cpu" else "The last checkpoint remains."
        raise ProcessLost(f"{error} {saved}") from None
    except DataError as error:
        raise TrainingStopped(f"{error} {group.save_what_can_be()}") from None
    except TrainingStopped:
        raise
    except Exception as error:
        saved = group.save_what_can_be()
        commands = (member.command_in_less_memory(shared=True) for member in group.members)
        if (named := out_of_memory(error, "; ".join(filter(None, commands)))) is not None:
            raise OutOfMemory(f"{named} {saved}") from error
        raise


def _record(prepared: Prepared, done: int, shown: Display) -> None:
    """Write what is due after a step: lines of metrics, evaluations, checkpoints."""
    group = prepared.group
    group.each(partial(_report, done))
    due = [member for member in group.members if member.line is not None]
    evaluated = [m for m in due if m.at_end or _due(m.config.training.evaluate_every, done)]
    if evaluated:
        with shown.paused():
            _evaluate_briefly(prepared, evaluated)
    group.each(partial(_write_line, shown, done), due)
    size = group.members[0].config.training.batch * prepared.corpora.train.context
    group.each(Member.save_as_it_is, [m for m in group.members if m.config.training.saves_after(done, size)])


def _report(done: int, member: Member) -> None:
    config = member.config.training
    intervals = (config.log_every, config.evaluate_every, config.checkpoint_every)
    if member.line is None and (member.at_end or done == 1 or any(_due(every, done) for every in intervals)):
        member.line = {**member.trainee.report(), "seed": member.config.seed}


def _write_line(shown: Display, done: int, member: Member) -> None:
    folder, line = member.folder, member.line
    assert line is not None
    member.line, member.heldout = None, line.get("heldout", member.heldout)
    if member.writes:
        folder.append(folder.metrics_file, line)
        timing = shown.timing(done)
        timing["seconds"] += member.seconds_before
        folder.append(folder.timings_file, {"step": done, **timing, "seed": member.config.seed})
        shown.show(folder.path, member.config, line)
    if _due(member.config.training.checkpoint_every, done):
        member.save()


def _due(every: int | None, done: int) -> bool:
    return every is not None and done % every == 0


def _evaluate_briefly(prepared: Prepared, members: list[Member]) -> None:
    """Add the metrics of `SCHEDULED_METRICS`, on a little held-out text, to the members' lines.

    Members with equal settings share its passes. Where that fails each is measured alone, so that the fault (an SAE
    that is infinite on held-out text) ends its own run only.
    """
    groups: dict[EvaluationConfig, list[Member]] = {}
    for member in members:
        settings = member.config.evaluation
        tokens = min(settings.during_training_tokens, settings.tokens)
        groups.setdefault(settings.model_copy(update={"tokens": tokens, "bootstrap": 1}), []).append(member)

    def evaluate(brief: EvaluationConfig, sharing: list[Member]) -> None:
        for member, evaluation in zip(sharing, _evaluated(prepared, brief, sharing), strict=True):
            assert member.line is not None
            known = [name for name in SCHEDULED_METRICS if name in evaluation.metrics]
            member.line["heldout"] = {name: evaluation[name] for name in known}

    for brief, sharing in groups.items():
        if len(sharing) > 1:
            try:
                evaluate(brief, sharing)
                continue
            except Exception as error:  # each is measured alone below, and says what is wrong with it
                if isinstance(error, ProcessLost) or prepared.world.shards.size > 1:
                    raise
        prepared.group.each(lambda member, brief=brief: evaluate(brief, [member]), sharing)


def _evaluated(prepared: Prepared, brief: EvaluationConfig, sharing: list[Member]) -> list[Evaluation]:
    """Each member's metrics: those of one place share a clean pass, those of several are measured all in place."""
    passes = {"corpus": prepared.corpora.heldout, "config": brief, "baselines": False, "world": prepared.world.replicas}
    alone = {str(m.folder.path): m.trainee for m in sharing if isinstance(m.trainee, Trainee)}
    found: dict[str, Evaluation] = {}
    if alone:
        found |= measure(prepared.model, {path: (one.place, one.sae) for path, one in alone.items()}, **passes)
    for member in sharing:
        if isinstance(member.trainee, JointTrainee):
            saes = {part.place: part.sae for part in member.trainee.parts}
            found[str(member.folder.path)] = measure_together(prepared.model, saes, **passes)
    return [found[str(member.folder.path)] for member in sharing]
