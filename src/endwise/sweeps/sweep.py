"""A sweep from its file to its table: skips what is finished, takes up what was broken off, reports what failed."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from endwise.errors import EndwiseError
from endwise.files import write_atomic
from endwise.reading import read_json
from endwise.run_config import RunConfig
from endwise.run_folder import RunFolder
from endwise.sweeps.engines import Engine, engine_of
from endwise.sweeps.points import Point, placed, points_of, with_coefficient, with_tokens
from endwise.sweeps.sweep_config import SearchConfig, SweepConfig, Target
from endwise.sweeps.tables import write_summary
from endwise.sweeps.targets import SearchError, Trial, miss, next_coefficient, slope_at
from endwise.sweeps.tasks import Outcome, folder_of, is_finished, tasks_of
from endwise.sweeps.watching import Watch

SIGNIFICANT = 6
"""Digits of a coefficient that a search finds."""


@dataclass(frozen=True)
class Sweep:
    """What became of a sweep's points."""

    runs: Mapping[Point, Path]
    """The folder of each point that is trained and measured."""
    failures: Mapping[Point, str]
    """Why each of the others is not."""
    folder: Path

    @property
    def folders(self) -> list[Path]:
        return list(self.runs.values())


def sweep(config: SweepConfig | Mapping[str, Any] | str | Path, *, display: bool = True) -> Sweep:
    """Trains and measures every point of a sweep, and writes the table of them (`summary.parquet`, `summary.csv`).

    Run again, it skips what is finished and goes on with what was broken off.

    Raises:
        ConfigError: the sweep or one of its recipes breaks a rule, before anything is trained.
        Interrupted: the user asked to stop; what runs is saved.
    """
    if isinstance(config, str | Path):
        config = SweepConfig.read(Path(config))
    elif not isinstance(config, SweepConfig):
        config = SweepConfig.build(dict(config), "the sweep")
    points = points_of(config)
    write_atomic(config.out / "sweep.yaml", config.to_yaml().encode())
    with closing(engine_of(config)) as engine:
        result = sweep_points(points, config.out, engine, config.search, config.together, display)
    write_summary(result.runs, result.failures, config.out)
    return result


def sweep_points(
    points: Sequence[Point], out: Path, engine: Engine, search: SearchConfig, together: int, display: bool
) -> Sweep:
    """As `sweep`, of points that are there already; writes no table."""
    progress = [_Progress(point, out, search) for point in points]
    with Watch(display) as watch:
        while True:
            due = {folder_of(config): config for each in progress for config in each.due()}
            if not due:
                break
            watch.expect(due.values())
            for outcomes in engine.carry_out(tasks_of(due.values(), together)):
                _note(outcomes, progress, watch)
    runs = {each.point: folder_of(each.result) for each in progress if each.result is not None}
    return Sweep(runs, {each.point: each.error for each in progress if each.error is not None}, out)


def _note(outcomes: Iterable[Outcome], progress: Sequence["_Progress"], watch: Watch) -> None:
    for outcome in outcomes:
        watch.ended(outcome)
        for each in progress:
            if outcome.error is not None and outcome.folder == each.waiting_for:
                each.error = outcome.error


@dataclass
class _Progress:
    """Where a point stands, which is read from its run folders alone."""

    point: Point
    out: Path
    search: SearchConfig
    result: RunConfig | None = None
    error: str | None = None
    waiting_for: Path | None = None

    def due(self) -> list[RunConfig]:
        """The run that is to be made next, if there is one."""
        try:
            if self.result is None and self.error is None:
                config = self._next_run()
                self.waiting_for = folder_of(config)
                if not is_finished(config):
                    return [config]
                self.result = config
        except EndwiseError as error:
            self.error = str(error)
        return []

    def _next_run(self) -> RunConfig:
        """The first run that is not finished, or else the point's last."""
        config, target = self.point.config, self.point.target
        if target is None:
            return placed(config, self.out / "runs")
        trials: list[Trial] = []
        length = max(1, round(config.training.tokens * self.search.tokens))
        while True:
            step = next_coefficient(trials, config.objective.sparsity.coefficient, target, self.search)
            if step.found:
                return self._full_run(target, step.coefficient, slope_at(trials, target))
            folder = self.out / ("runs" if self.search.tokens == 1 else "trials")
            trial = placed(with_tokens(with_coefficient(config, _rounded(step.coefficient)), length), folder)
            if not is_finished(trial):
                return trial
            trials.append(_trial(trial, target))

    def _full_run(self, target: Target, coefficient: float, slope: float | None) -> RunConfig:
        """The run at full length with the coefficient found, or with one corrected by what that reached."""
        runs: list[tuple[Trial, RunConfig]] = []
        while True:
            run = placed(with_coefficient(self.point.config, _rounded(coefficient)), self.out / "runs")
            if not is_finished(run):
                return run
            runs.append((_trial(run, target), run))
            closest = min(runs, key=lambda made: miss(made[0], target))
            if len(runs) > self.search.corrections or miss(closest[0], target) <= self.search.tolerance:
                return closest[1]
            try:
                step = next_coefficient([trial for trial, _ in runs], coefficient, target, self.search, slope)
            except SearchError:
                return closest[1]
            coefficient = step.coefficient


def _trial(config: RunConfig, target: Target) -> Trial:
    evaluation = read_json(RunFolder(folder_of(config)).evaluation_file)
    return Trial(config.objective.sparsity.coefficient, float(evaluation[target.metric]))


def _rounded(coefficient: float) -> float:
    return float(f"{coefficient:.{SIGNIFICANT}g}")
