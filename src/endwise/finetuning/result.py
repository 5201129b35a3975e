"""Result of tuning an SAE."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from endwise.common.showing import Shown
from endwise.config.run import RunConfig
from endwise.dictionaries import SAE
from endwise.evaluation.inspecting import Inspected
from endwise.finetuning.moved import Moved
from endwise.finetuning.texts import BeforeAfter


@dataclass(frozen=True, repr=False)
class Finetuned(Shown):
    """A tuned SAE, and what came of it."""

    sae: SAE
    config: RunConfig
    folder: Path
    """Its run folder, with the SAE in SAELens's layout."""
    source: Inspected
    given_back: Path | None
    """The SAE in the format that it came in; None: `refused` says why not."""
    refused: str | None
    text: BeforeAfter
    """Held-out text of the kind that it was tuned on."""
    others: Mapping[str, BeforeAfter]
    """Text of other kinds, by name."""
    moved: Moved
    remarks: Sequence[str]

    def shown_facts(self) -> dict[str, object]:
        ratio = f"{self.text.ce_increase.estimate:.1%} of what it was"
        return {"": self.source.name, "at": self.config.place, "CE increase": ratio, "in": self.folder}

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source.name,
            "format": self.source.format_name,
            "read_as": self.source.rule,
            "given_back": None if self.given_back is None else str(self.given_back),
            "not_given_back": self.refused,
            "text": self.text.to_json(),
            "others": {name: each.to_json() for name, each in self.others.items()},
            "moved": self.moved.to_json(),
            "remarks": list(self.remarks),
        }
