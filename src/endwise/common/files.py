"""Files: written so that no reader sees half of one, read with a word for each fault."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from filelock import FileLock, Timeout

from endwise.common.errors import FolderTaken, FormatError, RunFolderError
from endwise.common.remedies import reason, remedy

PARTIAL = ".partial"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A neighbour of `path` to write to, which at the end is flushed to the disk and renamed over it.

    Raises:
        RunFolderError: the disk is full or the folder cannot be written; `path` keeps its old content.
    """
    path = expanded(path)
    partial = path.parent / f".{path.name}.{os.getpid()}{PARTIAL}"  # which has a name even where `path` has none
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        flush(partial)
        partial.replace(path)
        flush(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            partial.unlink()


@contextmanager
def held(lock: Path, taken: str | None = None) -> Iterator[None]:
    """Hold a lock file, its folder made if need be. The operating system frees it when the process ends, however it
    ends.

    Args:
        taken: what to say where another process holds it; None: it is waited for.

    Raises:
        FolderTaken: another process holds it.
        RunFolderError: it cannot be written.
    """
    holding = FileLock(lock, timeout=-1 if taken is None else 0)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        holding.acquire()
    except Timeout:
        raise FolderTaken(taken or "") from None
    except (OSError, NotImplementedError) as error:  # the second of older versions, where a disk knows no locks
        known = error if isinstance(error, OSError) else OSError(errno.ENOLCK, str(error))
        raise cannot_write(lock.parent, known) from None
    try:
        yield
    finally:
        holding.release()


def write_atomic(path: Path, content: bytes) -> None:
    """Put `content` in the place of what `path` held (see `replacing`)."""
    with replacing(path) as partial:
        partial.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON; NaN and infinity are refused, since JSON has neither."""
    write_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def cannot_write(path: Path, error: Exception) -> RunFolderError:
    return RunFolderError(
        f"Cannot write {path} ({reason(error)}). {remedy(error, 'choose another folder')} Files already there are "
        "untouched."
    )


def check_can_write(folder: Path) -> None:
    """Check before long work that its results can be written to the folder, which is not made yet.

    Raises:
        RunFolderError: it is a file or below one, or nothing may be written where it would be made.
    """
    place = folder = expanded(folder)
    while not there_is(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise cannot_write(folder, NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)))
    if not os.access(place, os.W_OK | os.X_OK):
        raise cannot_write(folder, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def flush(path: Path) -> None:
    """Return once the disk has what was written to a file, or which names a folder holds."""
    if os.name == "nt" and path.is_dir():  # where a folder cannot be opened, names are flushed with their files
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_partials(folder: Path) -> None:
    """Remove what processes that were killed left half-written, in a folder that no other process writes to."""
    for partial in folder.glob(f".*{PARTIAL}"):
        with suppress(OSError):
            partial.unlink()


LARGEST_JSON = 32 << 20
"""Bytes; the index of a model in a thousand shards has less than a tenth of it."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        FormatError: it cannot be read, is larger than `LARGEST_JSON`, or holds no object in JSON.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_JSON + 1)
        if len(content) > LARGEST_JSON:
            raise ValueError(f"it has more than {LARGEST_JSON:,} bytes")
        value = json.loads(content.decode("utf-8-sig"))
        if not isinstance(value, dict):
            raise ValueError(f"it must hold an object, not {type(value).__name__}")
    except FileNotFoundError:
        raise
    except RecursionError:
        raise FormatError(f"{path} cannot be read as JSON: it is nested too deeply. {_REMEDY}") from None
    except OSError as error:
        raise FormatError(f"{path} cannot be read as JSON: {reason(error)}. {remedy(error)}") from None
    except ValueError as error:
        raise FormatError(f"{path} cannot be read as JSON: {error}. {_REMEDY}") from None
    return value


def read_format(path: Path, version: int) -> dict[str, Any]:
    """The object in a JSON file of ours, which says by `format` how it is to be read.

    Raises:
        FileNotFoundError, FormatError: as `read_json`.
        ValueError: it is of another version than the one that is read.
    """
    value = read_json(path)
    if value.get("format") != version:
        raise ValueError(f"its format is {value.get('format')!r:.40}, this version reads {version}")
    return value


_REMEDY = "Restore it from a copy, or have it written again."


def there_is(path: Path) -> bool:
    """True if there is such a file or folder. A name that the file system does not take (too long, a NUL) names none,
    where `Path.exists` raises.
    """
    return os.path.exists(path)  # noqa: PTH110


def at_home(name: str) -> str:
    """The name of a path with `~` resolved; where there is no such user, as it stands (`Path.expanduser` raises)."""
    return os.path.expanduser(name)  # noqa: PTH111


def expanded(path: str | Path) -> Path:
    """A path that a user gave, as `at_home`: every one of them goes through here, so that none makes a folder `~`."""
    return Path(at_home(str(path)))


def stays_inside(name: str) -> bool:
    """Return whether a relative file name, taken from a folder, names something in it, on any operating system."""
    paths = (PurePosixPath(name), PureWindowsPath(name))
    return bool(name) and not any(path.is_absolute() or path.anchor or ".." in path.parts for path in paths)
