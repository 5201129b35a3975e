"""Pareto curves of any runs: which can be compared, their fronts, their bands, their ratios.

Runs are compared only where all but the kind, the sparsity coefficient, the seed and the learning rate (which is tuned
for each kind) agree: one model, one site, the same held-out text, one length of training, one dictionary size, one kind
of start. Each such set has its own curves and ratios.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from endwise.analysis.comparison import Ratio, RunSummary, Summary, resampled, summarise
from endwise.errors import RunFolderError
from endwise.run_folder import RunFolder
from endwise.statistics import LEAST_SEEDS, InterpolationError, interpolate_at, interval_over_seeds

GRID = 40
"""Points of a band."""
RESAMPLES, SEED = 1000, 12345
AXES = (("l0", "ce_increase"), ("alive", "ce_increase"), ("l0", "kl"))
"""What is drawn against what: x, y."""
NOT_RUNS = ("trials", "checkpoints", "sae")
"""Folders in which no run is looked for; a sweep's trials are short ones, made to find a coefficient."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Setting:
    """What runs must have in common to be compared."""

    model: str
    site: str
    alive_tokens: int
    tokens: int
    d_sae: int
    started: bool
    """From another SAE."""

    @classmethod
    def of(cls, run: RunSummary) -> "Setting":
        return cls(run.model, run.site, run.alive_tokens, run.tokens, run.d_sae, run.start is not None)

    def __str__(self) -> str:
        start = ", from another SAE" if self.started else ""
        return f"{self.d_sae:,} features, {self.tokens:,} training tokens{start}"


@dataclass(frozen=True)
class Pareto:
    """The runs of one setting, compared."""

    setting: Setting
    runs: tuple[RunSummary, ...]
    summary: Summary

    @property
    def has_local(self) -> bool:
        """Whether there is anything to relate the other kinds to."""
        return any(run.kind == "local" for run in self.runs)

    @property
    def ratios(self) -> dict[tuple[str, str], Ratio]:
        """By measure and kind; each relative to local."""
        return {(key, kind): ratio for key, by in self.summary.ratios.items() for kind, ratio in by.items()}


@dataclass(frozen=True)
class BandOf:
    """A 95 % band of a curve."""

    x: Floats
    middle: Floats
    low: Floats
    high: Floats
    over: str
    """`held-out text`, or `3 seeds`."""


def pareto(paths: Iterable[str | Path]) -> list[Pareto]:
    """Compares evaluated runs, in as many sets as can be compared.

    Args:
        paths: run folders, or folders that hold some at any depth (a sweep's).

    Raises:
        RunFolderError: there is no run, or one was not measured yet.
        FormatError: what a run holds cannot be read.
    """
    return [Pareto(setting, tuple(runs), _summary(runs)) for setting, runs in comparable(paths).items()]


def comparable(paths: Iterable[str | Path]) -> dict[Setting, list[RunSummary]]:
    """Evaluated runs among and below the paths, in sets that can be compared.

    Raises:
        RunFolderError: there is no run, or one was not measured yet.
        FormatError: what a run holds cannot be read.
    """
    sets: dict[Setting, list[RunSummary]] = {}
    for path in runs_in(paths):
        run = RunSummary.read(path)
        sets.setdefault(Setting.of(run), []).append(run)
    ordered = sorted(sets, key=lambda each: (each.model, each.site, each.started, each.d_sae, each.tokens))
    return {setting: sets[setting] for setting in ordered}


def _summary(runs: Sequence[RunSummary]) -> Summary:
    baselines = (RunFolder(Path(runs[0].folder)).evaluation() or {}).get("baselines", {})
    return summarise(
        runs,
        clean_ce=baselines.get("clean", float("nan")),
        mean_ablated_ce=baselines.get("mean_ablated"),
        zero_ablated_ce=baselines.get("zero_ablated"),
        resamples=RESAMPLES,
        seed=SEED,
        model=runs[0].model,
    )


