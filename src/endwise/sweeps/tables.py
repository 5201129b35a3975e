"""The table of a sweep: one row a point, as parquet and CSV, and on the terminal."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from endwise.common.files import write_atomic
from endwise.common.remarks import gathered, show_remarks
from endwise.common.tables import as_csv, as_table, write_table
from endwise.common.terminal import Grid, show
from endwise.config.fields import flat
from endwise.config.method import COEFFICIENT, Knob
from endwise.config.places import JOINED, Recipe
from endwise.evaluation.summary import method_of
from endwise.runs.folder import RunFolder, parts_of, seconds_of
from endwise.runs.several import PLACES, is_several
from endwise.sweeps.points import KIND, Point
from endwise.sweeps.survey import PointStatus
from endwise.sweeps.sweep_config import OF_ONE, recipe_fields
from endwise.sweeps.tuning import RateTrial

SHOWN = ("training.tokens", "training.learning_rate", "dictionary.size", "dictionary.ratio", "init_from")
"""Keys of the recipe that are columns of every table; others are where the points differ in them."""
NAMED = (KIND, "site", "seed", COEFFICIENT, "out")
"""Keys that are columns under a name of their own, or none."""


def write_summary(places: Mapping[Point, Path], failures: Mapping[Point, str], folder: Path) -> list[dict[str, Any]]:
    """`summary.parquet` and `summary.csv`, with wall-clock in `timings.csv` apart, so that a sweep made twice gives the
    same tables wherever it lies. A run of several places has a row for all of them together, then one for each alone.

    Returns:
        The rows.
    """
    keys = (*SHOWN, *_differing([point.config for point in places]))
    rows: list[dict[str, Any]] = []
    for point, path in places.items():
        row = {"run": _within(path, folder), "status": "finished", "error": None, **_identity(point, keys)}
        if point in failures:
            rows.append(row | {"status": "failed", "error": failures[point]})
        else:
            rows.append(row | measured(point, path))
            rows += _rows_of_places(path, folder, keys)
    write_table(rows, folder / "summary")
    finished = [path for point, path in places.items() if point not in failures]
    timings = [{"run": _within(path, folder), "seconds": seconds_of(path)} for path in finished]
    write_atomic(folder / "timings.csv", as_csv(as_table(timings)))
    return rows


def _rows_of_places(run: Path, folder: Path, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    for part in parts_of(run) if is_several(run) else ():
        point = Point(part.config())
        row = {"run": _within(part.path, folder), "status": "finished", "error": None, **_identity(point, keys)}
        yield row | measured(point, part.path)


def measured(point: Point, path: Path) -> dict[str, Any]:
    """Return what a finished run measured, flat: nested names joined by dots, ends of intervals as `.low` and `.high`.
    With it where its knob stood, and how far from its target it is, as a share of it.
    """
    folder = RunFolder(path)
    evaluation = folder.evaluation() or {}
    intervals = evaluation.pop("intervals", {})
    config = folder.recipe()
    row: dict[str, Any] = {**Knob.of(config).columns, "method": method_of(path, config).label}
    if point.target is not None:
        row["target_miss"] = evaluation[point.target.metric] / point.target.value - 1
    for name, value in flat(evaluation).items():
        if name in ("kind", "site", "seed", "coefficient") or name.startswith("seeds."):
            continue
        row[name] = "\n".join(value) if name == "remarks" else value
        if name in intervals:
            row[f"{name}.low"], row[f"{name}.high"] = intervals[name]
    return row


def _within(path: Path, folder: Path) -> str:
    return (path.relative_to(folder) if path.is_relative_to(folder) else path).as_posix()


def _identity(point: Point, keys: Iterable[str]) -> dict[str, Any]:
    config = point.config
    named = {
        "kind": config.objective_name,
        "site": config.place,
        "coefficient": None,
        **(Knob.of(config).columns if point.target is None else {}),
        "target": None if point.target is None else str(point.target),
        "target_miss": None,
        "seed": config.seed,
    }
    content = _content(config)
    return named | {key: _plain(content.get(key)) for key in keys}


def _differing(configs: Iterable[Recipe]) -> list[str]:
    """Keys in which recipes differ that have no column yet."""
    contents = [_content(config) for config in configs]
    keys = dict.fromkeys(key for content in contents for key in content if key not in (*SHOWN, *NAMED))
    return [key for key in keys if len({_plain(content.get(key)) for content in contents}) > 1]


def _content(config: Recipe) -> dict[str, Any]:
    """A recipe's values by key; where several places differ, each one's by its number."""
    content = config.model_dump(mode="json")
    places = [flat(place) for place in content.pop("places", ())]
    own: dict[str, Any] = {}
    for key in dict.fromkeys(key for place in places for key in place):
        values = [place.get(key) for place in places]
        alike = all(value == values[0] for value in values)
        own |= {key: values[0]} if alike else {f"places.{number}.{key}": each for number, each in enumerate(values)}
    return flat(content) | own


def _plain(value: Any) -> Any:
    """A list as text, which every kind of table can hold."""
    return json.dumps(value) if isinstance(value, list) else value


def print_rows(rows: Sequence[Mapping[str, Any]], console: Console | None = None) -> None:
    """The finished rows of a summary: what tells each run from the others, and what it reached."""
    finished = [row for row in rows if row["status"] == "finished"]
    if not finished:
        return
    own = [key for key in finished[0] if key in ("site", "seed", *SHOWN) or OF_ONE.sub("", key) in recipe_fields()]
    own = [key for key in own if len({row.get(key) for row in finished}) > 1]
    searched = any(row["target"] for row in finished)
    words = (
        [f"{''.join(OF_ONE.findall(key))}{key.rpartition('.')[2]}" for key in own] + ["kind"] + ["target"] * searched
    )
    table: list[list[str]] = []
    for row in finished:
        ends = [row.get(f"ce_increase.{end}", math.nan) for end in ("low", "high")]
        cells = [_end_of(row["run"]).partition(" ")[0], *(_shown(row[key]) for key in own), row["method"]]
        cells += [_target(row)] if searched else []
        knob = row["knob.value"] if row["coefficient"] is None else row["coefficient"]
        cells += [f"{knob:.4g}", f"{row['l0']:.1f}", f"{row['alive']:,}"]
        cells += [f"{row['ce_increase']:+.3f} [{ends[0]:.3f}, {ends[1]:.3f}]"]
        table.append(cells)
    knobs = ", ".join(dict.fromkeys(row.get("knob") or "λ" for row in finished))
    show(Grid(("run", *words, knobs, "L0", "alive", "CE increase [95 %]"), table, words=words), console)
    show("A run is named by the end of its folder's name.", console)
    own_remarks = {_end_of(row["run"]): str(row.get("remarks") or "").splitlines() for row in finished}
    show_remarks(gathered(own_remarks), console)


def _end_of(run: str) -> str:
    """Name a run by the end of its folder's name, and one of several places by itself too."""
    whole, _, place = run.partition(f"/{PLACES}/")
    return whole.rpartition("-")[2] + (f" {place}" if place else "")


