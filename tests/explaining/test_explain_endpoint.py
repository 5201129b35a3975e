"""Calls to servers that misbehave: what is tried again, what ends the work, what is never repeated."""

import asyncio
import io
import json
import logging
import signal
import sqlite3
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import openai
import pytest
from typer.testing import CliRunner

from bad_input import HOSTILE, hidden_in
from chat_server import chat_server, completion, perfect, reset, respond
from endwise.cli import app
from endwise.common.errors import ConfigError, EndpointError, FormatError, RunFolderError
from endwise.explaining.asking import Call, CallStats, run_async
from endwise.explaining.cache import Answer, in_memory, opened, request_key
from endwise.explaining.client import Pace, connected, retry_after
from endwise.explaining.endpoint import Endpoint, find_endpoint
from endwise.explaining.explain import Estimate, estimate_lines, explain, plan
from endwise.explaining.settings import RetryPolicy, Settings
from endwise.features.explanations import read_explanations
from warm import Warm
from word_harvests import make_run

KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)


def ask(url, *prompts, key=None, cache=None, pace=None, **retry):
    """The answers to prompts, asked at once, and the tally."""
    endpoint = Endpoint(f"{url}/chat/completions", key, None if key is None else "KEY")
    retry = RetryPolicy(**{"timeout": 5.0, "attempts": 4, **retry})

    async def work(cache):
        async with connected(endpoint, retry, pace) as client:
            calls = [Call(Settings(model="m").request("m", prompt)) for prompt in prompts]
            return await asyncio.gather(*(client.ask(call, cache) for call in calls)), client.stats

    if cache is not None:
        return asyncio.run(work(cache))
    with in_memory() as cache:
        return asyncio.run(work(cache))


def text_of(answers):
    return [None if answer is None else answer.text for answer in answers]


def first_times(count, does):
    """Misbehaves for the first `count` requests."""

    def misbehave(handler, number):
        if number > count:
            return False
        does(handler)
        return True

    return misbehave


def test_an_answer_with_what_it_took():
    with chat_server(answer=lambda prompt: prompt.upper()) as server:
        answers, tally = ask(server.url, "abc")
    assert answers == [Answer("ABC", 100, 10)]
    assert (tally.calls, tally.tokens_in, tally.tokens_out, tally.retries) == (1, 100, 10, 0)
    request = json.loads(server.requests[0])
    assert request["messages"] == [{"role": "user", "content": "abc"}] and request["model"] == "m"


def test_nothing_of_the_environment_is_sent(monkeypatch):
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "authorization: Bearer leaked\nX-Mine: leaked")
    for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID"):
        monkeypatch.setenv(f"OPENAI_{name}", "leaked")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with chat_server(answer=lambda prompt: "good") as server:
        answers, _ = ask(server.url, "abc")
        assert text_of(answers) == ["good"] and "leaked" not in str(server.headers)
        assert "Authorization" not in server.headers[0]
        ask(server.url, "abc", key=KEY)
        assert server.headers[1]["Authorization"] == f"Bearer {KEY}" and "leaked" not in str(server.headers)


MISBEHAVIOUR = {
    "429": lambda handler: respond(handler, 429, '{"error": {"message": "slow down"}}'),
    "500": lambda handler: respond(handler, 500, "<html>oops</html>"),
    "503": lambda handler: respond(handler, 503, ""),
    "425": lambda handler: respond(handler, 425, "too early"),
    "told not to": lambda handler: respond(handler, 500, "{}", x_should_retry="false"),
    "reset": reset,
    "truncated": lambda handler: respond(handler, 200, completion("abc")[:-7]),
    "no choices": lambda handler: respond(handler, 200, '{"choices": []}'),
    "a list": lambda handler: respond(handler, 200, "[1, 2]"),
    "no text": lambda handler: respond(handler, 200, '{"choices": [{"message": {"content": null}}]}'),
    "nested": lambda handler: respond(handler, 200, "[" * 100_000),
    "not UTF-8": lambda handler: respond(handler, 200, "\udcff".encode("utf-8", "surrogateescape").decode("latin-1")),
}


