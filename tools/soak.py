"""Training under fire: processes killed, checkpoints corrupted, disks filled, for a set time; counts what was lost.

    python tools/soak.py --minutes 30 --out runs/soak

One run after another is trained by the command line itself, on the embedded model and on a small disk of its own where
one may be mounted. While it trains, a fault is drawn at random: SIGKILL, SIGTERM, SIGINT, a checkpoint with a byte
flipped, one that is cut short, a disk that fills up, a second process in the same folder. Then the run is resumed
as its own messages say, until it ends; and what it ended as, weights, optimiser and metrics.jsonl, is compared bit by
bit with a run that was left alone. Anything else is data lost.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from endwise.runs.checkpoints import checksum, read_checkpoint
from endwise.runs.folder import RunFolder

FAULTS_PER_RUN = 6
DISK = "64m"
STEPS = 60
RECIPES = [
    {"objective": {"kind": kind, "sparsity": {"coefficient": 1.0}, **more}, "training": training}
    for kind, more, training in (
        ("e2e", {}, {"batch": 2}),
        ("e2e_ds", {"downstream_mse": 1.0}, {"batch": 4, "accumulation": 2}),
        ("local", {}, {"batch": 8}),
    )
]
CONTEXT = 64


@dataclass
class Tally:
    """Counts of what was done to the runs, and how they ended."""

    caused: Counter[str] = field(default_factory=Counter)
    survived: Counter[str] = field(default_factory=Counter)
    resumes: int = 0
    steps_repeated: int = 0
    runs: int = 0
    lost: list[str] = field(default_factory=list)


class Soak:
    """A folder, perhaps a small disk, and runs to torment."""

    def __init__(self, out: Path, seed: int) -> None:
        self.out, self.random, self.tally = out, random.Random(seed), Tally()
        out.mkdir(parents=True)
        self.disk = out / "disk"
        self.disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(self.disk)]
        self.small_disk = subprocess.run(mount, capture_output=True, check=False).returncode == 0

    def run_for(self, seconds: float) -> Tally:
        end = time.monotonic() + seconds
        try:
            expected = [self._left_alone(number) for number in range(len(RECIPES))]
            while time.monotonic() < end:
                number = self.tally.runs % len(RECIPES)
                self._torment(number, expected[number])
                self.tally.runs += 1
        finally:
            if self.small_disk:
                subprocess.run(["umount", "--lazy", str(self.disk)], check=False)
        return self.tally

    def _recipe(self, number: int, folder: Path) -> Path:
        training = {"checkpoint_every": 3, "log_every": 1, "evaluate_every": 20, "keep_checkpoints": 3}
        training |= RECIPES[number]["training"]
        training["tokens"] = STEPS * training["batch"] * CONTEXT
        values = {
            **RECIPES[number],
            "site": "blocks.3.hook_resid_pre",
            "dictionary": {"ratio": 4},
            "data": {"context": CONTEXT},
            "training": training,
            "evaluation": {"tokens": 4096, "during_training_tokens": 2048},
            "out": str(folder),
        }
        file = self.out / f"{folder.name}.yaml"
        file.write_text(yaml.safe_dump(values))
        return file

    def _left_alone(self, number: int) -> tuple[str, str]:
        folder = self.out / f"alone-{number}"
        process = self._start("train", str(self._recipe(number, folder)), "--quiet")
        _, errors = process.communicate()
        if process.returncode:
            raise SystemExit(f"A run that was left alone failed: {errors}")
        return _end_of(folder)

    def _torment(self, number: int, expected: tuple[str, str]) -> None:
        folder = self.disk / f"run-{self.tally.runs}"
        start = ["train", str(self._recipe(number, folder)), "--or-resume", "--quiet"]
        faults: list[tuple[str, Callable[[RunFolder, list[str]], None]]] = [
            ("SIGKILL", self._kill),
            ("SIGTERM", self._terminate),
            ("SIGINT", self._interrupt),
            ("checkpoint altered", self._alter),
            ("checkpoint cut short", self._cut_short),
            ("second process", self._second_process),
        ]
        if self.small_disk:
            faults.append(("disk full", self._fill_disk))
        for name, cause in self.random.choices(faults, k=FAULTS_PER_RUN):
            before = self._saved(folder)
            cause(RunFolder(folder), start)
            self.tally.caused[name] += 1
            if self._continues(name, folder, before):
                self.tally.survived[name] += 1
        self._finish(folder, start)
        if _end_of(folder) != expected:
            self.tally.lost.append(f"{folder.name} did not end as the run that was left alone")
        shutil.rmtree(folder)

    def _saved(self, folder: Path) -> int:
        steps = RunFolder(folder).saved_steps()
        return steps[-1] if steps else 0

    def _continues(self, name: str, folder: Path, before: int) -> bool:
        """Return whether at least the checkpoint before the then newest is still there and whole."""
        folder_now = RunFolder(folder)
        for step in reversed(folder_now.saved_steps()):
            try:
                read_checkpoint(folder_now.checkpoint(step))
            except Exception:  # noqa: BLE001  Damaged, by us: the one before must do.
                continue
            return True
        if before == 0 or len(folder_now.saved_steps()) <= 1:  # there was none yet: it starts from the beginning
            return True
        self.tally.lost.append(f"{folder.name}: no whole checkpoint after {name}")
        return False

    def _start(self, *arguments: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "endwise", *arguments]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def _train_a_while(self, folder: RunFolder, start: list[str]) -> subprocess.Popen[str]:
        """A training process that has come some way, or has ended."""
        process = self._start(*start)
        lines = _lines(folder)
        wanted = self.random.randint(0, 12)
        while process.poll() is None and _lines(folder) - lines < wanted:
            time.sleep(0.02)
        time.sleep(self.random.uniform(0, 0.3))
        return process

    def _kill(self, folder: RunFolder, start: list[str], number: int = signal.SIGKILL) -> None:
        process = self._train_a_while(folder, start)
        process.send_signal(number)
        self._check_errors(process)

    def _terminate(self, folder: RunFolder, start: list[str]) -> None:
        self._kill(folder, start, signal.SIGTERM)

    def _interrupt(self, folder: RunFolder, start: list[str]) -> None:
        self._kill(folder, start, signal.SIGINT)

    def _alter(self, folder: RunFolder, start: list[str]) -> None:
        self._kill(folder, start)
        if steps := folder.saved_steps():
            file = folder.checkpoint(steps[-1])
            content = bytearray(file.read_bytes())
            content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
            file.write_bytes(content)
            self._go_back(folder)

    def _cut_short(self, folder: RunFolder, start: list[str]) -> None:
        self._kill(folder, start)
        if steps := folder.saved_steps():
            file = folder.checkpoint(steps[-1])
            os.truncate(file, self.random.randrange(file.stat().st_size))
            self._go_back(folder)

    def _go_back(self, folder: RunFolder) -> None:
        """Resumes; where a checkpoint is damaged, as the message offers."""
        damaged = folder.saved_steps()[-1]
        process = self._start("train", "--resume", str(folder.path), "--quiet")
        _, errors = process.communicate()
        offered = re.search(r"--from-step (\d+)", errors)
        if process.returncode == 0:  # what was altered means the same (white space in the header)
            return
        if offered is None:
            self.tally.lost.append(f"{folder.path.name}: nothing was offered for a damaged checkpoint: {errors}")
            return
        self.tally.steps_repeated += damaged - int(offered[1])
        self.tally.resumes += 1
        process = self._start("train", "--resume", str(folder.path), "--from-step", offered[1], "--quiet")
        while process.poll() is None and folder.saved_steps()[-1:] == [damaged]:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        self._check_errors(process)

    def _fill_disk(self, folder: RunFolder, start: list[str]) -> None:
        filler = self.disk / "filler"
        process = self._train_a_while(folder, start)
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(1 << 16)):
                pass
        _, errors = process.communicate()
        if process.returncode not in (0, 5):
            self.tally.lost.append(f"{folder.path.name}: on a full disk: {errors}")
        filler.unlink()

    def _second_process(self, folder: RunFolder, start: list[str]) -> None:
        first = self._start(*start)
        second = self._start(*start)
        for process in (first, second):
            _, errors = process.communicate()
            if process.returncode not in (0, 5):
                self.tally.lost.append(f"{folder.path.name}: two processes: {errors}")

    def _check_errors(self, process: subprocess.Popen[str]) -> None:
        _, errors = process.communicate()
        if "Traceback" in errors:
            self.tally.lost.append(f"a traceback: {errors}")

    def _finish(self, folder: Path, start: list[str]) -> None:
        errors = ""
        for _ in range(5):
            self.tally.resumes += 1
            process = self._start(*start)
            _, errors = process.communicate()
            if process.returncode == 0:
                return
            if offered := re.search(r"--from-step (\d+)", errors):
                start = ["train", "--resume", str(folder), "--from-step", offered[1], "--quiet"]
        self.tally.lost.append(f"{folder.name} cannot be resumed: {errors}")


def _lines(folder: RunFolder) -> int:
    return folder.metrics_file.read_text().count("\n") if folder.metrics_file.exists() else 0


def _end_of(folder: Path) -> tuple[str, str]:
    run = RunFolder(folder)
    latest = run.latest_checkpoint()
    tensors = read_checkpoint(latest).tensors if latest is not None else {}
    return run.metrics_file.read_text(), checksum(tensors, "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    begun = time.monotonic()
    soak = Soak(arguments.out, arguments.seed)
    tally = soak.run_for(arguments.minutes * 60)
    result = {
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "small disk": soak.small_disk,
        "runs": tally.runs,
        "caused": sum(tally.caused.values()),
        "survived": sum(tally.survived.values()),
        "data lost": len(tally.lost),
        "by fault": {name: [tally.caused[name], tally.survived[name]] for name in sorted(tally.caused)},
        "resumes": tally.resumes,
        "steps repeated after corruption": tally.steps_repeated,
        "what was lost": tally.lost,
    }
    print(json.dumps(result, indent=2))
    (arguments.out / "soak.json").write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(bool(tally.lost))


if __name__ == "__main__":
    main()
