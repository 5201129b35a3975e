"""Pace of calls: so many a minute, none while the server has asked to wait; and how long to back off."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

LONGEST_BACK_OFF = 60.0
"""Seconds."""


class Pace:
    """Shared by all calls.

    Args:
        per_minute: starts of calls, evenly spread; None: as many as there are.
        clock, sleep: by which time is measured and passes; unset: the event loop's.
    """

    def __init__(
        self,
        per_minute: float | None,
        clock: Callable[[], float] | None = None,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self.sleep = sleep
        self._between = 0.0 if per_minute is None else 60.0 / per_minute
        self._clock = clock or (lambda: asyncio.get_running_loop().time())
        self._next = 0.0
        self._not_before = 0.0

    def reserve(self) -> float:
        """Take the next place; the seconds until it comes."""
        now = self._clock()
        start = max(now, self._next, self._not_before)
        self._next = start + self._between
        return start - now

    def pause(self, seconds: float) -> None:
        """No call starts within these seconds: what one was asked to wait holds for all."""
        self._not_before = max(self._not_before, self._clock() + seconds)

    @property
    def paused(self) -> float:
        """Seconds for which no call may start."""
        return max(0.0, self._not_before - self._clock())

    async def wait(self) -> None:
        await self.sleep(self.reserve())
        while self.paused > 0:  # asked for meanwhile
            await self.sleep(self.paused)


def back_off(attempt: int, first: float = 1.0, jitter: Callable[[], float] = random.random) -> float:
    """Seconds before attempt 1, 2, …: doubling from the first up to `LONGEST_BACK_OFF`, of which a random half to the
    whole, so that calls that failed together do not come back together.
    """
    most = min(LONGEST_BACK_OFF, first * 2 ** min(attempt - 1, 30))
    return most * (0.5 + 0.5 * jitter())


def retry_after(header: str | None, now: datetime | None = None) -> float | None:
    """Seconds that a `Retry-After` header asks for, given in seconds or as a date; None where it asks for nothing that
    can be read.
    """
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            until = parsedate_to_datetime(header)
        except (ValueError, TypeError, OverflowError):
            return None
        until = until if until.tzinfo is not None else until.replace(tzinfo=UTC)
        seconds = (until - (now or datetime.now(UTC))).total_seconds()
    return max(0.0, seconds) if seconds == seconds else None
