"""A bar, or some lines in a log, that count what is done."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress

LOG_SECONDS = 30.0


@contextmanager
def counting(what: str, total: int, display: bool, unit: str = "sequences") -> Iterator[Callable[[int], None]]:
    """A function to be told how many more are done: a bar on a terminal, a line now and then in a log, either with the
    time that is left.
    """
    console = Console(stderr=True, quiet=not display)
    with Progress(console=console, disable=not (display and console.is_terminal)) as progress:
        task = progress.add_task(what, total=total)
        started = said = time.monotonic()
        done = 0

        def advance(count: int) -> None:
            nonlocal said, done
            progress.advance(task, count)
            done += count
            now = time.monotonic()
            if not console.is_terminal and now - said > LOG_SECONDS and done:
                left = (now - started) / done * (total - done)
                console.print(f"{what}: {done:,} of {total:,} {unit} · {left / 60:.1f} min left", highlight=False)
                said = now

        yield advance
