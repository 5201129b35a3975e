"""What a user sees while a sweep runs: all of its runs, read from their folders, wherever they are carried out."""

import json
import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from endwise.printable import printable
from endwise.progress import LOG_SECONDS
from endwise.run_config import RunConfig
from endwise.run_folder import RunFolder
from endwise.sweeps.tasks import Outcome, folder_of

LOOK_SECONDS = 1.0
LAST_LINES = 16_384
"""Bytes of a file's end in which its last whole line lies."""
ROWS = 40
"""Most runs in the live table; those in training come first."""


@dataclass
class Standing:
    """What a run's folder tells of it."""

    config: RunConfig
    state: str = "waiting"
    tokens: int = 0
    seconds: float = 0.0
    """Its share of the wall-clock of training."""
    l0: float | None = None
    ce_increase: float | None = None
    changed: float = 0.0

    @property
    def left(self) -> int:
        return 0 if self.state in ("finished", "failed") else max(0, self.config.training.tokens - self.tokens)

    def look(self) -> None:
        """Reads the latest; a line that is just being written waits for the next look."""
        folder = RunFolder(folder_of(self.config))
        line, timing = last_record(folder.metrics_file), last_record(folder.timings_file)
        if line is not None and int(line.get("tokens", 0)) != self.tokens:
            self.tokens, self.l0 = int(line["tokens"]), line.get("l0")
            self.state, self.changed = "training", time.monotonic()
        if line is not None and isinstance(line.get("heldout"), dict):
            self.ce_increase = line["heldout"].get("ce_increase")
        if timing is not None:
            self.seconds = float(timing.get("seconds", 0.0))

    def end(self, outcome: Outcome) -> None:
        self.look()
        self.state = "finished" if outcome.error is None else "failed"
        if outcome.error is None and (evaluation := RunFolder(outcome.folder).evaluation()) is not None:
            self.l0, self.ce_increase = evaluation.get("l0"), evaluation.get("ce_increase")


def last_record(file: Path) -> dict[str, Any] | None:
    """The last whole line of a file of JSON lines."""
    try:
        with file.open("rb") as lines:
            lines.seek(max(0, os.fstat(lines.fileno()).st_size - LAST_LINES))
            for line in reversed(lines.read().split(b"\n")[:-1]):
                if isinstance(record := json.loads(line), dict):
                    return record
    except (OSError, ValueError):
        return None
    return None


class Watch:
    """On a terminal a live table of all runs; elsewhere a line every `LOG_SECONDS`, and one for each run that fails."""

    def __init__(self, shown: bool) -> None:
        self._console = Console(stderr=True, quiet=not shown)
        watched = shown and self._console.is_terminal
        self._live = Live(console=self._console, auto_refresh=False) if watched else None
        self._runs: dict[Path, Standing] = {}
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._started = time.monotonic()
        self._tokens_before = 0
        self._said = self._started
        self._thread = threading.Thread(target=self._look, daemon=True, name="sweep-watch")

    def __enter__(self) -> "Watch":
        if self._live is not None:
            self._live.__enter__()
        if not self._console.quiet:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
            self._live.__exit__(kind, error, trace)

    def expect(self, configs: Iterable[RunConfig]) -> None:
        """Runs that are to be carried out now."""
        with self._lock:
            for config in configs:
                standing = Standing(config)
                standing.look()
                self._tokens_before += standing.tokens
                standing.state = "waiting"
                self._runs[folder_of(config)] = standing

    def ended(self, outcome: Outcome) -> None:
        with self._lock:
            if outcome.folder in self._runs:
                self._runs[outcome.folder].end(outcome)
        if outcome.error is not None:
            text = printable(f"failed: {outcome.folder}: {outcome.error}")
            self._console.print(text, style="red", markup=False, highlight=False, soft_wrap=True)

    def _look(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            with self._lock:
                for standing in self._runs.values():
                    if standing.left:
                        standing.look()
                self._show()

    def _show(self) -> None:
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
        elif time.monotonic() - self._said >= LOG_SECONDS:
            self._said = time.monotonic()
            self._console.print(self._heading(), markup=False, highlight=False, soft_wrap=True)

    def _heading(self) -> str:
        runs = list(self._runs.values())
        count = {state: sum(run.state == state for run in runs) for state in ("finished", "training", "failed")}
        said = f"{count['finished']} of {len(runs)} runs finished, {count['training']} in training"
        said += f", {count['failed']} failed" if count["failed"] else ""
        return f"{said} · {self._time_left()}"

    def _time_left(self) -> str:
        seconds = seconds_left(list(self._runs.values()), time.monotonic() - self._started)
        return "time left not known yet" if seconds is None else f"about {_duration(seconds)} left"

    def _table(self) -> Table:
        table = Table(title=self._heading(), title_justify="left")
        for heading in ("run", "state", "trained", "L0", "CE increase"):
            table.add_column(heading, justify="left" if heading in ("run", "state") else "right", no_wrap=True)
        order = {"training": 0, "failed": 1, "waiting": 2, "finished": 3}
        runs = sorted(self._runs.items(), key=lambda item: order[item[1].state])
        for folder, run in runs[:ROWS]:
            table.add_row(
                Text(printable(folder.name)),
                Text(run.state, style="red" if run.state == "failed" else ""),
                f"{100 * run.tokens / run.config.training.tokens:.0f} %",
                "–" if run.l0 is None else f"{run.l0:.1f}",
                "–" if run.ce_increase is None else f"{run.ce_increase:+.3f}",
            )
        if len(runs) > ROWS:
            table.add_row(f"and {len(runs) - ROWS} more", "", "", "", "")
        return table


def seconds_left(runs: list[Standing], elapsed: float) -> float | None:
    """Wall-clock to the end, if the runs that are left cost per token what those of their kind did so far, and if as
    many go on side by side as did until now.
    """
    spent: dict[str, list[float]] = {}
    for run in runs:
        if run.tokens and run.seconds:
            totals = spent.setdefault(run.config.objective.kind, [0.0, 0.0])
            totals[0] += run.seconds
            totals[1] += run.tokens
    seconds = sum(total for total, _ in spent.values())
    if not seconds or not elapsed:
        return None
    average = seconds / sum(tokens for _, tokens in spent.values())
    rates = {kind: total / tokens for kind, (total, tokens) in spent.items()}
    work = sum(run.left * rates.get(run.config.objective.kind, average) for run in runs)
    return work / max(1.0, seconds / elapsed)


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )
