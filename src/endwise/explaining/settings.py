"""Settings of `endwise explain`, checked before anything is read or paid."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from endwise.common.errors import ConfigError
from endwise.explaining.scorers import SCORERS

OWN = ("model", "messages", "stream", "n")
"""Fields of a request that `extra` may not change: they decide what is asked and how it is read."""


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
    attempts: int = 8
    concurrency: int = 4
    per_minute: float | None = None
    give_up: int = 8
    """Calls in a row that failed in every attempt, after which the server counts as gone."""
    largest_answer: int = 4 << 20
    """Bytes of a response."""

    def __post_init__(self) -> None:
        for name, value in {"timeout": self.timeout, "per-minute": self.per_minute}.items():
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"--{name} must be above 0; given {value:g}.")
        check_least(self, {"attempts": 1, "concurrency": 1})


@dataclass(frozen=True)
class Settings:
    model: str
    """Name that the endpoint has for it."""
    scorer_model: str | None = None
    """Model that is asked with an explanation; None: the same."""
    features: str = "random:200"
    """`all`, `random:N`, `top:N` by importance, or numbers and ranges, `1,5,10-20`."""
    seed: int = 0
    scorers: tuple[str, ...] = tuple(SCORERS)
    shown: int = 20
    """Texts from which an explanation is made, at most."""
    scored: int = 20
    """Items of each scorer for each feature: half true, half false."""
    per_call: int = 5
    """Items per call."""
    shuffled: bool = True
    """Each feature is also scored with another feature's explanation."""
    random: int = 50
    """Features that are also replaced by random texts; 0: none."""
    temperature: float = 0.0
    max_tokens: int = 500
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of each request; None takes a field out."""
    prompts: Path | None = None
    """A folder with prompts in place of those that ship."""
    retry: RetryPolicy = field(default_factory=RetryPolicy)

    def __post_init__(self) -> None:
        if not self.model.strip():
            raise ConfigError("--model must be a name that the endpoint has, such as gpt-4o-mini.")
        if unknown := [name for name in self.scorers if name not in SCORERS]:
            raise ConfigError(f"There is no scorer {unknown[0]!r:.80}. There are: {', '.join(SCORERS)}.")
        if not self.scorers or len(set(self.scorers)) < len(self.scorers):
            raise ConfigError(f"Name each scorer once, and at least one of {', '.join(SCORERS)}.")
        check_least(self, {"shown": 3, "per_call": 1, "random": 0, "max_tokens": 1})
        if self.scored < 2 or self.scored % 2:
            raise ConfigError(f"--scored must be even and at least 2, half true and half false; given {self.scored}.")
        if not 0 <= self.temperature <= 2:
            raise ConfigError(f"--temperature must lie in 0 to 2; given {self.temperature:g}.")
        if owned := [name for name in self.extra if name in OWN]:
            raise ConfigError(f"--extra must not set {owned[0]}, which is decided elsewhere. Leave it out.")

    @property
    def scorer(self) -> str:
        return self.scorer_model or self.model

    def request(self, model: str, prompt: str) -> dict[str, Any]:
        """The body of one call: one message of the user, which every model's chat template takes."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            **self.extra,
        }
        return {name: value for name, value in body.items() if value is not None}

    def to_json(self) -> dict[str, Any]:
        """Return what decides on the numbers, for the record; how patiently they were asked for does not."""
        record = {name: value for name, value in vars(self).items() if name not in ("retry", "prompts")}
        return {**record, "scorers": list(self.scorers), "extra": dict(self.extra), "scorer_model": self.scorer}


def parse_extra(text: str) -> dict[str, Any]:
    """
    Raises:
        ConfigError: it is no object in JSON.
    """
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ConfigError(f'--extra must be an object in JSON, such as {{"top_p": 0.9}}; given {text!r:.200}.')
    return value


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
