"""What a user sees while training runs: a live table on a terminal, a line now and then in a log."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from endwise.run_config import RunConfig

LOG_SECONDS = 30.0


class Display:
    """On a terminal one live row per SAE; elsewhere a line every `LOG_SECONDS`; nothing when switched off."""

    def __init__(self, steps: int, first: int, tokens_per_step: int, shown: bool) -> None:
        self._steps, self._first, self._tokens_per_step = steps, first, tokens_per_step
        self._started = time.monotonic()
        self._rows: dict[str, dict[str, Any]] = {}
        self._console = Console(stderr=True, quiet=not shown)
        watched = shown and self._console.is_terminal
        self._live = Live(console=self._console, refresh_per_second=4) if watched else None
        self._logged = self._started
        self._paused = 0.0

    def __enter__(self) -> "Display":
        if self._live is not None:
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.__exit__(kind, error, trace)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent within it is not training's."""
        before = time.monotonic()
        try:
            yield
        finally:
            self._paused += time.monotonic() - before

    def timing(self, done: int) -> dict[str, float]:
        """Wall-clock of training in this process so far, without pauses: seconds, and tokens per second."""
        seconds = time.monotonic() - self._started - self._paused
        return {
            "seconds": seconds,
            "tokens_per_second": (done - self._first) * self._tokens_per_step / max(seconds, 1e-9),
        }

    def show(self, config: RunConfig, line: dict[str, Any]) -> None:
        key = f"{config.objective.kind} {config.objective.sparsity.coefficient:g} {config.site} seed {config.seed}"
        previous = self._rows.get(key)
        if previous is not None and "heldout" not in line and "heldout" in previous:
            line = {**line, "heldout": previous["heldout"]}
        self._rows[key] = line

    def advance(self, done: int) -> None:
        if self._live is not None:
            self._live.update(self._table(done))
        elif time.monotonic() - self._logged >= LOG_SECONDS:
            self._logged = time.monotonic()
            self._console.print(self._heading(done), highlight=False)

    def _heading(self, done: int) -> str:
        timing = self.timing(done)
        left = timing["seconds"] / max(1, done - self._first) * (self._steps - done)
        return f"step {done}/{self._steps} · {timing['tokens_per_second']:,.0f} tokens/s · {left / 60:.1f} min left"

    def _table(self, done: int) -> Table:
        table = Table(title=self._heading(done), title_justify="left")
        for heading in ("SAE", "loss terms", "L0", "alive", "CE increase (held out)"):
            table.add_column(heading, justify="left" if heading in ("SAE", "loss terms") else "right")
        for key, line in self._rows.items():
            names = [name for name in ("kl", "local_mse", "downstream_mse", "sparsity") if name in line]
            terms = "  ".join(f"{name} {line[name]:.3g}" for name in names)
            increase = f"{line['heldout']['ce_increase']:+.3f}" if "heldout" in line else "–"
            table.add_row(key, terms, f"{line['l0']:.1f}", f"{line['alive']:,}", increase)
        return table
