"""A claim of the paper's, and what one's own runs say to it."""

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["shown", "not shown", "not testable here"]


@dataclass(frozen=True)
class Claim:
    claim: str
    published: str
    ours: str
    """What was measured, with 95 % intervals; or why nothing was."""
    verdict: Verdict
    timed: bool = False
    """It rests on wall-clock, so that another machine, or another hour, may judge otherwise."""
