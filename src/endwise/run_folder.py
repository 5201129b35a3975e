"""A run folder: everything a run was and became.

config.yaml                     the recipe, every default filled in
environment.json                versions, platform, command
data.json                       sources, sizes and fingerprints of both sides of the data
metrics.jsonl                   numbers of the method: one line per logged step
timings.jsonl                   wall-clock, kept apart so that two identical runs have identical metrics
sae/                            the SAE as it is used, in SAELens's layout
checkpoints/                    what training goes on from (raw weights, optimiser, counters)
evaluation.json                 metrics on held-out text
evaluation_sums.safetensors     the same per sequence, which paired comparisons are made of
"""

import json
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from endwise.errors import ConfigError, RunFolderError
from endwise.files import write_atomic, write_json
from endwise.reading import read_json, there_is
from endwise.run_config import RunConfig

REPORTED_PACKAGES = ("endwise", "torch", "transformers", "datasets", "safetensors", "numpy")


class RunFolder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.data_file = path / "data.json"
        self.metrics_file = path / "metrics.jsonl"
        self.timings_file = path / "timings.jsonl"
        self.evaluation_file = path / "evaluation.json"
        self.sae = path / "sae"
        self.checkpoints = path / "checkpoints"

    def check_free(self) -> None:
        """
        Raises:
            RunFolderError: the folder holds another run or other files.
        """
        if there_is(self.config_file):
            raise RunFolderError(
                f"{self.path} holds a run already. Go on with it (--resume), remove it, or set out=ANOTHER_FOLDER."
            )
        if there_is(self.path) and (not self.path.is_dir() or any(self.path.iterdir())):
            raise RunFolderError(f"{self.path} exists and is not an empty folder. Set out=ANOTHER_FOLDER.")

    def create(self, config: RunConfig) -> None:
        """Starts a new run.

        Raises:
            RunFolderError: as `check_free`, or the folder cannot be written.
        """
        self.check_free()
        write_json(self.path / "environment.json", environment())
        write_atomic(self.config_file, config.to_yaml().encode())

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """A folder that a run has been started in.

        Raises:
            RunFolderError: there is none.
        """
        folder = cls(path)
        folder.check_exists()
        return folder

    def check_exists(self) -> None:
        """
        Raises:
            RunFolderError: no run has been started here.
        """
        if not there_is(self.config_file):
            raise RunFolderError(f"{self.path} is not a run folder (it holds no config.yaml).")

    def check_same_data(self, data: Mapping[str, Any]) -> None:
        """
        Raises:
            RunFolderError: the run was started on other sequences than `data` (`Corpora.describe`) describes.
        """
        started = read_json(self.data_file) if self.data_file.exists() else data
        try:
            before, now = (each["train"]["fingerprint"] for each in (started, data))
        except (KeyError, TypeError):
            raise RunFolderError(
                f"{self.data_file} names no fingerprint of the training data (train.fingerprint). Restore it from a "
                "copy, or start a new run."
            ) from None
        if before != now:
            raise RunFolderError(
                f"{self.path} was started on other text ({before}) than {data['train']['source']} holds now ({now}). "
                "Restore the text, or start a new run."
            )

    def config(self) -> RunConfig:
        try:
            return RunConfig.read(self.config_file)
        except ConfigError as error:
            raise RunFolderError(f"The run in {self.path} cannot be read: {error}") from None

    def append(self, file: Path, record: Mapping[str, Any]) -> None:
        try:
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(record, allow_nan=False) + "\n")
        except OSError as error:
            raise RunFolderError(f"Cannot write {file} ({error.strerror}). Free space on that disk.") from error

    def cut_after(self, step: int) -> None:
        """Drops the lines of later steps, which a resumed run writes again."""
        for file in (self.metrics_file, self.timings_file):
            if file.exists():
                kept = [line for line in file.read_text(errors="replace").splitlines() if 0 <= _step_of(line) <= step]
                write_atomic(file, "".join(f"{line}\n" for line in kept).encode())

    def metrics(self) -> list[dict[str, Any]]:
        try:
            return [json.loads(line) for line in self.metrics_file.read_text().splitlines()]
        except (OSError, ValueError, RecursionError) as error:
            raise RunFolderError(
                f"{self.metrics_file} cannot be read: {error}. Restore it from a copy, or remove the line."
            ) from None

    def evaluation(self) -> dict[str, Any] | None:
        return read_json(self.evaluation_file) if self.evaluation_file.exists() else None

    def latest_checkpoint(self) -> Path | None:
        found = sorted(self.checkpoints.glob("step-*.safetensors"))
        return found[-1] if found else None

    def drop_old_checkpoints(self) -> None:
        """All but the latest and, in case that is damaged, the one before it."""
        for file in sorted(self.checkpoints.glob("step-*.safetensors"))[:-2]:
            file.unlink()


def _step_of(line: str) -> int:
    """-1 for a line that was cut off while it was written, or is none of ours."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return -1
    return step if type(step) is int else -1


def environment() -> dict[str, Any]:
    """What a reader needs to repeat the run: versions, platform, command."""
    versions: dict[str, str | None] = {}
    for package in REPORTED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
    }
