"""Answers that were paid for, in one SQLite file: each is on the disk before the next step uses it.

An answer's key is the SHA-256 of the endpoint's address and the whole request, so that any change of model, prompt or
setting is another call, and none is made twice.
"""

import errno
import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from endwise.common.errors import FormatError
from endwise.common.files import cannot_write, held

ANSWERS_FILE = "answers.sqlite"
_FORMAT = 1


@dataclass(frozen=True)
class Answer:
    """Answer of a model, and what it took."""

    text: str
    tokens_in: int | None = None
    """Tokens as the server counted them; None where it does not say."""
    tokens_out: int | None = None


def request_key(url: str, request: Mapping[str, Any]) -> str:
    content = json.dumps([url, request], sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(content.encode()).hexdigest()


class Cache:
    """Answers by key, those of one run."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection, self._path = connection, path

    def get(self, key: str) -> Answer | None:
        """
        Raises:
            FormatError: the file is damaged.
        """
        query = "SELECT text, tokens_in, tokens_out FROM answers WHERE key = ?"
        try:
            row = self._connection.execute(query, (key,)).fetchone()
        except sqlite3.Error as error:
            raise _broken(self._path, error) from None
        return None if row is None else Answer(*row)

    def put(self, key: str, answer: Answer) -> None:
        """Keep an answer, on the disk when this returns.

        Raises:
            RunFolderError: it cannot be written.
        """
        try:
            with self._connection:
                self._connection.execute(
                    "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)",
                    (key, answer.text, answer.tokens_in, answer.tokens_out),
                )
        except sqlite3.Error as error:
            raise cannot_write(self._path, _of_the_system(error)) from None


@contextmanager
def opened(folder: Path) -> Iterator[Cache]:
    """The answers in a folder, made if need be, for this process alone.

    Raises:
        RunFolderError: another process explains there, or it cannot be written.
        FormatError: the file is damaged.
    """
    taken = f"Another process explains in {folder}. Wait for it to finish, or stop it."
    with held(folder / ".lock", taken), _connected(folder / ANSWERS_FILE) as cache:
        yield cache


@contextmanager
def in_memory() -> Iterator[Cache]:
    """Open an empty store in memory, which is not kept."""
    with _connected(Path(":memory:")) as cache:
        yield cache


@contextmanager
def _connected(path: Path) -> Iterator[Cache]:
    connection = sqlite3.connect(path, check_same_thread=False)  # used by one thread at a time
    try:
        _prepare(connection, path)
        yield Cache(connection, path)
    finally:
        connection.close()


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    try:
        connection.execute("PRAGMA synchronous = FULL")
        found = connection.execute("PRAGMA user_version").fetchone()[0]
        if found not in (0, _FORMAT):
            raise FormatError(f"{path} is of another version ({found}, this one reads {_FORMAT}). Move it away.")
        with connection:
            connection.execute(
                "CREATE TABLE IF NOT EXISTS answers "
                "(key TEXT PRIMARY KEY, text TEXT NOT NULL, tokens_in INTEGER, tokens_out INTEGER)"
            )
            connection.execute(f"PRAGMA user_version = {_FORMAT}")
    except sqlite3.OperationalError as error:
        raise cannot_write(path, _of_the_system(error)) from None
    except sqlite3.DatabaseError as error:
        raise _broken(path, error) from None


_NUMBERS = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_IOERR: errno.EIO,
    sqlite3.SQLITE_READONLY: errno.EACCES,
    sqlite3.SQLITE_PERM: errno.EACCES,
    sqlite3.SQLITE_BUSY: errno.EBUSY,
    sqlite3.SQLITE_LOCKED: errno.EBUSY,
    sqlite3.SQLITE_NOMEM: errno.ENOMEM,
}


def _of_the_system(error: sqlite3.Error) -> OSError:
    """Return the system's error that SQLite met; it hides the number, but names the kind of error."""
    number = _NUMBERS.get(getattr(error, "sqlite_errorcode", 0) & 0xFF)
    return OSError(str(error)) if number is None else OSError(number, str(error))


def _broken(path: Path, why: object) -> FormatError:
    return FormatError(
        f"{path} does not hold answers ({why}). Restore it from a copy, or move it away: its calls are then made again."
    )
