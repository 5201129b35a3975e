"""Beginning of a run: its folder started, or taken up where its last whole checkpoint left it."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from endwise.common.errors import ConfigError, FormatError, RunFolderError, Unreadable
from endwise.common.processes import World
from endwise.config.adopted import refuse_adopted
from endwise.config.fields import differing, identity
from endwise.config.places import PlacesConfig, Recipe, read_recipe
from endwise.evaluation.provenance import as_recorded, beginning, check_resumed, described, pinned
from endwise.models.language_model import LanguageModel
from endwise.runs.checkpoints import Checkpoint, read_checkpoint
from endwise.runs.finding import refuse_several
from endwise.runs.folder import RunFolder
from endwise.runs.several import check_whole
from endwise.tokens import Corpora
from endwise.training.group import Group
from endwise.training.members import Member
from endwise.training.shards import Sharing, shards_of


def recipe_to_resume(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a run that was started, with changes to how it is executed.

    Raises:
        RunFolderError: there is no run, or its recipe cannot be read.
        ConfigError: a change breaks a rule, or is of what the run computes.
    """
    refuse_several(path)
    folder = RunFolder.open(path)
    check_whole(path)
    kept = folder.recipe()
    refuse_adopted(kept, path)
    config = read_recipe(folder.config_file, list(overrides))
    if apart := differing(identity(kept), identity(config)):
        raise ConfigError(
            f"{', '.join(apart)}: what a run computes cannot change during training, since its numbers would "
            "no longer describe one recipe. Start a new run; on --resume only keys of how it is executed may change "
            "(docs/configuration.md marks them)."
        )
    if config.out != kept.out:
        raise ConfigError("out: a run is resumed in its own folder. Move the folder itself, and resume it there.")
    return config.model_copy(update={"out": path})


def start_or_resume(group: Group, model: LanguageModel, corpora: Corpora, from_step: int | None) -> None:
    """Start every member's folder, or take up the run that it holds.

    Raises:
        RunFolderError: the run was started with another recipe, model or text, or has no checkpoint of that step.
        FormatError: the checkpoint is damaged; the message offers the one before.
    """
    data, stands_on = corpora.describe(), described(model, corpora)
    if from_step is None and len(group.members) > 1:
        from_step = _latest_of_all(group)
    started = {
        member.folder.path: _taken_up(member, as_recorded(member.folder, model, stands_on), corpora, from_step)
        for member in group.members
        if member.folder.has_run()
    }
    for member in group.members:  # only now that all can be resumed is anything changed
        if member.folder.path in started:
            member.folder.cut(member.trainee.step, started[member.folder.path])
            member.seconds_before = member.folder.seconds()
        else:
            member.folder.create(member.config)
        member.folder.mirror.started(member.config, member.folder.path, member.trainee.step)
        if member.folder.path in started:
            member.folder.take_over(member.config, member.trainee.step)
        digests = stands_on | beginning(member.config) if member.trainee.step == 0 else None
        member.folder.describe(member.config, data, digests)
        member.describe_places(data, stands_on if member.trainee.step == 0 else None)


def start_apart(folder: RunFolder, config: PlacesConfig, resume: bool | Literal["if_started"]) -> None:
    """Start the folder of several places that are not trained jointly; each place's own is started as a run's is.

    Raises:
        RunFolderError: there is none to resume, it holds another recipe, or it is not free.
    """
    if resume is True:
        folder.check_exists()
    if resume is False or not folder.has_run():
        folder.create(config)
    elif apart := differing(identity(folder.recipe()), identity(config)):
        raise RunFolderError(
            f"{folder.path} was started with another recipe than this one ({', '.join(apart)}). Resume with its own "
            "config.yaml; only how a run is executed may change."
        )


def _latest_of_all(group: Group) -> int:
    """The latest step at which every member was saved: a process killed between two of them leaves one behind.

    Raises:
        RunFolderError: some have come further, and no step is common to all.
    """
    saved = [set(member.folder.saved_steps()) for member in group.members]
    common = max(set.intersection(*saved), default=0)
    if not common and any(saved):
        raise RunFolderError(
            "The runs stand at different steps and cannot be resumed together; resume each on its own."
        )
    return common


