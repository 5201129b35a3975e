"""What a user sees while training runs: one live line per SAE, and time left."""

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from endwise.run_config import RunConfig


class Display:
    """A live table on a terminal; nothing when switched off or when nobody watches (`metrics.jsonl` has it all)."""

    def __init__(self, steps: int, first: int, tokens_per_step: int, shown: bool) -> None:
        self._steps, self._first, self._tokens_per_step = steps, first, tokens_per_step
        self._started = time.monotonic()
        self._rows: dict[str, dict[str, Any]] = {}
        console = Console(stderr=True)
        self._live = (
            Live(console=console, refresh_per_second=4, transient=False) if shown and console.is_terminal else None
        )

    def __enter__(self) -> "Display":
        if self._live is not None:
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.__exit__(kind, error, trace)

    def timing(self, done: int) -> dict[str, float]:
        """Wall-clock of this process so far: seconds, and training tokens per second."""
        seconds = time.monotonic() - self._started
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

    def _table(self, done: int) -> Table:
        timing = self.timing(done)
        left = timing["seconds"] / max(1, done - self._first) * (self._steps - done)
        title = f"step {done}/{self._steps} · {timing['tokens_per_second']:,.0f} tokens/s · {left / 60:.1f} min left"
        table = Table(title=title, title_justify="left")
        for heading in ("SAE", "loss terms", "L0", "alive", "CE increase (held out)"):
            table.add_column(heading, justify="left" if heading in ("SAE", "loss terms") else "right")
        for key, line in self._rows.items():
            names = [name for name in ("kl", "local_mse", "downstream_mse", "sparsity") if name in line]
            terms = "  ".join(f"{name} {line[name]:.3g}" for name in names)
            increase = f"{line['heldout']['ce_increase']:+.3f}" if "heldout" in line else "–"
            table.add_row(key, terms, f"{line['l0']:.1f}", f"{line['alive']:,}", increase)
        return table
