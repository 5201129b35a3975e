"""A run folder: everything a run was and became.

config.yaml                     the recipe, every default filled in
changes.jsonl                   what was changed on resuming of how it is executed: by key, what it was and became
environment.json                versions, platform, command
data.json                       sources, sizes and fingerprints of both sides of the data
digests.json                    what tells all that the run stands on, and its SAE, from others (see `provenance`)
metrics.jsonl                   numbers of the method: one line per logged step
timings.jsonl                   wall-clock, kept apart so that two identical runs have identical metrics
sae/                            the SAE as it is used, in SAELens's layout
saes/                           the same after fewer steps, where the recipe asks for it (`training.save_at`)
checkpoints/                    what training is resumed from (raw weights, optimiser, random generators, counters)
places/                         in place of `sae/`, of several places: each has a run folder there
hub.json                        of a run that was pulled from the hub: its repository and commit
part.json                       in such a folder: which run trains it
evaluation.json                 metrics on held-out text
evaluation_sums.safetensors     the same per sequence, which paired comparisons are made of
evaluation_firings.safetensors  on how many of these tokens each feature fired
importance.safetensors          what each feature does for the predictions, if that was measured
explanations/                   what a language model says of features, with scores, once `endwise explain` has asked
directions.safetensors          lengths and principal directions, once `endwise directions` has measured them
harvest/                        what each feature fires on, raises and fires with, if `endwise harvest` gathered it
.harvest.lock                   held by the process that joins a harvest's shards
trackers/                       of each tracker what was sent, and the log of the process that sends
bench/                          what benchmark suites of others say of it, once `endwise bench` has run them
dashboard/                      its features as a site, made from `harvest/` by `endwise dashboard`
.lock                           held by the process that trains here
"""

import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from endwise.common.digests import of_file
from endwise.common.errors import ConfigError, FormatError, RunFolderError
from endwise.common.extras import version_of
from endwise.common.files import (
    PARTIAL,
    expanded,
    flush,
    held,
    read_json,
    remove_partials,
    there_is,
    write_atomic,
    write_json,
)
from endwise.common.remedies import reason, remedy
from endwise.config.fields import differing
from endwise.config.objective import loss_of
from endwise.config.places import PlacesConfig, Recipe, read_recipe
from endwise.config.run import RunConfig
from endwise.formats import weights_file
from endwise.runs.no_run import no_run
from endwise.runs.several import is_several, place_folders, resuming
from endwise.runs.shown_run import ShownRun
from endwise.runs.trackers import Mirror

REPORTED_PACKAGES = ("endwise", "torch", "transformers", "datasets", "safetensors", "numpy")

LAST_BYTES = 1 << 16
"""Bytes of a file's end, in which its last whole line lies: more than a line of `metrics.jsonl` takes."""


