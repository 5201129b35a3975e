"""Files of documents: a reader for each kind. Nothing is tokenised here."""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from endwise.common.errors import DataError
from endwise.common.remedies import reason, remedy
from endwise.tokens.chats import Chat

COLUMNS = ("text", "input_ids", "tokens", "messages")
"""Looked for in this order where `data.column` is unset."""
ROWS_AT_ONCE = 1000
LONGEST_FIELD = 1 << 30
"""Characters of a document in a .csv file."""
_HALF_OF_A_PAIR = re.compile("[\ud800-\udfff]")


class SourceLost(DataError):
    """A source that cannot be read now, and perhaps can be again later."""


@dataclass(frozen=True)
class Document:
    """Text, token ids, or a conversation."""

    content: str | NDArray[Any] | Chat
    form: Literal["document", "chat", "row", "stream"] = "document"
    """A `chat` is a document, whatever separators stand in it; `row` and `stream` are joined documents already (a 2-D
    or 1-D array): no separator is added to them."""
    size: int = 1
    """This document's part of `TextSource.size`."""


def kind_of(file: Path) -> str | None:
    """Return the name of the one of `READERS` that reads a file."""
    return next((kind for kind in READERS if file.name.lower().endswith(kind)), None)


def read_file(file: Path, reader: "Reader", column: str | None) -> Iterator[Document]:
    found = False
    try:
        for document in reader(file, column):
            found = True
            yield document
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8 text (byte {error.start}: {error.reason}). Convert it to UTF-8."
        ) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{file} is not a gzip file that can be read: {one_line(error)}. Compress it again.") from None
    except OSError as error:
        if error.errno is None and file.suffix.lower() == ".zst":  # of what unpacks it, not of the system
            raise DataError(
                f"{file} is not a zst file that can be read: {one_line(error)}. Compress it again."
            ) from None
        raise SourceLost(f"Cannot read {file}: {reason(error)}. {remedy(error)}") from None
    if not found:
        raise DataError(f"{file} is empty: it holds no document. Remove it or write documents into it.")


def _opened(file: Path, newline: str | None = None) -> io.TextIOWrapper:
    """A file as text, unpacked."""
    if file.name.lower().endswith(".gz"):
        return io.TextIOWrapper(gzip.open(file), encoding="utf-8-sig", newline=newline)
    if file.name.lower().endswith(".zst"):
        import pyarrow as pa

        return io.TextIOWrapper(pa.input_stream(str(file), compression="zstd"), encoding="utf-8-sig", newline=newline)
    return file.open(encoding="utf-8-sig", newline=newline)


def _read_txt(file: Path, _column: str | None) -> Iterator[Document]:
    """Documents are separated by blank lines."""
    lines: list[str] = []
    with _opened(file) as stream:
        for line in stream:
            if line.strip():
                lines.append(line)
            elif lines:
                yield _text("".join(lines))
                lines = []
    if lines:
        yield _text("".join(lines))


def _text(text: str) -> Document:
    return Document(text.rstrip("\n"), size=len(text.encode()))


def _read_jsonl(file: Path, column: str | None) -> Iterator[Document]:
    with _opened(file) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # an integer of thousands of digits is not JSONDecodeError
                reason = getattr(error, "msg", None) or f"{error}".partition(";")[0]
                raise DataError(f"{where} is not JSON ({reason}). A .jsonl file has one object per line.") from None
            yield from _of_record(record, column, where, len(line.encode()))


def _of_record(record: Any, column: str | None, where: str, size: int = 1) -> Iterator[Document]:
    """The document of an object with a column of it, or of a string, which is one itself; null is none."""
    if isinstance(record, str):
        if column is not None:
            raise DataError(f"{where} is a string, with no column {column}. Unset data.column.")
        value: Any = record
    elif isinstance(record, dict):
        value = record[choose_column(record, column, where)]
    else:
        given = type(record).__name__
        raise DataError(f"{where} must be an object such as {{'text': ...}}, or text, not {given}. Correct it.")
    if _is_chat(value):
        yield Document(Chat.of(value, where), "chat", size)
    elif value is not None:
        yield Document(_checked(value, where), size=size)


def _read_json(file: Path, column: str | None) -> Iterator[Document]:
    """One list of strings or of objects."""
    with _opened(file) as stream:
        try:
            records = json.load(stream)
        except UnicodeDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            where = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
            raise DataError(
                f"{file}{where} is not JSON. With one object a line it is a .jsonl file: rename it."
            ) from None
    if not isinstance(records, list):
        raise DataError(
            f"{file} must hold one list, of texts or of objects such as {{'text': ...}}; it holds a "
            f"{type(records).__name__}. Write the documents as such a list, or one a line into a .jsonl file."
        )
    for number, record in enumerate(records, 1):
        yield from _of_record(record, column, f"{file}, entry {number}")


