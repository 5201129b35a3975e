"""Scorers of how well an explanation predicts a feature, each a class: what is asked, how answers are read and counted.

Detection and fuzzing are those of Paulo et al. 2024 (arXiv 2410.13928; EleutherAI's delphi). A scorer of another kind,
simulation say, is one more class and one more line in `SCORERS`: it asks for numbers, reads them, correlates them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np

from endwise.explaining.answers import read_choices
from endwise.explaining.prompts import Places
from endwise.explaining.rendering import Writer, marks_of
from endwise.explaining.samples import ScoringSample, Text
from endwise.features.explanations import Score

Read = TypeVar("Read")


@dataclass(frozen=True)
class Question(Generic[Read]):
    """Question that one call asks."""

    items: tuple[str, ...]
    truth: Read
    """Reading of a perfect answer."""
    stand_in: str
    """An answer of the length that is expected, for the estimate."""


@runtime_checkable
class Scorer(Protocol[Read]):
    name: str
    """Name of its scores and of its prompt's file."""
    places: Places

    def questions(
        self, sample: ScoringSample, writer: Writer, per_call: int, generator: np.random.Generator
    ) -> list[Question[Read]]:
        """All that is asked about a feature, whatever the explanation."""
        ...

    def read(self, answer: str, question: Question[Read]) -> Read | None:
        """Read an answer; None where it cannot be read."""
        ...

    def score(self, answers: Sequence[tuple[Question[Read], Read | None]]) -> Score: ...


Choices = list[bool]


def balanced_accuracy(truth: Sequence[bool], chosen: Sequence[bool]) -> float | None:
    """Mean of the shares of true and of false items judged rightly: 0 to 1, 0.5 by chance; None without both."""
    judged, is_true = np.asarray(chosen, dtype=bool), np.asarray(truth, dtype=bool)
    if is_true.all() or not is_true.any():
        return None
    return float((judged[is_true].mean() + (~judged[~is_true]).mean()) / 2)


class _Choosing:
    """Base of scorers that ask for one choice an item."""

    places = Places(required=("explanation", "examples"))

    def read(self, answer: str, question: Question[Choices]) -> Choices | None:
        return read_choices(answer, len(question.items))

    def score(self, answers: Sequence[tuple[Question[Choices], Choices | None]]) -> Score:
        answered = [(question, chosen) for question, chosen in answers if chosen is not None]
        truth = [each for question, _ in answered for each in question.truth]
        chosen = [each for _, choices in answered for each in choices]
        asked = sum(len(question.items) for question, _ in answers)
        return Score(balanced_accuracy(truth, chosen), len(truth), asked - len(truth))


class Detection(_Choosing):
    """Scorer that asks in which texts the feature fires. Half are texts of its own, half those of others."""

    name = "detection"

    def questions(
        self, sample: ScoringSample, writer: Writer, per_call: int, generator: np.random.Generator
    ) -> list[Question[Choices]]:
        items = [(writer.plain(text), True) for text in sample.active]
        items += [(writer.plain(text), False) for text in sample.inactive]
        return _calls([items[place] for place in generator.permutation(len(items)).tolist()], per_call)


class Fuzzing(_Choosing):
    """Scorer that asks whether the marked tokens are those at which the feature fires. Each held-out text comes once
    with its own marks and once with as many at tokens where it does not fire, in different calls.
    """

    name = "fuzzing"

    def questions(
        self, sample: ScoringSample, writer: Writer, per_call: int, generator: np.random.Generator
    ) -> list[Question[Choices]]:
        texts = [sample.active[place] for place in generator.permutation(len(sample.active)).tolist()]
        rightly = [bool(each) for each in generator.permutation(np.arange(len(texts)) % 2 == 0)]
        questions = []
        for flipped in (False, True):
            items = []
            for text, right in zip(texts, rightly, strict=True):
                marks = marks_of(text) if right != flipped else wrong_marks(text, generator)
                if any(marks):
                    items.append((writer.marked(text, marks), right != flipped))
            questions += _calls(items, per_call)
        return questions


def wrong_marks(text: Text, generator: np.random.Generator) -> tuple[bool, ...]:
    """Draw as many as the right ones, at random among the tokens where the feature does not fire, or all there are."""
    free = [place for place, activation in enumerate(text.activations) if activation <= 0]
    count = min(len(free), sum(marks_of(text)))
    chosen = set(generator.choice(free, count, replace=False).tolist()) if count else set()
    return tuple(place in chosen for place in range(len(text.tokens)))


def _calls(items: Sequence[tuple[str, bool]], per_call: int) -> list[Question[Choices]]:
    parts = [items[start : start + per_call] for start in range(0, len(items), per_call)]
    return [
        Question(
            tuple(text for text, _ in part),
            [truth for _, truth in part],
            f'{{"answers": [{", ".join("0" for _ in part)}]}}',
        )
        for part in parts
    ]


SCORERS: dict[str, Scorer[Any]] = {scorer.name: scorer for scorer in (Detection(), Fuzzing())}
"""Every way to score, by name."""
