"""Claims with their verdicts, as part of a page."""

from collections.abc import Iterable

from endwise.analysis.claims import Claim
from endwise.report.shell import escape


def claim_list(claims: Iterable[Claim]) -> str:
    """Each with its verdict, what was measured, and what the paper has, if it has anything."""
    items = []
    for claim in claims:
        ours = "<br>".join(escape(part) for part in claim.ours.split("; "))
        paper = f'<p class="note">Paper, GPT2-small: {escape(claim.published)}.</p>' if claim.published else ""
        items.append(
            f'<li><p class="verdict {claim.verdict.replace(" ", "-")}">{claim.verdict}</p>'
            f"<div><h3>{escape(claim.claim)}</h3>"
            f"<p>{ours}</p>{paper}</div></li>"
        )
    return f'<ul class="claims">{"".join(items)}</ul>'
