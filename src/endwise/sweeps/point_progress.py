"""Progress of a point of a sweep, and the run that it needs next; read from its run folders alone."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from endwise.common.errors import EndwiseError, FormatError
from endwise.config.method import Knob
from endwise.config.places import Recipe
from endwise.runs.folder import RunFolder
from endwise.sweeps.points import Point, placed, with_tokens
from endwise.sweeps.sweep_config import SearchConfig, Target
from endwise.sweeps.targets import SearchError, Trial, miss, next_value, slope_at
from endwise.sweeps.tasks import Outcome, evaluation_of, folder_of, is_finished

RUNS, TRIALS = "runs", "trials"
SIGNIFICANT = 6
"""Digits of a value that a search finds."""


@dataclass
class PointProgress:
    """A point on its way to its run."""

    point: Point
    out: Path
    search: SearchConfig
    result: Recipe | None = None
    """Run, once it is trained and measured."""
    error: str | None = None
    """Reason why there will be none."""
    run: Recipe | None = None
    """The run that was last asked for."""
    on_trial: bool = False
    """True if that is one of a search, and not the point's own."""
    _given_out: set[Path] = field(default_factory=set)

    @property
    def folder(self) -> Path:
        """Folder of the run that was last asked for."""
        return self.out if self.run is None else folder_of(self.run)

    def due(self) -> Recipe | None:
        """The run that is to be made next, if there is one."""
        if self.result is not None or self.error is not None:
            return None
        try:
            config = self._next_run()
            if not is_finished(config):
                if folder_of(config) not in self._given_out:
                    return config
                self.error = f"The run in {folder_of(config)} ended, but its SAE is not there. Start the sweep again."
                return None
            self.result = config
        except EndwiseError as error:
            self.error = str(error)
        return None

    def given_out(self) -> None:
        """Mark its run as being carried out."""
        self._given_out.add(self.folder)

    def note(self, outcome: Outcome) -> None:
        """Take note of its run's outcome."""
        if outcome.error is None:
            return
        self.error = outcome.error
        if self.on_trial and self.run is not None:
            tokens = f"{self.run.training.tokens:,} tokens (search.tokens)"
            self.error = f"A trial of {tokens} in {self.folder} failed: {outcome.error}"

    def _placed(self, config: Recipe, folder: str, *, on_trial: bool = False) -> Recipe:
        self.run, self.on_trial = placed(config, self.out / folder), on_trial
        return self.run

    def _next_run(self) -> Recipe:
        """The first run that is not finished, or else the point's last."""
        config, target = self.point.config, self.point.target
        if target is None:
            return self._placed(config, RUNS)
        trials: list[Trial] = []
        knob = Knob.of(config)
        length = max(1, round(config.training.tokens * self.search.tokens))
        folder = RUNS if self.search.tokens == 1 else TRIALS
        while True:
            step = next_value(trials, knob, target, self.search)
            if step.found:
                return self._full_run(target, replace(knob, value=step.at), slope_at(trials, target))
            changed = with_tokens(knob.set_in(config, _rounded(step.at)), length)
            trial = self._placed(changed, folder, on_trial=True)
            if not is_finished(trial):
                return trial
            trials.append(_trial(trial, target))

    def _full_run(self, target: Target, knob: Knob, slope: float | None) -> Recipe:
        """The run at full length with the knob where it was found, or with one corrected by what that reached."""
        runs: list[tuple[Trial, Recipe]] = []
        while True:
            run = self._placed(knob.set_in(self.point.config, _rounded(knob.value)), RUNS)
            if not is_finished(run):
                return run
            runs.append((_trial(run, target), run))
            closest = min(runs, key=lambda made: miss(made[0], target))
            self.run = closest[1]
            if len(runs) > self.search.corrections or miss(closest[0], target) <= self.search.tolerance:
                return closest[1]
            try:
                step = next_value([trial for trial, _ in runs], knob, target, self.search, slope)
            except SearchError:
                return closest[1]
            knob = replace(knob, value=step.at)


def runs_of(points: Iterable[PointProgress]) -> list[Recipe]:
    """The runs that they ask for, each once though it may be that of several points."""
    return list({each.folder: each.run for each in points if each.run is not None}.values())


def _rounded(value: float) -> float:
    return float(f"{value:.{SIGNIFICANT}g}")


def _trial(config: Recipe, target: Target) -> Trial:
    evaluation = evaluation_of(config)
    if evaluation is None:
        file = RunFolder(folder_of(config)).evaluation_file
        raise FormatError(f"{file} is gone. Start the sweep again, which measures the run again.")
    return Trial(Knob.of(config).value, float(evaluation[target.metric]))
