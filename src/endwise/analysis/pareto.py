"""Pareto curves of any runs: which can be compared, their fronts, their bands, their ratios.

Runs are compared only where all agrees but the kind, the sparsity coefficient, the seeds and the learning rate (which
is tuned for each kind): one model, one site, the same text, one length of training, one dictionary size, one kind of
start. Each such set has its own curves and ratios. A kind's curve is of one method: runs whose objective differs in
more than the coefficient, in a weight say, or in the penalty's power, have a set of their own beside the same local
runs.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from endwise.analysis.comparison import Summary, summarise
from endwise.analysis.kept_apart import with_digests
from endwise.analysis.ratios import DEFINED_SHARE, Ratio
from endwise.analysis.run_summary import KINDS, LABELS, RunSummary, resampled
from endwise.errors import RunFolderError
from endwise.printable import model_title, model_titles
from endwise.reading import expanded
from endwise.run_config import PRESETS, TERMS, Kind
from endwise.run_folder import RunFolder
from endwise.statistics import LEAST_SEEDS, InterpolationError, interpolate_at, interval_over_seeds, log_spaced
from endwise.tabular import flat

GRID = 40
"""Points of a band."""
RESAMPLES, SEED = 1000, 12345
AXES = (("l0", "ce_increase"), ("alive", "ce_increase"), ("l0", "kl"))
"""What is drawn against what: x, y."""
HELDOUT_TEXT = "held-out text"
"""What a band is over that is no band over seeds."""
NOT_RUNS = ("trials", "checkpoints", "sae")
"""Folders in which no run is looked for; a sweep's trials are short ones, made to find a coefficient."""

ASIDE = (
    *("model.name", "model.device", "site", "seed", "init_from", "out", "dictionary.size", "dictionary.ratio"),
    *("data.cache", "data.seed", "training.tokens", "training.learning_rate", "training.microbatch"),
    *("training.alive_window", "training.log_every", "training.evaluate_every", "training.checkpoint_every"),
    "training.keep_checkpoints",
)
"""Keys of a recipe that a setting names itself, that runs of a curve may differ in, or that do not change a run."""

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
    further: tuple[tuple[str, str], ...] = ()
    """Other keys of the recipe, with their values, in which the runs given differ."""

    @classmethod
    def of(cls, run: RunSummary, further: Iterable[tuple[str, str]] = ()) -> "Setting":
        start = run.start is not None
        return cls(run.model, run.site, run.alive_tokens, run.tokens, run.d_sae, start, tuple(further))

    def __str__(self) -> str:
        parts = [f"{self.d_sae:,} features", f"{self.tokens:,} training tokens"]
        parts += ["from another SAE"] if self.started else []
        return ", ".join([*parts, *(f"{key} {value}" for key, value in self.further)])


@dataclass(frozen=True)
class Pareto:
    """The runs of one setting, compared."""

    setting: Setting
    runs: tuple[RunSummary, ...]
    """By kind, coefficient, seed and learning rate."""
    summary: Summary
    """Of the runs of one learning rate a kind, where it has several."""
    remarks: tuple[str, ...] = ()
    """Which rate that is."""

    @property
    def is_compared(self) -> bool:
        """Whether there are local SAEs, and others that can be related to them."""
        kinds = {run.kind for run in self.runs}
        return "local" in kinds and len(kinds) > 1

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
    return [_compared(setting, runs) for setting, runs in comparable(paths).items()]


def comparable(paths: Iterable[str | Path]) -> dict[Setting, list[RunSummary]]:
    """Evaluated runs among and below the paths, in sets that can be compared.

    Raises:
        RunFolderError: there is no run, or one was not measured yet.
        FormatError: what a run holds cannot be read.
    """
    found, methods = _with_methods(runs_in(paths))
    sets: dict[Setting, list[RunSummary]] = {}
    for run, setting in found:
        sets.setdefault(setting, []).append(run)
    for setting, local in methods.local_of(found).items():
        sets[setting] += local
    ordered = sorted(sets, key=lambda s: (s.model, s.site, s.started, s.d_sae, s.tokens, s.further))
    return {setting: sets[setting] for setting in ordered}