def _read_csv(file: Path, column: str | None) -> Iterator[Document]:
    """A line of names, then a document in each row; an empty field is none."""
    csv.field_size_limit(LONGEST_FIELD)  # of the whole process; 131,072 characters otherwise
    with _opened(file, newline="") as stream:  # a field may hold line breaks, which stay as they are
        rows = csv.reader(stream, strict=True)
        try:
            names = next(rows, [])
            chosen = names.index(choose_column(names, column, str(file)))
            for row in rows:
                if row and len(row) != len(names):
                    raise DataError(
                        f"{file}, line {rows.line_num}: a row has {len(row)} fields, and the first line names "
                        f"{len(names)} columns. Correct it."
                    )
                if row and row[chosen]:
                    yield Document(_checked(row[chosen], f"{file}, line {rows.line_num}"))
        except csv.Error as error:
            raise DataError(f"{file}, line {rows.line_num} is not CSV ({error}). Write it again.") from None


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)


def _checked(value: Any, where: str) -> str | NDArray[Any]:
    if isinstance(value, str):
        if not value.isascii() and _HALF_OF_A_PAIR.search(value):
            raise DataError(f"{where}: the text holds half of a surrogate pair, which is not a character. Replace it.")
        return value
    try:
        ids = np.asarray(value) if isinstance(value, list) else None
    except (ValueError, OverflowError):  # lists of unequal lengths
        ids = None
    if ids is None or ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.signedinteger)):
        raise DataError(
            f"{where}: a document must be text or a list of token ids, or of messages, not {value!r:.60}. Set "
            "data.column."
        )
    return ids.astype(np.int64)


def _read_parquet(file: Path, column: str | None) -> Iterator[Document]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
        chosen = choose_column(table.schema_arrow.names, column, str(file))
        for batch in table.iter_batches(batch_size=ROWS_AT_ONCE, columns=[chosen]):
            yield from arrow_documents(batch.column(0), f"{file}, column {chosen}")
    except pa.ArrowException as error:
        raise DataError(f"{file} is not a Parquet file that can be read: {error}.") from None


def arrow_documents(values: Any, where: str) -> Iterator[Document]:
    """Rows of one Arrow column, strings, lists of integers or conversations; nulls are left out."""
    from pyarrow import types

    if types.is_dictionary(values.type):  # a column of categories
        values = values.cast(values.type.value_type)
    if types.is_null(values.type):
        return
    if any(check(values.type) for check in (types.is_string, types.is_large_string, types.is_string_view)):
        yield from (Document(text) for text in values.to_pylist() if text is not None)
    elif hasattr(values.type, "value_type") and types.is_integer(values.type.value_type):
        # Slices of the column's one flat array: Python lists of ids would be many times slower.
        for row in values:
            if row.is_valid and row.values.null_count:
                raise DataError(f"{where} holds a list of token ids with a null in it. Remove it.")
            if row.is_valid:
                yield Document(row.values.to_numpy(zero_copy_only=False))
    elif hasattr(values.type, "value_type") and types.is_struct(values.type.value_type):
        yield from (Document(Chat.of(chat, where), "chat") for chat in values.to_pylist() if chat)
    else:
        raise DataError(
            f"{where} holds {values.type}; a document must be text or a list of token ids, or of messages. Set "
            "data.column."
        )


def _read_npy(file: Path, _column: str | None) -> Iterator[Document]:
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # NumPy reads the header as Python, and raises whatever that does
        raise DataError(
            f"{file} is not a NumPy array of integers that can be read: {one_line(error)}. Pickles are never read, "
            "since they can run any code; save the ids with numpy.save as an integer array."
        ) from error
    if not isinstance(array, np.ndarray) or array.ndim not in (1, 2) or not np.issubdtype(array.dtype, np.integer):
        found = f"{array.dtype} with {array.ndim} axes" if isinstance(array, np.ndarray) else "an archive"
        raise DataError(f"{file} must hold integer token ids with 1 or 2 axes; it holds {found}.")
    if array.ndim == 1 and array.size:
        yield Document(array, "stream", array.nbytes)
    elif array.size:
        yield from (Document(row, "row", row.nbytes) for row in array)


Reader = Callable[[Path, str | None], Iterator[Document]]
_PACKED = ("", ".gz", ".zst")
READERS: dict[str, Reader] = {
    **{f".txt{packed}": _read_txt for packed in _PACKED},
    **{f".jsonl{packed}": _read_jsonl for packed in _PACKED},
    **{f".json{packed}": _read_json for packed in _PACKED},
    **{f".csv{packed}": _read_csv for packed in _PACKED},
    ".parquet": _read_parquet,
    ".npy": _read_npy,
}
LISTS = tuple(kind for kind, reader in READERS.items() if reader is _read_json)
"""Suffixes of files that are data where they are named, and in a folder without any of another kind: beside those they
are mostly what describes them."""
WITH_COLUMNS = tuple(kind for kind, reader in READERS.items() if reader not in (_read_txt, _read_npy))
PLAIN = (".txt", ".jsonl", ".npy")
"""Suffixes of files whose size in bytes is how much there is to read."""


def choose_column(names: Iterable[str], column: str | None, where: str) -> str:
    """`column`, or the first of `COLUMNS` that is there.

    Raises:
        DataError: it is not there; the columns that are get listed.
    """
    names = list(names)
    wanted = COLUMNS if column is None else (column,)
    for name in wanted:
        if name in names:
            return name
    raise DataError(
        f"{where} has no column {' or '.join(wanted)}; it has {', '.join(names) or 'none'}. Set data.column."
    )


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
