"""Display of training: a live table on a terminal, some lines now and then in a log."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from endwise.common.counting import Board
from endwise.common.terminal import Grid
from endwise.common.text import minus, printable
from endwise.config.method import Knob
from endwise.config.objective import PHASE
from endwise.config.places import PlacesConfig, Recipe

TABLE_SECONDS = 0.2


@dataclass
class _Row:
    """The latest of one run."""

    config: Recipe
    line: dict[str, Any]
    ce_increase: float | None = None
    failed: bool = False
    logged: bool = False
    """True once a log has a line of these numbers."""


class Display(Board):
    """A row for each SAE."""

    def __init__(self, steps: int, first: int, tokens_per_step: int, shown: bool) -> None:
        super().__init__(shown)
        self._steps, self._first, self._tokens_per_step = steps, first, tokens_per_step
        self._rows: dict[Path, _Row] = {}
        self._paused = 0.0

    def __enter__(self) -> "Display":
        super().__enter__()
        return self

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent within it is not training's."""
        before = time.monotonic()
        try:
            yield
        finally:
            self._paused += time.monotonic() - before

    @property
    def seconds(self) -> float:
        """Wall-clock of training in this process so far, without pauses."""
        return time.monotonic() - self._started - self._paused

    def timing(self, done: int) -> dict[str, float]:
        """`seconds`, and tokens per second."""
        seconds = self.seconds
        return {
            "seconds": seconds,
            "tokens_per_second": (done - self._first) * self._tokens_per_step / max(seconds, 1e-9),
        }

    def show(self, folder: Path, config: Recipe, line: dict[str, Any]) -> None:
        """A run's latest line of metrics; what the last evaluation found stays until the next."""
        row = self._rows.setdefault(folder, _Row(config, line))
        row.line, row.logged = line, False
        if "heldout" in line:
            row.ce_increase = line["heldout"]["ce_increase"]

    def fail(self, folder: Path, message: str) -> None:
        """Report at once that a run has ended while others continue.

        Args:
            message: empty: the table alone shows it.
        """
        if folder in self._rows:
            self._rows[folder].failed = True
        if message:
            self._show_failure(message)

    def advance(self, done: int) -> None:
        last = done == self._steps
        self._update(lambda: self._table(done), lambda: self._lines(done), 0.0 if last else TABLE_SECONDS)

    def _heading(self, done: int) -> str:
        timing = self.timing(done)
        left = timing["seconds"] / max(1, done - self._first) * (self._steps - done)
        return f"step {done}/{self._steps} · {timing['tokens_per_second']:,.0f} tokens/s · {left / 60:.1f} min left"

    def _lines(self, done: int) -> list[str]:
        """One line where one SAE is in training; of several the speed, then a line for each; of each only numbers that
        are newer than its last line.
        """
        new = {folder: row for folder, row in self._rows.items() if not row.logged}
        for row in new.values():
            row.logged = True
        if len(self._rows) == 1:
            return [" · ".join([self._heading(done), *map(_numbers, new.values())])]
        names = self._names()
        return [self._heading(done), *(f"  {names[folder]}: {_numbers(row)}" for folder, row in new.items())]

    def _table(self, done: int) -> Grid:
        names, rows = self._names(), []
        for folder, row in self._rows.items():
            line = row.line
            weighted = {name for phase in row.config.in_phases for name in phase.objective.weights}
            terms = [name for name in line if name in weighted or name == "sparsity"]
            increase = "–" if row.ce_increase is None else f"{row.ce_increase:+.3f}"
            loss = "  ".join([*filter(None, [_phase(row)]), *(f"{name} {line[name]:.3g}" for name in terms)])
            rows.append((names[folder], loss, f"{line['l0']:.1f}", f"{line['alive']:,}", increase))
        headings = ("SAE", "loss terms", "L0", "alive", "CE increase (held out)")
        return Grid(headings, rows, self._heading(done), words=("loss terms",))

    def _names(self) -> dict[Path, str]:
        """Name the runs apart: objective, knob, site and seed, and the folder where these are alike."""
        described = {folder: _description(row.config) for folder, row in self._rows.items()}
        names: dict[Path, str] = {}
        for folder, text in described.items():
            alike = list(described.values()).count(text) > 1
            failed = " (failed)" if self._rows[folder].failed else ""
            names[folder] = printable(text + (f" in {folder}" if alike else "") + failed)
        return names


def _description(config: Recipe) -> str:
    if isinstance(config, PlacesConfig):
        return f"{config.objective_name} at {len(config.places)} places seed {config.seed}"
    return f"{config.objective_name} {Knob.of(config)} {config.place} seed {config.seed}"


def _numbers(row: _Row) -> str:
    known = [_phase(row), f"loss {row.line['loss']:.4g}", f"L0 {row.line['l0']:.1f}"]
    if row.ce_increase is not None:
        known.append(minus(f"CE increase {row.ce_increase:+.3f}"))
    return " · ".join(filter(None, known))


def _phase(row: _Row) -> str:
    """Name the phase of the latest line, where there are several."""
    if (number := row.line.get(PHASE)) is None:
        return ""
    phases = row.config.in_phases
    return f"phase {number} of {len(phases)}, {phases[number - 1].objective.name}"
