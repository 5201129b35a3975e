"""A claim of the paper held against numbers: shown, not shown, or not testable here."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["shown", "not shown", "not testable here"]


@dataclass(frozen=True)
class Claim:
    claim: str
    published: str
    ours: str
    """What was measured, with 95 % intervals; or why nothing was. Parts are separated by `; `."""
    verdict: Verdict
    timed: bool = False
    """It rests on wall-clock, so that another machine, or another hour, may judge otherwise."""


def shown_if_all(holds: Sequence[bool]) -> Verdict:
    """Not testable where nothing was measured."""
    if not holds:
        return "not testable here"
    return "shown" if all(holds) else "not shown"
