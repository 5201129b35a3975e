"""Writing files so that a reader never sees half of one, and a loss of power never costs the old one."""

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from endwise.errors import RunFolderError
from endwise.reading import expanded, there_is
from endwise.remedies import reason, remedy

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
    """Holds a lock file, its folder made if need be. The operating system frees it when the process ends, however it
    ends.

    Args:
        taken: what to say where another process holds it; None: it is waited for.

    Raises:
        RunFolderError: another process holds it, or it cannot be written.
    """
    holding = FileLock(lock, timeout=-1 if taken is None else 0)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        holding.acquire()
    except Timeout:
        raise RunFolderError(taken or "") from None
    except (OSError, NotImplementedError) as error:  # the second of older versions, where a disk knows no locks
        known = error if isinstance(error, OSError) else OSError(errno.ENOLCK, str(error))
        raise cannot_write(lock.parent, known) from None
    try:
        yield
    finally:
        holding.release()


def write_atomic(path: Path, content: bytes) -> None:
    """Puts `content` in the place of what `path` held (see `replacing`)."""
    with replacing(path) as partial:
        partial.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON; NaN and infinity are refused, since JSON has neither."""
    write_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file, written straight from the tensors' memory; one that is not contiguous, or not on the CPU, is
    copied first.
    """
    own = laid_out(tensors)
    with replacing(path) as partial:
        try:
            save_file(own, partial, metadata=dict(metadata))
        except SafetensorError as error:  # of a disk that is full, among others
            raise OSError(str(error)) from error


def laid_out(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, each in one piece; copied only where they are not."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def cannot_write(path: Path, error: Exception) -> RunFolderError:
    return RunFolderError(
        f"Cannot write {path} ({reason(error)}). {remedy(error, 'choose another folder')} Files already there are "
        "untouched."
    )


def check_can_write(folder: Path) -> None:
    """To be asked before what takes long is begun whose results go into the folder, which is not made yet.

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
    """Returns once the disk has what was written to a file, or which names a folder holds."""
    if os.name == "nt" and path.is_dir():  # where a folder cannot be opened, names are flushed with their files
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_partials(folder: Path) -> None:
    """Removes what processes that were killed left half-written, in a folder that no other process writes to."""
    for partial in folder.glob(f".*{PARTIAL}"):
        with suppress(OSError):
            partial.unlink()
