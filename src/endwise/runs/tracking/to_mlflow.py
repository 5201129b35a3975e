"""MLflow: metrics by step, the recipe as parameters, files as artifacts; `MLFLOW_TRACKING_URI` says where, and
`MLFLOW_EXPERIMENT_NAME` in which experiment (`endwise` without it).

It keeps every value that it got of a step; those of steps that it has are not sent again.
"""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from endwise.runs.trackers import TRACKERS, Status
from endwise.runs.tracking.outside import Outside, TrackedRun

STATUS: Mapping[Status, str] = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
LONGEST = 500
"""Characters of a parameter that every MLflow takes."""
AT_ONCE = 100
"""Parameters that every MLflow takes in one call."""


@TRACKERS.add("mlflow")
class MLflow(Outside):
    name = package = "mlflow"

    def begin(self, run: TrackedRun) -> str:
        from mlflow import MlflowClient  # type: ignore[pyrefly:missing-import]
        from mlflow.entities import Param  # type: ignore[pyrefly:missing-import]

        self._client: Any = MlflowClient()
        self._step = max(run.sent, 0)
        if run.id is not None:
            self._id = run.id
            self._client.update_run(self._id, status="RUNNING")
            return self._id
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "endwise")
        found = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if found is None else found.experiment_id
        self._id = self._client.create_run(experiment, run_name=run.name).info.run_id
        recipe = [Param(key, str(value)[:LONGEST]) for key, value in run.recipe.items()]
        for first in range(0, len(recipe), AT_ONCE):
            self._client.log_batch(self._id, params=recipe[first : first + AT_ONCE])
        return self._id

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric  # type: ignore[pyrefly:missing-import]

        self._step = step
        now = int(time.time() * 1000)
        metrics = [Metric(_allowed(name), value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def summary(self, values: Mapping[str, float]) -> None:
        self.scalars(values, self._step)

    def files(self, files: Sequence[Path]) -> None:
        for file in files:
            self._client.log_artifact(self._id, str(file))

    def end(self, status: Status, error: str | None) -> None:
        if error is not None:
            self._client.set_tag(self._id, "failure", error)
        self._client.set_terminated(self._id, STATUS[status])


def _allowed(name: str) -> str:
    """Replace characters that names of metrics may not have there."""
    return "".join(each if each.isalnum() or each in "_-. /" else "_" for each in name)