@pytest.mark.parametrize("how", MISBEHAVIOUR)
def test_what_may_pass_is_tried_again(how):
    with chat_server(answer=lambda prompt: "good", misbehave=first_times(2, MISBEHAVIOUR[how])) as server:
        answers, tally = ask(server.url, "abc")
    assert text_of(answers) == ["good"] and len(server.requests) == 3
    assert (tally.calls, tally.retries, tally.failed) == (1, 2, 0)


@pytest.mark.parametrize("how", ["500", "truncated", "no choices", "reset"])
def test_what_does_not_pass_counts_as_failed_and_is_not_kept(how):
    with in_memory() as cache:
        with chat_server(misbehave=first_times(99, MISBEHAVIOUR[how])) as server:
            answers, tally = ask(server.url, "abc", cache=cache, attempts=3)
        assert answers == [None] and len(server.requests) == 3
        assert (tally.calls, tally.retries, tally.failed) == (0, 2, 1)
        with chat_server(answer=lambda prompt: "good") as server:
            assert text_of(ask(server.url, "abc", cache=cache)[0]) == ["good"]


def test_a_slow_server_is_given_up_and_tried_again():
    done = threading.Event()
    with chat_server(answer=lambda prompt: "good", misbehave=first_times(1, lambda handler: done.wait(20))) as server:
        answers, tally = ask(server.url, "abc", timeout=0.5)
        done.set()
    assert text_of(answers) == ["good"] and tally.retries == 1


