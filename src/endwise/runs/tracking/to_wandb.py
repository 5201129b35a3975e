"""Weights & Biases: scalars by step, the recipe as its config, the evaluation as its summary, files beside them.

`WANDB_PROJECT`, `WANDB_ENTITY`, `WANDB_MODE=offline` and its other variables hold; the project is `endwise` unless one
is named. It takes no line of a step that it is past; those are not sent again.
"""

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from endwise.runs.trackers import TRACKERS, Status
from endwise.runs.tracking.outside import Outside, TrackedRun


@TRACKERS.add("wandb")
class WeightsAndBiases(Outside):
    name = package = "wandb"

    def begin(self, run: TrackedRun) -> str:
        import wandb  # type: ignore[pyrefly:missing-import]

        os.environ.setdefault("WANDB_DIR", str(run.folder / "trackers"))
        self._folder = run.folder
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "endwise"),
            name=os.environ.get("WANDB_NAME", run.name),
            id=run.id or secrets.token_hex(4),
            resume="allow",
            config=dict(run.recipe),
            settings=wandb.Settings(console="off", disable_git=True, disable_code=True),
        )
        return self._run.id

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def summary(self, values: Mapping[str, float]) -> None:
        self._run.summary.update(dict(values))

    def files(self, files: Sequence[Path]) -> None:
        for file in files:
            self._run.save(str(file), base_path=str(self._folder), policy="now")

    def end(self, status: Status, error: str | None) -> None:
        if error is not None:
            self._run.summary["failure"] = error
        self._run.finish(exit_code=0 if status == "finished" else 1)
