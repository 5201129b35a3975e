"""Sets of runs that can be compared, and tables of them, as every question about finished runs has them."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable
from weakref import WeakKeyDictionary

import numpy as np
from markupsafe import Markup

from endwise.analysis.comparable import Setting, methods_of
from endwise.analysis.comparison.comparison import runs_at_similar, similar_by_seed
from endwise.common.html import bullets
from endwise.common.showing import Shown
from endwise.common.text import minus, model_title
from endwise.config.method import Method
from endwise.evaluation.summary import RunSummary, knob_labels, remarks_of


@runtime_checkable
class Measured(Protocol):
    """A run with what a question has measured of it."""

    @property
    def summary(self) -> RunSummary: ...


@runtime_checkable
class Compared(Protocol):
    """The runs of one setting, as a question compares them."""

    @property
    def setting(self) -> Setting: ...
    @property
    def runs(self) -> Sequence[Any]: ...


M = TypeVar("M", bound=Measured)
S = TypeVar("S", bound=Compared)
R = TypeVar("R")


def once(measure: Callable[[S], R]) -> Callable[[S], R]:
    """Measure each set once, for as long as it lives: its tables, figures and claims ask alike."""
    made: WeakKeyDictionary[S, R] = WeakKeyDictionary()

    @wraps(measure)
    def of(found: S) -> R:
        if found not in made:
            made[found] = measure(found)
        return made[found]

    return of


class ShownSet(Shown):
    """The runs of one setting, by how many they are, where they lie, and of which methods."""

    def shown_facts(self: Any) -> dict[str, object]:
        methods = ", ".join(method.label for method in methods_of(map(summary_of, self.runs)))
        return {"": f"{len(self.runs)} runs at {self.setting.site}", "of": methods}


@dataclass(frozen=True, repr=False)
class RunSet(ShownSet, Generic[M]):
    """The runs of one setting, by method, seed and knob, each with what was measured of it."""

    setting: Setting
    runs: tuple[M, ...]

    @property
    def methods(self) -> list[Method]:
        """Methods that have runs, the presets first."""
        return methods_of(summaries(self))

    def closest(self, metric: str) -> tuple[M, ...]:
        """One run of each method, all of one seed, those whose ce_increase or l0 (`metric`) are closest."""
        return self._of(runs_at_similar(summaries(self), metric))

    def closest_by_seed(self, metric: str) -> list[dict[Method, M]]:
        """The same of every seed, by method."""
        chosen = similar_by_seed(summaries(self), metric).values()
        return [{run.summary.method: run for run in self._of(runs)} for runs in chosen]

    def _of(self, wanted: Iterable[RunSummary]) -> tuple[M, ...]:
        by_folder = {run.summary.folder: run for run in self.runs}
        return tuple(by_folder[each.folder] for each in wanted)


def in_sets(runs: Iterable[tuple[Setting, M]], alike: Callable[[M], Any]) -> list[tuple[Setting, tuple[M, ...]]]:
    """Gather runs of one setting that were measured alike, in the order of settings.

    Args:
        alike: what must agree for measurements to be compared.
    """
    sets: dict[tuple[Setting, Any], list[M]] = {}
    for setting, run in runs:
        sets.setdefault((setting, alike(run)), []).append(run)

    def place(run: M) -> tuple[Any, ...]:
        return run.summary.method.place, run.summary.seed, run.summary.knob

    ordered = sorted(sets.items(), key=lambda each: (each[0][0].place, each[0][1]))
    return [(setting, tuple(sorted(runs, key=place))) for (setting, _), runs in ordered]


def summary_of(run: RunSummary | Measured) -> RunSummary:
    return run if isinstance(run, RunSummary) else run.summary


def summaries(one: Compared) -> list[RunSummary]:
    """List what the runs of a set measured."""
    return list(map(summary_of, one.runs))


Column = tuple[str, Callable[[Any], str]]
"""A heading, and what makes the cell of a run."""
Table = tuple[list[str], list[list[str]]]
"""Headings and rows."""


def measured(metric: str, form: str) -> Callable[[RunSummary], str]:
    """Make cells of a number of `evaluation.json` with its 95 % interval, where it has one."""

    def cell(run: RunSummary) -> str:
        number, ends = value(run, metric), run.intervals.get(metric)
        sign = "+" if metric == "ce_increase" else ""
        text = f"{number:{sign}{form}}" + (f" [{ends[0]:{form}}, {ends[1]:{form}}]" if ends else "")
        return "–" if math.isnan(number) else minus(text)

    return cell


def value(run: RunSummary, metric: str) -> float:
    """A run's number by its name in `evaluation.json`; NaN for a form of explained variance that was not measured."""
    group, _, form = metric.partition(".")
    if group == "explained_variance":
        return run.explained_variances.get(form, run.explained_variance if form == "per_token" else math.nan)
    return float(getattr(run, metric))


def _ce_increase(run: RunSummary) -> str:
    return f"{run.ce_increase:+.3f}"


def _later_mse(run: RunSummary) -> str:
    """Mean over the later sites of the downstream MSE."""
    return f"{np.mean(list(run.downstream_mse.values())):.3g}" if run.downstream_mse else "–"


KNOB = "knob"
"""The column that is headed by what runs of one method differ in."""
COLUMNS: dict[str, Callable[[RunSummary], str]] = {
    "kind": lambda run: run.method.label,
    KNOB: lambda run: f"{run.knob.value:g}",
    "seed": lambda run: str(run.seed) if run.trained_here else "–",
    "L0": lambda run: f"{run.l0:.1f}",
    "alive": lambda run: f"{run.alive:,}",
    "CE": _ce_increase,
    "CE +": _ce_increase,
    "CE increase": _ce_increase,
    "CE increase [95 %]": measured("ce_increase", ".3f"),
    "KL": lambda run: f"{run.kl:.3f}",
    "EV": lambda run: f"{run.explained_variance:.3f}",
    "later MSE": _later_mse,
}
"""Cells that tables have of a run, by their heading."""


def run_table(runs: Iterable[RunSummary | Measured], *columns: str | Column) -> Table:
    """One row a run, for a terminal or a page.

    Args:
        columns: of `COLUMNS`, or a heading with what makes the cell of one of `runs`.
    """
    runs = list(runs)
    heads = {KNOB: knob_labels(map(summary_of, runs))}
    headings = [heads.get(each, each) if isinstance(each, str) else each[0] for each in columns]
    rows = [
        [COLUMNS[each](summary_of(run)) if isinstance(each, str) else each[1](run) for each in columns] for run in runs
    ]
    return headings, rows


def columns_of_run(run: RunSummary) -> dict[str, Any]:
    """Name a run in a table on disk."""
    return run.known({"kind": run.method.key, **run.knob.columns, "seed": run.seed, "data_seed": run.data_seed})


def title_of(setting: Setting) -> str:
    """`<site> of <model>: <what else the runs have in common>`."""
    return f"{setting.site} of {model_title(setting.model)}: {setting}"


def counted(found: Sequence[Compared]) -> str:
    """`3 sparse autoencoders in 1 set`."""
    runs, sets = sum(len(one.runs) for one in found), len(found)
    return f"{runs} sparse autoencoder{'' if runs == 1 else 's'} in {sets} set{'' if sets == 1 else 's'}"


def remark_list(runs: Iterable[RunSummary]) -> Markup:
    """The remarks on runs, as HTML; empty where there are none."""
    return bullets("remarks", remarks_of(runs), "note")
