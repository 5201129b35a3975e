"""Tokenised documents on disk: written once per source and tokenizer, memory-mapped ever after.

A store is a folder of the cache: `tokens.npy` (every document's ids, one after another), `ends.npy` (where each
document ends), `hashes.npy`, `info.json`. It is built under another name and renamed when complete.
"""

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from endwise.errors import DataError
from endwise.printable import printable
from endwise.tokens.corpus import Documents, Layout
from endwise.tokens.sources import ROWS_AT_ONCE, Document, Source

VERSION = 1
"""Raised when the same source would be stored otherwise than before."""
PEEKED_ROWS = 64
BLOCK = 1 << 22
"""Tokens of a stream looked at together."""
WINDOW = 16
"""Tokens that decide a content-defined cut, and the least number in which a fragment of a stream is compared."""

Ids = NDArray[Any]


@dataclass(frozen=True)
class Encoding:
    """How text becomes ids, and which ids are allowed."""

    tokenizer: Any | None
    separator: int | None
    vocab_size: int

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def fingerprint(self) -> str:
        """Equal for tokenizers that encode alike."""
        if self.tokenizer is None:
            return "none"
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            content: Any = [type(self.tokenizer).__name__, sorted(self.tokenizer.get_vocab().items())]
        else:
            content = json.loads(backend.to_str())
            # Calls set these two as they go; we never truncate or pad.
            content.pop("truncation", None)
            content.pop("padding", None)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Quota:
    """How much of a source is enough, so that a streamed one is not read to its end.

    A streamed source has no last documents to hold out until it is read whole. Each document goes to a side by its
    hash instead, which depends on nothing else and sends identical documents to the same side.
    """

    layout: Layout
    train: int
    """Sequences wanted."""
    heldout: int = 0
    share: float = 0.0
    """Of the documents, held out."""
    excluded: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    """Hashes of documents that do not count, since they are held out elsewhere."""

    def key(self) -> list[Any]:
        digest = hashlib.sha256(np.sort(self.excluded).tobytes()).hexdigest()
        return [asdict(self.layout), self.share, digest]

    def counted(
        self, lengths: NDArray[np.int64], hashes: NDArray[np.uint64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """How much of sequences' payload each document fills, on the training side and held out."""
        if self.layout.packing == "stream":
            filled = lengths
        else:
            filled = -(-(lengths - 1) // self.layout.payload) * self.layout.payload
        filled = filled * ~np.isin(hashes, self.excluded)
        held = held_by_hash(hashes, self.share)
        return filled * ~held, filled * held

    def met(self, train: int, heldout: int) -> bool:
        """Whether positions counted on both sides are enough."""
        payload = self.layout.payload
        return train >= self.train * payload and heldout >= self.heldout * payload

    def trim(self, documents: Documents) -> Documents:
        """The first documents that meet the quota: a store may hold more, read for another run."""
        needed = 0
        sides = self.counted(documents.ends - documents.starts, documents.hashes)
        for filled, wanted in zip(sides, (self.train, self.heldout), strict=True):
            reached = int(np.searchsorted(np.cumsum(filled), wanted * self.layout.payload))
            needed = max(needed, reached + 1 if wanted else 0)
        return documents.where(np.arange(len(documents)) < needed)


def held_by_hash(hashes: NDArray[np.uint64], share: float) -> NDArray[np.bool_]:
    """Which documents of a streamed source are held out."""
    return hashes < np.uint64(share * 2**64)


def open_store(source: Source, encoding: Encoding, context: int, cache: Path, quota: Quota | None) -> Documents:
    """The source's documents, tokenised now or before.

    Args:
        context: rows of ids that all have one length, this or more, count as packed already.
        quota: when to stop reading; None: at the end.

    Raises:
        DataError: a document or an id breaks a rule, or the cache cannot be written.
    """
    parts = [VERSION, source.identity, encoding.fingerprint(), encoding.separator, encoding.dtype.name, context]
    parts += [quota.key() if quota else None]
    folder = cache / "tokens" / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    stored = _load(folder)
    if stored is None or not _suffices(stored.info, quota):
        partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        try:
            partial.mkdir(parents=True, exist_ok=True)
            _Builder(source, encoding, context, quota).write(partial)
            _put(partial, folder)
        except OSError as error:
            raise DataError(
                f"Cannot keep tokenised text in {cache} ({error.strerror or error}). "
                "Free space there, or set data.cache to another folder."
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        stored = _load(folder)
        if stored is None:
            raise DataError(f"The tokenised text just written to {folder} cannot be read back. Set data.cache.")
    if stored.info["largest"] >= encoding.vocab_size:
        raise outside_vocabulary(source.name, stored.info["largest"], encoding)
    return stored.documents if quota is None else quota.trim(stored.documents)


def documents_in(tokens: NDArray[np.unsignedinteger], separator: int) -> Documents:
    """Documents of an array that ends each with `separator`, found without a cache: some 0.1 s per million tokens."""
    pieces = list(_pieces(tokens, "stream", separator))
    ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    hashes = np.array([_hash(_content(piece, separator)) for piece in pieces], dtype=np.uint64)
    return _documents(tokens, ends, hashes, WINDOW)


@dataclass(frozen=True)
class _Stored:
    documents: Documents
    info: dict[str, Any]


def _load(folder: Path) -> _Stored | None:
    """None where there is no store, or a damaged one."""
    try:
        info = json.loads((folder / "info.json").read_text())
        tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        ends, hashes = np.load(folder / "ends.npy"), np.load(folder / "hashes.npy")
        if len(ends) != info["documents"] or len(hashes) != len(ends) or len(tokens) != ends[-1]:
            return None
        return _Stored(_documents(tokens, ends, hashes, info["compared_from"]), info)
    except (OSError, EOFError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _documents(tokens: Ids, ends: NDArray[np.int64], hashes: NDArray[np.uint64], compared_from: int) -> Documents:
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    return Documents(tokens, starts, ends, hashes, ends - starts > compared_from)


def _suffices(info: dict[str, Any], quota: Quota | None) -> bool:
    return quota is None or info["exhausted"] or quota.met(info["train"], info["heldout"])


def _put(partial: Path, folder: Path) -> None:
    """Renames a complete store into place; one that another process put there meanwhile is replaced by its equal."""
    if folder.exists():
        old = partial.with_name(f"{partial.name}.old")
        folder.rename(old)
        shutil.rmtree(old, ignore_errors=True)
    partial.rename(folder)


class _Builder:
    """Reads, tokenises and writes one source."""

    def __init__(self, source: Source, encoding: Encoding, context: int, quota: Quota | None) -> None:
        self._source, self._encoding, self._context, self._quota = source, encoding, context, quota
        self._ends, self._hashes = array("q"), array("Q")
        self._written, self._largest, self._joined = 0, 0, False
        self._counted = {"train": 0, "heldout": 0}

    def write(self, folder: Path) -> None:
        exhausted = True
        with (folder / "tokens.npy").open("wb") as file, _progress() as progress:
            _write_header(file, self._encoding.dtype, 0)
            task = progress.add_task(printable(f"Tokenising {self._source.name}"), total=self._source.size, tokens=0)
            for batch in _batches(self._rows_marked()):
                before = len(self._ends)
                for document, ids in zip(batch, self._encoded(batch), strict=True):
                    self._add(document, ids, file)
                progress.update(task, advance=sum(document.size for document in batch), tokens=self._written)
                if self._has_enough(len(self._ends) - before):
                    exhausted = False
                    break
            file.seek(0)
            _write_header(file, self._encoding.dtype, self._written)
            file.flush()
            os.fsync(file.fileno())
        if not self._ends:
            raise DataError(f"{self._source.name} is empty: it holds no document with a token in it.")
        np.save(folder / "ends.npy", np.frombuffer(self._ends, dtype=np.int64))
        np.save(folder / "hashes.npy", np.frombuffer(self._hashes, dtype=np.uint64))
        info = {"source": self._source.name, "documents": len(self._ends), "tokens": self._written}
        info |= {"largest": self._largest, "compared_from": WINDOW if self._joined else 1, "exhausted": exhausted}
        (folder / "info.json").write_text(json.dumps(info | self._counted, indent=2))

    def _rows_marked(self) -> Iterator[Document]:
        """The documents, with rows of ids that are packed already marked as such, judged by the first rows."""
        documents = self._source.read()
        peeked = list(islice(documents, PEEKED_ROWS))
        lengths = {len(document.content) for document in peeked}
        are_ids = all(not isinstance(document.content, str) and document.form == "document" for document in peeked)
        packed = are_ids and len(peeked) > 1 and len(lengths) == 1 and lengths.pop() >= self._context
        for document in chain(peeked, documents):
            yield Document(document.content, "row", document.size) if packed else document

    def _encoded(self, batch: list[Document]) -> Iterator[Ids]:
        """Ids of each document; texts are tokenised together, on all cores if the tokenizer is a fast one."""
        texts = [document.content for document in batch if isinstance(document.content, str)]
        tokenizer = self._encoding.tokenizer
        if texts and tokenizer is None:
            raise DataError(f"{self._source.name} is text, but the model has no tokenizer. Give token ids instead.")
        encoded: Iterator[list[int]] = iter(())
        if texts and tokenizer is not None:
            encoded = iter(
                tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
            )
        for document in batch:
            if isinstance(document.content, str):
                yield np.asarray(next(encoded), dtype=np.int64)
            else:
                yield document.content

    def _add(self, document: Document, ids: Ids, file: BinaryIO) -> None:
        separator = self._encoding.separator
        if document.form == "document":
            if separator is None:
                raise DataError(
                    f"{self._source.name}: documents need a separator, and the tokenizer has no end-of-sequence token. "
                    "Set data.separator to a token of its vocabulary."
                )
            if not len(ids):
                return
            if ids[-1] != separator:
                ids = np.append(ids, np.asarray(separator, dtype=np.int64))
        else:
            self._joined = True
        for piece in _pieces(ids, document.form, separator):
            self._check_range(piece)
            digest = _hash(_content(piece, separator))
            file.write(piece.astype(self._encoding.dtype).tobytes())
            self._written += len(piece)
            self._ends.append(self._written)
            self._hashes.append(digest)

    def _check_range(self, ids: Ids) -> None:
        smallest, largest = int(ids.min()), int(ids.max())
        if smallest < 0 or largest >= self._encoding.vocab_size:
            raise outside_vocabulary(self._source.name, smallest if smallest < 0 else largest, self._encoding)
        self._largest = max(self._largest, largest)

    def _has_enough(self, new: int) -> bool:
        """Counts the last `new` documents; whether the quota is met."""
        if self._quota is None:
            return False
        first = len(self._ends) - new
        ends = np.array(self._ends[first:], dtype=np.int64)
        lengths = np.diff(ends, prepend=self._ends[first - 1] if first else 0)
        train, heldout = self._quota.counted(lengths, np.array(self._hashes[first:], dtype=np.uint64))
        self._counted["train"] += int(train.sum())
        self._counted["heldout"] += int(heldout.sum())
        return self._quota.met(**self._counted)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Lists of documents, bounded in number and in length."""
    batch: list[Document] = []
    length = 0
    for document in documents:
        batch.append(document)
        length += len(document.content)
        if len(batch) == ROWS_AT_ONCE or length >= BLOCK:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def _pieces(ids: Ids, form: str, separator: int | None) -> Iterator[Ids]:
    """Cuts after every separator. A stream that has none is cut where its content says (see `_content_cuts`)."""
    start = 0
    while start < len(ids):
        block = np.asarray(ids[start : start + BLOCK])
        cuts = np.flatnonzero(block == separator) + 1 if separator is not None else np.empty(0, np.int64)
        if form == "stream" and not len(cuts):
            cuts = _content_cuts(block)
        if not len(cuts) or (start + len(block) == len(ids) and cuts[-1] < len(block)):
            cuts = np.append(cuts, len(block))
        begin = 0
        for end in cuts.tolist():
            yield block[begin:end]
            begin = end
        start += begin


def _content_cuts(ids: Ids) -> NDArray[np.int64]:
    """Cuts, 64 tokens apart on average, each decided by the `WINDOW` tokens before it and nothing else.

    The same text is thus cut at the same places wherever it stands in a stream, and its pieces can be compared.
    """
    mixed = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    for shift in (1, 2, 4, 8):
        if len(mixed) <= shift:
            return np.empty(0, np.int64)
        mixed = (mixed[:-shift] * np.uint64(0xBF58476D1CE4E5B9)) ^ (mixed[shift:] * np.uint64(0x94D049BB133111EB))
        mixed ^= mixed >> np.uint64(31)
    return np.flatnonzero(mixed >> np.uint64(58) == 0) + WINDOW


def _content(piece: Ids, separator: int | None) -> Ids:
    return piece[:-1] if separator is not None and piece[-1] == separator else piece


def _hash(ids: Ids) -> int:
    return int.from_bytes(hashlib.blake2b(ids.astype("<u4").tobytes(), digest_size=8).digest())


def _write_header(file: BinaryIO, dtype: np.dtype[Any], length: int) -> None:
    """NumPy leaves room for the length to grow, so that the header can be written again once it is known."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[tokens]:,} tokens"),
    )
    return Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal, transient=True)


def outside_vocabulary(name: str, token: int, encoding: Encoding) -> DataError:
    return DataError(
        f"{name} holds the token id {token}, outside the model's vocabulary of {encoding.vocab_size} (ids 0 to "
        f"{encoding.vocab_size - 1}). It was made for another tokenizer; tokenise the text with this model's."
    )
