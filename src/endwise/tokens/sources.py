"""Sources of documents: files, folders of files, Hugging Face datasets. Nothing is tokenised here."""

import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from endwise.common.digests import cache_folder, of_text
from endwise.common.errors import DataError, FormatError, RunFolderError
from endwise.common.files import expanded, read_json, stays_inside, there_is, write_json
from endwise.common.remedies import reason, remedy
from endwise.tokens.chats import Chat
from endwise.tokens.folders import check_split, files_of_split, no_split

COLUMNS = ("text", "input_ids", "tokens", "messages")
"""Looked for in this order where `data.column` is unset."""
ROWS_AT_ONCE = 1000
NETWORK_LIBRARIES = ("aiohttp", "fsspec", "httpcore", "httpx", "requests", "urllib3")
"""Those that `datasets` reads through; what they raise is no documented list, and not all of it an OSError."""
ANSWER_SECONDS = 10.0
"""To wait for the hub's answer."""
_COMMIT = re.compile("[0-9a-f]{40}")
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


@dataclass(frozen=True)
class TextSource:
    """Documents in a fixed order, with what identifies them."""

    name: str
    identity: list[Any]
    """Changes when the documents do: paths, sizes and times of files; id, configuration and split on the hub."""
    read: Callable[[], Iterator[Document]]
    size: int | None = None
    """For the progress display only."""
    has_columns: bool = True
    """True if `data.column` says anything about it."""
    commit: str | None = None
    """Commit of a data set on the hub, where it could be learnt."""


def open_source(
    name: str, column: str | None, config: str | None, split: str, streaming: bool, revision: str | None = None
) -> TextSource:
    """Finds the documents named in a recipe, without reading them.

    Args:
        name: a file, a folder (of files, or saved by `datasets`), or a Hugging Face dataset id.
        config: configuration of a dataset on the hub; None: its only one.
        split: of a dataset or a folder of files.
        revision: commit, branch or tag of a dataset on the hub; None: as it is there.

    Raises:
        DataError: there is no such file, split or reader, or it has no configurations or revisions.
    """
    path = expanded(name)
    if there_is(path):
        refuse_hub_settings(name, config, revision)
        saved = any((path / marker).exists() for marker in ("state.json", "dataset_dict.json"))
        return _saved_dataset(path, column, split) if saved else _files(path, column, split)
    looks_local = _kind(path) is not None or path.is_absolute() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)
    if looks_local or name.startswith("."):
        raise DataError(f"There is no file or folder {name}. Correct data.source or data.heldout.")
    commit = commit_on_hub(name, revision)
    pinned = commit or revision
    return TextSource(
        f"{name} ({split})",
        ["hub", name, config, pinned, split, column],
        lambda: _hub_documents(name, column, config, pinned, split, streaming),
        commit=commit,
    )


def refuse_hub_settings(name: str, config: str | None, revision: str | None) -> None:
    """
    Raises:
        DataError: one is set, for a source that is not on the hub.
    """
    for setting, value, what in (("revision", revision, "revisions"), ("dataset_config", config, "configurations")):
        if value is not None:
            raise DataError(
                f"data.{setting} is {value!r}, but only a dataset on the Hugging Face hub has {what}, and {name} is "
                "none. Unset it."
            )


def _kind(file: Path) -> str | None:
    """Name of the one of `READERS` that reads a file."""
    return next((kind for kind in READERS if file.name.lower().endswith(kind)), None)


