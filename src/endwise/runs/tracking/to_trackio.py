"""trackio: runs in its local database (`TRACKIO_DIR`), on a Space (`TRACKIO_SPACE_ID`) or a server of one's own
(`TRACKIO_SERVER_URL`); the project is `$TRACKIO_PROJECT` or `endwise`.

It keeps every line that it got; those of steps that it has are not sent again.
"""

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from endwise.runs.trackers import TRACKERS, Status
from endwise.runs.tracking.outside import Outside, TrackedRun


@TRACKERS.add("trackio")
class Trackio(Outside):
    name = package = "trackio"

    def begin(self, run: TrackedRun) -> str:
        import trackio  # type: ignore[pyrefly:missing-import]

        self._trackio, self._step = trackio, max(run.sent, 0)
        name = run.id or f"{run.name}-{secrets.token_hex(3)}"  # it identifies runs by their names
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "endwise"),
            name=name,
            config=dict(run.recipe),
            resume="allow",
            embed=False,
        )
        return name

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._step = step
        self._run.log(dict(values), step=step)

    def summary(self, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=self._step)

    def files(self, files: Sequence[Path]) -> None:
        kept = self._trackio.Artifact(f"{self._run.name}-files", type="run")
        for file in files:
            kept.add_file(str(file))
        self._run.log_artifact(kept)

    def end(self, status: Status, error: str | None) -> None:
        if error is not None:
            self._run.log({"failure": error}, step=self._step)
        self._trackio.finish()
