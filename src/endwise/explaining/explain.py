"""Explanations of the features of runs, scored, as tables in their folders."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from endwise.errors import Interrupted
from endwise.explaining.asking import PURPOSES, Asking, Explained
from endwise.explaining.cache import opened
from endwise.explaining.client import Client, Tally, connected
from endwise.explaining.endpoint import Endpoint
from endwise.explaining.estimating import Estimate, estimate
from endwise.explaining.event_loop import run_async
from endwise.explaining.preparing import Prepared, Say, prepare, unsaid
from endwise.explaining.prompts import read_prompts
from endwise.explaining.settings import Settings
from endwise.features.explanations import EXPLANATIONS_FOLDER, Explanations, read_explanations, write_explanations

PROGRESS_SECONDS = 15.0


@dataclass(frozen=True)
class Plan:
    """What is known before the first call."""

    prepared: tuple[Prepared, ...]
    settings: Settings
    endpoint: Endpoint
    estimate: Estimate


def plan(runs: Iterable[Path], settings: Settings, endpoint: Endpoint, say: Say = unsaid) -> Plan:
    """Chooses features and texts, and counts the calls; nothing is asked.

    Raises:
        ConfigError: a prompt or `settings.features` breaks a rule.
        RunFolderError, FormatError, DataError: see `prepare`.
    """
    read_prompts(PURPOSES, settings.prompts)  # which costs least, so that it is told first
    prepared = prepare(list(runs), settings, say)
    return Plan(tuple(prepared), settings, endpoint, estimate(prepared, settings, endpoint))


def explain(plan: Plan, say: Say = unsaid) -> tuple[dict[Path, Explanations], Tally]:
    """Makes the calls that were planned and writes each run's `explanations/`; what was answered before is not asked
    again. By run folder, and what it took.

    Raises:
        EndpointError: the endpoint refuses, or is gone; answers so far are kept.
        RunFolderError: a folder cannot be written, or another process explains there.
        Interrupted: by Ctrl-C; answers so far are kept.
    """
    try:
        tally = run_async(_explain(plan, say))
    except KeyboardInterrupt:
        raise Interrupted("Stopped; every answer so far is kept. The same command resumes from here.") from None
    found = {each.run: read_explanations(each.run) for each in plan.prepared}
    return {run: explanations for run, explanations in found.items() if explanations is not None}, tally


async def _explain(plan: Plan, say: Say) -> Tally:
    tallies = [Tally() for _ in plan.prepared]
    expected = plan.estimate.calls + plan.estimate.kept
    async with connected(plan.endpoint, plan.settings.patience) as client, _telling(tallies, expected, say):
        for prepared, client.tally in zip(plan.prepared, tallies, strict=True):
            with opened(prepared.run / EXPLANATIONS_FOLDER) as cache:
                explained = await Asking(prepared, plan.settings, client, cache).all()
                write_explanations(prepared.run, explained.rows, _about(plan, prepared, explained, client))
    return sum(tallies, Tally())


def _about(plan: Plan, prepared: Prepared, explained: Explained, client: Client) -> dict[str, Any]:
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
        "tally": asdict(client.tally),
    }


@asynccontextmanager
async def _telling(tallies: Sequence[Tally], expected: int, say: Say) -> AsyncIterator[None]:
    """Says now and then how far it is."""

    async def tell() -> None:
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            tally = sum(tallies, Tally())
            done = tally.calls + tally.kept + tally.failed
            say(f"{done:,} of about {expected:,} answers, {tally.failed:,} calls failed, {tally.retries:,} tried again")

    task = asyncio.create_task(tell())
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
    work = (
        f"{made.features:,} features of {made.runs:,} run{'s' * (made.runs > 1)}: {made.calls:,} calls to make, "
        f"{made.kept:,} answers are kept from before."
    )
    size = (
        f"About {made.tokens_in:,} tokens in and {made.tokens_out:,} out (characters / 4; more if the model thinks "
        "before it answers, or an answer must be asked for again)."
    )
    lines = [work, size]
    if price_in is not None and price_out is not None:
        lines.append(
            f"At {price_in:g} and {price_out:g} per million tokens: about {made.price(price_in, price_out):.2f}."
        )
    elif made.calls:
        lines.append("What it costs: name the prices per million tokens, --price-in and --price-out.")
    if made.left_out:
        lines.append(f"{made.left_out:,} features were passed over: too few texts (explanations.json says why).")
    return lines
