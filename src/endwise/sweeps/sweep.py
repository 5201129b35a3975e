"""A sweep from its file to its table: skips what is finished, resumes what was interrupted, reports what failed."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from endwise.common.errors import ConfigError, Interrupted
from endwise.common.files import write_atomic
from endwise.common.processes import launched
from endwise.common.showing import Shown
from endwise.config.places import Recipe
from endwise.sweeps.engines import Engine, engine_of
from endwise.sweeps.point_progress import PointProgress, runs_of
from endwise.sweeps.points import Point, points_of
from endwise.sweeps.survey import find_faults
from endwise.sweeps.sweep_config import SearchConfig, SweepConfig, as_sweep
from endwise.sweeps.tables import write_summary
from endwise.sweeps.tasks import folder_of, tasks_of
from endwise.sweeps.watching import Watch


@dataclass(frozen=True, repr=False)
class Sweep(Shown):
    """Outcomes of a sweep's points."""

    runs: Mapping[Point, Path]
    """The folder of each point that is trained and measured."""
    failures: Mapping[Point, str]
    """Reason why each of the others is not."""
    folder: Path
    places: Mapping[Point, Path]
    """Folder of the latest run of each point, in the order of the sweep."""
    rows: Sequence[Mapping[str, Any]] = ()
    """The table of all points, once it is written."""

    def shown_facts(self) -> dict[str, object]:
        return {"runs": f"{len(self.runs)} of {len(self.places)}", "failed": len(self.failures), "in": self.folder}

    @property
    def folders(self) -> list[Path]:
        return list(self.runs.values())

    def missing(self, tolerance: float) -> list[Mapping[str, Any]]:
        """Rows of runs that are further from their target than the tolerance, a share of it."""
        return [row for row in self.rows if row["target_miss"] is not None and abs(row["target_miss"]) > tolerance]

    @property
    def summary(self) -> Path:
        """The table of all points, beside which a `.parquet` with the same content stands."""
        return self.folder / "summary.csv"


def sweep(
    config: SweepConfig | Mapping[str, Any] | str | Path, *, display: bool = True, engine: Engine | None = None
) -> Sweep:
    """Train and measure every point of a sweep, and write the table of them (`summary.parquet`, `summary.csv`).

    Run again, it skips what is finished and resumes what was interrupted.

    Args:
        config: a sweep: an object, a mapping of its fields, the path of a YAML file, or the name of one that ships.
        engine: carries out the runs instead of the one that the sweep names, and is closed at the end.

    Raises:
        ConfigError: the sweep or one of its recipes breaks a rule, before anything is trained.
        Interrupted: the user asked to stop; what runs is saved.
    """
    config = as_sweep(config)
    points = points_of(config)
    if launched():
        raise ConfigError(
            "A sweep is one process, which gives tasks to others by its `engine`; torchrun would start it several "
            "times. Start it without."
        )
    write_atomic(config.out / "sweep.yaml", config.to_yaml().encode())
    try:
        with closing(engine or engine_of(config, config.out)) as used:
            result = sweep_points(points, config.out, used, config.search, config.together, display)
    except (Interrupted, KeyboardInterrupt):
        raise Interrupted(
            f"Stopped as asked. What was done is in {config.out}; the same command resumes from there."
        ) from None
    return replace(result, rows=write_summary(result.places, result.failures, config.out))


def sweep_points(
    points: Sequence[Point], out: Path, engine: Engine, search: SearchConfig, together: int, display: bool
) -> Sweep:
    """Variant of `sweep` for points that are there already; writes no table."""
    progress = [PointProgress(point, out, search) for point in points]
    with Watch(display) as watch:
        first = True
        while due := _due(progress, watch, check=first):
            first = False
            waiting: dict[Path, list[PointProgress]] = {}
            for each in due:
                waiting.setdefault(each.folder, []).append(each)
                each.given_out()
            runs = runs_of(due)
            watch.expect(runs, _to_come(progress, runs))
            for outcomes in engine.carry_out(tasks_of(runs, together)):
                for outcome in outcomes:
                    watch.ended(outcome)
                    for each in waiting.get(outcome.folder, ()):
                        each.note(outcome)
    return Sweep(
        {each.point: folder_of(each.result) for each in progress if each.result is not None},
        {each.point: each.error for each in progress if each.error is not None},
        out,
        {each.point: each.folder for each in progress},
    )


def _due(progress: Iterable[PointProgress], watch: Watch, *, check: bool) -> list[PointProgress]:
    """The points with a run to be made. Those of searches come first, so that the runs that they lead to then go side
    by side with the others.
    """
    open_before = [each for each in progress if each.error is None]
    due = [each for each in open_before if each.due() is not None]
    if check:
        find_faults(due)
    for each in open_before:
        if each.error is not None:
            watch.failed(each.point, each.error)
    due = [each for each in due if each.error is None]
    return [each for each in due if each.on_trial] or due


def _to_come(progress: Iterable[PointProgress], runs: Iterable[Recipe]) -> list[Recipe]:
    """Full runs that are sure to follow those that are carried out now."""
    now = set(runs)
    return [
        each.point.config
        for each in progress
        if each.result is None and each.error is None and (each.on_trial or each.run not in now)
    ]
