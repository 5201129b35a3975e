"""List of the runs in folders: what each trains, how far it is, what it measured."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from endwise.common.errors import EndwiseError, OtherKind
from endwise.common.files import there_is
from endwise.common.terminal import Grid, show
from endwise.common.text import model_title
from endwise.config.method import Knob, Method
from endwise.config.places import PlacesConfig
from endwise.config.run import RunConfig
from endwise.evaluation.finished import unfinished
from endwise.runs.finding import run_folders
from endwise.runs.folder import RunFolder, last_record, parts_of


@dataclass(frozen=True)
class ListedRun:
    """A run folder at a glance."""

    folder: Path
    state: str
    """`measured`, `trained`, `at step N`, `started`, `adopted`, or `unreadable`."""
    model: str = ""
    place: str = ""
    kind: str = ""
    """Key of the method that it was trained by."""
    label: str = ""
    """Name of that method in tables."""
    architecture: str = ""
    knob: str = ""
    """Setting that varies along a curve, and its value."""
    seed: int | None = None
    tokens: int | None = None
    """Training tokens."""
    l0: float | None = None
    ce_increase: float | None = None
    """Nats per token on held-out text."""
    alive: int | None = None
    d_sae: int | None = None
    error: str = ""
    """Reason why it cannot be read."""

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder)}


def list_runs(paths: Iterable[str | Path]) -> list[ListedRun]:
    """List every run among and below the paths.

    Raises:
        OtherKind: a path is no folder, or there is no run.
    """
    places = [Path(path) for path in paths]
    found = list(dict.fromkeys(run for path in places if there_is(path) for run in run_folders(path)))
    if not found:
        raise OtherKind(
            f"{', '.join(map(str, places))} holds no run folder. Train one: endwise init MODEL, then endwise train."
        )
    return [_listed(run) for run in found]


def _listed(path: Path) -> ListedRun:
    folder = RunFolder(path)
    try:
        config = folder.recipe()
        measured: Mapping[str, Any] = folder.measured() or {}
        numbers: dict[str, Any] = {name: measured.get(name) for name in ("l0", "ce_increase", "alive", "d_sae")}
        several = isinstance(config, PlacesConfig)
        method = Method.of(config)
        return ListedRun(
            path,
            _state(folder, measured),
            model_title(config.model.name),
            f"{len(config.places)} places" if several else config.place,
            method.key,
            method.label,
            config.dictionary.architecture,
            "" if several else str(Knob.of(config)),
            config.seed,
            config.training.tokens or None,
            **numbers,
        )
    except EndwiseError as error:
        return ListedRun(path, "unreadable", error=" ".join(str(error).split()))


def _state(folder: RunFolder, measured: Mapping[str, Any]) -> str:
    parts = parts_of(folder.path)
    saved = all(part.sae.exists() for part in parts)
    recipes = [part.recipe() for part in parts] if saved else []
    pairs = zip(parts, recipes, strict=saved)
    if saved and all(isinstance(each, RunConfig) and unfinished(part.path, each) is None for part, each in pairs):
        adopted = " (adopted)" if any(not each.training.tokens for each in recipes) else ""
        return ("measured" if measured else "trained") + adopted
    step = (last_record(folder.metrics_file) or {}).get("step")
    return f"at step {step:,}" if isinstance(step, int) else "started"


def print_runs(runs: Sequence[ListedRun], console: Console | None = None) -> None:
    """Print a row a run, and what is wrong with those that cannot be read."""
    whole = [run for run in runs if not run.error]
    if whole:
        show(
            Grid(
                ("run", "model", "place", "kind", "setting", "state", "L0", "CE increase", "alive"),
                [_row(run) for run in whole],
                words=("model", "place", "kind", "setting", "state"),
            ),
            console,
        )
    for run in runs:
        if run.error:
            show(f"! {run.folder}: {run.error}", console)
    measured = sum(run.state.startswith("measured") for run in runs)
    show(f"{len(runs)} run{'' if len(runs) == 1 else 's'}, {measured} measured.", console)


def _row(run: ListedRun) -> tuple[str, ...]:
    alive = "" if run.alive is None else f"{run.alive:,}" + ("" if run.d_sae is None else f" of {run.d_sae:,}")
    return (
        *(str(run.folder), run.model, run.place, run.label, run.knob, run.state),
        "" if run.l0 is None else f"{run.l0:.1f}",
        "" if run.ce_increase is None else f"{run.ce_increase:+.3f}",
        alive,
    )