def _files(path: Path, column: str | None, split: str) -> TextSource:
    if path.is_dir():
        files = files_of_split(path, split, lambda file: _kind(file) is not None)
    else:
        check_split(path, split)
        files = [path]
    kinds = [_kind(file) for file in files]
    for file, kind in zip(files, kinds, strict=True):
        if kind is None:
            raise DataError(
                f"{file} cannot be read: the extension {file.suffix!r} is none of {', '.join(READERS)}. Convert it."
            )
    identity = [_identity(file) for file in files]
    for file, (_, size, _) in zip(files, identity, strict=True):
        if size == 0:
            raise DataError(f"{file} is empty. Remove it or write documents into it.")
    # What is compressed, and counted in rows or in its own bytes: its size says nothing about how much is read.
    size = None if set(kinds) - set(PLAIN) else sum(size for _, size, _ in identity)

    def read() -> Iterator[Document]:
        for file, kind, found in zip(files, kinds, identity, strict=True):
            yield from _read_file(file, READERS[str(kind)], column)
            if _identity(file) != found:
                raise DataError(f"{file} changed while it was read. Start again.")

    has_columns = any(kind in WITH_COLUMNS for kind in kinds)
    return TextSource(str(path), ["files", identity, column], read, size, has_columns)


def _identity(file: Path) -> list[Any]:
    """
    Raises:
        SourceLost: the file is gone.
    """
    try:
        stat = file.stat()
    except OSError as error:
        raise SourceLost(f"Cannot read {file}: {reason(error)}. {remedy(error)}") from None
    return [str(file.resolve()), stat.st_size, stat.st_mtime_ns]


def _read_file(file: Path, reader: "Reader", column: str | None) -> Iterator[Document]:
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
        raise DataError(f"{file} is not a gzip file that can be read: {_one_line(error)}. Compress it again.") from None
    except OSError as error:
        raise SourceLost(f"Cannot read {file}: {reason(error)}. {remedy(error)}") from None
    if not found:
        raise DataError(f"{file} is empty: it holds no document. Remove it or write documents into it.")


def _opened(file: Path) -> io.TextIOWrapper:
    if file.name.lower().endswith(".gz"):
        return io.TextIOWrapper(gzip.open(file), encoding="utf-8-sig")
    return file.open(encoding="utf-8-sig")


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
            except (ValueError, RecursionError) as error:  # an integer of thousands of digits is no JSONDecodeError
                reason = getattr(error, "msg", None) or f"{error}".partition(";")[0]
                raise DataError(f"{where} is not JSON ({reason}). A .jsonl file has one object per line.") from None
            if not isinstance(record, dict):
                raise DataError(f"{where} must be an object such as {{'text': ...}}, not {type(record).__name__}.")
            value = record[choose_column(record, column, where)]
            if value is not None:
                if _is_chat(value):
                    yield Document(Chat.of(value, where), "chat", len(line.encode()))
                else:
                    yield Document(_checked(value, where), size=len(line.encode()))


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)


def _checked(value: Any, where: str) -> str | NDArray[Any]:
    if isinstance(value, str):
        if not value.isascii() and _HALF_OF_A_PAIR.search(value):
            raise DataError(f"{where}: the text holds half of a surrogate pair, which is no character. Replace it.")
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
            yield from _arrow_documents(batch.column(0), f"{file}, column {chosen}")
    except pa.ArrowException as error:
        raise DataError(f"{file} is not a Parquet file that can be read: {error}.") from None


def _arrow_documents(values: Any, where: str) -> Iterator[Document]:
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
            f"{file} is not a NumPy array of integers that can be read: {_one_line(error)}. Pickles are never read, "
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
READERS: dict[str, Reader] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".npy": _read_npy,
    ".txt.gz": _read_txt,
    ".jsonl.gz": _read_jsonl,
}
WITH_COLUMNS = (".jsonl", ".jsonl.gz", ".parquet")
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


