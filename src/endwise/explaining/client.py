"""Calls of chat completions: kept answers first, then the network, with retries for servers that misbehave.

Tried again, after a growing pause: 408, 409, 425, 429, 5xx, no connection, no answer in time, an answer cut off, an
answer of another shape. Everything else is the caller's to put right and ends the whole work at once. A redirect is
never followed: the key belongs to the host that was named.
"""

import asyncio
import json
import math
from collections.abc import AsyncIterator, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx2 as httpx

from endwise.common.errors import ConfigError, EndpointError
from endwise.common.text import printable, storable
from endwise.explaining.cache import Answer, Cache, request_key
from endwise.explaining.endpoint import Endpoint
from endwise.explaining.pacing import Pace, back_off, retry_after

LONGEST_WAIT = 900.0
"""Seconds of a `Retry-After` that are waited."""
TOLD = 300
"""Characters of a server's own words in an error."""

_TRIED_AGAIN = frozenset({408, 409, 425, 429})


def check_least(options: object, bounds: Mapping[str, int]) -> None:
    """
    Raises:
        ConfigError: an option of the command is below its bound.
    """
    for name, least in bounds.items():
        if (given := getattr(options, name)) < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}; given {given}.")


@dataclass(frozen=True)
class RetryPolicy:
    """Settings of how calls are made."""

    timeout: float = 120.0
    """Seconds for one attempt, from its start to the answer's last byte."""
    attempts: int = 6
    concurrency: int = 4
    per_minute: float | None = None
    first_back_off: float = 1.0
    """Seconds before the second attempt, which double from one to the next."""
    give_up: int = 8
    """Calls in a row that failed in every attempt, after which the server counts as gone."""
    largest_answer: int = 4 << 20
    """Bytes of a response."""

    def __post_init__(self) -> None:
        for name, value in {"timeout": self.timeout, "per-minute": self.per_minute}.items():
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"--{name} must be above 0; given {value:g}.")
        check_least(self, {"attempts": 1, "concurrency": 1})


@dataclass
class CallStats:
    """Counts of what was done, for progress and for the record."""

    calls: int = 0
    """Answered over the network."""
    kept: int = 0
    """Answered from what was kept."""
    failed: int = 0
    """Calls that failed in every attempt."""
    last_failure: str = field(default="", compare=False)
    """Reason why the last of them did."""
    unreadable: int = 0
    """Answers that could not be read, even when asked again."""
    retries: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    """As the server counted, of the calls over the network."""

    def __add__(self, other: "CallStats") -> "CallStats":
        counts = {name: value + getattr(other, name) for name, value in vars(self).items() if name != "last_failure"}
        return CallStats(**counts, last_failure=other.last_failure or self.last_failure)

    def __str__(self) -> str:
        return (
            f"{self.calls:,} calls, {self.kept:,} answers from before, {self.retries:,} tried again, "
            f"{self.failed:,} calls failed, {self.unreadable:,} answers could not be read; {self.tokens_in:,} tokens "
            f"in, {self.tokens_out:,} out."
        )


class Retryable(Exception):
    """Fault that may be gone at another attempt."""

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


