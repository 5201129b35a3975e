"""One run's explanations and scores from answers, whoever gives them: the endpoint, or the estimate in its place."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar, runtime_checkable

from endwise.common.seeds import numpy_stream
from endwise.explaining.answers import read_explanation
from endwise.explaining.cache import Answer, Cache
from endwise.explaining.preparing import PreparedRun
from endwise.explaining.prompts import Places, read_prompts
from endwise.explaining.rendering import Writer, numbered
from endwise.explaining.samples import ScoringSample
from endwise.explaining.scorers import SCORERS, Question, Scorer
from endwise.explaining.settings import Settings
from endwise.features.explanations import Explanation, Score

EXPLAIN = "explain"
"""The prompt that asks for an explanation; the others are called as their scorers."""
PURPOSES: dict[str, Places] = {EXPLAIN: Places(("examples",)), **{name: each.places for name, each in SCORERS.items()}}
REMINDER = "\n\nYour answer must be the JSON alone, complete, in exactly the form that is asked for above."
"""Added where an answer could not be read; the changed request is another call, asked once."""
STAND_IN_LENGTH = 120
"""Characters of the explanation that the estimate stands in."""
UNDERWAY = 256
"""Features whose prompts exist at a time: those of a whole dictionary would take gigabytes."""

Read = TypeVar("Read")
Found = TypeVar("Found")


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
    """Tokens as the server counted them, of the calls over the network."""

    def __add__(self, other: "CallStats") -> "CallStats":
        counts = {name: value + getattr(other, name) for name, value in vars(self).items() if name != "last_failure"}
        return CallStats(**counts, last_failure=other.last_failure or self.last_failure)

    def __str__(self) -> str:
        return (
            f"{self.calls:,} calls, {self.kept:,} answers from before, {self.retries:,} tried again, "
            f"{self.failed:,} calls failed, {self.unreadable:,} answers could not be read; {self.tokens_in:,} tokens "
            f"in, {self.tokens_out:,} out."
        )


@dataclass(frozen=True)
class Call:
    """Something to ask."""

    request: Mapping[str, Any]
    stand_in: str = ""
    """An answer of the kind that is expected, for the estimate."""


@runtime_checkable
class Asker(Protocol):
    stats: CallStats

    async def ask(self, call: Call, cache: Cache) -> Answer | None: ...


@dataclass(frozen=True)
class Explained:
    """Findings about one run."""

    rows: tuple[Explanation, ...]
    left_out: dict[int, str]
    """Features without an explanation, with the reason."""


@dataclass
class Asking:
    """Asks about one run."""

    prepared: PreparedRun
    settings: Settings
    asker: Asker
    cache: Cache
    underway: int = UNDERWAY

    def __post_init__(self) -> None:
        self.prompts = read_prompts(PURPOSES, self.settings.prompts)
        self._places = asyncio.Semaphore(self.underway)

    @property
    def _writer(self) -> Writer:
        return self.prepared.writer

    async def all(self) -> Explained:
        """Explanations first, since one feature's scores may need another's; then every score."""
        texts = await self._explanations(self.prepared.samples)
        random = await self._explanations(self.prepared.random)
        samples = {sample.feature: sample for sample in self.prepared.samples}
        sources = {feature: (samples[feature], text) for feature, text in texts.items()}
        jobs = {("", feature): job for feature, job in sources.items()}
        for feature, other in self._shuffled(list(texts)).items():
            jobs["shuffled", feature] = (samples[feature], texts[other])
        for sample in self.prepared.random:
            if sample.feature in random and sample.feature in texts:
                jobs["random", sample.feature] = (sample, random[sample.feature])
        scores = await self._scores(jobs)
        settings = self.settings
        rows = tuple(
            Explanation(feature, text, settings.model, settings.scorer, scores.get(feature, {}), random.get(feature))
            for feature, text in sorted(texts.items())
        )
        unread = dict.fromkeys(sorted(samples.keys() - texts.keys()), "no explanation was obtained")
        return Explained(rows, {**self.prepared.left_out, **unread})

    def _shuffled(self, features: Sequence[int]) -> dict[int, int]:
        """Draw for each feature another, in one round, so that none is left with its own."""
        if not self.settings.shuffled or len(features) < 2:
            return {}
        order = numpy_stream(self.settings.seed, "shuffled explanations").permutation(sorted(features)).tolist()
        return dict(zip(order, [*order[1:], order[0]], strict=True))

    async def _explanations(self, samples: Sequence[ScoringSample]) -> dict[int, str]:
        """Ask for explanations, by feature; of those for which one could be had."""
        found = await _together([self._in_turn(self._explanation, sample) for sample in samples])
        return {sample.feature: text for sample, text in zip(samples, found, strict=True) if text is not None}

    async def _explanation(self, sample: ScoringSample) -> str | None:
        examples = numbered([self._writer.shown(text, sample.greatest) for text in sample.shown])
        prompt = self.prompts[EXPLAIN].filled(examples=examples, count=len(sample.shown))
        stand_in = json.dumps({"explanation": str(sample.feature).rjust(STAND_IN_LENGTH, "x")})
        return await self._answered(self.settings.model, prompt, stand_in, read_explanation)

    async def _scores(self, jobs: Mapping[tuple[str, int], tuple[ScoringSample, str]]) -> dict[int, dict[str, Score]]:
        """Collect scores by feature, then by scorer and control."""
        keys = [(name, control, feature) for name in self.settings.scorers for control, feature in jobs]
        found = await _together(
            [self._in_turn(self._score, SCORERS[name], *jobs[control, each]) for name, control, each in keys]
        )
        scores: dict[int, dict[str, Score]] = {}
        for (name, control, feature), score in zip(keys, found, strict=True):
            scores.setdefault(feature, {})[f"{name}.{control}" if control else name] = score
        return scores

    async def _score(self, scorer: Scorer[Any], sample: ScoringSample, explanation: str) -> Score:
        """Questions depend on the feature and the seed alone, so that each explanation of it is asked the same ones."""
        generator = numpy_stream(self.settings.seed, f"questions of {scorer.name}", sample.feature)
        questions = scorer.questions(sample, self._writer, self.settings.per_call, generator)

        async def answer(question: Question[Any]) -> Any:
            count = len(question.items)
            filled = {"explanation": explanation, "examples": numbered(question.items), "count": count}
            prompt = self.prompts[scorer.name].filled(**filled)
            read = partial(scorer.read, question=question)
            return await self._answered(self.settings.scorer, prompt, question.stand_in, read)

        answers = await _together([answer(question) for question in questions])
        return scorer.score(list(zip(questions, answers, strict=True)))

    async def _in_turn(self, ask: Callable[..., Awaitable[Found]], *arguments: Any) -> Found:
        async with self._places:
            return await ask(*arguments)

    async def _answered(
        self, model: str, prompt: str, stand_in: str, read: Callable[[str], Read | None]
    ) -> Read | None:
        """Read an answer, asked for once more if it cannot be read; None: neither could, or a call failed."""
        for asked in (prompt, prompt + REMINDER):
            answer = await self.asker.ask(Call(self.settings.request(model, asked), stand_in), self.cache)
            if answer is None:
                return None
            if (value := read(answer.text)) is not None:
                return value
        self.asker.stats.unreadable += 1
        return None


async def _together(jobs: Sequence[Any]) -> list[Any]:
    """The results in order; at the first error the others are given up and it is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(job) for job in jobs]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def run_async(work: Coroutine[Any, Any, Found]) -> Found:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
