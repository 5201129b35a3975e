"""Sweeps over the tiny GPT-2, for the tests of sweeps."""

import os
import signal
from pathlib import Path
from typing import Any

from endwise.config.run import RunConfig
from endwise.runs.trackers import TRACKERS
from endwise.sweeps import SweepConfig
from endwise.sweeps.engines import InProcess
from endwise.sweeps.tasks import Worker
from small_gpt2 import data, recipe

COEFFICIENT = "objective.sparsity.coefficient"


def small_recipe(made: Path, kind: str = "local", **training: Any) -> dict[str, Any]:
    """As a user writes it, for the model and the tokens in `made`; half a second to train."""
    values = recipe(Path("unused"), kind, **training).model_dump(mode="json", exclude_defaults=True)
    values["model"] = {"name": str(made / "model"), "device": "cpu"}
    values["evaluation"] = {"tokens": 64, "during_training_tokens": 32}
    values["data"] = data(made).model_dump(mode="json", exclude_defaults=True)
    return {key: value for key, value in values.items() if key != "out"}


def small_sweep(made: Path, out: Path, *grids: dict[str, Any], kind: str = "local", **changes: Any) -> SweepConfig:
    """A sweep of the recipe; changes are of the sweep's own keys, but for `training`."""
    base = small_recipe(made, kind, **changes.pop("training", {}))
    return SweepConfig.build({"recipe": base, "grids": grids, "out": out, **changes})


def complete(made: Path, out: Path, changes: dict[str, Any], **training: Any) -> RunConfig:
    """The recipe of one point, put together by hand."""
    values = small_recipe(made, **training) | {"out": out}
    for key, value in changes.items():
        *sections, last = key.split(".")
        section = values
        for name in sections:
            section = section[name]
        section[last] = value
    return RunConfig.build(values)


def never(*arguments, **options):
    raise AssertionError("nothing should be trained or measured")


def here(**acts):
    """An engine whose worker trains, or measures, as it is asked to."""
    return InProcess(Worker(**acts))


@TRACKERS.add("stops")
class Stops:
    """Presses Ctrl-C once, at a line of metrics."""

    pressed = False

    def started(self, config, folder, step): ...

    def line(self, name, record):
        if name == "metrics" and record["step"] == 6 and not Stops.pressed:
            Stops.pressed = True
            os.kill(os.getpid(), signal.SIGINT)

    def ended(self, status): ...
