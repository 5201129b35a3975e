"""Calls of chat completions: kept answers first, then the network, by openai's client.

openai makes the attempts and the growing pauses between them: at 408, 409, 425, 429, 5xx, no connection, no answer in
time, an answer cut off, an answer of another shape. Everything else is the caller's to put right and ends the whole
work at once. A redirect is never followed: the key belongs to the host that was named.
"""

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from email.utils import mktime_tz, parsedate_tz
from functools import cache
from typing import Any

import httpx2 as httpx
from openai import APIConnectionError, AsyncOpenAI

from endwise.common.errors import EndpointError
from endwise.common.text import printable, storable
from endwise.explaining.asking import Call, CallStats
from endwise.explaining.cache import Answer, Cache, request_key
from endwise.explaining.endpoint import Endpoint
from endwise.explaining.settings import RetryPolicy


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


LONGEST_WAIT = 900.0
"""Seconds of a `Retry-After` that are waited."""
LONGEST_QUOTE = 300
"""Characters of a server's own words in an error."""
_RESUMES = "Explaining again resumes from here."


class Client(httpx.AsyncBaseTransport):
    """Asks one endpoint, for several runs; each call says where its answer is kept.

    It is also the transport below openai's client, which makes one attempt: what the environment's `OPENAI_*` add to
    a request is not sent.
    """

    def __init__(self, http: httpx.AsyncClient, endpoint: Endpoint, retry: RetryPolicy, pace: Pace) -> None:
        self._http, self._endpoint, self._retry, self._pace = http, endpoint, retry, pace
        self._openai = AsyncOpenAI(
            base_url=endpoint.url,
            api_key="added by each attempt",
            max_retries=retry.attempts - 1,
            http_client=httpx.AsyncClient(transport=self, trust_env=False),
        )
        self.stats = CallStats()
        self._places = asyncio.Semaphore(retry.concurrency)
        self._flying: dict[tuple[int, str], asyncio.Future[Answer | None]] = {}
        self._failed_in_a_row = 0

    async def ask(self, call: Call, cache: Cache) -> Answer | None:
        """The answer to a call; None if it failed in every attempt. Equal requests at a time make one call.

        Raises:
            EndpointError: nothing more can be asked.
        """
        key = request_key(self._endpoint.url, call.request)
        place = id(cache), key
        if place in self._flying:
            return await asyncio.shield(self._flying[place])
        if (kept := cache.get(key)) is not None:
            self.stats.kept += 1
            return kept
        self._flying[place] = asyncio.ensure_future(self._call(call.request, cache, key))
        try:
            return await self._flying[place]
        finally:
            del self._flying[place]

    async def _call(self, request: Mapping[str, Any], cache: Cache, key: str) -> Answer | None:
        async with self._places:
            try:
                response = await self._openai.post(self._endpoint.url, cast_to=httpx.Response, body=dict(request))
            except APIConnectionError as error:
                self.stats.failed += 1
                self.stats.last_failure = str(error.__cause__)
                self._failed_in_a_row += 1
                if self._failed_in_a_row >= self._retry.give_up:
                    raise EndpointError(
                        f"{self._endpoint.url} does not answer: the last {self._failed_in_a_row} calls failed "
                        f"{self._retry.attempts} times each, the last one because {error.__cause__}. Check the "
                        f"server, or raise --timeout or lower --concurrency. {_RESUMES}"
                    ) from None
                return None
            answer = response.extensions["found"]
            if isinstance(answer, EndpointError):
                raise answer
            cache.put(key, answer)
            self._failed_in_a_row = 0
            self.stats.calls += 1
            self.stats.tokens_in += answer.tokens_in or 0
            self.stats.tokens_out += answer.tokens_out or 0
            return answer

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Make one attempt. `found` in the extensions is an answer, or an error that no other attempt will mend.

        Raises:
            httpx.RequestError: it failed in a way that may pass; openai makes another.
        """
        self.stats.retries += request.headers.get("x-stainless-retry-count", "0") != "0"
        headers = {"Content-Type": "application/json", **self._endpoint.headers}
        await self._pace.wait()
        body = bytearray()
        try:
            async with (
                asyncio.timeout(self._retry.timeout),
                self._http.stream("POST", self._endpoint.url, content=request.content, headers=headers) as response,
            ):
                async for part in response.aiter_bytes():
                    body += part
                    if len(body) > self._retry.largest_answer:
                        break
        except TimeoutError:
            raise httpx.RequestError(f"no answer came within {self._retry.timeout:g} s (--timeout)") from None
        except httpx.RequestError as error:
            quoted = self._quote(str(error)) or "the connection broke"
            raise httpx.RequestError(f"of {type(error).__name__}: {quoted}") from None
        if response.status_code != 200:
            return httpx.Response(200, extensions={"found": self._refused(response, bytes(body))})
        if len(body) > self._retry.largest_answer:
            raise httpx.RequestError(f"the answer has more than {self._retry.largest_answer:,} bytes")
        return httpx.Response(200, extensions={"found": _read(body)})

    def _refused(self, response: httpx.Response, body: bytes) -> EndpointError:
        """Say what a status other than 200 means; raised where it may pass."""
        status, url, quoted = response.status_code, self._endpoint.url, self._quote(_message(body))
        if status in (408, 409, 425, 429) or status >= 500:
            wait = retry_after(response.headers.get("Retry-After"))
            if b"insufficient_quota" in body:  # a 429 which no waiting helps
                return EndpointError(f"{url} says that the account is spent: {quoted} {_RESUMES}")
            if wait > LONGEST_WAIT:
                return EndpointError(
                    f"{url} asks to wait {wait:,.0f} s, more than {LONGEST_WAIT:,.0f}. Try again then. {_RESUMES}"
                )
            self._pace.pause(wait)
            raise httpx.RequestError(f"the server said {status}: {quoted}")
        if 300 <= status < 400:
            return EndpointError(
                f"{url} redirects to {self._quote(response.headers.get('Location', 'nowhere'))}, which is not "
                "followed: a key must not go to a host that was not named. Give that address as --endpoint if right."
            )
        return EndpointError(f"{url} refused the call ({status}: {quoted}) {self._remedy(status)}")

    def _remedy(self, status: int) -> str:
        if status in (401, 403):
            if self._endpoint.key_variable is None:
                return "Name the environment variable that holds the key: --key-variable NAME."
            return f"Put a key that it accepts into the environment variable {self._endpoint.key_variable}."
        if status == 404:
            return "Check --endpoint (it usually ends in /v1) and --model, a name that this server has."
        if status == 402:
            return f"The account is spent. {_RESUMES}"
        return f"Change what it names: --model, --max-tokens, --extra, or --shown for shorter prompts. {_RESUMES}"

    def _quote(self, text: str) -> str:
        return printable(" ".join(self._endpoint.hidden(text).split()))[:LONGEST_QUOTE]


@cache
def _certificates(trust_env: bool) -> ssl.SSLContext:
    """Authorities' certificates, which take longer to read than a call."""
    return httpx.create_ssl_context(trust_env=trust_env)