def broadcast_state(group: Group, world: World) -> None:
    """Give every process the state that the first one starts from, whatever its own arithmetic made of the seed."""
    if world.size == 1:
        return
    for member in group.members:
        checkpoint = member.trainee.checkpoint()
        tensors = world.replicas.tensors_from_first(checkpoint.tensors)
        member.trainee.restore(Checkpoint(tensors, world.from_first(checkpoint.state)))
        member.line = world.from_first(member.line)


def share_out(group: Group, world: World) -> None:
    """Give every shard its part of the checkpoint that the first process took up."""
    for member in group.members if world.shards.size > 1 else ():
        whole, member.taken_up = member.taken_up, None
        if (state := world.from_first(whole.state if whole else None)) is not None:
            own = world.tensors_from_first(whole.tensors if whole else {}, Sharing.of(member.trainee).own)
            member.trainee.restore(Checkpoint(own, state))


def _taken_up(member: Member, stands_on: Mapping[str, Any], corpora: Corpora, from_step: int | None) -> int:
    """Restore a member, and change nothing on the disk; the length of `metrics.jsonl` at the checkpoint."""
    folder, trainee = member.folder, member.trainee
    if apart := differing(identity(folder.recipe()), identity(member.config)):
        changes = ", ".join(f"{key} {was!r:.40} (now {now!r:.40})" for key, (was, now) in list(apart.items())[:5])
        raise RunFolderError(
            f"{folder.path} was started with another recipe than this one: {changes}. Resume with its own config.yaml; "
            "only how a run is executed may change."
        )
    check_resumed(folder, member.config, stands_on, corpora)
    checkpoint = _checkpoint_to_resume_from(folder, from_step)
    if checkpoint is None:
        for (_, its_folder, _), recipe in zip(member.outputs(), member.of_each(), strict=True):
            check_resumed(its_folder, recipe, beginning(pinned(its_folder.path, recipe)), corpora)
        return 0
    if (kept := checkpoint.state.get("architectures", member.architectures)) != member.architectures:
        raise RunFolderError(
            f"{folder.path} holds a checkpoint of a {', '.join(kept)} dictionary, but its config.yaml says "
            f"{', '.join(member.architectures)}. Restore config.yaml, or start a new run."
        )
    trainee.restore(Sharing.of(trainee).part(checkpoint))
    member.taken_up = checkpoint if shards_of(trainee).size > 1 else None
    position, line = checkpoint.state.get("metrics_bytes"), checkpoint.state.get("line_due")
    if type(position) is not int or position < 0 or not (line is None or isinstance(line, dict)):
        raise FormatError(f"The checkpoint of step {trainee.step} in {folder.path} names no place in metrics.jsonl.")
    member.line = line
    return position


def _checkpoint_to_resume_from(folder: RunFolder, step: int | None) -> Checkpoint | None:
    """The checkpoint of a step, or the latest; None: the beginning."""
    steps = folder.saved_steps()
    if step is None:
        step = steps[-1] if steps else 0
    if step == 0:
        return None
    if step not in steps:
        raise RunFolderError(
            f"{folder.path} has no checkpoint of step {step}; it has {', '.join(map(str, steps)) or 'none'}, and 0 is "
            "the beginning."
        )
    try:
        return read_checkpoint(folder.checkpoint(step))
    except Unreadable:
        raise
    except FormatError as error:
        before = _latest_whole(folder, step)
        found = f"The one before it, of step {before}, is whole" if before else "No other checkpoint is whole"
        where = "there" if before else "the beginning"
        command = f"endwise train --resume {shlex.quote(str(folder.path))} --from-step {before}"
        raise FormatError(f"{error} {found}; resume from {where} with: {command}") from None


def _latest_whole(folder: RunFolder, step: int) -> int:
    """The latest step before `step` with a whole checkpoint, or 0."""
    for earlier in reversed([saved for saved in folder.saved_steps() if saved < step]):
        try:
            read_checkpoint(folder.checkpoint(earlier))
        except FormatError:
            continue
        return earlier
    return 0
