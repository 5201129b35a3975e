"""Writing files so that a reader never sees half of one."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from endwise.errors import RunFolderError


def write_atomic(path: Path, content: bytes) -> None:
    """Writes to a neighbour, flushes it to the disk and renames it over `path`.

    Raises:
        RunFolderError: the disk is full or the folder cannot be written; `path` keeps its old content.
    """
    partial = path.parent / f".{path.name}.{os.getpid()}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise RunFolderError(
            f"Cannot write {path} ({error.strerror or error}). Free space on that disk or choose another folder; "
            "files already there are untouched."
        ) from error


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON; NaN and infinity are refused, since JSON has neither."""
    write_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())
