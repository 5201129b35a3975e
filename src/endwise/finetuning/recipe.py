"""Recipe by which a finished SAE is tuned: what its file says, and defaults that fit any site."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from endwise.common.errors import ConfigError
from endwise.config.base import read_overrides
from endwise.config.dictionary import ARCHITECTURES
from endwise.config.fields import differing
from endwise.config.run import DataConfig, RunConfig
from endwise.evaluation.inspecting import Inspected
from endwise.models.sites import Place
from endwise.runs.folder import RunFolder

TOKENS, MEASURED_ON = 1_000_000, 100_000
"""Tokens to train on and to measure on by default."""
STEPS, MOST_TOKENS = 1000, 4096
"""Steps that the tokens are cut into, where a step then has no more than so many tokens."""
RELATIVE_RATE = 0.03
"""Learning rate times √d: about the share of its size by which a weight of a unit direction changes in one step."""
OBJECTIVE = {"kl": 0.5, "local_mse": 0.5, "balance": "loss"}
"""½·(MSE + α·KL) with α = MSE/KL of the step (Karvonen 2025, arXiv 2503.17272)."""
EVALUATIONS = 10
"""Short evaluations in the course of it."""
STEERED, SAME_L0 = "objective.sparsity.target_l0", 1e-3
"""L0 that is held, and how much of it may be another when it is measured again, on another machine."""


@dataclass(frozen=True)
class TuningSettings:
    """Settings that a user gives a finetuning.

    Args:
        data: text, as `data.source` of a recipe.
        context: tokens per sequence; None: as the SAE was trained.
        measured_on: held-out tokens.
        overrides: `key=value` of the recipe.
    """

    data: str = "embedded"
    tokens: int = TOKENS
    measured_on: int = MEASURED_ON
    context: int | None = None
    overrides: Sequence[str] = ()


def recipe_of(
    found: Inspected, place: Place, l0: float, model: str, data: DataConfig, out: Path, settings: TuningSettings
) -> RunConfig:
    """Make the recipe.

    Args:
        l0: active features per token, which are held where a penalty sets them.
        model: its name.

    Raises:
        ConfigError: an override breaks a rule, or no context is known.
    """
    if data.context is None:
        raise ConfigError("The model names no longest context. Give --context, the tokens per sequence.")
    sae, tokens = found.sae, settings.tokens
    batch = max(1, min(MOST_TOKENS, tokens // STEPS) // data.context)
    often = max(1, tokens // (batch * data.context) // EVALUATIONS)
    sparsity = {"sparsity": {"target_l0": l0}} if ARCHITECTURES[sae.architecture].Config.penalised else {}
    training = {
        "tokens": tokens,
        "batch": batch,
        "learning_rate": float(f"{RELATIVE_RATE / math.sqrt(sae.d_out):.2g}"),
        "schedule": "linear",
        "floor": 0.0,
        "evaluate_every": often,
        "checkpoint_every": often,
    }
    evaluation = {"tokens": settings.measured_on, "during_training_tokens": min(settings.measured_on, 20_000)}
    values: dict[str, Any] = {
        "model": {"name": model},
        "site": place.reads.name,
        "writes": None if place.reads == place.writes else place.writes.name,
        "dictionary": sae.section(),
        "objective": {**OBJECTIVE, **sparsity},
        "data": data.model_dump(mode="json", exclude_defaults=True),
        "training": training,
        "evaluation": evaluation,
        "init_from": found.name,
        "out": str(out),
    }
    return RunConfig.build(RunConfig.changed(values, read_overrides(list(settings.overrides))))


def agreed(recipe: RunConfig, folder: Path) -> RunConfig:
    """Return the recipe, or the one that was started in the folder before, if it is the same but for rounding of the
    L0 that it holds.

    Raises:
        ConfigError: another run was started there.
    """
    if not RunFolder(folder).has_run():
        return recipe
    before = RunFolder(folder).config()
    apart = differing(before.model_dump(mode="json"), recipe.model_dump(mode="json"))
    old, new = apart.get(STEERED, (None, None))
    if isinstance(old, float) and isinstance(new, float) and abs(old - new) <= SAME_L0 * new:
        del apart[STEERED]
    if apart:
        first = itertools.islice(apart.items(), 3)
        changes = ", ".join(f"{key}: {old!r:.60} there, {new!r:.60} now" for key, (old, new) in first)
        raise ConfigError(f"{folder} holds another run ({changes}). Give another folder with --out, or remove it.")
    return before