@asynccontextmanager
async def connected(endpoint: Endpoint, retry: RetryPolicy, pace: Pace | None = None) -> AsyncIterator[Client]:
    """A client with connections of its own. Proxies of the environment serve for other machines only."""
    limits, elsewhere = httpx.Limits(max_connections=retry.concurrency), not endpoint.is_local
    certificates = _certificates(elsewhere)
    async with httpx.AsyncClient(timeout=None, limits=limits, trust_env=elsewhere, verify=certificates) as http:
        yield Client(http, endpoint, retry, pace or Pace(retry.per_minute))


def _read(body: bytes | bytearray) -> Answer:
    try:
        value = json.loads(body)
        text = storable(value["choices"][0]["message"]["content"])
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        raise httpx.RequestError("the answer is not JSON with a text at choices[0].message.content") from None
    usage = value["usage"] if isinstance(value.get("usage"), dict) else {}
    tokens = (usage.get(name) for name in ("prompt_tokens", "completion_tokens"))
    return Answer(text, *(count if isinstance(count, int) and 0 <= count < 1 << 40 else None for count in tokens))


def _message(body: bytes) -> str:
    """OpenAI's `error.message`; else the body as it stands."""
    try:
        value = json.loads(body)
        text = value.get("error", value)
        text = text if isinstance(text, str) else text["message"]
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        text = None
    return text if isinstance(text, str) else body[: 4 * LONGEST_QUOTE].decode("utf-8", "replace")
