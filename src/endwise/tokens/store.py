"""Tokenised documents on disk: written once per source and tokenizer, memory-mapped ever after.

A store is a folder of the cache (`tokenising` says what is in it). It is built under another name, which a later
attempt resumes from if this one is cut off, and renamed when complete. One process builds it, others wait.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from endwise.common.errors import DataError, RunFolderError
from endwise.common.files import PARTIAL
from endwise.common.remedies import reason, remedy
from endwise.common.terminal import note
from endwise.tokens.corpus import Documents
from endwise.tokens.encoding import Encoding, outside_vocabulary
from endwise.tokens.sources import SourceLost, TextSource
from endwise.tokens.tokenising import (
    ENDS,
    HASHES,
    INFO,
    INNER_ENDS,
    INNER_HASHES,
    LEFT_ENDS,
    LEFT_STARTS,
    TOKENS,
    Builder,
    Quota,
    documents_at,
)

VERSION = 2
"""Raised when the same source would be stored otherwise than before."""


def open_store(source: TextSource, encoding: Encoding, payload: int, cache: Path, quota: Quota | None) -> Documents:
    """The source's documents, tokenised now or before.

    Args:
        payload: rows of ids that all have one length, this or more, count as packed already.
        quota: when to stop reading; None: at the end.

    Raises:
        DataError: a document or an id breaks a rule, or the cache cannot be written.
    """
    parts = [VERSION, source.identity, encoding.fingerprint(), encoding.separator, encoding.dtype.name, payload]
    parts += [encoding.specials, quota.key() if quota else None]
    parts += encoding.of_chats if source.has_columns else []
    folder = cache / "tokens" / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    stored = _load(folder)
    if stored is None or not _suffices(stored.info, quota):
        try:
            with _building(folder, source.name):
                stored = _load(folder)  # another process may have built it meanwhile
                if stored is None or not _suffices(stored.info, quota):
                    stored = _build(source, encoding, payload, quota, folder)
        except (OSError, RunFolderError) as error:
            if isinstance(error, RunFolderError):  # which says what helps
                raise DataError(f"Cannot keep tokenised text in {cache}. {error}") from error
            advice = remedy(error, "set data.cache to another folder")
            raise DataError(
                f"Cannot keep tokenised text in {cache} ({reason(error)}). {advice} What is kept there is used "
                "next time."
            ) from error
    if stored.info["largest"] >= encoding.vocab_size:
        raise outside_vocabulary(source.name, stored.info["largest"], encoding)
    return stored.documents if quota is None else quota.trim(stored.documents)


@dataclass(frozen=True)
class _Stored:
    documents: Documents
    info: dict[str, Any]


def _load(folder: Path) -> _Stored | None:
    """Load a store; None where there is none, or a damaged one."""
    try:
        info = json.loads((folder / INFO).read_text())
        tokens = np.load(folder / TOKENS, mmap_mode="r")
        ends, hashes = np.load(folder / ENDS), np.load(folder / HASHES)
        if len(ends) != info["documents"] or len(hashes) != len(ends) or len(tokens) != ends[-1]:
            return None
        documents = documents_at(tokens, ends, hashes, info["compared_from"])
        if info.get("left_out"):
            left = np.stack([np.load(folder / LEFT_STARTS), np.load(folder / LEFT_ENDS)], axis=1)
            if len(left) != info["left_out"]:
                return None
            documents = replace(documents, left_out=left)
        return _Stored(_as_rows(folder, documents, info) if info["inner"] else documents, info)
    except (OSError, EOFError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _as_rows(folder: Path, rows: Documents, info: dict[str, Any]) -> Documents:
    """
    Raises:
        ValueError, OSError: what is in the rows cannot be read, or does not belong to them.
    """
    ends, hashes = np.load(folder / INNER_ENDS), np.load(folder / INNER_HASHES)
    if len(ends) != info["inner"] or len(hashes) != len(ends) or not np.isin(rows.ends, ends).all():
        raise ValueError(f"{folder} is damaged")
    inside = documents_at(rows.tokens, ends, hashes, info["compared_from"])
    return replace(rows, inside=inside, comparable=np.ones(len(rows), np.bool_))


def _suffices(info: dict[str, Any], quota: Quota | None) -> bool:
    return quota is None or info["exhausted"] or quota.met(info["train"], info["heldout"])


def _build(source: TextSource, encoding: Encoding, payload: int, quota: Quota | None, folder: Path) -> _Stored:
    """Build the store; one that holds too little is where it resumes from."""
    partial = folder.with_name(f".{folder.name}{PARTIAL}")
    if _load(folder) is not None and not partial.exists():
        copy = partial.with_suffix(".copy")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        copy.rename(partial)
    partial.mkdir(parents=True, exist_ok=True)
    builder = Builder(source, encoding, payload, quota, partial)
    try:
        builder.write()
    except SourceLost:
        raise
    except DataError:  # of the text itself, most likely, so that nothing made of it is of use
        if not builder.continues:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    stored = _load(folder)
    if stored is None:
        raise DataError(f"The tokenised text just written to {folder} cannot be read back. Set data.cache.")
    return stored


@contextmanager
def _building(folder: Path, name: str) -> Iterator[None]:
    """Hold a store against other processes that would build it too."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        note(f"Waiting for another process that is tokenising {name}.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
