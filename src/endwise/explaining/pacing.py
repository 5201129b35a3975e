"""Pace of attempts: so many a minute, and none while the server has asked to wait."""

import asyncio
import time
from email.utils import mktime_tz, parsedate_tz


class Pace:
    """Shared by all calls.

    Args:
        per_minute: starts of attempts, evenly spread; None: as many as there are.
    """

    def __init__(self, per_minute: float | None) -> None:
        self._between = 60.0 / per_minute if per_minute else 0.0
        self._turn = asyncio.Lock()
        self._next = 0.0

    async def wait(self) -> None:
        now = asyncio.get_running_loop().time
        async with self._turn:
            while (left := self._next - now()) > 0:  # it may grow meanwhile
                await asyncio.sleep(left)
            self._next = now() + self._between

    def pause(self, seconds: float) -> None:
        """No attempt starts within these seconds: what one was asked to wait holds for all."""
        self._next = max(self._next, asyncio.get_running_loop().time() + seconds)


def retry_after(header: str | None) -> float:
    """Seconds that a `Retry-After` header asks for, given in seconds or as a date; 0 where it asks for nothing that can
    be read.
    """
    try:
        seconds = float(header or 0)
    except ValueError:
        try:
            seconds = mktime_tz(date) - time.time() if (date := parsedate_tz(header)) else 0.0
        except (ValueError, OverflowError):
            seconds = 0.0
    return max(0.0, seconds)
