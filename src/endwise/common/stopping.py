"""Stopping as asked: a signal becomes a question that a loop asks when its state is whole."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SAME_SIGNAL_SECONDS = 5.0

_listening: list[threading.Event] = []


@contextmanager
def polite_stop() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C (or SIGTERM) into a question the loop asks after each step; the second acts at once.

    A scheduler and `torchrun` may each pass on the same SIGTERM, so one that comes right after another is no second.
    Off the main thread, which alone gets signals, only `ask_to_stop` is heard.
    """
    asked = threading.Event()
    first = math.inf

    def ask(number: int, _frame: object) -> None:
        nonlocal first
        if asked.is_set() and (number != signal.SIGTERM or time.monotonic() - first > SAME_SIGNAL_SECONDS):
            raise KeyboardInterrupt
        first = min(first, time.monotonic())
        asked.set()

    hears = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)} if hears else {}
    _listening.append(asked)
    try:
        yield asked.is_set
    finally:
        _listening.remove(asked)
        for number, handler in before.items():
            signal.signal(number, handler)


def ask_to_stop() -> bool:
    """Act like the first Ctrl-C on whatever listens in this process; returns whether anything does."""
    for asked in _listening:
        asked.set()
    return bool(_listening)
