"""SAEs trained side by side: what belongs to each, and how one that fails leaves the others to train."""

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from traceback import format_exception
from typing import Any

import torch

from endwise.common.errors import (
    DataError,
    ElsewhereFailed,
    EndwiseError,
    NotFinite,
    ProcessLost,
    TrainingStopped,
    out_of_memory,
)
from endwise.common.processes import World
from endwise.common.remarks import diverged, remarks_on
from endwise.common.showing import Shown
from endwise.config.places import PlacesConfig, Recipe
from endwise.config.run import EvaluationConfig, RunConfig
from endwise.dictionaries import SAE
from endwise.evaluation.provenance import beginning
from endwise.runs.checkpoints import Checkpoint, write_checkpoint
from endwise.runs.folder import RunFolder
from endwise.runs.several import mark_part, place_folder
from endwise.training.display import Display
from endwise.training.joint import AnyTrainee
from endwise.training.memory import command_in_less_memory
from endwise.training.shards import gathered, give, shards_of
from endwise.training.trainee import Trainee


class _Recorded(Shown):
    """A finished run's record, as a reader needs it."""

    folder: Path
    record: Mapping[str, Any]

    def shown_facts(self) -> Mapping[str, object]:
        return RunFolder(self.folder).shown_facts()

    def shown_parts(self) -> Iterable[str]:
        return RunFolder(self.folder).shown_parts()

    @property
    def remarks(self) -> list[str]:
        """Remarks that a reader of the run needs."""
        return remarks_on(self.record)

    @property
    def diverged(self) -> bool:
        return diverged(self.record) is not None


@dataclass(frozen=True, repr=False)
class Run(_Recorded):
    """A trained SAE and where everything about it lies."""

    config: RunConfig
    sae: SAE
    folder: Path
    seconds: float
    """Wall-clock of training in this process, without evaluations; runs trained together share it equally."""
    record: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Facts at the end that remarks are computed from: the loss, the last evaluation, the text."""


@dataclass(frozen=True, repr=False)
class PlacesRun(_Recorded):
    """Trained SAEs of several places, and where everything about them lies."""

    config: PlacesConfig
    saes: Mapping[str, SAE]
    """Dictionaries by place, in the order of the recipe."""
    folder: Path
    folders: Mapping[str, Path]
    """Each place's, which everything takes that takes a run."""
    seconds: float
    """See `Run.seconds`."""
    record: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """See `Run.record`."""


@dataclass(frozen=True)
class Failure:
    """A run that ended before its last step."""

    config: Recipe
    folder: Path
    error: Exception
    step: int
    """Steps that its weights had taken."""
    checkpoint: Path | None
    """State to look at or to resume from; None: nothing could be saved."""

    @property
    def kept(self) -> str:
        if self.checkpoint is None:
            return f"Its state could not be saved in {self.folder}."
        return f"The last good state is saved in {self.folder}."

    def __str__(self) -> str:
        text = " ".join(str(self.error).split())
        if not isinstance(self.error, EndwiseError):
            text = f"after step {self.step}, {type(self.error).__name__}: {text}"
        return f"{self.folder}: {text} {self.kept}"


class SomeFailed(TrainingStopped):
    """Failure of some SAEs of several trained together; the others are finished and saved.

    Args:
        failures: what ended each of them.
        finished: the others, as `train_together` would have returned them.
    """

    def __init__(self, failures: Sequence[Failure], finished: "Sequence[Run | PlacesRun]") -> None:
        self.failures, self.finished = list(failures), list(finished)
        saved = ", ".join(str(run.folder) for run in finished)
        super().__init__(
            f"{len(failures)} of {len(failures) + len(finished)} SAEs trained together failed. {_listed(failures)} "
            + (f"Finished and saved: {saved}." if saved else "None finished.")
        )


