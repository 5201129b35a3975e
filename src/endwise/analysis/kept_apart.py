"""Runs that stand on other text, weights or tokenizers than each other are not compared: what tells them apart."""

from collections.abc import Sequence
from pathlib import Path

from endwise.evaluation.provenance import PARTS, tell
from endwise.evaluation.summary import RunSummary
from endwise.runs.folder import RunFolder

SHOWN = 8
"""Digits of a digest."""

Recipe = dict[str, str]


def with_digests(runs: Sequence[tuple[RunSummary, Recipe]]) -> list[tuple[RunSummary, Recipe]]:
    """Add what each run must have in common with those that it is compared with, and the digests of what it stands on.

    A digest that some run's folder does not have (an older version made it) keeps no runs apart; that is said, once.
    """
    found: list[Recipe] = [{} for _ in runs]
    texts = zip(*((run.text, run.heldout) for run, _ in runs), strict=True)  # the most exact first
    for each, text in zip(found, next((told for told in texts if None not in told), ()), strict=False):
        each["held-out text"] = str(text)
    records = [RunFolder(Path(run.folder)).digests() for run, _ in runs]
    for part in ("train", "model", "tokenizer"):
        digests = [_digest(record.get(part)) for record in records]
        if None not in digests and len({str(digest).partition(":")[0] for digest in digests if ":" in str(digest)}) < 2:
            for each, digest in zip(found, digests, strict=True):
                each[PARTS[part]] = str(digest)
    if older := [run.folder for run, _ in runs if run.text is None]:
        which = f"{len(older)} of {len(runs)} runs ({older[0]}, …)" if len(older) > 1 else older[0]
        tell(
            f"{which}: measured by an older version, so whether that was on the others' text, and of the SAE that is "
            "there now, cannot be checked. Measure again: endwise evaluate RUN..."
        )
    shown = [{part: digest.rpartition(":")[2][:SHOWN] for part, digest in each.items()} for each in found]
    return [(run, recipe | digests) for (run, recipe), digests in zip(runs, shown, strict=True)]


def _digest(told: object) -> str | None:
    """Return a part's digest; of text, that of all its documents, which is the last."""
    if isinstance(told, dict):
        told = next(reversed(told.values()), None)
    return told if isinstance(told, str) else None
