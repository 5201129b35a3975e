"""Sources of documents: files, folders of files, Hugging Face datasets. Nothing is tokenised here."""

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from endwise.common.digests import cache_folder, of_text
from endwise.common.errors import DataError, FormatError, RunFolderError
from endwise.common.files import expanded, read_json, stays_inside, there_is, write_json
from endwise.common.hub import SECONDS, answers, cache_alone
from endwise.common.remedies import reason, remedy
from endwise.tokens.folders import check_split, files_below, files_of_split, no_split
from endwise.tokens.readers import (
    LISTS,
    PLAIN,
    READERS,
    ROWS_AT_ONCE,
    WITH_COLUMNS,
    Document,
    SourceLost,
    arrow_documents,
    choose_column,
    kind_of,
    one_line,
    read_file,
)

NETWORK_LIBRARIES = ("aiohttp", "fsspec", "httpcore", "httpx", "requests", "urllib3")
"""Libraries that `datasets` reads through; what they raise is no documented list, and not all of it an OSError."""
_COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class TextSource:
    """Documents in a fixed order, with what identifies them."""

    name: str
    identity: list[Any]
    """Changes when the documents do: paths, sizes and times of files; id, configuration and split on the hub."""
    read: Callable[[], Iterator[Document]]
    size: int | None = None
    """Size, for the progress display only."""
    has_columns: bool = True
    """True if `data.column` says anything about it."""
    commit: str | None = None
    """Commit of a data set on the hub, where it could be learnt."""


def open_source(
    name: str, column: str | None, config: str | None, split: str, streaming: bool, revision: str | None = None
) -> TextSource:
    """Find the documents named in a recipe, without reading them.

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
    looks_local = kind_of(path) is not None or path.is_absolute() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)
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


def _files(path: Path, column: str | None, split: str) -> TextSource:
    if path.is_dir():
        lists = not any(kind_of(file) not in (None, *LISTS) for file in files_below(path))  # beside others: no data
        files = files_of_split(
            path, split, lambda file: kind_of(file) is not None and (lists or kind_of(file) not in LISTS)
        )
    else:
        check_split(path, split)
        files = [path]
    kinds = [kind_of(file) for file in files]
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
            yield from read_file(file, READERS[str(kind)], column)
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
                raise SourceLost(f"Cannot read {folder}: {one_line(error)}. {remedy(error)}") from None
            raise DataError(
                f"{folder} is not a dataset that can be loaded: {one_line(error)}. Save the dataset again."
            ) from error

    return TextSource(str(folder), ["saved", identity, column], read)


def _names_in(file: Path, names: Callable[[dict[str, Any]], list[str]]) -> list[str]:
    """Names of files or folders beside `file` that it lists; none may lead elsewhere."""
    try:
        found = names(read_json(file))
    except (FormatError, FileNotFoundError, LookupError, TypeError) as error:
        raise DataError(f"{file} is not what datasets writes: {one_line(error)} Save the dataset again.") from None
    if not isinstance(found, list) or not all(isinstance(name, str) and stays_inside(name) for name in found):
        raise DataError(f"{file} must list names of what lies beside it, not {found!r:.200}. Save the dataset again.")
    return found


def _hub_documents(
    name: str, column: str | None, config: str | None, revision: str | None, split: str | None, streaming: bool
) -> Iterator[Document]:
    from datasets import load_dataset

    try:
        with cache_alone(if_so=not on_hub(name, revision)):
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
        options = ", ".join(f"{what} {value!r}" for what, value in asked.items() if value is not None)
        why = (one_line(error) or type(error).__name__).rstrip(".")
        raise kind(
            f"Cannot load the Hugging Face dataset {name!r}{f' ({options})' if options else ''}: {why}. {remedy}"
        ) from None


def on_hub(name: str, revision: str | None) -> bool:
    """Return whether the hub can be asked for a data set now."""
    return answers(partial(HfApi().dataset_info, name, revision=revision, timeout=SECONDS))


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
    try:
        return HfApi().dataset_info(name, revision=revision, timeout=SECONDS).sha
    except Exception:  # noqa: BLE001  No connection, no such data set: reading it will say what is wrong.
        return None


def _dataset_documents(dataset: Any, column: str | None, where: str) -> Iterator[Document]:
    names = dataset.column_names or list(next(iter(dataset), {}))
    chosen = choose_column(names, column, where)
    for table in dataset.select_columns([chosen]).with_format("arrow").iter(batch_size=ROWS_AT_ONCE):
        yield from arrow_documents(table.column(chosen), f"{where}, column {chosen}")