class Client:
    """Asks one endpoint, for several runs; each call says where its answer is kept."""

    def __init__(self, http: httpx.AsyncClient, endpoint: Endpoint, retry: RetryPolicy, pace: Pace) -> None:
        self._http, self._endpoint, self._retry, self._pace = http, endpoint, retry, pace
        self.stats = CallStats()
        self._places = asyncio.Semaphore(retry.concurrency)
        self._flying: dict[tuple[int, str], asyncio.Future[Answer | None]] = {}
        self._failed_in_a_row = 0

    async def ask(self, request: Mapping[str, Any], cache: Cache, stand_in: str = "") -> Answer | None:
        """The answer to a request; None if it failed in every attempt. Equal requests at a time make one call.

        Args:
            stand_in: not used; see `asking.Asker`.

        Raises:
            EndpointError: nothing more can be asked.
        """
        key = request_key(self._endpoint.url, request)
        flying = self._flying.get((id(cache), key))
        if flying is not None:
            return await asyncio.shield(flying)
        if (kept := cache.get(key)) is not None:
            self.stats.kept += 1
            return kept
        call = asyncio.ensure_future(self._call(request, cache, key))
        self._flying[id(cache), key] = call
        try:
            return await call
        finally:
            self._flying.pop((id(cache), key), None)

    async def _call(self, request: Mapping[str, Any], cache: Cache, key: str) -> Answer | None:
        async with self._places:
            try:
                answer = await self._patiently(request)
            except Retryable as error:
                self.stats.failed += 1
                self.stats.last_failure = str(error)
                self._failed_in_a_row += 1
                if self._failed_in_a_row >= self._retry.give_up:
                    raise EndpointError(
                        f"{self._endpoint.url} does not answer: the last {self._retry.give_up} calls failed "
                        f"{self._retry.attempts} times each, the last one because {error}. See to the server, or "
                        "raise --timeout or lower --concurrency; then explain again, which resumes from here."
                    ) from None
                return None
            self._failed_in_a_row = 0
            cache.put(key, answer)
            self.stats.calls += 1
            self.stats.tokens_in += answer.tokens_in or 0
            self.stats.tokens_out += answer.tokens_out or 0
            return answer

    async def _patiently(self, request: Mapping[str, Any]) -> Answer:
        for attempt in range(1, self._retry.attempts + 1):
            await self._pace.wait()
            try:
                return await self._once(request)
            except Retryable as error:
                if error.wait is not None:
                    self._pace.pause(error.wait)
                if attempt == self._retry.attempts:
                    raise
                self.stats.retries += 1
                await self._pace.sleep(max(back_off(attempt, self._retry.first_back_off), error.wait or 0.0))
        raise AssertionError  # there is at least one attempt

    async def _once(self, request: Mapping[str, Any]) -> Answer:
        try:
            async with asyncio.timeout(self._retry.timeout):
                async with self._http.stream(
                    "POST", self._endpoint.url, json=dict(request), headers=self._endpoint.headers
                ) as response:
                    body = await self._body(response)
        except TimeoutError:
            raise Retryable(f"no answer came within {self._retry.timeout:g} s (--timeout)") from None
        except httpx.UnsupportedProtocol as error:
            raise EndpointError(f"{self._endpoint.url} cannot be asked ({error}). Correct --endpoint.") from None
        except (httpx.HTTPError, httpx.StreamError) as error:
            told = self._told(str(error)) or "the connection broke"
            raise Retryable(f"of {type(error).__name__}: {told}") from None
        if response.status_code != 200:
            self._refused(response, body)
        return _answer(body)

    async def _body(self, response: httpx.Response) -> bytes:
        body = bytearray()
        async for part in response.aiter_bytes():
            body += part
            if len(body) > self._retry.largest_answer:
                raise Retryable(f"the answer has more than {self._retry.largest_answer:,} bytes")
        return bytes(body)

    def _refused(self, response: httpx.Response, body: bytes) -> None:
        """Raises what a status other than 200 means."""
        status, told = response.status_code, self._told(_error_text(body))
        if status in _TRIED_AGAIN or status >= 500:
            wait = retry_after(response.headers.get("Retry-After"))
            if _is_spent(body):
                raise EndpointError(f"{self._endpoint.url} says that the account is spent: {told} {_GOES_ON}")
            if wait is not None and wait > LONGEST_WAIT:
                raise EndpointError(
                    f"{self._endpoint.url} asks to wait {wait:,.0f} s, more than {LONGEST_WAIT:,.0f}. Come back then. "
                    + _GOES_ON
                )
            raise Retryable(f"the server said {status}: {told}", wait)
        if 300 <= status < 400:
            where = self._told(response.headers.get("Location", "nowhere"))
            raise EndpointError(
                f"{self._endpoint.url} sends on to {where}, which is not followed: a key must not go to a host that "
                "was not named. Give that address as --endpoint if it is right."
            )
        raise EndpointError(f"{self._endpoint.url} refused the call ({status}: {told}) {self._remedy(status)}")

    def _remedy(self, status: int) -> str:
        variable = self._endpoint.key_variable
        if status in (401, 403):
            if variable is None:
                return "Name the environment variable that holds the key: --key-variable NAME."
            return f"Put a key that it accepts into the environment variable {variable}."
        if status == 404:
            return "Check --endpoint (it mostly ends in /v1) and --model, a name that this server has."
        if status == 402:
            return f"The account is spent. {_GOES_ON}"
        return "Change what it names: --model, --max-tokens, --extra, or --shown for shorter prompts. " + _GOES_ON

    def _told(self, text: str) -> str:
        return printable(" ".join(self._endpoint.hidden(text).split()))[:TOLD]


_GOES_ON = "Explaining again resumes from here."


@asynccontextmanager
async def connected(endpoint: Endpoint, retry: RetryPolicy, pace: Pace | None = None) -> AsyncIterator[Client]:
    """A client with connections of its own. Proxies of the environment serve for other machines only."""
    limits = httpx.Limits(max_connections=retry.concurrency)
    async with httpx.AsyncClient(
        timeout=retry.timeout, limits=limits, follow_redirects=False, trust_env=not endpoint.is_local
    ) as http:
        yield Client(http, endpoint, retry, pace or Pace(retry.per_minute))


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _answer(body: bytes) -> Answer:
    value = _parsed(body)
    if value is None:
        raise Retryable("the answer is no whole JSON")
    try:
        text = value["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        text = None
    if not isinstance(text, str):
        raise Retryable("the answer has no text at choices[0].message.content")
    usage = value.get("usage")
    counted = usage if isinstance(usage, dict) else {}
    return Answer(storable(text), _count(counted.get("prompt_tokens")), _count(counted.get("completion_tokens")))


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and 0 <= value < 1 << 40 else None


def _error(body: bytes) -> Any:
    value = _parsed(body)
    return value.get("error", value) if isinstance(value, dict) else None


def _error_text(body: bytes) -> str:
    error = _error(body)
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) else body[: 4 * TOLD].decode("utf-8", "replace")


def _is_spent(body: bytes) -> bool:
    """OpenAI's 429 of an account without money, which no waiting helps."""
    error = _error(body)
    return isinstance(error, dict) and "insufficient_quota" in (error.get("code"), error.get("type"))


Result = TypeVar("Result")


def run_async(work: Coroutine[Any, Any, Result]) -> Result:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
