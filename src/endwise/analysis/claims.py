"""A claim of the paper held against numbers: shown, not shown, or not testable here."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

from endwise.common.html import part
from endwise.evaluation.summary import RunSummary

Verdict = Literal["shown", "not shown", "not testable here"]
SIMILAR = 1.5
"""Factor within which CE increases count as similar. (The paper's table 2 goes up to 1.33.)"""


@dataclass(frozen=True)
class Claim:
    claim: str
    published: str | None
    """The paper's number; None where it has none."""
    ours: str
    """Numbers measured, with 95 % intervals; or why there are none. Parts are separated by `; `."""
    verdict: Verdict
    timed: bool = False
    """The claim rests on wall-clock, so that another machine, or another hour, may judge otherwise."""


class Unmeasured(Claim):
    """A claim that these runs give no number on, for a reason: a kind is absent, or has too little."""

    def __init__(self, claim: str, published: str | None, why: str) -> None:
        super().__init__(claim, published, why, "not testable here")


def shown_if_all(holds: Sequence[bool]) -> Verdict:
    """Judge that all hold; not testable where nothing was measured."""
    if not holds:
        return "not testable here"
    return "shown" if all(holds) else "not shown"


def all_shown(verdicts: Iterable[Verdict]) -> Verdict:
    """Judge several places: one that is not shown decides; one that cannot be tested leaves it open."""
    found = set(verdicts)
    if "not shown" in found:
        return "not shown"
    return "shown" if found == {"shown"} else "not testable here"


def are_similar(runs: Iterable[RunSummary]) -> bool:
    """Return whether runs that were chosen for their CE increases have similar ones."""
    increases = [run.ce_increase for run in runs]
    return min(increases) > 0 and max(increases) <= SIMILAR * min(increases)


def claim_list(claims: Iterable[Claim]) -> Markup:
    """Each with its verdict, what was measured, and what the paper has, if anything; then in a line the others."""
    return part("analysis/claims.html.j2", "claims", *_apart(claims))


def claim_lines(claims: Iterable[Claim]) -> list[str]:
    """Variant of `claim_list`, for a terminal."""
    measured, others = _apart(claims)
    lines = [f"• {claim.verdict}: {claim.claim} ({claim.ours})" for claim in measured]
    return [*lines, f"• {others}"] if others else lines


def _apart(claims: Iterable[Claim]) -> tuple[list[Claim], str]:
    """List claims with numbers, and all others in a sentence, with each reason once."""
    claims = list(claims)
    others = [claim for claim in claims if isinstance(claim, Unmeasured)]
    what = "; ".join(claim.claim for claim in others)
    why = "; ".join(dict.fromkeys(claim.ours for claim in others))
    measured = [claim for claim in claims if not isinstance(claim, Unmeasured)]
    return measured, f"not testable here: {what} ({why})" if others else ""
