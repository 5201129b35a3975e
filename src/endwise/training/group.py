"""SAEs in training side by side: how one that fails leaves the others to train, and what is reported at the end."""

import shlex
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from traceback import format_exception
from typing import Any

import torch

from endwise.common.errors import DataError, ElsewhereFailed, NotFinite, ProcessLost, TrainingStopped, out_of_memory
from endwise.common.processes import World
from endwise.training.display import Display
from endwise.training.joint import AnyTrainee
from endwise.training.members import Failure, Member, PlacesRun, Run, SomeFailed, listed
from endwise.training.shards import shards_of

NOTHING_KEPT = "Nothing is kept of such trials: begin again."


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
                self.shown.fail(folder.path, str(failure) if member.keeps else "")
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
        if not all(member.keeps for member in self.members):
            return NOTHING_KEPT
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

    def stopped(self, done: int) -> str:
        """The step at which the user stopped them, the commands that resume every member, and what ended the others."""
        if not all(member.keeps for member in self.members):
            return f"Stopped as asked. {NOTHING_KEPT}"
        commands = "; ".join(f"endwise train --resume {shlex.quote(str(m.folder.path))}" for m in self.members)
        failed = f" Failed before: {listed(self.failures)}" if self.failures else ""
        return f"Stopped as asked, saved at step {done}. Resume with: {commands}{failed}"


def _release(error: Exception) -> None:
    """Keep an error's traceback as text: its frames hold the step's tensors, whose memory the others need."""
    error.add_note("".join(format_exception(error)))
    error.__traceback__ = error.__context__ = error.__cause__ = None
