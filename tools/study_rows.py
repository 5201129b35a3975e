"""Rows of a study: one small JSON file for each run, by the hash of its recipe, so that no run is made twice."""

import json
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from endwise import SAE, RunConfig, corpora_for, load_model, measure, train_together
from endwise.analysis.importance.concentration import HALF, carrying, count_with
from endwise.analysis.importance.measure import measure_importance
from endwise.common.files import write_json
from endwise.evaluation.measure import Evaluation
from endwise.evaluation.summary import RunSummary
from endwise.sweeps.points import fingerprint
from endwise.training.members import SomeFailed

TOGETHER = 6
"""Most runs in one pass."""
IMPORTANCE_TOKENS = 20480
"""Held-out tokens of which importance is measured."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """Those of one study.

    Args:
        folder: holds the files, named by the recipes' hashes.
        importance: whether it is measured how many features carry the model's behaviour.
    """

    folder: Path
    importance: bool = True

    def file(self, config: RunConfig) -> Path:
        return self.folder / f"{fingerprint(config)}.json"

    def of(self, config: RunConfig) -> Row | None:
        """Return the row of a run that was made before, here or elsewhere."""
        file = self.file(config)
        return json.loads(file.read_text()) if file.exists() else None

    def make(self, configs: Sequence[RunConfig], kept: Path | None = None) -> None:
        """Train and measure runs together, and write the row of each; with `kept`, keep each SAE there besides."""
        first = configs[0]
        model = load_model(**first.model.model_dump())
        tuning = first.evaluation.model_copy(update={"skip": first.evaluation.tokens})
        corpora = corpora_for(model, first.data, training_tokens=first.training.tokens, evaluation_tokens=tuning.needed)
        scratch = Path(tempfile.mkdtemp())
        try:
            placed = [config.model_copy(update={"out": scratch / fingerprint(config)}) for config in configs]
            start = time.monotonic()
            try:
                runs = train_together(placed, model=model, corpora=corpora, display=False)
            except SomeFailed as error:
                runs = error.finished
                for failure in error.failures:
                    write_json(self.folder / f"{failure.folder.name}.json", {"failed": str(failure.error), **machine()})
            seconds = (time.monotonic() - start) / len(configs)
            saes = {run.folder.name: SAE.load(run.folder) for run in runs}
            carried = {}
            if self.importance:
                folders = [run.folder for run in runs]
                carried = measure_importance(folders, tokens=IMPORTANCE_TOKENS, ablate=0, model=model, corpora=corpora)
            placed_saes = {name: (model.place(first.place), sae) for name, sae in saes.items()}
            reported = measure(model, placed_saes, corpora.heldout, first.evaluation)
            tuned = measure(model, placed_saes, corpora.heldout, tuning, baselines=False)
            for config in (each for each in configs if fingerprint(each) in saes):
                name = fingerprint(config)
                if kept is not None:
                    ignored = shutil.ignore_patterns("checkpoints", ".lock")
                    shutil.copytree(scratch / name, kept / name, ignore=ignored, dirs_exist_ok=True)
                row = row_of(config, reported[name], tuned[name], seconds)
                if found := carried.get(scratch / name):
                    half = count_with(HALF, found.importance.ce_second)
                    row["importance"] = {"half": half, "carrying": carrying(found.faithfulness).estimate}
                write_json(self.file(config), row)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def row_of(config: RunConfig, reported: Evaluation, tuned: Evaluation, seconds: float) -> Row:
    """Return what is kept of one run."""
    summary = RunSummary.of(config, reported, seconds, fingerprint(config)).to_json()
    return {
        **summary,
        "architecture": config.dictionary.architecture,
        "tuning": {name: tuned[name] for name in ("l0", "ce_increase")},
        **machine(),
    }


def machine() -> dict[str, str]:
    return {"machine": platform.machine(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}


def batches(configs: Sequence[RunConfig]) -> Iterator[list[RunConfig]]:
    """Group runs that share their passes: of one site, text, length and batch."""
    groups: dict[tuple[Any, ...], list[RunConfig]] = {}
    for config in configs:
        key = (config.site, config.data.seed, config.training.tokens, config.training.batch)
        groups.setdefault(key, []).append(config)
    for group in groups.values():
        for start in range(0, len(group), TOGETHER):
            yield group[start : start + TOGETHER]
