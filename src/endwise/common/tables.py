"""Tables on the disk: rows as parquet and CSV."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import csv, parquet

from endwise.common.files import replacing, write_atomic

_WRITTEN: ContextVar[dict[str, list[dict[str, Any]]] | None] = ContextVar("tables", default=None)


@contextmanager
def recorded_tables() -> Iterator[dict[str, list[dict[str, Any]]]]:
    """Yield the rows of all tables that are written within it, by the table's name."""
    tables: dict[str, list[dict[str, Any]]] = {}
    token = _WRITTEN.set(tables)
    try:
        yield tables
    finally:
        _WRITTEN.reset(token)


def write_table(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """`<path>.parquet` and `<path>.csv`; a row without a column has nothing there.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    _write(as_table(rows), path)


def write_columns(columns: Mapping[str, Any], path: Path) -> None:
    """Variant of `write_table` for arrays of one length by name: what has a row for each of very many features.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    _write(pa.table(dict(columns)), path)


def _write(table: pa.Table, path: Path) -> None:
    write_parquet(table, path.with_name(f"{path.name}.parquet"))
    write_atomic(path.with_name(f"{path.name}.csv"), as_csv(table))
    if (tables := _WRITTEN.get()) is not None:
        tables[path.name] = table.to_pylist()


def write_parquet(table: pa.Table, path: Path) -> None:
    """
    Raises:
        RunFolderError: the folder cannot be written; what was there is untouched.
    """
    with replacing(path) as partial:
        parquet.write_table(table, partial, compression="zstd")


def as_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: [row.get(name) for row in rows] for name in names})


def as_csv(table: pa.Table) -> bytes:
    text = io.BytesIO()
    csv.write_csv(table, text, csv.WriteOptions(quoting_style="needed"))
    return text.getvalue()
