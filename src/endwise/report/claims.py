"""Verdicts on the paper's claims, as a page shows them."""

from collections.abc import Iterable

from endwise.analysis.claims import Claim
from endwise.report.shell import escape


def claim_list(claims: Iterable[Claim]) -> str:
    """Each with its verdict, one's own numbers, and the published ones."""
    items = []
    for claim in claims:
        ours = "<br>".join(escape(part) for part in claim.ours.split("; "))
        items.append(
            f'<li><p class="verdict {claim.verdict.replace(" ", "-")}">{claim.verdict}</p>'
            f"<div><h3>{escape(claim.claim)}</h3>"
            f'<p>{ours}</p><p class="note">Paper, GPT2-small: {escape(claim.published)}.</p></div></li>'
        )
    return f'<ul class="claims">{"".join(items)}</ul>'
