"""TensorBoard: event files in the run folder's `trackers/tensorboard`, read by `tensorboard --logdir`.

A run that is resumed writes on beside them; what an earlier process wrote of later steps is taken back (`purge_step`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from endwise.runs.trackers import TRACKERS, Status
from endwise.runs.tracking.outside import Outside, TrackedRun

TEXTS = (".yaml", ".json", ".jsonl", ".csv")


@TRACKERS.add("tensorboard")
class TensorBoard(Outside):
    name = package = "tensorboard"

    def begin(self, run: TrackedRun) -> str:
        from torch.utils.tensorboard import SummaryWriter

        folder = run.folder / "trackers" / "tensorboard"
        self._step = max(run.sent, 0)
        self._writer = SummaryWriter(str(folder), purge_step=run.sent + 1 if run.sent >= 0 else None)
        return folder.name

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._step = step
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def summary(self, values: Mapping[str, float]) -> None:
        self.scalars(values, self._step)

    def files(self, files: Sequence[Path]) -> None:
        """Show texts and images; TensorBoard has no place for other files."""
        from PIL import Image

        for file in files:
            if file.suffix in TEXTS:
                text = "".join(f"    {line}\n" for line in file.read_text(encoding="utf-8").splitlines())
                self._writer.add_text(file.name, text, self._step)
            elif file.suffix == ".png":
                pixels = np.asarray(Image.open(file).convert("RGB"))
                self._writer.add_image(file.name, pixels, self._step, dataformats="HWC")

    def end(self, status: Status, error: str | None) -> None:
        self._writer.add_text("ended", f"{status}: {error}" if error else status, self._step)
        self._writer.close()
