"""Files of what a shard of a harvest has gathered so far, on the disk: `harvest/parts/` in the run's folder."""

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from endwise.common.files import held
from endwise.common.tensor_files import write_tensors
from endwise.features.harvest.gathering import Gathered
from endwise.features.harvest.results import HARVEST_FOLDER


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
        """Hold a shard, so that no other process reads the same.

        Raises:
            RunFolderError: another process holds it, or the folder cannot be written.
        """
        lock = self.folder / f".{shard}-of-{self.shards}.lock"
        with held(lock, f"Another process is harvesting {self.run} ({lock}). Wait for it to finish, or stop it."):
            yield

    def load(self, shard: int, into: Gathered) -> int | None:
        """Fill `into` with what the shard has gathered.

        Returns:
            The number of the batch to resume at; None if nothing is there that was gathered with these settings.
        """
        next_batch = self.next_batch(shard)
        if next_batch is None:
            return None
        try:
            into.restore(load_file(self.file(shard)))
        except (OSError, SafetensorError, KeyError, RuntimeError):
            return None
        return next_batch

    def save(self, shard: int, gathered: Gathered, next_batch: int) -> None:
        about = {"settings": self.settings, "next": next_batch}
        write_tensors(self.file(shard), gathered.tensors(), {"endwise": json.dumps(about)})

    def next_batch(self, shard: int) -> int | None:
        """Return where the shard stands; None if nothing is there that was gathered with these settings."""
        try:
            with safe_open(self.file(shard), framework="pt") as opened:
                about = json.loads((opened.metadata() or {})["endwise"])
            return int(about["next"]) if about["settings"] == self.settings else None
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None

    def remove(self) -> None:
        with suppress(OSError):
            shutil.rmtree(self.folder)


class Saver:
    """Says when it is time to save, so that saving takes a small share of all time.

    Args:
        seconds: between two savings, and longer where one takes more than a twentieth of that; 0: always.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._saved, self._took = seconds, time.monotonic(), 0.0

    @property
    def due(self) -> bool:
        return not self._seconds or time.monotonic() - self._saved >= max(self._seconds, 20 * self._took)

    @contextmanager
    def saving(self) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._saved = time.monotonic()
        self._took = self._saved - started
