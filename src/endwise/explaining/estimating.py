"""What explaining will take, before it starts: the work is gone through with stand-ins for answers not yet kept.

So the number of calls is that of the work itself, but for those that must be asked a second time. Tokens are counted as
characters / 4, as English mostly comes to; a model that thinks before it answers writes more than is counted.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

from endwise.explaining.asking import Asking
from endwise.explaining.cache import ANSWERS_FILE, Answer, Cache, in_memory, opened, request_key
from endwise.explaining.client import CallStats, run_async
from endwise.explaining.endpoint import Endpoint
from endwise.explaining.preparing import PreparedRun
from endwise.explaining.settings import Settings
from endwise.features.explanations import EXPLANATIONS_FOLDER

CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class Estimate:
    runs: int
    features: int
    """Of all runs."""
    left_out: int
    calls: int
    """To be made."""
    kept: int
    """That need not be made again."""
    tokens_in: int
    tokens_out: int

    def price(self, price_in: float, price_out: float) -> float:
        """In the currency of the prices, which are per million tokens."""
        return (self.tokens_in * price_in + self.tokens_out * price_out) / 1e6


class _Estimator:
    """In the endpoint's place: what is kept, or a stand-in that is counted."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._url = endpoint.url
        self._counted: set[tuple[int, str]] = set()
        self.stats = CallStats()

    async def ask(self, request: Mapping[str, Any], cache: Cache, stand_in: str) -> Answer | None:
        key = request_key(self._url, request)
        if (id(cache), key) in self._counted:
            return Answer(stand_in)
        if (kept := cache.get(key)) is not None:
            self.stats.kept += 1
            return kept
        self._counted.add((id(cache), key))
        self.stats.calls += 1
        self.stats.tokens_in += sum(_tokens(message["content"]) for message in request["messages"])
        self.stats.tokens_out += _tokens(stand_in)
        return Answer(stand_in)


def estimate(prepared: Sequence[PreparedRun], settings: Settings, endpoint: Endpoint) -> Estimate:
    """Makes no call and no file.

    Raises:
        FormatError, RunFolderError: kept answers cannot be read, or another process uses them.
    """
    estimator = _Estimator(endpoint)
    with ExitStack() as stack:
        caches = [stack.enter_context(_kept(each)) for each in prepared]
        askings = [Asking(each, settings, estimator, cache) for each, cache in zip(prepared, caches, strict=True)]
        run_async(_all(askings))
    stats = estimator.stats
    return Estimate(
        runs=len(prepared),
        features=sum(len(each.samples) for each in prepared),
        left_out=sum(len(each.left_out) for each in prepared),
        calls=stats.calls,
        kept=stats.kept,
        tokens_in=stats.tokens_in,
        tokens_out=stats.tokens_out,
    )


async def _all(askings: Sequence[Asking]) -> None:
    for asking in askings:
        await asking.all()


def _kept(prepared: PreparedRun) -> AbstractContextManager[Cache]:
    folder = prepared.run / EXPLANATIONS_FOLDER
    return opened(folder) if (folder / ANSWERS_FILE).exists() else in_memory()


def _tokens(text: str) -> int:
    return -(-len(text) // CHARACTERS_PER_TOKEN)
