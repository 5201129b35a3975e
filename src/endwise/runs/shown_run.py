"""Display of a run folder in a notebook: its recipe in a line, what was measured, and what comes next."""

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from endwise.common.errors import EndwiseError
from endwise.common.files import there_is
from endwise.common.html import paragraph
from endwise.common.remarks import remarks_on
from endwise.common.showing import Shown, notes
from endwise.config.places import Recipe

NUMBERS = (
    *(("L0", "l0", ".1f"), ("CE increase", "ce_increase", "+.4f"), ("KL", "kl", ".4f")),
    ("alive features", "alive", ",d"),
)
"""Numbers of `evaluation.json` that are shown: in words, by their keys, in their forms."""


class ShownRun(Shown):
    """A run, by its folder."""

    path: Path

    def recipe(self) -> Recipe:
        raise NotImplementedError

    def measured(self) -> dict[str, Any] | None:
        raise NotImplementedError

    def course(self) -> dict[str, float]:
        raise NotImplementedError

    def shown_facts(self) -> Mapping[str, object]:
        try:
            config = self.recipe()
        except EndwiseError:  # a folder that holds no run has a name all the same
            return {"": self.path}
        trained = f"{config.training.tokens:,}" if config.training.tokens else "unknown"
        kind = {"dictionary": config.dictionary.architecture, "training tokens": trained}
        return {"": config.objective_name, "at": config.place, **kind, "in": self.path}

    def shown_parts(self) -> Iterable[str]:
        try:
            measured, course = self.measured(), self.course()
        except EndwiseError as error:
            yield from notes([str(error)])
            return
        name = shlex.quote(str(self.path))
        if course:
            yield paragraph(f"Loss {course['first']:.4g} at first, {course['last']:.4g} at last.")
        if measured is None:
            yield paragraph("Measure it:", "note", f"endwise evaluate {name}")
            return
        known = [(label, measured.get(key), form) for label, key, form in NUMBERS]
        numbers = [f"{label} {number:{form}}" for label, number, form in known if isinstance(number, int | float)]
        yield paragraph(f"{', '.join(numbers)}, on {int(measured.get('tokens', 0)):,} held-out tokens.")
        yield from notes(remarks_on(measured))
        if not there_is(self.path / "harvest"):
            yield paragraph("See its features:", "note", f"endwise harvest {name}")
