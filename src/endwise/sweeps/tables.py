"""The table of a sweep: one row a point, as parquet and CSV, and on the terminal."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import csv, parquet

from endwise.files import replacing, write_atomic
from endwise.run_folder import RunFolder
from endwise.sweeps.points import Point


def write_summary(runs: Mapping[Point, Path], failures: Mapping[Point, str], folder: Path) -> None:
    """`summary.parquet` and `summary.csv`, with wall-clock in `timings.csv` apart, so that a sweep made twice gives the
    same tables.
    """
    rows = [run_row(point, path) for point, path in runs.items()]
    rows += [{**_identity(point), "status": "failed", "error": why} for point, why in failures.items()]
    write_table(rows, folder / "summary")
    timings = [{"run": str(path), "seconds": RunFolder(path).seconds()} for path in runs.values()]
    write_atomic(folder / "timings.csv", _csv(_table(timings)))


def run_row(point: Point, path: Path) -> dict[str, Any]:
    """What a finished run is and what it measured, flat: nested names joined by dots, ends of intervals as `.low` and
    `.high`.
    """
    folder = RunFolder(path)
    evaluation = folder.evaluation() or {}
    intervals = evaluation.pop("intervals", {})
    row = {"run": str(path), **_identity(point), "status": "finished", "error": None}
    row["coefficient"] = folder.config().objective.sparsity.coefficient
    measured = {
        key: value for key, value in flat(evaluation).items() if key not in row and not key.startswith("seeds.")
    }
    for name, value in measured.items():
        row[name] = value
        if name in intervals:
            row[f"{name}.low"], row[f"{name}.high"] = intervals[name]
    return row


def _identity(point: Point) -> dict[str, Any]:
    config = point.config
    return {
        "kind": config.objective.kind,
        "site": config.site,
        "coefficient": config.objective.sparsity.coefficient,
        "target": None if point.target is None else str(point.target),
        "seed": config.seed,
        "dictionary": config.dictionary.size or config.dictionary.ratio,
        "training_tokens": config.training.tokens,
        "learning_rate": config.training.learning_rate,
        "init_from": None if config.init_from is None else str(config.init_from),
    }


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return result


def write_table(rows: list[dict[str, Any]], path: Path) -> None:
    """`<path>.parquet` and `<path>.csv`; a row without a column has nothing there."""
    table = _table(rows)
    with replacing(path.with_name(f"{path.name}.parquet")) as partial:
        parquet.write_table(table, partial)
    write_atomic(path.with_name(f"{path.name}.csv"), _csv(table))


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: [row.get(name) for row in rows] for name in names})


def _csv(table: pa.Table) -> bytes:
    text = io.BytesIO()
    csv.write_csv(table, text, csv.WriteOptions(quoting_style="needed"))
    return text.getvalue()