def test_a_server_that_drips_is_given_up_as_well():
    done = threading.Event()

    def drip(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000000")
        handler.end_headers()
        while not done.wait(0.05):
            handler.wfile.write(b" ")

    with chat_server(answer=lambda prompt: "good", misbehave=first_times(1, drip)) as server:
        answers, tally = ask(server.url, "abc", timeout=0.5)
        done.set()
    assert text_of(answers) == ["good"] and tally.retries == 1


def test_an_answer_without_end_is_not_read_to_its_end():
    with chat_server(answer=lambda prompt: "x" * 100_000) as server:
        answers, tally = ask(server.url, "abc", attempts=2, largest_answer=1000)
    assert answers == [None] and tally.failed == 1


class Recorded(Pace):
    """Keeps what it was asked to wait, and does not wait."""

    def __init__(self):
        super().__init__(None)
        self.paused = []

    def pause(self, seconds):
        self.paused.append(seconds)


def test_retry_after_is_waited_by_every_call():
    pace = Recorded()
    busy = first_times(1, lambda handler: respond(handler, 429, "{}", Retry_After="700"))
    with chat_server(answer=lambda prompt: "good", misbehave=busy) as server:
        answers, _ = ask(server.url, "abc", pace=pace)
    assert text_of(answers) == ["good"] and pace.paused == [700.0]


def test_retry_after_as_seconds_or_as_a_date():
    assert retry_after("1.5") == 1.5 and retry_after("-3") == 0
    now = datetime.now(UTC)
    assert retry_after(format_datetime(now + timedelta(days=1), usegmt=True)) == pytest.approx(86400, abs=60)
    assert retry_after(format_datetime(now - timedelta(seconds=30), usegmt=True)) == 0
    assert [retry_after(each) for each in (None, "", "soon", "nan", "Thu, 01 Jan 99999 99:99:99 GMT")] == [0] * 5


class Skipping(asyncio.SelectorEventLoop):
    """A loop whose clock starts at 100 and runs on at once where all that is left is waiting."""

    def __init__(self):
        super().__init__()
        self.now, wait = 100.0, self._selector.select

        def select(timeout=None):
            self.now += timeout or 0.0
            return wait(0)

        self._selector.select = select

    def time(self):
        return self.now


def test_pace_spreads_calls_and_pauses():
    async def starts(per_minute, pauses=()):
        pace, loop, found = Pace(per_minute), asyncio.get_running_loop(), []

        async def start():
            await pace.wait()
            found.append(round(loop.time() - 100, 6))

        for after, seconds in pauses:
            loop.call_later(after, pace.pause, seconds)
        await asyncio.gather(*(start() for _ in range(4)))
        await asyncio.sleep(10)
        await start()
        return found

    def run(*given):
        with asyncio.Runner(loop_factory=Skipping) as runner:
            return runner.run(starts(*given))

    assert run(120.0) == [0, 0.5, 1.0, 1.5, 11.5]
    assert run(None) == [0, 0, 0, 0, 10]
    assert run(120.0, [(0.75, 5.0), (1.0, 0.1)]) == [0, 0.5, 5.75, 6.25, 16.25]  # asked for while others wait


def test_no_more_calls_at_a_time_than_allowed():
    gate = threading.Barrier(3)

    def together(prompt):
        gate.wait(10)  # three must be there at once, or this breaks
        return "good"

    with chat_server(answer=together) as server:
        answers, _ = ask(server.url, *map(str, range(12)), concurrency=3)
    assert text_of(answers) == ["good"] * 12 and server.most_at_once == 3


@pytest.mark.parametrize(
    ("status", "remedy"),
    [(401, "--key-variable"), (403, "--key-variable"), (404, "--model"), (400, "--max-tokens"), (402, "spent")],
)
def test_what_will_not_pass_ends_the_work_at_once(status, remedy):
    body = json.dumps({"error": {"message": f"no {HOSTILE} {'x' * 5000}"}})
    with chat_server(misbehave=first_times(99, lambda handler: respond(handler, status, body))) as server:
        with pytest.raises(EndpointError) as caught:
            ask(server.url, "abc")
        assert len(server.requests) == 1
    message = str(caught.value)
    assert str(status) in message and remedy in message and len(message) < 1000 and not hidden_in(message)


def test_an_empty_account_is_not_waited_for():
    body = '{"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}'
    with chat_server(misbehave=first_times(99, lambda handler: respond(handler, 429, body))) as server:
        with pytest.raises(EndpointError, match="account is spent: You exceeded"):
            ask(server.url, "abc")
        assert len(server.requests) == 1


def test_a_wait_without_end_is_not_waited():
    with (
        chat_server(misbehave=first_times(9, lambda handler: respond(handler, 429, "{}", Retry_After="1e9"))) as server,
        pytest.raises(EndpointError, match="asks to wait 1,000,000,000 s"),
    ):
        ask(server.url, "abc")


def test_a_redirect_is_not_followed_and_the_key_does_not_leave():
    with chat_server() as elsewhere, chat_server() as server:
        target = f"{elsewhere.url}/chat/completions"
        for status in (301, 302, 307, 308):
            server.misbehave = lambda handler, number, status=status: (
                respond(handler, status, "", Location=target) or True
            )
            with pytest.raises(EndpointError, match="not followed"):
                ask(server.url, "abc", key=KEY)
        assert not elsewhere.requests and server.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_a_server_that_is_gone_ends_the_work_after_some_calls():
    with chat_server() as server:
        pass
    with pytest.raises(EndpointError, match="does not answer: the last 3 calls failed 2 times each"):
        ask(server.url, *map(str, range(10)), attempts=2, concurrency=1, give_up=3)


def test_equal_requests_are_one_call_and_kept_ones_none():
    with chat_server(answer=lambda prompt: prompt) as server, in_memory() as cache:
        answers, tally = ask(server.url, "a", "a", "b", "a", cache=cache)
        assert text_of(answers) == ["a", "a", "b", "a"] and len(server.requests) == tally.calls == 2
        answers, tally = ask(server.url, "a", "b", cache=cache)
        assert text_of(answers) == ["a", "b"] and len(server.requests) == 2
        assert (tally.calls, tally.kept) == (0, 2)


def test_keys_of_answers_tell_everything_apart():
    base = {"model": "m", "messages": [], "temperature": 0.0}
    keys = {request_key("u", base), request_key("v", base), request_key("u", base | {"temperature": 0.5})}
    assert len(keys) == 3 and request_key("u", dict(reversed(base.items()))) in keys


def test_answers_are_kept_across_processes_and_damage_is_told(tmp_path):
    with opened(tmp_path) as cache:
        cache.put("k", Answer("text", 1, None))
        with pytest.raises(RunFolderError, match="Another process"), opened(tmp_path):
            pass
    with opened(tmp_path) as cache:
        assert cache.get("k") == Answer("text", 1, None) and cache.get("other") is None
    (tmp_path / "answers.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(FormatError, match="move it away"), opened(tmp_path):
        pass
    (tmp_path / "answers.sqlite").unlink()
    with sqlite3.connect(tmp_path / "answers.sqlite") as newer:
        newer.execute("PRAGMA user_version = 9")
    newer.close()
    with pytest.raises(FormatError, match="another version"), opened(tmp_path):
        pass


@pytest.mark.parametrize(
    "address",
    [
        "",
        "localhost:8080",
        "ftp://x/v1",
        "http://",
        "http://x/v1?a=b",
        "http://x/v1#a",
        "http://[::1/v1",
        "http://x:99999/v1",
    ],
)
def test_addresses_that_are_none_are_refused(address):
    with pytest.raises(ConfigError, match="--endpoint"):
        find_endpoint(address)


def test_addresses_and_keys(monkeypatch):
    monkeypatch.setenv("KEY", f" {KEY}\n")
    for address in (
        "https://api.example.com/v1",
        "https://api.example.com/v1/",
        "https://api.example.com/v1/chat/completions",
    ):
        found = find_endpoint(address, "KEY")
        assert found.url == "https://api.example.com/v1/chat/completions" and not found.is_local
        assert found.headers == {"Authorization": f"Bearer {KEY}"} and KEY not in repr(found)
    for address in ("http://127.0.0.1:1/v1", "http://localhost/v1", "http://[::1]:80/v1"):
        assert find_endpoint(address, "KEY").is_local and find_endpoint(address).headers == {}
    with pytest.raises(ConfigError, match=r"unencrypted to example\.com"):
        find_endpoint("http://example.com/v1", "KEY")
    assert not find_endpoint("http://example.com/v1").is_local
    with pytest.raises(ConfigError, match="user or a password") as caught:
        find_endpoint(f"https://me:{KEY}@example.com/v1")
    assert KEY not in str(caught.value)
    for value in ("", "   ", "two words", "schlüssel", "a\nb"):
        monkeypatch.setenv("KEY", value)
        with pytest.raises(ConfigError, match="KEY holds"):
            find_endpoint("https://example.com/v1", "KEY")
    with pytest.raises(ConfigError, match="not the key itself") as caught:
        find_endpoint("https://example.com/v1", KEY)
    assert KEY not in str(caught.value)


@pytest.fixture
def logged():
    handler, level = logging.StreamHandler(io.StringIO()), logging.root.level
    logging.root.addHandler(handler)
    logging.root.setLevel(logging.DEBUG)
    yield handler.stream
    logging.root.removeHandler(handler)
    logging.root.setLevel(level)


def test_the_key_is_in_no_file_no_log_and_no_message(tmp_path, monkeypatch, logged):
    monkeypatch.setenv("KEY", KEY)
    run = make_run(tmp_path / "run", 4)
    arguments = ["explain", run, "--model", "m", "--features", "all", "--key-variable", "KEY", "--yes", "--random", 1]
    with chat_server() as server:
        said = CliRunner().invoke(app, [*map(str, arguments), "--endpoint", server.url], catch_exceptions=False)
        assert said.exit_code == 0 and server.headers[0]["Authorization"] == f"Bearer {KEY}"
        body = json.dumps({"error": {"message": f"Incorrect API key: {KEY}"}})
        server.misbehave = lambda handler, number: respond(handler, 401, body) or True
        refused = CliRunner().invoke(app, [*map(str, arguments), "--endpoint", server.url, "--seed", "1"])
        assert refused.exit_code == 9 and "Incorrect API key: ***" in refused.stderr and "KEY" in refused.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"answers.sqlite", "explanations.json", "explanations.parquet"} <= {path.name for path in files}
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    assert KEY not in said.output + refused.output + logged.getvalue() and "chat/completions" in logged.getvalue()


def planned(run, url, **settings):
    retry = RetryPolicy(timeout=5.0, attempts=2, concurrency=1)
    return plan(
        [run],
        Settings(**{"model": "m", "features": "all", "random": 2, "retry": retry, **settings}),
        find_endpoint(url),
    )


def test_the_estimate_is_what_it_takes(tmp_path):
    run = make_run(tmp_path / "run", 6)
    with chat_server() as server:
        made = planned(run, server.url)
        assert not (run / "explanations").exists() and not server.requests
        found, tally = explain(made)
        assert made.estimate.stats.calls == tally.calls == len(server.requests) == 6 + 2 + (6 + 6 + 2) * 8
        characters = sum(len(json.loads(request)["messages"][0]["content"]) for request in server.requests)
        assert made.estimate.stats.tokens_in == pytest.approx(characters / 4, rel=0.1)
        again = planned(run, server.url)
        assert (again.estimate.stats.calls, again.estimate.stats.kept) == (0, tally.calls)
        more = planned(run, server.url, random=3)
        assert more.estimate.stats.calls == 1 + 8
    assert found[run] == read_explanations(run)
    about = found[run].about
    assert about["tally"]["calls"] == tally.calls and about["explained"] == 6
    assert about["settings"]["scorer_model"] == "m" and about["endpoint"].startswith(server.url)


def test_the_estimate_in_words():
    stats = CallStats(calls=6800, kept=10, tokens_in=3_000_000, tokens_out=100_000)
    made = Estimate(runs=2, features=400, left_out=3, stats=stats)
    lines = estimate_lines(made, (0.15, 0.6))
    assert lines[0] == "400 features of 2 runs: 6,800 calls to make, 10 answers are kept from before."
    assert "about 0.51" in lines[2] and "3 features were skipped" in lines[3]
    assert "--price-in" in estimate_lines(made, (None, 0.6))[2]


def test_work_that_was_broken_off_continues_without_repeating_a_call(tmp_path):
    run = make_run(tmp_path / "run", 6)
    with chat_server() as whole:
        reference = explain(planned(make_run(tmp_path / "reference", 6), whole.url))[0]
    with chat_server() as server:
        server.misbehave = lambda handler, number: number > 40 and (respond(handler, 401, "{}") or True)
        with pytest.raises(EndpointError):
            explain(planned(run, server.url))
        assert read_explanations(run) is None and sum(server.answered.values()) == 40
        server.misbehave = None
        found, tally = explain(planned(run, server.url))
        assert set(server.answered.values()) == {1} and tally.kept == 40
        assert tally.calls + 40 == len(server.answered) == len(whole.answered)
    assert found[run].rows == reference[tmp_path / "reference"].rows


@pytest.mark.parametrize(
    ("how", "status", "words"), [("SIGKILL", -9, ""), ("SIGINT", 130, "every answer so far is kept")]
)
def test_a_broken_off_run_continues_without_repeating_a_call(tmp_path, how, status, words):
    run = make_run(tmp_path / "run", 4)
    arguments = ["explain", run, "--model", "m", "--features", "all", "--random", 0, "--concurrency", 1, "--yes"]
    victim = []

    def kill(handler, number):
        if number != 30:
            return False
        victim[0].send_signal(getattr(signal, how))
        victim[0].wait()
        return True

    with chat_server(misbehave=kill) as server:
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, "text": True}
        with Warm("-m", "endwise", *arguments, "--endpoint", server.url, **streams) as process:
            victim.append(process)
            told = process.stderr.read()
        assert process.returncode == status and words in told and sum(server.answered.values()) == 29
        said = CliRunner().invoke(app, [*map(str, arguments), "--endpoint", server.url], catch_exceptions=False)
        assert said.exit_code == 0 and "29 answers are kept from before" in said.output
        assert set(server.answered.values()) == {1} and len(server.answered) == 4 + 2 * 4 * 8
    assert all(each.detection == 1 for each in read_explanations(run).rows)