def _compared(setting: Setting, runs: list[RunSummary]) -> Pareto:
    runs.sort(key=lambda run: (KINDS.index(run.kind), run.coefficient, run.seeds, run.learning_rate or 0.0))
    rates = {kind: rate for kind in KINDS if (rate := rate_of_most([run for run in runs if run.kind == kind]))}
    kept = [run for run in runs if run.learning_rate == rates.get(run.kind, run.learning_rate)]
    remarks = [
        f"Of {LABELS[kind]} the learning rate {rate:g} is compared, which most runs have; others are only shown."
        for kind, rate in rates.items()
    ]
    return Pareto(setting, tuple(runs), _summary(kept), tuple(remarks))


def rate_of_most(runs: Sequence[RunSummary]) -> float | None:
    """Of one kind's runs that were trained at several learning rates with the same coefficient and seed, the rate that
    has more of them than any other: that of a curve, rather than those that were tried for it. None: there are no such
    runs, or no such rate.
    """
    if not has_several_rates(runs):
        return None
    counts = Counter(run.learning_rate for run in runs).most_common(2)
    return None if len(counts) < 2 or counts[0][1] == counts[1][1] else counts[0][0]


def has_several_rates(runs: Sequence[RunSummary]) -> bool:
    """Whether runs of one kind share coefficient and seed."""
    return len({(run.coefficient, run.seeds) for run in runs}) < len(runs)


def with_settings(folders: Iterable[Path]) -> list[tuple[RunSummary, Setting]]:
    """Each evaluated run with its setting, which tells apart what may not be compared.

    Raises:
        RunFolderError: a folder is no run, or was not measured yet.
        FormatError: what a run holds cannot be read.
    """
    return _with_methods(folders)[0]


def _with_methods(folders: Iterable[Path]) -> tuple[list[tuple[RunSummary, Setting]], "_Methods"]:
    runs = with_digests([(RunSummary.read(path), _recipe(path)) for path in folders])
    keys = sorted({key for _, recipe in runs for key in recipe})
    differing = [key for key in keys if len({recipe.get(key) for _, recipe in runs}) > 1]
    titles = model_titles(run.model for run, _ in runs)
    settings = []
    for run, recipe in runs:
        model = titles[run.model]
        alike = [("model.name", model)] if model != model_title(run.model) else []
        settings.append((run, Setting.of(run, [*alike, *((key, recipe.get(key, "")) for key in differing)])))
    methods = _Methods(settings)
    return [(run, methods.setting(run, setting)) for run, setting in settings], methods


class _Methods:
    """Of each setting and kind, the method that its curve is of; runs of others have settings of their own."""

    def __init__(self, runs: Sequence[tuple[RunSummary, Setting]]) -> None:
        self._runs = runs
        groups: dict[tuple[Setting, str], list[Mapping[str, Any]]] = {}
        for run, setting in runs:
            groups.setdefault((setting, run.kind), []).append(run.method)
        self._main = {place: _main_method(cast("Kind", place[1]), methods) for place, methods in groups.items()}

    def setting(self, run: RunSummary, setting: Setting) -> Setting:
        """That of the run's own method."""
        main = self._main[setting, run.kind]
        differing = [key for key in run.method if run.method[key] != main.get(key)]
        if not differing:
            return setting
        words = ", ".join(f"{key} {json.dumps(run.method[key])}" for key in differing)
        return replace(setting, further=(*setting.further, (LABELS[run.kind], words)))

    def local_of(self, found: Sequence[tuple[RunSummary, Setting]]) -> dict[Setting, list[RunSummary]]:
        """For each setting of a further method the local runs that it is compared with: of the same penalty, if there
        are such, otherwise those of the main method.
        """
        local: dict[Setting, list[RunSummary]] = {}
        for (run, common), (_, own) in zip(self._runs, found, strict=True):
            if own != common and run.kind != "local" and own not in local:
                of_setting = [each for each, setting in self._runs if (setting, each.kind) == (common, "local")]
                main = self._main.get((common, "local"), {})
                for wanted in ({**main, "p": run.method.get("p")}, main):
                    local[own] = [each for each in of_setting if each.method == wanted]
                    if local[own]:
                        break
        return local


