"""Explanations of the features of runs, scored, as tables in their folders; and what they will take, beforehand."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from endwise.common.errors import Interrupted
from endwise.common.extras import check_extra
from endwise.explaining.asking import PURPOSES, Asking, Call, CallStats, Explained, run_async
from endwise.explaining.cache import ANSWERS_FILE, Answer, Cache, in_memory, opened, request_key
from endwise.explaining.endpoint import Endpoint
from endwise.explaining.preparing import PreparedRun, Say, prepare, silent
from endwise.explaining.prompts import read_prompts
from endwise.explaining.settings import Settings
from endwise.features.explanations import EXPLANATIONS_FOLDER, Explanations, read_explanations, write_explanations
from endwise.runs.finding import harvested_runs

PROGRESS_SECONDS = 15.0
CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class Estimate:
    runs: int
    features: int
    """Number over all runs."""
    left_out: int
    stats: CallStats
    """Calls to be made, answers that are kept, tokens."""


class _Estimator:
    """Stand-in for the endpoint: what is kept, or a stand-in that is counted."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._url = endpoint.url
        self._counted: set[tuple[int, str]] = set()
        self.stats = CallStats()

    async def ask(self, call: Call, cache: Cache) -> Answer | None:
        key = request_key(self._url, call.request)
        if (id(cache), key) in self._counted:
            return Answer(call.stand_in)
        if (kept := cache.get(key)) is not None:
            self.stats.kept += 1
            return kept
        self._counted.add((id(cache), key))
        self.stats.calls += 1
        self.stats.tokens_in += sum(_tokens(message["content"]) for message in call.request["messages"])
        self.stats.tokens_out += _tokens(call.stand_in)
        return Answer(call.stand_in)


def estimate(prepared: Sequence[PreparedRun], settings: Settings, endpoint: Endpoint) -> Estimate:
    """Estimate what explaining will take: the work is gone through with stand-ins for answers that are not kept yet,
    without a call and without a file. So the number of calls is that of the work itself, but for those that must be
    asked a second time. Tokens are counted as characters / 4, as English mostly comes to; a model that thinks before it
    answers writes more than is counted.

    Raises:
        FormatError, RunFolderError: kept answers cannot be read, or another process uses them.
    """
    estimator = _Estimator(endpoint)
    with ExitStack() as stack:
        caches = [stack.enter_context(_kept(each)) for each in prepared]
        askings = [Asking(each, settings, estimator, cache) for each, cache in zip(prepared, caches, strict=True)]
        run_async(_all(askings))
    features = sum(len(each.samples) for each in prepared)
    return Estimate(len(prepared), features, sum(len(each.left_out) for each in prepared), estimator.stats)


async def _all(askings: Sequence[Asking]) -> None:
    for asking in askings:
        await asking.all()


def _kept(prepared: PreparedRun) -> AbstractContextManager[Cache]:
    folder = prepared.run / EXPLANATIONS_FOLDER
    return opened(folder) if (folder / ANSWERS_FILE).exists() else in_memory()