@dataclass
class Member:
    """One SAE in training, or several that are spliced jointly, with its recipe and folder."""

    config: Recipe
    trainee: AnyTrainee
    folder: RunFolder
    metadata: dict[str, Any]
    writes: bool = True
    """True in the first of several processes that train it, which alone writes."""
    seconds: float = 0.0
    """Share of the wall-clock so far."""
    line: dict[str, Any] | None = None
    """Line of `metrics.jsonl`, due and not yet written; a checkpoint keeps it, so that it is written after all."""
    heldout: dict[str, float] = field(default_factory=dict)
    """Metrics of the latest evaluation on schedule."""
    seconds_before: float = 0.0
    """Wall-clock of the run before this process took it up."""
    taken_up: Checkpoint | None = None
    """Checkpoint of a whole dictionary, until the shards have their parts of it."""

    def outputs(self) -> Iterable[tuple[Trainee, RunFolder, Mapping[str, Any]]]:
        """Each dictionary, the folder that its SAE is saved in, and its metadata."""
        return [(part, self.folder, self.metadata) for part in self.trainee.parts]

    def of_each(self) -> Sequence[RunConfig]:
        """The recipe of each dictionary by itself, in the order of `outputs`."""
        assert isinstance(self.config, RunConfig)
        return [self.config]

    def measure(self, evaluation: EvaluationConfig) -> None:
        """Have it measured in another way than its recipe says."""
        self.config = self.config.model_copy(update={"evaluation": evaluation})

    def describe_places(self, data: Mapping[str, Any], stands_on: Mapping[str, Any] | None) -> None:
        """Write what the folders of several places are made of: see `RunFolder.describe`.

        Args:
            stands_on: `provenance.described`, of a run that starts now.
        """

    def finished(self, text: Mapping[str, Any]) -> "Run | PlacesRun":
        """The run, after its last step."""
        (sae,) = self.finished_saes()
        assert isinstance(self.config, RunConfig)
        return Run(self.config, sae, self.folder.path, self.seconds, {**text, **self.record()})

    def finished_saes(self) -> list[SAE]:
        """The dictionaries, in the order of `outputs`; those that are split are read from their files, whole."""
        if (world := self.trainee.parts[0].sae.world).shards.size == 1:
            return [part.sae.eval() for part in self.trainee.parts]
        world.total(0)  # returns when all have come here, the one that wrote among them
        return [SAE.load(folder.sae) for _, folder, _ in self.outputs()]

    def record(self) -> dict[str, Any]:
        """See `Run.record`."""
        known = {"l0": self.heldout["l0"]} if self.heldout else {}
        explained = {"per_token": self.heldout.get("explained_variance.per_token")}
        return {**known, "explained_variance": explained, "loss": self.folder.course()}

    def command_in_less_memory(self, *, shared: bool = False) -> str | None:
        """See `training.memory`."""
        context = self.metadata["context_size"]
        return command_in_less_memory(self.trainee, str(self.folder.path), context, shared=shared)

    @property
    def architectures(self) -> list[str]:
        """Architecture of each dictionary, in the order of `outputs`."""
        return [part.sae.architecture for part in self.trainee.parts]

    @property
    def at_end(self) -> bool:
        return self.trainee.step == self.trainee.total_steps

    def save(self) -> None:
        """Write the SAE as it is used, and what training is resumed from.

        Raises:
            NotFinite: a number was not finite at some step since the last report; nothing is written.
            RunFolderError: the folder cannot be written.
        """
        self.trainee.report()
        self.write()

    def save_as_it_is(self) -> None:
        """Write the SAE beside those of other steps, to be looked at.

        Raises:
            NotFinite, RunFolderError: see `save`.
        """
        self.trainee.report()
        if not self.writes:
            give(self.trainee)
            return
        for part, its_folder, metadata in self.outputs():
            place = its_folder.path / "saes" / f"step-{self.trainee.step:09d}"
            part.sae.save(place, self._with_step(metadata))

    def _with_step(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        return {**metadata, "endwise": {**metadata["endwise"], "step": self.trainee.step}}

    def save_last_good(self) -> None:
        """Variant of `save`, but where a number was not finite, the state before that step."""
        with suppress(NotFinite):
            self.trainee.report()
        self.write()

    def write(self) -> None:
        """Variant of `save` for a trainee that has just reported."""
        if not self.writes:
            give(self.trainee, with_checkpoint=True)
            return
        trainee, folder, seeds = self.trainee, self.folder, self.config.seeds
        for part, its_folder, metadata in self.outputs():
            its_folder.note_weights(whole=False)
            part.sae.save(its_folder.sae, self._with_step(metadata))
            its_folder.note_weights(whole=True)
        checkpoint = gathered(trainee)
        state = {**checkpoint.state, "seeds": seeds, "metrics_bytes": folder.position(), "line_due": self.line}
        state["architectures"] = self.architectures
        write_checkpoint(folder.checkpoint(trainee.step), replace(checkpoint, state=state))
        folder.mirror.line("checkpoint", {"step": trainee.step, "file": str(folder.checkpoint(trainee.step))})
        for step in folder.saved_steps()[: -self.config.training.keep_checkpoints]:
            folder.checkpoint(step).unlink()


@dataclass
class JointMember(Member):
    """Several dictionaries of one recipe, each with a folder of its own in the run's."""

    recipes: Sequence[RunConfig] = ()
    """Each place's, as a recipe for one, in the order of `trainee.parts`."""
    of_places: Sequence[Mapping[str, Any]] = ()
    """Metadata of each SAE in its files."""

    @property
    def folders(self) -> list[RunFolder]:
        """Folders in the order of `trainee.parts`."""
        return [RunFolder(place_folder(self.folder.path, recipe)) for recipe in self.recipes]

    def of_each(self) -> Sequence[RunConfig]:
        return self.recipes

    def measure(self, evaluation: EvaluationConfig) -> None:
        super().measure(evaluation)
        self.recipes = [recipe.model_copy(update={"evaluation": evaluation}) for recipe in self.recipes]

    def outputs(self) -> Iterable[tuple[Trainee, RunFolder, Mapping[str, Any]]]:
        return zip(self.trainee.parts, self.folders, self.of_places, strict=True)

    def describe_places(self, data: Mapping[str, Any], stands_on: Mapping[str, Any] | None) -> None:
        assert isinstance(self.config, PlacesConfig)
        for recipe, folder in zip(self.recipes, self.folders, strict=True):
            if not folder.has_run():
                folder.create(recipe)
            folder.describe(recipe, data, None if stands_on is None else {**stands_on, **beginning(recipe)})
            mark_part(folder.path, self.config)

    def finished(self, text: Mapping[str, Any]) -> PlacesRun:
        assert isinstance(self.config, PlacesConfig)
        saes = {part.place.name: sae for part, sae in zip(self.trainee.parts, self.finished_saes(), strict=True)}
        folders = {recipe.place: place_folder(self.folder.path, recipe) for recipe in self.config.recipes}
        record = {**text, **self.record()}
        return PlacesRun(
            self.config, {name: saes[name] for name in folders}, self.folder.path, folders, self.seconds, record
        )


class Group:
    """The members still in training, and what ended the others.

    Args:
        members: the group is their only owner, so that the memory of one that leaves is free again.
    """

    def __init__(self, members: Iterable[Member]) -> None:
        self.members = list(members)
        self._folders = [member.folder.path for member in self.members]
        self.failures: list[Failure] = []
        self._alone = len(self.members) == 1
        self._shared = 0.0
        self.text: Mapping[str, Any] = {}
        """Measurements of the text, made beforehand (`text_check`)."""
        self.shown: Display | None = None
        """Display that reports failures and has the time; there while training runs."""

    def each(self, act: Callable[[Member], None], members: Iterable[Member] | None = None) -> None:
        """Do each member's own part of something, for all of them or those given; one that fails at it leaves.

        Raises:
            TrainingStopped: none is left; of an only member its own error.
        """
        for member in tuple(self.members if members is None else members):
            try:
                act(member)
            except ProcessLost:
                raise
            except Exception as error:  # noqa: BLE001  Whatever it is, it concerns this member alone.
                self.end(member, error)

    def failed(self, trainee: AnyTrainee, error: Exception, whole: bool) -> None:
        """End the member of a trainee: what `training.take_step` calls."""
        self.end(next(member for member in self.members if member.trainee is trainee), error, whole)

    def end(self, member: Member, error: Exception, whole: bool = True) -> None:
        """Save a member that cannot continue, report it at once, and let it go.

        Args:
            whole: its weights are those of a whole step; if not, what was last saved of it stays.

        Raises:
            TrainingStopped: see `each`.
            Exception: `error`, where other processes hold features of the dictionary and may wait for them.
        """
        if shards_of(member.trainee).size > 1 and not isinstance(error, NotFinite):
            raise error
        self.share_time()
        self.members.remove(member)
        if (named := out_of_memory(error, member.command_in_less_memory())) is not None:
            _release(error)
            named.__notes__ = error.__notes__
            error = named
        elif not self._alone:
            _release(error)
        for part in member.trainee.parts:
            part.optimizer.zero_grad(set_to_none=True)
        if whole:
            with suppress(Exception):  # a full disk, for one, is what it failed of
                if isinstance(error, NotFinite):  # it comes from a report, which went back to the last good state
                    member.write()
                else:
                    member.save_last_good()
        folder = member.folder
        failure = Failure(member.config, folder.path, error, member.trainee.step, folder.latest_checkpoint())
        self.failures.append(failure)
        folder.mirror.line("failure", {"step": failure.step, "error": str(failure)})
        folder.mirror.ended("failed")
        if self.members:
            if self.shown is not None:
                self.shown.fail(folder.path, str(failure))
        else:
            self._raise(error, failure)

    def _raise(self, error: Exception, failure: Failure) -> None:
        if not self._alone:
            raise SomeFailed(self.failures, []) from error
        if isinstance(error, TrainingStopped | DataError):
            kind = type(error) if isinstance(error, TrainingStopped) else TrainingStopped
            raise kind(f"{error} {failure.kept}") from None
        raise error

    def agree(self, world: World, stop: bool = False) -> bool:
        """Let go of those that failed in another process, so that all processes continue with the same; True if any
        process was asked to stop.

        Raises:
            TrainingStopped: see `each`.
        """
        here = {member.folder.path: member for member in self.members}
        stop, *gone = world.any([stop, *(folder not in here for folder in self._folders)])
        for folder, is_gone in zip(self._folders, gone, strict=True):
            if is_gone and folder in here:
                self.end(here[folder], ElsewhereFailed())
        return stop

    @property
    def device(self) -> torch.device:
        return self.members[0].trainee.device

    def save_what_can_be(self) -> str:
        """Save every member's last good state, where it can be written, for when an error ends them all; say what
        was saved.
        """
        saved: list[str] = []
        for member in (each for each in self.members if shards_of(each.trainee).size == 1):
            with suppress(Exception):
                member.save_last_good()
                saved.append(str(member.folder.path))
        if saved and self.members[0].writes:
            return f"The last good state is saved in {', '.join(saved)}."
        if saved:
            return "The first process saves the last good state, unless it is the lost one."
        return "Its state could not be saved; earlier saves are intact."

    def share_time(self) -> None:
        """Share the wall-clock since the last call equally among those who spent it."""
        if self.shown is not None:
            now = self.shown.seconds
            for member in self.members:
                member.seconds += (now - self._shared) / len(self.members)
            self._shared = now

    def runs(self) -> "list[Run | PlacesRun]":
        """The members as finished runs.

        Raises:
            SomeFailed: others failed; the error carries these.
        """
        runs = [member.finished(self.text) for member in self.members]
        if self.failures:
            raise SomeFailed(self.failures, runs) from self.failures[0].error
        return runs

    def how_to_resume(self) -> str:
        """The commands that resume every member, and what had ended the others."""
        commands = "; ".join(f"endwise train --resume {shlex.quote(str(m.folder.path))}" for m in self.members)
        failed = f" Failed before: {_listed(self.failures)}" if self.failures else ""
        return f"Resume with: {commands}{failed}"


def _release(error: Exception) -> None:
    """Keep an error's traceback as text: its frames hold the step's tensors, whose memory the others need."""
    error.add_note("".join(format_exception(error)))
    error.__traceback__ = error.__context__ = error.__cause__ = None


def _listed(failures: Sequence[Failure]) -> str:
    return " ".join(map(str, failures))