class RunFolder(ShownRun):
    def __init__(self, path: Path) -> None:
        self.path = path = expanded(path)
        self.config_file = path / "config.yaml"
        self.changes_file = path / "changes.jsonl"
        self.environment_file = path / "environment.json"
        self.data_file = path / "data.json"
        self.digests_file = path / "digests.json"
        self.start_file = path / "start.json"
        self.metrics_file = path / "metrics.jsonl"
        self.timings_file = path / "timings.jsonl"
        self.evaluation_file = path / "evaluation.json"
        self.sae = path / "sae"
        self.checkpoints = path / "checkpoints"
        self._lock_file = path / ".lock"
        self.mirror = Mirror()
        """Trackers that hear of what is written here."""

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Hold the folder (`held`), so that no other process trains in it. One in which no run was started is removed
        again.

        Raises:
            FolderTaken: another process holds it.
            RunFolderError: it cannot be written.
        """
        is_new = not there_is(self.path)
        taken = f"Another process is training in {self.path}. Wait for it, stop it, or set out=ANOTHER_FOLDER."
        with held(self._lock_file, taken):
            try:
                if self.has_run():
                    for folder in (self.path, self.sae, self.checkpoints):
                        remove_partials(folder)
                yield
            finally:
                if not self.has_run():
                    with suppress(OSError):
                        self._lock_file.unlink()
                if is_new:
                    with suppress(OSError):
                        self.path.rmdir()

    def check_free(self) -> None:
        """
        Raises:
            RunFolderError: the folder holds another run or other files.
        """
        if self.has_run():
            raise RunFolderError(
                f"{self.path} holds a run already. Resume it (--resume), remove it, or set out=ANOTHER_FOLDER."
            )
        files = self.path.iterdir() if self.path.is_dir() else ()
        # A process that was killed before its run began leaves its lock, and files half-written.
        foreign = any(file != self._lock_file and not file.name.endswith(PARTIAL) for file in files)
        if foreign or (there_is(self.path) and not self.path.is_dir()):
            raise RunFolderError(f"{self.path} exists and is not an empty folder. Set out=ANOTHER_FOLDER.")

    def create(self, config: Recipe) -> None:
        """Start a new run. From here on it can be resumed, so the recipe comes first.

        Raises:
            RunFolderError: as `check_free`, or the folder cannot be written.
        """
        self.check_free()
        write_atomic(self.config_file, config.to_yaml().encode())

    def take_over(self, config: Recipe, step: int) -> None:
        """Take over a recipe that differs in how the run is executed, from this step on: a line of `changes.jsonl`,
        then `config.yaml`. Where the folder lies is no change.
        """
        kept = self.recipe()
        config = config.model_copy(update={"out": kept.out})
        if changes := differing(kept.model_dump(mode="json"), config.model_dump(mode="json")):
            record = {key: list(values) for key, values in changes.items()}
            self.append(self.changes_file, {"step": step, "changes": record, "seed": config.seed})
            write_atomic(self.config_file, config.to_yaml().encode())

    def describe(self, config: Recipe, data: Mapping[str, Any], digests: Mapping[str, Any] | None = None) -> None:
        """Write what the run is made of; on resuming, only what was not written before.

        Args:
            digests: what it stands on (`provenance.described`), of a run that starts now.
        """
        if not self.environment_file.exists():
            write_json(self.environment_file, {"seed": config.seed, **environment()})
        if not self.data_file.exists():
            write_json(self.data_file, {"seed": config.data.seed, **data})
        if digests is not None and not self.digests_file.exists():
            write_json(self.digests_file, {"seed": config.seed, **digests})

    def note_start(self, record: Mapping[str, Any]) -> None:
        """Keep, beside what was, what is measured before the first step."""
        before = read_json(self.start_file) if self.start_file.exists() else {}
        write_json(self.start_file, {**before, "seed": self.config().seed, **record})

    def digests(self) -> dict[str, Any]:
        """Read what the run stands on, as far as its folder says: nothing, of one that an older version started.

        Raises:
            FormatError: the file is there, but cannot be read.
        """
        return read_json(self.digests_file) if self.digests_file.exists() else {}

    def note_weights(self, *, whole: bool) -> None:
        """Keep the digest of the SAE's weights; or, before they are written, that they have none yet."""
        digests = {key: value for key, value in self.digests().items() if key != "sae"}
        write_json(self.digests_file, digests | ({"sae": of_file(weights_file(self.sae))} if whole else {}))

    def weights_digest(self) -> str:
        """SHA-256 of the file that holds the SAE's weights, which are those that training wrote.

        Raises:
            FormatError: there is no such file, or it holds other weights.
        """
        path, again = weights_file(self.sae), resuming(self.path)
        try:
            digest = of_file(path)
        except FileNotFoundError:
            raise FormatError(f"{path} is not there. Restore it, or train it: {again}") from None
        if self.digests().get("sae", digest) != digest:
            raise FormatError(
                f"{path} does not hold the weights that training wrote there. Restore it, or have those of the last "
                f"checkpoint written again: {again}; an SAE made elsewhere belongs in a folder of its own."
            )
        return digest

    def fingerprint(self, side: str) -> str | None:
        """Read that of the training (`train`) or held-out text (`heldout`), see `Corpus.fingerprint`; None: unknown.

        Raises:
            RunFolderError, FormatError: `data.json` is there, but does not hold it as it is written.
        """
        if not self.data_file.exists():
            return None
        record = read_json(self.data_file).get(side)
        found = record.get("fingerprint") if isinstance(record, dict) else None
        if not isinstance(found, str):
            raise RunFolderError(
                f"{self.data_file} names no fingerprint of the run's text ({side}.fingerprint). Restore it from a "
                "copy, or start a new run."
            )
        return found

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """A folder that a run has been started in.

        Raises:
            RunFolderError: there is none.
        """
        folder = cls(path)
        folder.check_exists()
        return folder

    @classmethod
    def config_of_trained(cls, path: Path) -> RunConfig:
        """The recipe of a run that has an SAE to show for it.

        Raises:
            RunFolderError: as `open`; its recipe cannot be read; or it holds no trained SAE yet.
        """
        folder = cls.open(path)
        config = folder.config()
        if not folder.sae.exists():
            raise RunFolderError(f"{path} holds no trained SAE yet; train it first: {resuming(path)}")
        return config

    def has_run(self) -> bool:
        """Return whether a run has been started here."""
        return there_is(self.config_file)

    def check_exists(self) -> None:
        """
        Raises:
            RunFolderError: no run has been started here.
        """
        if not self.has_run():
            raise no_run(self.path)

    def config(self) -> RunConfig:
        """
        Raises:
            RunFolderError: the recipe cannot be read, or is one for several places.
        """
        recipe = self.recipe()
        if isinstance(recipe, PlacesConfig):
            raise RunFolderError(
                f"{self.path} is a run of several places. Name one of them: {place_folders(self.path, recipe)[0]}, ..."
            )
        return recipe

    def recipe(self) -> Recipe:
        try:
            return read_recipe(self.config_file)
        except ConfigError as error:
            raise RunFolderError(f"The run in {self.path} cannot be read: {error}") from None

    def append(self, file: Path, record: Mapping[str, Any]) -> None:
        """Add a line, the whole of it or nothing, and mirror it."""
        size = file.stat().st_size if file.exists() else 0
        try:
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(record, allow_nan=False) + "\n")
        except OSError as error:
            with suppress(OSError):
                os.truncate(file, size)
            raise RunFolderError(f"Cannot write {file} ({reason(error)}). {remedy(error)}") from error
        self.mirror.line(file.stem, record)

    def position(self) -> int:
        """Bytes of `metrics.jsonl` so far, all of them on the disk when this returns."""
        if not self.metrics_file.exists():
            return 0
        flush(self.metrics_file)
        return self.metrics_file.stat().st_size

    def cut(self, step: int, position: int) -> None:
        """Drop what was written after a checkpoint (later ones too), which a run that is resumed from it writes again.

        Args:
            position: what `position` was at the checkpoint.

        Raises:
            RunFolderError: `metrics.jsonl` has lost earlier lines.
        """
        size = self.metrics_file.stat().st_size if self.metrics_file.exists() else 0
        if size < position:
            raise RunFolderError(
                f"{self.metrics_file} is {size} bytes long, but was {position} at step {step}: earlier lines are "
                "missing. Restore it, or resume from an earlier step (--from-step, 0 for the beginning)."
            )
        for later in self.saved_steps():
            if later > step:
                self.checkpoint(later).unlink()
        if size > position:
            os.truncate(self.metrics_file, position)
        if self.timings_file.exists():
            lines = self.timings_file.read_text(errors="replace").splitlines()
            kept = [line for line in lines if 0 <= _step_of(line) <= step]
            write_atomic(self.timings_file, "".join(f"{line}\n" for line in kept).encode())

    def seconds(self) -> float:
        """Wall-clock of training up to the last timed step."""
        seconds = (last_record(self.timings_file) or {}).get("seconds")
        return float(seconds) if isinstance(seconds, int | float) else 0.0

    def metrics(self) -> list[dict[str, Any]]:
        try:
            return [json.loads(line) for line in self.metrics_file.read_text().splitlines()]
        except (OSError, ValueError, RecursionError) as error:
            advice = remedy(error) if isinstance(error, OSError) else "Restore it from a copy, or remove the line."
            raise RunFolderError(f"{self.metrics_file} cannot be read: {reason(error)}. {advice}") from None

    def course(self) -> dict[str, float]:
        """See `loss_of`: what its latest phase began with (`first`), and its latest (`last`); empty: none is known."""
        try:
            last = last_record(self.metrics_file) or {}
            with self.metrics_file.open("rb") as lines:
                first = json.loads(next(filter(_of_phase(last.get("phase")), lines), b""))
            return {"first": loss_of(first), "last": loss_of(last or first)}
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return {}

    def evaluation(self) -> dict[str, Any] | None:
        return read_json(self.evaluation_file) if self.evaluation_file.exists() else None

    def measured(self) -> dict[str, Any] | None:
        """`evaluation`, which is of the weights that the SAE has now. A run that was kept without its SAE has its
        numbers still.

        Raises:
            RunFolderError: it was measured with other weights: it was trained on since, or is another.
        """
        found = self.evaluation()
        weights = None if found is None else found.get("weights")
        if weights is not None and weights_of(self.path) not in (None, weights):
            raise RunFolderError(
                f"{self.path} was measured with other weights than its SAE has now. Measure it again: "
                f"endwise evaluate {shlex.quote(str(self.path))}"
            )
        return found

    def checkpoint(self, step: int) -> Path:
        """Return where the checkpoint of a step lies, if there is one."""
        return self.checkpoints / f"step-{step:09d}.safetensors"

    def saved_steps(self) -> list[int]:
        """Steps of which there is a checkpoint, the latest last."""
        names = (file.stem.removeprefix("step-") for file in self.checkpoints.glob("step-*.safetensors"))
        return sorted(int(name) for name in names if name.isdecimal())

    def latest_checkpoint(self) -> Path | None:
        steps = self.saved_steps()
        return self.checkpoint(steps[-1]) if steps else None