def _tokens(text: str) -> int:
    return -(-len(text) // CHARACTERS_PER_TOKEN)


@dataclass(frozen=True)
class ExplainingPlan:
    """Facts known before the first call."""

    prepared: tuple[PreparedRun, ...]
    settings: Settings
    endpoint: Endpoint
    estimate: Estimate


def plan(runs: Iterable[Path], settings: Settings, endpoint: Endpoint, say: Say = silent) -> ExplainingPlan:
    """Choose features and texts, and count the calls; nothing is asked.

    Raises:
        ConfigError: a prompt or `settings.features` breaks a rule, or openai is not installed.
        RunFolderError, FormatError, DataError: see `prepare`.
    """
    check_extra("openai")
    read_prompts(PURPOSES, settings.prompts)  # which costs least, so that it fails first
    prepared = prepare(harvested_runs(runs), settings, say)
    return ExplainingPlan(tuple(prepared), settings, endpoint, estimate(prepared, settings, endpoint))


def explain(plan: ExplainingPlan, say: Say = silent) -> tuple[dict[Path, Explanations], CallStats]:
    """Make the calls that were planned and write each run's `explanations/`; what was answered before is not asked
    again. By run folder, and what it took.

    Raises:
        EndpointError: the endpoint refuses, or is gone; answers so far are kept.
        RunFolderError: a folder cannot be written, or another process explains there.
        Interrupted: by Ctrl-C; answers so far are kept.
    """
    try:
        stats = run_async(_explain(plan, say))
    except KeyboardInterrupt:
        raise Interrupted("Stopped; every answer so far is kept. The same command resumes from here.") from None
    found = {each.run: read_explanations(each.run) for each in plan.prepared}
    return {run: explanations for run, explanations in found.items() if explanations is not None}, stats


async def _explain(plan: ExplainingPlan, say: Say) -> CallStats:
    from endwise.explaining.client import connected

    stats_by_run = [CallStats() for _ in plan.prepared]
    expected = plan.estimate.stats.calls + plan.estimate.stats.kept
    async with connected(plan.endpoint, plan.settings.retry) as client, _reporting(stats_by_run, expected, say):
        for prepared, client.stats in zip(plan.prepared, stats_by_run, strict=True):
            with opened(prepared.run / EXPLANATIONS_FOLDER) as cache:
                explained = await Asking(prepared, plan.settings, client, cache).all()
                write_explanations(prepared.run, explained.rows, _about(plan, prepared, explained, client.stats))
    return sum(stats_by_run, CallStats())


def _about(plan: ExplainingPlan, prepared: PreparedRun, explained: Explained, stats: CallStats) -> dict[str, Any]:
    """Never the key, nor the name of its variable."""
    prompts = read_prompts(PURPOSES, plan.settings.prompts)
    harvest = prepared.harvest.about
    return {
        "endpoint": plan.endpoint.url,
        "settings": plan.settings.to_json(),
        "prompts": {name: sha256(prompt.text.encode()).hexdigest() for name, prompt in prompts.items()},
        "weights": harvest.get("weights"),
        "corpus": harvest.get("corpus"),
        "explained": len(explained.rows),
        "left_out": {str(feature): why for feature, why in sorted(explained.left_out.items())},
        "tally": {name: count for name, count in asdict(stats).items() if name != "last_failure"},
    }


@asynccontextmanager
async def _reporting(stats_by_run: Sequence[CallStats], expected: int, say: Say) -> AsyncIterator[None]:
    """Say now and then how far it is."""

    async def report() -> None:
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            stats = sum(stats_by_run, CallStats())
            done = stats.calls + stats.kept + stats.failed
            say(f"{done:,} of about {expected:,} answers, {stats.failed:,} calls failed, {stats.retries:,} tried again")

    task = asyncio.create_task(report())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def estimate_lines(made: Estimate, prices: Sequence[float | None]) -> list[str]:
    """The estimate as sentences.

    Args:
        prices: per million tokens in and out; unset where they are not known.
    """
    price_in, price_out = prices
    stats = made.stats
    work = (
        f"{made.features:,} feature{'s' * (made.features != 1)} of {made.runs:,} run{'s' * (made.runs > 1)}: "
        f"{stats.calls:,} calls to make, "
        f"{stats.kept:,} answers are kept from before."
    )
    size = (
        f"About {stats.tokens_in:,} tokens in and {stats.tokens_out:,} out (characters / 4; more if the model thinks "
        "before it answers, or an answer must be asked for again)."
    )
    lines = [work, size]
    if price_in is not None and price_out is not None:
        price = (stats.tokens_in * price_in + stats.tokens_out * price_out) / 1e6
        lines.append(f"At {price_in:g} and {price_out:g} per million tokens: about {price:.2f}.")
    elif stats.calls:
        lines.append("For the cost, give the prices per million tokens, --price-in and --price-out.")
    if made.left_out:
        lines.append(f"{made.left_out:,} features were skipped: too few texts (explanations.json says why).")
    return lines
