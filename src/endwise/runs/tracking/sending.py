"""The process that sends a run folder to one tracker: `python -m endwise.runs.tracking.sending TRACKER FOLDER`.

It reads the files that the folder holds, looks for new lines once a second, and ends once its standard input has said
how the run ended; where that closes without a word, the run was killed. What was sent is kept beside the log, so that
a later start takes up where this one ended, in the same tracked run.
"""

import json
import os
import sys
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from threading import Event, Thread, Timer
from typing import Any

import yaml

from endwise.common.files import held, write_json
from endwise.runs.trackers import TRACKERS
from endwise.runs.tracking.outside import FOLDER, Outside, TrackedRun, patience, sent_of

SECONDS = 1.0
"""Time between two looks at the folder."""
GRACE = 5.0
"""Seconds over the patience of the run, after which the process ends itself, whoever is left to end it."""
LINES = {"metrics": "train", "timings": "timings"}
"""Files of lines, with the first part of the names that their numbers are sent by."""
FILES = (".yaml", ".json", ".jsonl", ".csv", ".html", ".png", ".svg")
"""Endings of the files in the run folder that are sent: small ones, that people read."""


class Sender:
    """Sends what is new in a run folder.

    Args:
        tracker: receives it.
    """

    def __init__(self, tracker: Outside, folder: Path) -> None:
        self._tracker, self._folder = tracker, folder
        self._kept = folder / FOLDER / f"{tracker.name}.json"
        self._sent: dict[str, Any] = {"id": None, "step": -1, "files": {}, **sent_of(folder, tracker.name)}
        self._read = dict.fromkeys(LINES, 0)

    def begin(self) -> None:
        recipe = yaml.safe_load((self._folder / "config.yaml").read_text(encoding="utf-8"))
        run = TrackedRun(self._folder, dict(named(recipe)), self._sent["id"], self._sent["step"])
        self._sent["id"] = self._tracker.begin(run)
        self._keep()
        self._files(("config.yaml",))

    def lines(self) -> None:
        """Send the lines that were written since the last call, but for those of steps that were sent by an earlier
        process.
        """
        rows: dict[int, dict[str, float]] = {}
        for stem, what in LINES.items():
            for record in self._new(stem):
                step = record.pop("step")
                record.pop("seed", None)
                rows.setdefault(step, {}).update(numbers(record, what))
        for step in sorted(step for step in rows if step > self._sent["step"]):
            self._tracker.scalars(rows[step], step)
        if rows:
            self._sent["step"] = max(self._sent["step"], *rows)
            self._keep()

    def end(self, status: Any, error: str | None) -> None:
        self.lines()
        self._files()
        self._tracker.end(status, error)
        self._keep()

    def _new(self, stem: str) -> Iterator[dict[str, Any]]:
        try:
            with (self._folder / f"{stem}.jsonl").open("rb") as file:
                file.seek(self._read[stem])
                whole, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return
        self._read[stem] += len(whole + newline)
        for line in whole.splitlines():
            record = json.loads(line)
            if type(record.get("step")) is int:
                yield record

    def _files(self, names: Container[str] | None = None) -> None:
        """Send the files, of these names alone or all, that are new or have changed, and an evaluation's numbers."""
        found = {file.name: file for file in sorted(self._folder.iterdir()) if _is_sent(file)}
        stamps = {name: [file.stat().st_size, file.stat().st_mtime_ns] for name, file in found.items()}
        sent = self._sent["files"]
        new = [name for name in found if sent.get(name) != stamps[name] and (names is None or name in names)]
        if "evaluation.json" in new:
            self._tracker.summary(numbers(json.loads(found["evaluation.json"].read_text()), "evaluation"))
        if new:
            self._tracker.files([found[name] for name in new])
            sent |= {name: stamps[name] for name in new}
            self._keep()

    def _keep(self) -> None:
        write_json(self._kept, self._sent)


def _is_sent(file: Path) -> bool:
    lines = [f"{stem}.jsonl" for stem in LINES]
    return file.suffix in FILES and not file.name.startswith(".") and file.name not in lines and file.is_file()


def named(values: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """List the leaves of a recipe by their dotted keys."""
    parts = values.items() if isinstance(values, Mapping) else enumerate(values) if isinstance(values, list) else None
    if not parts:
        yield name, values
        return
    for key, value in parts:
        yield from named(value, f"{name}.{key}" if name else str(key))


def numbers(values: Mapping[str, Any], what: str) -> dict[str, float]:
    """The numbers of a record: of `what` its own, those of a part of it by the part's name, intervals by their ends."""
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{what}/{key}" if what != "train" else key)
        elif isinstance(value, list) and len(value) == 2:
            found |= numbers(dict(zip(("low", "high"), value, strict=True)), f"{what}/{key}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{what}/{key}"] = float(value)
    return found


class Ending:
    """Word on how the run ended, which comes by standard input."""

    def __init__(self) -> None:
        self.there = Event()
        self.outcome: dict[str, Any] = {"status": "failed", "error": "the process was killed", "patience": patience()}
        Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        if text := sys.stdin.read():
            self.outcome = json.loads(text)
        if (seconds := self.outcome["patience"]) is not None:
            late = Timer(seconds + GRACE, os._exit, [1])
            late.daemon = True
            late.start()
        self.there.set()


def main(name: str, folder: Path) -> None:
    if hasattr(os, "nice"):  # training goes first
        os.nice(5)
    ending = Ending()
    tracker: Any = TRACKERS[name]()
    with held(folder / FOLDER / f".{name}.lock"):  # an earlier process may still be sending its last lines
        sender = Sender(tracker, folder)
        sender.begin()
        while not ending.there.wait(SECONDS):
            sender.lines()
        sender.end(ending.outcome["status"], ending.outcome["error"])


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