def parts_of(run: Path) -> list[RunFolder]:
    """List the folders that hold a run's SAEs: its own, or each place's."""
    folder = RunFolder(run)
    if not is_several(folder.path):
        return [folder]
    return [RunFolder(path) for path in place_folders(folder.path, folder.recipe())]


def seconds_of(run: Path) -> float:
    """Wall-clock of a run's training, as `RunFolder.seconds`; of places that are trained apart, of all."""
    folders = {folder.path: folder for folder in (RunFolder(run), *parts_of(run))}
    return sum(folder.seconds() for folder in folders.values())


def weights_of(run: Path) -> str | dict[str, str] | None:
    """Return the digest of a run's SAE; of several places each one's, by the place. None: it is not there.

    Raises:
        FormatError: see `RunFolder.weights_digest`.
    """
    parts = parts_of(run)
    if not all(part.sae.exists() for part in parts):
        return None
    if not is_several(run):
        return parts[0].weights_digest()
    places = (recipe.place for recipe in RunFolder(run).recipe().recipes)
    return {place: part.weights_digest() for place, part in zip(places, parts, strict=True)}


def last_record(file: Path) -> dict[str, Any] | None:
    """The last whole line of a file of JSON lines."""
    try:
        with file.open("rb") as lines:
            lines.seek(max(0, os.fstat(lines.fileno()).st_size - LAST_BYTES))
            whole = lines.read().split(b"\n")[:-1]
        record = json.loads(whole[-1]) if whole else None
    except (OSError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _of_phase(phase: int | None) -> Callable[[bytes], object]:
    return re.compile(b"" if phase is None else rb'"phase": %d[,}]' % phase).search


def _step_of(line: str) -> int:
    """-1 for a line that was cut off while it was written, or is none of ours."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return -1
    return step if type(step) is int else -1


def environment() -> dict[str, Any]:
    """Return what a reader needs to repeat the run: versions, platform, command."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    return {"command": sys.argv, **found, "packages": {package: version_of(package) for package in REPORTED_PACKAGES}}
