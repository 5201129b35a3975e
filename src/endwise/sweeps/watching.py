"""Display of a sweep: all of its runs, read from their folders, wherever they are carried out."""

import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from endwise.common.counting import Board
from endwise.common.errors import FormatError
from endwise.common.terminal import Cell, Grid
from endwise.config.method import Knob
from endwise.config.places import Recipe
from endwise.runs.folder import RunFolder, last_record, parts_of, seconds_of
from endwise.sweeps.points import Point
from endwise.sweeps.tasks import Outcome, folder_of

LOOK_SECONDS = 1.0
ROWS = 40
"""Most runs in the live table; those in training come first."""
ORDER = ("training", "measuring", "failed", "waiting", "finished")
"""States, in the order of the table."""


@dataclass
class RunStatus:
    """Status of a run, by its folder."""

    config: Recipe
    state: str = "waiting"
    tokens: int = 0
    """Tokens that it was trained on."""
    seconds: float = 0.0
    """Wall-clock of its training, which those of one pass spend together."""
    l0: float | None = None
    ce_increase: float | None = None
    _seconds_before: float = 0.0

    @classmethod
    def at_start(cls, config: Recipe) -> "RunStatus":
        """Read the status of a run that is to be carried out; what earlier sweeps spent on it is set aside."""
        standing = cls(config)
        standing.look()
        standing.state, standing._seconds_before = "waiting", standing.seconds
        return standing

    @property
    def left(self) -> int:
        """Tokens to be trained on."""
        return 0 if self.state in ("finished", "failed", "measuring") else self.config.training.tokens - self.tokens

    @property
    def spent(self) -> float:
        """Seconds of training in this sweep."""
        return max(0.0, self.seconds - self._seconds_before)

    def look(self) -> None:
        """Read the latest; a line that is just being written waits for the next look."""
        folder = RunFolder(folder_of(self.config))
        lines = [
            last_record(each.metrics_file)
            for each in ([folder] if folder.metrics_file.exists() else parts_of(folder.path))
        ]
        line = lines[0]
        tokens, step = _number(line, "tokens"), _number(line, "step")
        if tokens is not None and step and tokens != self.tokens:
            l0s = [l0 for each in lines if (l0 := _number(each, "l0")) is not None]
            self.tokens, self.l0 = int(tokens), sum(l0s) if len(l0s) == len(lines) else None
            self.state = "training" if step < self.config.training.tokens * step // tokens else "measuring"
        if line is not None and len(lines) == 1 and isinstance(heldout := line.get("heldout"), dict):
            self.ce_increase = _number(heldout, "ce_increase")
        self.seconds = seconds_of(folder.path) or self.seconds

    def end(self, outcome: Outcome) -> None:
        self.look()
        self.state = "finished" if outcome.error is None else "failed"
        if outcome.error is None:
            evaluation = _evaluation(outcome.folder)
            self.l0, self.ce_increase = _number(evaluation, "l0"), _number(evaluation, "ce_increase")


def _evaluation(folder: Path) -> dict[str, Any] | None:
    try:
        return RunFolder(folder).evaluation()
    except FormatError:
        return None


def _number(record: dict[str, Any] | None, key: str) -> float | None:
    value = None if record is None else record.get(key)
    return float(value) if isinstance(value, int | float) else None