def test_calls_that_fail_are_told_of_and_made_again_next_time(tmp_path):
    run = make_run(tmp_path / "run", 4)

    def misbehave(handler, number):
        return 20 < number <= 24 and (respond(handler, 500, "{}") or True)

    with chat_server(misbehave=misbehave) as server:
        found, tally = explain(planned(run, server.url, random=0))
        scores = [score for each in found[run].rows for score in each.scores.values()]
        assert tally.failed == 2 and sum(score.failed for score in scores) == 10
        assert all(each.detection == each.fuzzing == 1 for each in found[run].rows)
        found, tally = explain(planned(run, server.url, random=0))
        assert (tally.calls, tally.failed) == (2, 0)
        assert not any(score.failed for each in found[run].rows for score in each.scores.values())


def test_calls_that_fail_end_the_command_with_an_exit_code_of_their_own(tmp_path):
    run = make_run(tmp_path / "run", 4)
    options = ["--model", "m", "--attempts", 2, "--concurrency", 1, "--random", 0, "--yes"]

    def command(url, features="all"):
        given = ["explain", run, "--endpoint", url, "--features", features, *options]
        return CliRunner().invoke(app, [*map(str, given)])

    with chat_server(
        misbehave=lambda handler, number: 20 < number <= 24 and (respond(handler, 500, "{}") or True)
    ) as it:
        said = command(it.url)
        assert said.exit_code == EndpointError.exit_code == 9
        assert "2 of 68 calls failed in every attempt" in said.stderr and "the server said 500" in said.stderr
        again = command(it.url)
        assert again.exit_code == 0 and "2 calls to make" in again.output and "Next: " in again.output
    said = command(it.url.replace("/v1", "/dead/v1"), "0")  # fewer calls than those after which it gives up
    assert said.exit_code == 9 and "1 of 1 calls failed in every attempt" in said.stderr


