"""What a shard of a harvest has gathered so far, on the disk: `harvest/parts/` in the run's folder."""

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout
from safetensors import SafetensorError, safe_open

from endwise.errors import RunFolderError
from endwise.features.harvest import HARVEST_FOLDER
from endwise.features.harvesting.gathering import Gathered
from endwise.files import cannot_write, remove_partials, write_tensors

SAVE_SECONDS = 30.0
"""Between two savings; longer where one takes more than a twentieth of that."""


@dataclass(frozen=True)
class Parts:
    """The shards of one run's harvest."""

    run: Path
    settings: Mapping[str, Any]
    """Two parts with equal settings belong together."""
    shards: int

    @property
    def folder(self) -> Path:
        return self.run / HARVEST_FOLDER / "parts"

    def file(self, shard: int) -> Path:
        return self.folder / f"{shard}-of-{self.shards}.safetensors"

    @contextmanager
    def claimed(self, shard: int) -> Iterator[None]:
        """Holds a shard, so that no other process reads the same.

        Raises:
            RunFolderError: another process holds it, or the folder cannot be written.
        """
        lock = FileLock(self.folder / f".{shard}-of-{self.shards}.lock", timeout=0)
        with self._holding(lock):
            yield

    @contextmanager
    def joining(self) -> Iterator[None]:
        """Waits until no other process is joining the shards. It is not in the folder of the parts, which the first who
        can join them removes.
        """
        with self._holding(FileLock(self.run / ".harvest.lock")):
            yield

    @contextmanager
    def _holding(self, lock: BaseFileLock) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise RunFolderError(
                f"Another process is harvesting {self.run} ({lock.lock_file}). Wait for its end, or stop it."
            ) from None
        except OSError as error:
            raise cannot_write(self.folder, error) from None
        try:
            yield
        finally:
            lock.release()

    def load(self, shard: int, into: Gathered) -> int | None:
        """Fills `into` with what the shard has gathered.

        Returns:
            The number of the batch to go on with; None if nothing is there that was gathered with these settings.
        """
        try:
            with safe_open(self.file(shard), framework="pt") as opened:
                about = json.loads((opened.metadata() or {})["endwise"])
                if about["settings"] != self.settings:
                    return None
                next_batch = int(about["next"])
                into.restore({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118  No mapping.
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError):
            return None
        return next_batch

    def save(self, shard: int, gathered: Gathered, next_batch: int) -> None:
        about = {"settings": self.settings, "next": next_batch}
        write_tensors(self.file(shard), gathered.tensors(), {"endwise": json.dumps(about)})

    def next_batch(self, shard: int) -> int | None:
        """Where the shard stands; None if nothing is there that was gathered with these settings."""
        try:
            with safe_open(self.file(shard), framework="pt") as opened:
                about = json.loads((opened.metadata() or {})["endwise"])
            return int(about["next"]) if about["settings"] == self.settings else None
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None

    def remove(self) -> None:
        with suppress(OSError):
            shutil.rmtree(self.folder)

    def clear_partials(self) -> None:
        """What processes that were killed left half-written; other shards' are left alone while they write."""
        if self.shards == 1:
            remove_partials(self.folder)


class Saver:
    """Says when it is time to save, so that saving takes a small share of all time."""

    def __init__(self) -> None:
        self._saved, self._took = time.monotonic(), 0.0

    @property
    def due(self) -> bool:
        return time.monotonic() - self._saved >= max(SAVE_SECONDS, 20 * self._took)

    @contextmanager
    def saving(self) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._saved = time.monotonic()
        self._took = self._saved - started