class Watch(Board):
    """A row for each run, and a line for each that fails."""

    def __init__(self, shown: bool, console: Console | None = None) -> None:
        super().__init__(shown, console)
        self._runs: dict[Path, RunStatus] = {}
        self._to_come: Sequence[Recipe] = ()
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True, name="sweep-watch")

    def __enter__(self) -> "Watch":
        if not self._console.quiet:
            self._thread.start()
        super().__enter__()
        return self

    def __exit__(self, *ended: Any) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
        super().__exit__(*ended)

    def expect(self, configs: Iterable[Recipe], to_come: Sequence[Recipe] = ()) -> None:
        """Runs that are to be carried out now.

        Args:
            to_come: those that are sure to follow them.
        """
        with self._lock:
            self._runs |= {folder_of(config): RunStatus.at_start(config) for config in configs}
            self._to_come = to_come

    def ended(self, outcome: Outcome) -> None:
        with self._lock:
            if outcome.folder in self._runs:
                self._runs[outcome.folder].end(outcome)
        if outcome.error is not None:
            self._show_failure(f"{outcome.folder}: {outcome.error}")

    def failed(self, point: Point, error: str) -> None:
        """Report a point that fails without a run of its own."""
        self._show_failure(f"{point}: {error}")

    def _look(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            with self._lock:
                for standing in self._runs.values():
                    if standing.state not in ("finished", "failed"):
                        standing.look()
                self._show()

    def _show(self) -> None:
        self._update(self._table, lambda: [self._heading()], 0.0)

    def _heading(self) -> str:
        runs = list(self._runs.values())
        count = {state: sum(run.state == state for run in runs) for state in ORDER}
        counts = f"{count['finished']} of {len(runs) + len(self._to_come)} runs finished"
        counts += "".join(f", {count[state]} {state}" for state in ("training", "measuring", "failed") if count[state])
        seconds = seconds_left(runs, time.monotonic() - self._started, self._to_come)
        return f"{counts} · " + ("time left unknown" if seconds is None else f"about {_duration(seconds)} left")

    def _table(self) -> Grid:
        names = self._names()
        runs = sorted(self._runs.items(), key=lambda item: ORDER.index(item[1].state))
        rows: list[tuple[Cell, ...]] = [
            (
                names[folder],
                Text(run.state, style="red" if run.state == "failed" else ""),
                f"{100 * run.tokens / run.config.training.tokens:.0f} %",
                "–" if run.l0 is None else f"{run.l0:.1f}",
                "–" if run.ce_increase is None else f"{run.ce_increase:+.3f}",
            )
            for folder, run in runs[:ROWS]
        ]
        if len(runs) > ROWS:
            rows.append((f"and {len(runs) - ROWS} more", "", "", "", ""))
        return Grid(("run", "state", "trained", "L0", "CE increase"), rows, self._heading(), words=("state",))

    def _names(self) -> dict[Path, str]:
        """Objective and knob of each run, its site and seed where there are several, and the end of its folder's name
        where others are alike.
        """
        configs = {folder: run.config for folder, run in self._runs.items()}
        sites, seeds = ({getattr(config, key) for config in configs.values()} for key in ("place", "seed"))
        names: dict[Path, str] = {}
        for folder, config in configs.items():
            parts = [config.objective_name, Knob.of(config).tag]
            parts += [config.place] if len(sites) > 1 else []
            parts += [f"seed {config.seed}"] if len(seeds) > 1 else []
            names[folder] = " ".join(parts)
        count = Counter(names.values())
        ends = {
            folder: f" …{folder.name.rpartition('-')[2]}" if count[name] > 1 else "" for folder, name in names.items()
        }
        return {folder: name + ends[folder] for folder, name in names.items()}


def seconds_left(runs: Sequence[RunStatus], elapsed: float, to_come: Sequence[Recipe] = ()) -> float | None:
    """Wall-clock to the end, if what is left costs per token what runs of its kind cost so far, and if as many run
    side by side, with as much time between them, as did in the seconds that have elapsed. None: nothing to go by.
    """
    spent: dict[str, tuple[float, int]] = {}
    for run in runs:
        if run.tokens and run.seconds:
            seconds, tokens = spent.get(run.config.objective_name, (0.0, 0))
            spent[run.config.objective_name] = seconds + run.seconds, tokens + run.tokens
    now = sum(run.spent for run in runs)
    if not now:
        return None
    average = sum(seconds for seconds, _ in spent.values()) / sum(tokens for _, tokens in spent.values())
    rates = {kind: seconds / tokens for kind, (seconds, tokens) in spent.items()}
    left = [(run.config, run.left) for run in runs] + [(config, config.training.tokens) for config in to_come]
    work = sum(tokens * rates.get(config.objective_name, average) for config, tokens in left)
    return work * elapsed / now


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