def test_the_command_asks_before_it_pays(tmp_path):
    run = make_run(tmp_path / "run", 4)
    with chat_server() as server:
        arguments = ["explain", str(run), "--model", "m", "--endpoint", server.url, "--features", "all"]
        said = CliRunner().invoke(app, [*arguments, "--dry-run", "--price-in", "1", "--price-out", "2"])
        assert said.exit_code == 0 and "calls to make" in said.output and "At 1 and 2 per million" in said.output
        said = CliRunner().invoke(app, [*arguments, "--dry-run", "--json"])
        assert json.loads(said.stdout)["stats"]["calls"] > 0
        said = CliRunner().invoke(app, arguments)
        assert said.exit_code == 2 and "--yes" in said.stderr
        assert not server.requests and not (run / "explanations").exists()


def test_hostile_answers_stay_text(tmp_path):
    run = make_run(tmp_path / "run", 4)

    def hostile(prompt):
        return json.dumps({"explanation": HOSTILE}) if "20 texts" in prompt else perfect(f"{prompt} the word x")

    with chat_server(answer=hostile) as server:
        arguments = ["explain", str(run), "--model", HOSTILE, "--endpoint", server.url, "--features", "all", "--yes"]
        said = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert said.exit_code == 0 and not hidden_in(said.output)
    expected = " ".join(HOSTILE.split())
    assert {each.text for each in read_explanations(run).rows} == {expected}


def test_without_openai_nothing_is_begun(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ConfigError, match="openai is not installed"):
        plan([tmp_path / "nowhere"], Settings(model="m"), find_endpoint("http://127.0.0.1:9/v1"))


def test_it_runs_where_a_loop_runs_already():
    async def inner():
        return 3

    async def outer():
        return run_async(inner())

    assert asyncio.run(outer()) == run_async(inner()) == 3
