"""Documents become ids on disk: tokenised, cut, counted. What is done stays done if the source or the process is lost.

A folder in the making holds `tokens.npy` (every document's ids, one after another), `ends.npy` (where each document
ends), `hashes.npy`, and `info.json`, which is written last and says how far the other files count. Of rows that were
packed before, those two say where rows end, and `inner-ends.npy` and `inner-hashes.npy` where documents in them do. Of
conversations, `left-starts.npy` and `left-ends.npy` say which spans of ids do not count.
"""

import hashlib
import io
import json
import os
import time
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from endwise.common.errors import DataError, NoTokenizer
from endwise.common.files import replacing, write_json
from endwise.common.terminal import Bars, note
from endwise.common.text import printable
from endwise.tokens.chats import TEMPLATE, Chat, no_roles, spans
from endwise.tokens.corpus import Documents, SequenceLayout
from endwise.tokens.encoding import Encoding, outside_vocabulary
from endwise.tokens.readers import ROWS_AT_ONCE, Document, SourceLost
from endwise.tokens.sources import TextSource

PEEKED_ROWS = 64
BLOCK = 1 << 22
"""Tokens of a stream looked at together."""
WINDOW = 16
"""Tokens that decide a content-defined cut, and the least number in which a fragment of a stream is compared."""
KEPT_EVERY = 1 << 24
"""Tokens after which what is done is saved, so that a killed process loses no more than them."""
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each new attempt at a source that was lost."""
TOKENS, ENDS, HASHES, INFO = "tokens.npy", "ends.npy", "hashes.npy", "info.json"
INNER_ENDS, INNER_HASHES = "inner-ends.npy", "inner-hashes.npy"
LEFT_STARTS, LEFT_ENDS = "left-starts.npy", "left-ends.npy"
_CODES: dict[str, Literal["q", "Q"]] = {ENDS: "q", HASHES: "Q", INNER_ENDS: "q", INNER_HASHES: "Q"}
_CODES |= {LEFT_STARTS: "q", LEFT_ENDS: "q"}

Ids = NDArray[Any]


@dataclass(frozen=True)
class Quota:
    """Amount of a source that is enough, so that a streamed one is not read to its end.

    A streamed source has no last documents to hold out until it is read whole. Each document goes to a side by its
    hash instead, which depends on nothing else and sends identical documents to the same side.
    """

    layout: SequenceLayout
    train: int
    """Sequences wanted."""
    heldout: int = 0
    share: float = 0.0
    """Share of the documents that is held out."""
    excluded: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    """Hashes of documents that do not count, since they are held out elsewhere."""

    def key(self) -> list[Any]:
        digest = hashlib.sha256(np.sort(self.excluded).tobytes()).hexdigest()
        layout = {name: value for name, value in asdict(self.layout).items() if name != "roles" or value}
        return [layout, self.share, digest]

    def counted(
        self, lengths: NDArray[np.int64], hashes: NDArray[np.uint64], rows: bool
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Count how much of sequences' payload each document or row fills, on the training side and held out."""
        if rows:
            filled = lengths // self.layout.payload * self.layout.payload
        elif self.layout.packing == "stream":
            filled = lengths
        else:
            filled = -(-(lengths - 1) // self.layout.payload) * self.layout.payload
        filled = filled * ~np.isin(hashes, self.excluded)
        held = held_by_hash(hashes, self.share)
        return filled * ~held, filled * held

    def met(self, train: int, heldout: int) -> bool:
        """Return whether positions counted on both sides are enough."""
        payload = self.layout.payload
        return train >= self.train * payload and heldout >= self.heldout * payload

    def trim(self, documents: Documents) -> Documents:
        """The first documents that meet the quota: a store may hold more, read for another run."""
        needed = 0
        sides = self.counted(documents.ends - documents.starts, documents.hashes, documents.inside is not None)
        for filled, wanted in zip(sides, (self.train, self.heldout), strict=True):
            reached = int(np.searchsorted(np.cumsum(filled), wanted * self.layout.payload))
            needed = max(needed, reached + 1 if wanted else 0)
        return documents.where(np.arange(len(documents)) < needed)


def held_by_hash(hashes: NDArray[np.uint64], share: float) -> NDArray[np.bool_]:
    """Mark the documents of a streamed source that are held out."""
    return hashes < np.uint64(share * 2**64)


class Builder:
    """Reads, tokenises and writes one source, from where an earlier attempt in the same folder came to."""

    def __init__(self, source: TextSource, encoding: Encoding, payload: int, quota: Quota | None, folder: Path) -> None:
        self._source, self._encoding, self._payload, self._quota = source, encoding, payload, quota
        self._folder = folder
        self._arrays: dict[str, array[int]] = {name: array(code) for name, code in _CODES.items()}
        self._consumed, self._written, self._largest, self._joined = 0, 0, 0, False
        self._counted = {"train": 0, "heldout": 0}
        self._noted = False
        self._mark()
        self._take_up()
        self.continues = self._consumed > 0
        """True if an earlier attempt left something to resume from."""

    def write(self) -> None:
        """Write the folder to its end.

        Raises:
            SourceLost: the source went away and did not come back; what was tokenised is kept in the folder.
            DataError: a document breaks a rule, or there is none.
            OSError: the folder cannot be written; what was tokenised before the last `KEPT_EVERY` tokens is kept.
        """
        tokens = self._folder / TOKENS
        with tokens.open("r+b" if self._consumed else "w+b") as file, _progress() as progress:
            if not self._consumed:
                _write_header(file, self._encoding.dtype, 0)
            file.seek(0, os.SEEK_END)
            try:
                exhausted = self._read(file, progress)
            except (SourceLost, KeyboardInterrupt):
                self._roll_back()
                self._keep(file, exhausted=False)
                raise
            if not self._arrays[ENDS]:
                raise DataError(f"{self._source.name} is empty: it holds no document with a token in it.")
            self._keep(file, exhausted)

    def _read(self, file: BinaryIO, progress: Progress) -> bool:
        """Read; True if the source was read to its end."""
        task = progress.add_task(
            printable(f"Tokenising {self._source.name}"), total=self._source.size, tokens=self._written
        )
        kept = self._written
        self._mark()
        for batch in _batches(self._rows_marked(progress.console)):
            before = len(self._arrays[ENDS])
            for document, (ids, left) in zip(batch, self._encoded(batch), strict=True):
                self._add(document, ids, left, file)
            self._consumed += len(batch)
            self._mark()
            progress.update(task, advance=sum(document.size for document in batch), tokens=self._written)
            if self._has_enough(len(self._arrays[ENDS]) - before):
                return False
            if self._written - kept >= KEPT_EVERY:
                self._keep(file, exhausted=False)
                kept = self._written
        return True

    def _mark(self) -> None:
        """Remember where a batch of documents begins."""
        lengths = {name: len(values) for name, values in self._arrays.items()}
        self._begun = (lengths, self._written, self._largest, self._joined)

    def _roll_back(self) -> None:
        """Take back a batch that was interrupted, whose documents do not count as consumed."""
        lengths, self._written, self._largest, self._joined = self._begun
        for name, length in lengths.items():
            del self._arrays[name][length:]

    def _take_up(self) -> None:
        """Resume from what the folder holds, if it is whole as far as its `info.json` says."""
        try:
            info = json.loads((self._folder / INFO).read_text())
            arrays = {name: np.load(self._folder / name) for name in self._arrays}
            tokens, header = self._folder / TOKENS, _header_size(self._encoding.dtype)
            size = header + info["tokens"] * self._encoding.dtype.itemsize
            lengths: dict[str, int] = {ENDS: info["documents"], HASHES: info["documents"]}
            lengths |= {INNER_ENDS: info["inner"], INNER_HASHES: info["inner"]}
            lengths |= {LEFT_STARTS: info["left_out"], LEFT_ENDS: info["left_out"]}
            if any(length > len(arrays[name]) for name, length in lengths.items()) or tokens.stat().st_size < size:
                return
            if int(arrays[ENDS][lengths[ENDS] - 1] if lengths[ENDS] else 0) != info["tokens"]:
                return
            consumed, joined = info["consumed"], info["compared_from"] == WINDOW
            counted = {side: int(info[side]) for side in self._counted}
        except (OSError, EOFError, ValueError, LookupError, TypeError, RecursionError):
            return
        os.truncate(tokens, size)
        for name, values in arrays.items():
            self._arrays[name].frombytes(values[: lengths[name]].tobytes())
        self._consumed, self._written, self._largest = consumed, info["tokens"], info["largest"]
        self._joined, self._counted = joined, counted

    def _keep(self, file: BinaryIO, exhausted: bool) -> None:
        """Save what is done so far, so that it can be used, or resumed."""
        file.seek(0)
        _write_header(file, self._encoding.dtype, self._written)
        file.seek(0, os.SEEK_END)
        file.flush()
        os.fsync(file.fileno())
        for name, values in self._arrays.items():
            with replacing(self._folder / name) as partial, partial.open("wb") as target:
                np.save(target, np.array(values, dtype=values.typecode))
        info = {"source": self._source.name, "documents": len(self._arrays[ENDS]), "tokens": self._written}
        info |= {"inner": len(self._arrays[INNER_ENDS]), "left_out": len(self._arrays[LEFT_ENDS])}
        info |= {"largest": self._largest, "compared_from": WINDOW if self._joined else 1, "exhausted": exhausted}
        write_json(self._folder / INFO, info | self._counted | {"consumed": self._consumed})

    def _rows_marked(self, console: Console) -> Iterator[Document]:
        """The documents that are still to be done, with rows of ids that are packed already marked as such, judged by
        the first rows of all.
        """
        documents = lasting(self._source, console)
        peeked = list(islice(documents, PEEKED_ROWS))
        lengths = {len(document.content) for document in peeked}
        are_ids = all(not isinstance(document.content, str) and document.form == "document" for document in peeked)
        packed = are_ids and len(peeked) > 1 and len(lengths) == 1 and lengths.pop() >= self._payload
        for document in islice(chain(peeked, documents), self._consumed, None):
            if packed and not isinstance(document.content, str):
                document = replace(document, form="row")
            yield document

    def _encoded(self, batch: list[Document]) -> Iterator[tuple[Ids, NDArray[np.bool_] | None]]:
        """Ids of each document, and which of them do not count, where that is reported.

        Raises:
            NoTokenizer, DataError: there is none for text, or for conversations; or roles are named of what has none.
        """
        texts = [document.content for document in batch if isinstance(document.content, str)]
        if texts and self._encoding.tokenizer is None:
            raise NoTokenizer(f"{self._source.name} is text, but the model has no tokenizer. Give token ids instead.")
        encoded = iter(self._encoding.ids(texts) if texts else ())
        self._note_specials(texts)
        for document in batch:
            if isinstance(document.content, Chat):
                yield self._encoding.chats.encoded(document.content)
                continue
            if self._encoding.roles:
                raise no_roles(self._source.name)
            yield np.asarray(next(encoded), np.int64) if isinstance(document.content, str) else document.content, None

    def _note_specials(self, texts: list[str]) -> None:
        """Say once that a text holds the separator in letters, which its author may have meant to end a document."""
        separator = self._encoding.separator
        if self._noted or self._encoding.specials or separator is None:
            return
        tokenizer = self._encoding.tokenizer
        written = tokenizer.convert_ids_to_tokens(separator) if texts and tokenizer is not None else None
        if isinstance(written, str) and any(written in text for text in texts):
            self._noted = True
            note(
                f"{self._source.name} holds {written!r} in letters, which is ordinary text. If it ends documents "
                "there, set data.special_tokens=true."
            )

    def _add(self, document: Document, ids: Ids, left: NDArray[np.bool_] | None, file: BinaryIO) -> None:
        separator = self._encoding.separator
        if document.form in ("document", "chat"):
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
        if left is not None and left.any():
            ended = np.append(left, [TEMPLATE in self._encoding.roles] * (len(ids) - len(left)))
            for begin, end in spans(ended, self._written).tolist():
                self._arrays[LEFT_STARTS].append(begin)
                self._arrays[LEFT_ENDS].append(end)
        row = document.form == "row"
        if self._arrays[ENDS] and row != bool(self._arrays[INNER_ENDS]):
            raise DataError(
                f"{self._source.name} holds both documents and rows of ids that were packed before, which are not cut "
                "and joined alike. Train on one of them, or give text for both."
            )
        ends, hashes = (INNER_ENDS, INNER_HASHES) if row else (ENDS, HASHES)
        for piece in _pieces(ids, document.form, separator):
            self._check_range(piece)
            digest = _hash(_content(piece, separator))
            file.write(piece.astype(self._encoding.dtype).tobytes())
            self._written += len(piece)
            self._arrays[ends].append(self._written)
            self._arrays[hashes].append(digest)
        if row and len(ids):
            self._arrays[ENDS].append(self._written)
            self._arrays[HASHES].append(_hash(ids))

    def _check_range(self, ids: Ids) -> None:
        smallest, largest = int(ids.min()), int(ids.max())
        if smallest < 0 or largest >= self._encoding.vocab_size:
            raise outside_vocabulary(self._source.name, smallest if smallest < 0 else largest, self._encoding)
        self._largest = max(self._largest, largest)

    def _has_enough(self, new: int) -> bool:
        """Count the last `new` documents; True if the quota is met."""
        if self._quota is None:
            return False
        all_ends, hashes = self._arrays[ENDS], self._arrays[HASHES]
        first = len(all_ends) - new
        lengths = np.diff(np.array(all_ends[first:], np.int64), prepend=all_ends[first - 1] if first else 0)
        rows = len(self._arrays[INNER_ENDS]) > 0
        train, heldout = self._quota.counted(lengths, np.array(hashes[first:], np.uint64), rows)
        self._counted["train"] += int(train.sum())
        self._counted["heldout"] += int(heldout.sum())
        return self._quota.met(**self._counted)


def lasting(source: TextSource, console: Console) -> Iterator[Document]:
    """The source's documents. Where it is lost midway it is opened again, after a pause, and read on.

    Raises:
        SourceLost: it did not come back after the last of `PAUSES`, or was not there from the start.
        DataError: it came back with fewer documents than it had given already.
    """
    given, attempts = 0, 0
    while True:
        try:
            documents = source.read()
            if sum(1 for _ in islice(documents, given)) < given:
                raise DataError(f"{source.name} changed while it was read: it has fewer documents than before.")
            for document in documents:
                given, attempts = given + 1, 0
                yield document
            return
        except SourceLost as error:
            if not given:
                raise
            if attempts == len(PAUSES):
                raise SourceLost(
                    f"{source.name} was lost after {given:,} documents, and did not come back in {attempts} attempts "
                    f"over {sum(PAUSES):g} seconds ({error}) What was tokenised is kept: start again, to resume from "
                    "there, once it can be read."
                ) from None
            line = f"{source.name} was lost after {given:,} documents ({error}) Trying again in {PAUSES[attempts]:g} s."
            console.print(printable(line), markup=False, highlight=False, soft_wrap=True)
            time.sleep(PAUSES[attempts])
            attempts += 1


def documents_in(tokens: NDArray[np.unsignedinteger], separator: int) -> Documents:
    """Documents of an array that ends each with `separator`, found without a cache: some 0.1 s per million tokens."""
    pieces = list(_pieces(tokens, "stream", separator))
    ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    hashes = np.array([_hash(_content(piece, separator)) for piece in pieces], dtype=np.uint64)
    return documents_at(tokens, ends, hashes, WINDOW)


def documents_at(tokens: Ids, ends: NDArray[np.int64], hashes: NDArray[np.uint64], compared_from: int) -> Documents:
    """Documents that lie one after another; those of fewer tokens than `compared_from` + 1 are not compared."""
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    return Documents(tokens, starts, ends, hashes, ends - starts > compared_from)


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
    """Cut after every separator, but of conversations, whose turns it may end. A stream that has none is cut where its
    content says (see `_content_cuts`).
    """
    if form == "chat":
        yield ids
        return
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


def _write_header(file: BinaryIO | io.BytesIO, dtype: np.dtype[Any], length: int) -> None:
    """NumPy leaves room for the length to grow, so that the header can be written again once it is known."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)


def _header_size(dtype: np.dtype[Any]) -> int:
    buffer = io.BytesIO()
    _write_header(buffer, dtype, 0)
    return buffer.tell()


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[tokens]:,} tokens"),
    )
    return Bars(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal, transient=True)
