"""TensorBoard: event files in the run folder's `trackers/tensorboard`, read by `tensorboard --logdir`.

A run that is resumed writes on beside them; what an earlier process wrote of later steps is taken back.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from endwise.runs.trackers import TRACKERS, Status
from endwise.runs.tracking.outside import Outside, TrackedRun

TEXTS = (".yaml", ".json", ".jsonl", ".csv")


@TRACKERS.add("tensorboard")
class TensorBoard(Outside):
    name = package = "tensorboard"

    def begin(self, run: TrackedRun) -> str:
        # torch has a writer too, but takes seconds to import, and uses this one.
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = run.folder / "trackers" / "tensorboard"
        self._step = max(run.sent, 0)
        self._events: Any = event_pb2  # whose classes are made as it is imported
        self._summaries: Any = summary_pb2
        self._writer = EventFileWriter(str(folder))
        if run.sent >= 0:
            log = self._events.SessionLog  # pyrefly: ignore[missing-attribute]
            self._write(run.sent + 1, session_log=log(status=log.START))
        return folder.name

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._step = step
        self._show([self._summaries.Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._writer.flush()

    def summary(self, values: Mapping[str, float]) -> None:
        self.scalars(values, self._step)

    def files(self, files: Sequence[Path]) -> None:
        """Show texts and images; TensorBoard has no place for other files."""
        from PIL import Image

        for file in files:
            if file.suffix in TEXTS:
                text = "".join(f"    {line}\n" for line in file.read_text(encoding="utf-8").splitlines())
                self._text(file.name, text)
            elif file.suffix == ".png":
                with Image.open(file) as image:
                    width, height = image.size
                content = {"width": width, "height": height, "encoded_image_string": file.read_bytes()}
                self._show([self._summaries.Summary.Value(tag=file.name, image=content)])

    def end(self, status: Status, error: str | None) -> None:
        self._text("ended", f"{status}: {error}" if error else status)
        self._writer.close()

    def _text(self, name: str, text: str) -> None:
        from tensorboard.plugins.text.summary_v2 import text_pb

        self._write(self._step, summary=text_pb(f"{name}/text_summary", text))

    def _show(self, values: Sequence[Any]) -> None:
        self._write(self._step, summary=self._summaries.Summary(value=values))

    def _write(self, step: int, **what: Any) -> None:
        self._writer.add_event(self._events.Event(wall_time=time.time(), step=step, **what))
