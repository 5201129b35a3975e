"""Activations of training text on the disk, for passes that end at the site: whoever comes to a sequence again, in a
second epoch or another run, does without the model.
"""

import hashlib
import json
import zlib
from collections.abc import Collection, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from endwise.common.axes import Tokens
from endwise.common.errors import ConfigError
from endwise.common.files import cannot_write, expanded
from endwise.common.machine import free_disk, size_text
from endwise.common.processes import World
from endwise.common.terminal import note
from endwise.config.places import Recipe
from endwise.models.language_model import Clean, LanguageModel
from endwise.models.sites import Site
from endwise.tokens import Corpus
from endwise.training.joint import AnyTrainee
from endwise.training.objectives import Objective

DIGEST, CHECK = 16, 4
"""Bytes of a sequence's digest and of its row's checksum, in the index."""


class KeptActivations:
    """Activations of sequences at some sites, in the order in which they were first met.

    `rows.bin` has one row for each: its activations, site after site, in the model's own dtype. `index.bin` has, row by
    row, a digest of the tokens and a checksum of the row; a row that does not agree with it is computed again. A row is
    written before it is listed, so that what a process that was killed leaves is whole. The folder is named by a digest
    of all that the bits depend on, so that a hit is what the model would have given.

    Args:
        folder: of all such caches.
        sites: that are recorded.
        sequences: in a pass.
        about: what the activations depend on besides.

    Raises:
        RunFolderError: the folder cannot be written.
    """

    def __init__(
        self, folder: Path, model: LanguageModel, sites: Collection[Site], context: int, sequences: int, about: object
    ) -> None:
        self._model, self._sites, self._context = model, sorted(sites), context
        key = {
            "weights": model.weights_digest(),
            "sites": [site.name for site in self._sites],
            "dtype": str(model.dtype),
            "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type,
            "attention": str(getattr(model.model.config, "_attn_implementation", None)),
            "versions": [version(name) for name in ("torch", "transformers")],
            "threads": torch.get_num_threads(),
            "context": context,
            "sequences": sequences,
            "about": about,
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
        self.folder = expanded(folder) / f"activations-{digest}"
        self._rows, self._index = self.folder / "rows.bin", self.folder / "index.bin"
        self._widths = [model.width(site) for site in self._sites]
        self.row_bytes = context * sum(self._widths) * model.dtype.itemsize
        self._lock = FileLock(self.folder / ".lock", timeout=0)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for file in (self._rows, self._index):
                file.touch()
            (self.folder / "key.json").write_text(json.dumps(key, indent=1))
            self._lock.acquire()
        except Timeout:  # another process adds to it
            pass
        except OSError as error:
            raise cannot_write(self.folder, error) from None
        listed, size = self._index.read_bytes(), DIGEST + CHECK
        entries = [listed[number * size : (number + 1) * size] for number in range(len(listed) // size)]
        whole = self._rows.stat().st_size // self.row_bytes
        self._at = {entry[:DIGEST]: number for number, entry in enumerate(entries[:whole])}
        self._checks = [entry[DIGEST:] for entry in entries[:whole]]

    def __len__(self) -> int:
        """Number of sequences that are kept."""
        return len(self._checks)

    def check_room(self, sequences: int) -> None:
        """
        Raises:
            ConfigError: so many sequences more do not fit on the disk.
        """
        needed, free = max(0, sequences) * self.row_bytes, free_disk(self.folder)
        if needed > free:
            raise ConfigError(
                f"data.activations: {sequences:,} sequences of {self._context} tokens at "
                f"{', '.join(site.name for site in self._sites)} take {size_text(needed)}, and {self.folder} has "
                f"{size_text(free)} free. Choose a folder on another disk, lower training.tokens, or unset it."
            )

    def clean(self, tokens: Tokens) -> Clean:
        """Return the clean pass of some sequences: from the disk if all of them are there."""
        digests = [hashlib.blake2b(row.tobytes(), digest_size=DIGEST).digest() for row in tokens.cpu().numpy()]
        if (rows := self._read(digests)) is not None:
            return Clean(tokens, self._of_rows(rows), None)
        clean = self._model.clean(tokens, record=self._sites)
        if self._lock.is_locked:
            self._add(digests, clean)
        return clean

    def _read(self, digests: Sequence[bytes]) -> list[bytes] | None:
        rows: list[bytes] = []
        with self._rows.open("rb") as file:
            for digest in digests:
                if (number := self._at.get(digest)) is None:
                    return None
                file.seek(number * self.row_bytes)
                row = file.read(self.row_bytes)
                if zlib.crc32(row).to_bytes(CHECK, "little") != self._checks[number]:
                    del self._at[digest]
                    return None
                rows.append(row)
        return rows

    def _of_rows(self, rows: Sequence[bytes]) -> dict[Site, Tensor]:
        """Cut rows into the activations of each site, `[batch pos width]`."""
        whole = torch.from_numpy(np.frombuffer(bytearray(b"".join(rows)), np.uint8)).view(len(rows), self.row_bytes)
        sizes = [self._context * width * self._model.dtype.itemsize for width in self._widths]
        parts = zip(self._sites, self._widths, whole.split(sizes, 1), strict=True)
        return {
            site: part.contiguous().view(self._model.dtype).view(-1, self._context, width).to(self._model.device)
            for site, width, part in parts
        }

    def _add(self, digests: Sequence[bytes], clean: Clean) -> None:
        found = [clean.activations[site].detach().cpu().contiguous().flatten(1) for site in self._sites]
        try:
            with self._rows.open("r+b") as rows, self._index.open("r+b") as index:
                for number, digest in enumerate(digests):
                    if digest in self._at:
                        continue
                    row = b"".join(each[number].view(torch.uint8).numpy().tobytes() for each in found)
                    check, at = zlib.crc32(row).to_bytes(CHECK, "little"), len(self._checks)
                    rows.seek(at * self.row_bytes)
                    rows.write(row)
                    rows.flush()
                    index.seek(at * (DIGEST + CHECK))
                    index.write(digest + check)
                    index.flush()
                    self._at[digest] = at
                    self._checks.append(check)
        except OSError as error:
            raise cannot_write(self.folder, error) from None

    def close(self) -> None:
        """Let other processes add to it."""
        self._lock.release()


def kept_for(
    config: Recipe,
    model: LanguageModel,
    tail: LanguageModel,
    trainees: Sequence[AnyTrainee],
    corpus: Corpus,
    steps: int,
    world: World,
    display: bool,
) -> KeptActivations | None:
    """Return the cache that a recipe asks for (`data.activations`); None: it asks for none, or it could not be used,
    which is reported.

    Raises:
        ConfigError: the disk has no room for it.
        RunFolderError: it cannot be written.
    """
    if config.data.activations is None:
        return None
    phases = [[phase.objective for phase in trainee.course.phases] for trainee in trainees]
    reasons = {
        "several processes train": world.size > 1,
        "training.precision is mixed": tail is not model,
        "every phase has a term that reads a spliced pass": any(all(map(reads_splice, each)) for each in phases),
    }
    if why := next((reason for reason, holds in reasons.items() if holds), None):
        note(f"! data.activations is not used: {why}.", display)
        return None
    sites = {site for trainee in trainees for site in trainee.sites}
    size = config.training.batch // config.training.accumulation
    kept = KeptActivations(config.data.activations, model, sites, corpus.context, size, corpus.layout.ends)
    try:
        kept.check_room(min(len(corpus), steps * config.training.batch) - len(kept))
    except ConfigError:
        kept.close()
        raise
    return kept


def reads_splice(objective: Objective) -> bool:
    """Return whether an objective has a term that reads a spliced pass."""
    return bool(objective.spliced_terms or objective.places_terms)