def _saved_dataset(path: Path, column: str | None, split: str) -> TextSource:
    """A folder written by `save_to_disk`: a dataset, or several by split."""
    folder = path
    if (path / "dataset_dict.json").exists():
        splits = _names_in(path / "dataset_dict.json", lambda record: record["splits"])
        if split not in splits:
            raise no_split(path, split, splits)
        folder = path / split
    else:
        check_split(path, split)
    files = _names_in(folder / "state.json", lambda record: [file["filename"] for file in record["_data_files"]])
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise DataError(f"{folder} lacks {missing[0]}, which its state.json names. Save the dataset again.")
    identity = [_identity(file) for file in sorted(folder.iterdir()) if file.suffix in (".arrow", ".json")]

    def read() -> Iterator[Document]:
        from datasets import load_from_disk

        try:
            yield from _dataset_documents(load_from_disk(str(folder)), column, str(folder))
        except DataError:
            raise
        except (
            Exception
        ) as error:  # of a damaged file, whatever its reader stumbles over, an OSError without a number too
            if isinstance(error, OSError) and error.errno is not None:
                raise SourceLost(f"Cannot read {folder}: {_one_line(error)}. {remedy(error)}") from None
            raise DataError(
                f"{folder} is not a dataset that can be loaded: {_one_line(error)}. Save the dataset again."
            ) from error

    return TextSource(str(folder), ["saved", identity, column], read)


def _names_in(file: Path, names: Callable[[dict[str, Any]], list[str]]) -> list[str]:
    """Names of files or folders beside `file` that it lists; none may lead elsewhere."""
    try:
        found = names(read_json(file))
    except (FormatError, FileNotFoundError, LookupError, TypeError) as error:
        raise DataError(f"{file} is not what datasets writes: {_one_line(error)} Save the dataset again.") from None
    if not isinstance(found, list) or not all(isinstance(name, str) and stays_inside(name) for name in found):
        raise DataError(f"{file} must list names of what lies beside it, not {found!r:.200}. Save the dataset again.")
    return found


def _hub_documents(
    name: str, column: str | None, config: str | None, revision: str | None, split: str | None, streaming: bool
) -> Iterator[Document]:
    from datasets import load_dataset

    try:
        dataset = load_dataset(name, config, split=split, revision=revision, streaming=streaming)
        yield from _dataset_documents(dataset, column, f"{name} ({split})")
    except DataError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  no connection, dataset, configuration, revision or split; bad data
        lost = isinstance(error, OSError) or type(error).__module__.split(".")[0] in NETWORK_LIBRARIES
        kind = SourceLost if lost else DataError
        remedy = "Check the name and the connection; a local file needs its path."
        if isinstance(error, RuntimeError) and "script" in str(error):  # code, which `datasets` no longer runs
            remedy = (
                "Data that a script makes cannot be read. Where the hub has converted it, set "
                "data.revision=refs/convert/parquet; or give it as files."
            )
        asked = {"configuration": config, "revision": revision, "split": split}
        told = ", ".join(f"{what} {value!r}" for what, value in asked.items() if value is not None)
        why = (_one_line(error) or type(error).__name__).rstrip(".")
        raise kind(
            f"Cannot load the Hugging Face dataset {name!r}{f' ({told})' if told else ''}: {why}. {remedy}"
        ) from None


def commit_on_hub(name: str, revision: str | None) -> str | None:
    """The commit that a data set's revision is at now; where the hub cannot be asked, the last that this cache knows;
    None: there is none, and what is kept goes by the name alone.
    """
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    kept = cache_folder() / "commits" / f"{of_text(name, revision or '')}.json"
    commit = _asked(name, revision)
    if commit is not None:
        with suppress(RunFolderError):
            write_json(kept, {"dataset": name, "revision": revision, "commit": commit})
        return commit
    with suppress(OSError, FormatError):
        found = read_json(kept).get("commit")
        return found if isinstance(found, str) else None
    return None


def _asked(name: str, revision: str | None) -> str | None:
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name, revision=revision, timeout=ANSWER_SECONDS).sha
    except Exception:  # noqa: BLE001  No connection, no such data set: reading it will say what is wrong.
        return None


def _dataset_documents(dataset: Any, column: str | None, where: str) -> Iterator[Document]:
    names = dataset.column_names or list(next(iter(dataset), {}))
    chosen = choose_column(names, column, where)
    for table in dataset.select_columns([chosen]).with_format("arrow").iter(batch_size=ROWS_AT_ONCE):
        yield from _arrow_documents(table.column(chosen), f"{where}, column {chosen}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