def _main_method(kind: Kind, methods: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The preset's where there are such runs, otherwise that of most."""
    preset = {**dict.fromkeys(set().union(*TERMS.values()) - TERMS[kind], 0.0), **PRESETS[kind]}
    preset |= {"downstream_sites": None, "p": 1.0}

    def is_preset(method: Mapping[str, Any]) -> bool:
        return all(method.get(key) == value for key, value in preset.items())

    counts = Counter(json.dumps(method, sort_keys=True) for method in methods)
    return max(methods, key=lambda method: (is_preset(method), counts[json.dumps(method, sort_keys=True)]))


def _recipe(path: Path) -> dict[str, str]:
    """What a run's recipe holds of what it must have in common with those that it is compared with. Of `evaluation` the
    number of tokens is not, since of that it counts what was measured.
    """
    config = RunFolder(path).config()
    content = flat(config.model_dump(mode="json", exclude={"objective", "evaluation"}))
    content["evaluation.skip"] = config.evaluation.skip
    return {key: json.dumps(value).strip('"') for key, value in content.items() if key not in ASIDE}


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
    for path in map(expanded, paths):
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
    seeds = sorted({run.seeds for run in runs})
    by_seed = [[run for run in runs if run.seeds == seed] for seed in seeds]
    curves = [curve for group in by_seed if (curve := _points(group, x, y)) is not None]
    if len(curves) >= LEAST_SEEDS:
        return _over_seeds(curves)
    return _over_text(by_seed[0], x, y) if by_seed else None


def _points(runs: Sequence[RunSummary], x: str, y: str) -> tuple[Floats, Floats] | None:
    """A curve's points, if they are one."""
    if len({run.coefficient for run in runs}) < len(runs):
        return None
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
    grid = log_spaced(low, high, GRID)
    values = np.array([interpolate_at(x, y, grid) for x, y in curves])
    intervals = [interval_over_seeds(column) for column in values.T]
    ends = [np.array([getattr(each, name) for each in intervals]) for name in ("estimate", "low", "high")]
    return BandOf(grid, *ends, over=f"{len(curves)} seeds")


def _over_text(runs: Sequence[RunSummary], x: str, y: str) -> BandOf | None:
    curve = _points(runs, x, y)
    if curve is None or any(run.sums is None or not {x, y} - {"alive"} <= run.sums.keys() for run in runs):
        return None
    grid = log_spaced(curve[0].min(), curve[0].max(), GRID)
    drawn = [resampled(run, {x, y}, RESAMPLES, SEED) for run in runs]
    values = np.full((RESAMPLES, GRID), np.nan)
    for index in range(RESAMPLES):
        across, up = (np.array([each[name][index] for each in drawn]) for name in (x, y))
        inside = (grid >= across.min()) & (grid <= across.max())
        try:
            values[index, inside] = interpolate_at(across, up, grid[inside])
        except InterpolationError:
            continue
    kept = np.isfinite(values).mean(axis=0) >= DEFINED_SHARE
    if not kept.any():
        return None
    low, high = np.nanquantile(values[:, kept], [0.025, 0.975], axis=0)
    return BandOf(grid[kept], interpolate_at(*curve, grid[kept]), low, high, over=HELDOUT_TEXT)


def point_rows(found: Sequence[Pareto]) -> list[dict[str, Any]]:
    """One row a run, with the fronts that it lies on."""
    rows = []
    for one in found:
        fronts = {f"front.{y}_over_{x}": front(one.runs, x, y) for x, y in AXES}
        for run in one.runs:
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
        **dict(setting.further),
    }