def runs_in(paths: Iterable[str | Path]) -> list[Path]:
    """The run folders among and below the paths that were measured, each once, in order.

    A run that is named itself must have been measured; of those that lie below a path, others are passed over.

    Raises:
        RunFolderError: a path is no folder, or has no measured run.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if RunFolder(path).has_run():
            found[path] = None
            continue
        if not path.is_dir():
            raise RunFolderError(f"{path} is no folder. Give run folders, or folders that hold some.")
        below = [file.parent for file in sorted(path.rglob("config.yaml")) if not _aside(file.relative_to(path))]
        measured = [run for run in below if RunFolder(run).evaluation_file.exists()]
        if not measured:
            raise RunFolderError(
                f"{path} holds {len(below)} run folders, none of which was measured. Measure them: endwise evaluate."
                if below
                else f"{path} holds no run folder. Give one, or a folder that holds some."
            )
        found |= dict.fromkeys(measured)
    if not found:
        raise RunFolderError("There is no run to compare. Give run folders, or folders that hold some.")
    return list(found)


def _aside(file: Path) -> bool:
    return any(part in NOT_RUNS for part in file.parts[:-2])


def front(runs: Sequence[RunSummary], x: str, y: str) -> set[str]:
    """Folders of the runs that no other is at least as good as in both numbers and better in one; less is better."""
    points = [(run.folder, float(getattr(run, x)), float(getattr(run, y))) for run in runs]
    return {folder for folder, a, b in points if not any(c <= a and d <= b and (c < a or d < b) for _, c, d in points)}


def band(runs: Sequence[RunSummary], x: str, y: str) -> BandOf | None:
    """The band of one kind's curve: over seeds where three or more have a curve, otherwise over held-out text (of the
    first seed). None where the points determine no curve, or have no sums to resample.
    """
    seeds = sorted({run.seed for run in runs})
    by_seed = [[run for run in runs if run.seed == seed] for seed in seeds]
    curves = [curve for group in by_seed if (curve := _points(group, x, y)) is not None]
    if len(curves) >= LEAST_SEEDS:
        return _over_seeds(curves)
    return _over_text(by_seed[0], x, y) if by_seed else None


def _points(runs: Sequence[RunSummary], x: str, y: str) -> tuple[Floats, Floats] | None:
    """A curve's points, if they are one."""
    across, up = (np.array([float(getattr(run, name)) for run in runs]) for name in (x, y))
    try:
        interpolate_at(across, up, across[0] if len(across) else 0.0)
    except InterpolationError:
        return None
    return across, up


def _over_seeds(curves: Sequence[tuple[Floats, Floats]]) -> BandOf | None:
    low, high = max(x.min() for x, _ in curves), min(x.max() for x, _ in curves)
    if low >= high:
        return None
    grid = _grid(low, high)
    values = np.array([interpolate_at(x, y, grid) for x, y in curves])
    intervals = [interval_over_seeds(column) for column in values.T]
    ends = [np.array([getattr(each, name) for each in intervals]) for name in ("estimate", "low", "high")]
    return BandOf(grid, *ends, over=f"{len(curves)} seeds")


def _over_text(runs: Sequence[RunSummary], x: str, y: str) -> BandOf | None:
    curve = _points(runs, x, y)
    if curve is None or any(run.sums is None for run in runs):
        return None
    grid = _grid(curve[0].min(), curve[0].max())
    drawn = [resampled(run, {x, y}, RESAMPLES, SEED) for run in runs]
    values = np.full((RESAMPLES, GRID), np.nan)
    for index in range(RESAMPLES):
        across, up = (np.array([each[name][index] for each in drawn]) for name in (x, y))
        inside = (grid >= across.min()) & (grid <= across.max())
        try:
            values[index, inside] = interpolate_at(across, up, grid[inside])
        except InterpolationError:
            continue
    kept = np.isfinite(values).mean(axis=0) > 0.5
    if not kept.any():
        return None
    low, high = np.nanquantile(values[:, kept], [0.025, 0.975], axis=0)
    return BandOf(grid[kept], interpolate_at(*curve, grid[kept]), low, high, over="held-out text")


def _grid(low: float, high: float) -> Floats:
    """Evenly spread on a logarithmic scale, both ends exactly."""
    grid = np.geomspace(low, high, GRID)
    grid[0], grid[-1] = low, high
    return grid


def point_rows(found: Sequence[Pareto]) -> list[dict[str, Any]]:
    """One row a run, with the fronts that it lies on."""
    rows = []
    for one in found:
        fronts = {f"front.{y}_over_{x}": front(one.runs, x, y) for x, y in AXES}
        for run in one.summary.runs:
            row: dict[str, Any] = {
                **columns_of(one.setting),
                "kind": run.kind,
                "coefficient": run.coefficient,
                "seed": run.seed,
            }
            row |= {"learning_rate": run.learning_rate, "l0": run.l0, "alive": run.alive}
            row |= {"ce_increase": run.ce_increase, "kl": run.kl}
            for name in ("l0", "ce_increase", "kl"):
                if name in run.intervals:
                    row |= dict(zip((f"{name}.low", f"{name}.high"), run.intervals[name], strict=True))
            rows.append(row | {name: run.folder in members for name, members in fronts.items()} | {"run": run.folder})
    return rows


def ratio_rows(found: Sequence[Pareto]) -> list[dict[str, Any]]:
    """One row for each measure of each kind, relative to local."""
    return [
        {**columns_of(one.setting), "measure": measure, "kind": kind, **ratio.to_row()}
        for one in found
        for (measure, kind), ratio in one.ratios.items()
    ]


def columns_of(setting: Setting) -> dict[str, Any]:
    """What the rows of one set have in common."""
    return {
        "model": setting.model,
        "site": setting.site,
        "d_sae": setting.d_sae,
        "training_tokens": setting.tokens,
        "started": setting.started,
        "heldout_tokens": setting.alive_tokens,
    }
