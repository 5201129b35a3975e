"""Phases of a training: shares of its tokens, each with an objective and a learning rate of its own."""

import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import Field

from endwise.config.base import Config
from endwise.config.objective import ObjectiveConfig

SHARED_KEYS = ("sparsity", "errors")
"""Keys of an objective that a phase with terms of its own takes from the recipe."""
_RELATIVE = {"errors": "relative"}
PRESETS: dict[str, list[dict[str, Any]]] = {
    "horizon": [{"share": 1.0, "objective": {"kind": "horizon"}}],
    "finetune": [
        {"share": 0.9, "objective": {"kind": "local"}},
        {"share": 0.1, "objective": {"kind": "finetune"}},
    ],
    "staged": [
        {"share": 0.65, "objective": {"kind": "local", **_RELATIVE}},
        {"share": 0.31, "objective": {"kind": "horizon", **_RELATIVE}},
        {"share": 0.04, "objective": {"kind": "e2e_ds", "downstream_mse": 0.5, "balance": "gradient", **_RELATIVE}},
    ],
}
"""Lists of phases that one word stands for."""


class PhaseConfig(Config):
    """One phase."""

    share: Annotated[float, Field(gt=0, le=1)]
    """Share of the training's tokens; those of all phases add up to 1."""
    objective: dict[str, Any] = Field(default_factory=dict)
    """Keys that differ from the recipe's `objective`. With a kind or a term of its own, a phase takes from there only
    `sparsity` and `errors`."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """The largest; unset: `training.learning_rate`. Warm-up and decay of the training span all phases."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the phase's steps over which its rate rises linearly from 0."""
    optimizer: Literal["kept", "fresh"] = "kept"
    """`fresh`: Adam's moments start from 0 with the phase."""

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    def objective_over(self, base: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of its whole objective.

        Args:
            base: those of the recipe's.
        """
        own_terms = self.objective.keys() - set(SHARED_KEYS)
        kept = {key: value for key, value in base.items() if key in SHARED_KEYS or not own_terms}
        sparsity = self.objective.get("sparsity")
        if isinstance(sparsity, Mapping) and isinstance(kept.get("sparsity"), Mapping):
            return {**kept, **self.objective, "sparsity": {**kept["sparsity"], **sparsity}}
        return {**kept, **self.objective}


def spelled_out(given: Any) -> Any:
    """Return the list of phases that a word stands for.

    Raises:
        ValueError: it stands for none.
    """
    if not isinstance(given, str):
        return given
    if given not in PRESETS:
        raise ValueError(f"phases is a list, or one of the words {', '.join(PRESETS)}")
    return PRESETS[given]


def word_of(phases: Sequence[PhaseConfig]) -> str | None:
    """Return the word that stands for these phases, if one does."""
    return _words().get(tuple(phases))


@cache
def _words() -> dict[tuple[PhaseConfig, ...], str]:
    return {tuple(PhaseConfig(**each) for each in listed): word for word, listed in PRESETS.items()}


def with_objective(values: Any) -> Any:
    """Fill in the objective of a recipe whose phases alone have terms: that of the last."""
    if not isinstance(values, Mapping) or not (given := values.get("phases")):
        return values
    if isinstance(given, str) and given not in PRESETS:
        return values  # which the field itself refuses
    phases, base = spelled_out(given), values.get("objective", {})
    if not isinstance(phases, Sequence) or not isinstance(base, Mapping) or base.keys() - set(SHARED_KEYS):
        return values
    last = phases[-1].model_dump() if isinstance(phases[-1], PhaseConfig) else phases[-1]
    own = last.get("objective") if isinstance(last, Mapping) else None
    terms = {key: value for key, value in own.items() if key != "sparsity"} if isinstance(own, Mapping) else {}
    return {**values, "phases": phases, "objective": {**terms, **base}}


def refuse_shares(phases: Sequence[PhaseConfig]) -> None:
    """
    Raises:
        ValueError: the shares do not add up to 1.
    """
    total = math.fsum(phase.share for phase in phases)
    if phases and abs(total - 1) > 1e-6:
        shares = " + ".join(f"{phase.share:g}" for phase in phases)
        raise ValueError(f"the shares of the phases must add up to 1; {shares} is {total:g}")


def refuse_two_units(objectives: Sequence[ObjectiveConfig]) -> None:
    """
    Raises:
        ValueError: errors are relative in some phases, and absolute in others.
    """
    units = [objective.errors or "absolute" for objective in objectives]
    if len(set(units)) > 1:
        raise ValueError(
            f"objective.errors is {', '.join(units)} in the phases, so that λ and learning rates would mean something "
            "else in each; set it once, as objective.errors of the recipe"
        )


def given_values(objective: ObjectiveConfig) -> dict[str, Any]:
    """Return what is set of an objective, as values to build another from."""
    return {name: value for name, value in json.loads(objective.model_dump_json()).items() if value not in (None, {})}