def _target(row: Mapping[str, Any]) -> str:
    """`L0 40 (−3 %)`: the target, and how far from it the run ended."""
    if not row["target"]:
        return "–"
    metric, _, value = row["target"].partition("=")
    return f"{'L0' if metric == 'l0' else 'CE'} {value} ({100 * row['target_miss']:+.0f} %)"


def _shown(value: Any) -> str:
    if isinstance(value, str) and (others := value.count(JOINED)):
        return f"{others + 1} places"
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def print_prospects(prospects: Sequence[PointStatus], console: Console | None = None) -> None:
    """A line for each point: its pass, what it is, its folder, and where it stands."""
    for each in prospects:
        passes = "–" if each.passes is None else f"pass {each.passes}"
        show(f"{passes}: {each.point} in {each.folder}: {each.state}", console)
    finished = sum(each.state == "finished" for each in prospects)
    due = {each.passes for each in prospects} - {None}
    show(f"{finished} of {len(prospects)} runs finished. Next passes: {len(due)}.", console)


def print_trials(rounds: Sequence[Sequence[RateTrial]], console: Console | None = None) -> None:
    """Print the short runs of tuning, round by round."""
    rows = []
    for number, trials in enumerate(rounds, 1):
        for trial in trials:
            last = "–" if trial.coefficient is None else f"{trial.coefficient:.3g}"
            numbers = (last, f"{trial.l0:.1f}", f"{trial.ce_increase:+.3f}", f"{trial.miss:+.0%}")
            cells = ("–", "–", "–", "failed") if trial.failed else numbers
            rows.append((str(number), f"{trial.tokens:,}", f"{trial.learning_rate:.2g}", *cells))
    headings = ("round", "tokens", "learning rate", "λ at the end", "L0", "CE increase", "off target")
    show(Grid(headings, rows), console)
