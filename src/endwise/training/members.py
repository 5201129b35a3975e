"""Members of a training: recipe, folder and state of each SAE that is trained, and how it ends."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from endwise.common.errors import (
    EndwiseError,
    NotFinite,
    TrainingStopped,
)
from endwise.common.remarks import diverged, remarks_on
from endwise.common.showing import Shown
from endwise.common.terminal import note
from endwise.config.places import PlacesConfig, Recipe
from endwise.config.run import EvaluationConfig, RunConfig
from endwise.dictionaries import SAE
from endwise.evaluation.provenance import beginning
from endwise.runs.checkpoints import Checkpoint, write_checkpoint
from endwise.runs.folder import RunFolder
from endwise.runs.several import mark_part, place_folder
from endwise.training.joint import AnyTrainee
from endwise.training.memory import command_in_less_memory
from endwise.training.shards import gathered, give
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
    folder: Path  # pyrefly: ignore[bad-override]
    seconds: float
    """Wall-clock of training in this process, without evaluations; runs trained together share it equally."""
    record: Mapping[str, Any] = field(default_factory=dict, repr=False)  # pyrefly: ignore[bad-override]
    """Facts at the end that remarks are computed from: the loss, the last evaluation, the text."""


@dataclass(frozen=True, repr=False)
class PlacesRun(_Recorded):
    """Trained SAEs of several places, and where everything about them lies."""

    config: PlacesConfig
    saes: Mapping[str, SAE]
    """Dictionaries by place, in the order of the recipe."""
    folder: Path  # pyrefly: ignore[bad-override]
    folders: Mapping[str, Path]
    """Each place's, which everything takes that takes a run."""
    seconds: float
    """See `Run.seconds`."""
    record: Mapping[str, Any] = field(default_factory=dict, repr=False)  # pyrefly: ignore[bad-override]
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
            f"{len(failures)} of {len(failures) + len(finished)} SAEs trained together failed. {listed(failures)} "
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
    keeps: ClassVar[bool] = True
    """False where nothing is kept of the run, to resume or to advise on."""

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

    def advise(self, message: str, display: bool) -> None:
        """Print what its user can do better in a run of their own."""
        note(message, display)

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
class TrialMember(Member):
    """A short run that others are compared with, in a folder that is gone afterwards: its caller reports what it found,
    and nothing of it can be resumed.
    """

    keeps: ClassVar[bool] = False

    def advise(self, message: str, display: bool) -> None:
        pass

    def command_in_less_memory(self, *, shared: bool = False) -> str | None:
        return None

    def write(self) -> None:
        pass


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


def listed(failures: Sequence[Failure]) -> str:
    """List what ended each."""
    return " ".join(map(str, failures))
