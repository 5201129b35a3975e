"""Everything that a card is to show, in one command that nobody has to watch.

    python benchmarks/gpu.py --out runs/gpu.json                      # 8 minutes in all
    python benchmarks/gpu.py --minutes 20 --out runs/gpu.json         # the same again makes what is missing or failed
    python benchmarks/gpu.py --device cpu --tiny --out runs/try.json  # on a processor, to see that it works

Each part (`gpu_parts.py`) runs in a process of its own, most informative first, and is ended after a time of its own or
when the minutes are over; results are written after every row. A part for which packages are missing is skipped. The
last line sums up. Exit code: 0; 1 if something failed; 2 if there is no card, or `--out` holds what was made otherwise
or cannot be written; 130 or 143 if it was interrupted, after which the same call resumes.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from endwise import __version__
from gpu_report import summary, write_report
from harness import write_json

HERE = Path(__file__).parent
MINUTES = 8.0
"""For which the parts' own limits are set; with more minutes they grow alike."""
LEAST_SECONDS = 5.0
"""A part that less time is left for is not begun."""
SECONDS = {False: 2.0, True: 0.01}
"""Time that is spent on each figure, by whether shapes are tiny."""
LACKING = ModuleNotFoundError.__name__
"""Begins what a row raised for which a package is missing."""
TAIL = 3000
"""Characters of a worker's log that are kept where it failed."""


@dataclass(frozen=True)
class Part:
    name: str
    limit: float
    """Seconds after which it is ended, start included."""
    packages: tuple[str, ...] = ()
    """Modules that it needs besides endwise."""


PARTS = (
    Part("card", 60),
    Part("steps gpt2-small mixed", 75),
    Part("kernels", 120),
    Part("waits", 60),
    Part("long run", 120),
    Part("steps gpt2-small exact", 75),
    Part("steps gpt2-small exact, TF32", 60),
    Part("compiled", 120),
    Part("steps smollm2-135m mixed", 60),
    Part("steps tinystories-1m mixed", 45),
    Part("steps gemma-2-2b mixed", 60),
    Part("resume", 45),
    Part("plan", 90),
    Part("paper's step", 90, ("e2e_sae", "transformer_lens")),
    Part("peer saelens topk", 45, ("sae_lens",)),
    Part("peer sparsify topk", 45, ("sparsify",)),
    Part("peer reference standard", 45, ("e2e_sae",)),
    Part("steps smollm2-135m exact, TF32", 60),
    Part("steps tinystories-1m exact, TF32", 45),
    Part("steps smollm2-135m exact", 75),
    Part("steps tinystories-1m exact", 45),
)
"""The most informative first."""
FIRST, LAST = "card", "plan"
"""Nothing runs without the first; the last is about steps, and has more to say once there are more of them."""


class OtherResults(Exception):
    """The file holds what was made with other settings."""


class Results:
    """The file: `made_with`, and of every part its `status` and `rows`.

    Raises:
        OtherResults: what is there was made with other settings, or is no such file.
    """

    def __init__(self, path: Path, made_with: dict[str, Any]) -> None:
        self.path, self._lock = path, threading.Lock()
        self.all: dict[str, Any] = {"made_with": made_with, "calls": [], "parts": {}}
        if path.exists():
            self.all = _read(path)
            if (before := self.all["made_with"]) != made_with:
                difference = f"{path} was made with {before}, and this call is with {made_with}"
                raise OtherResults(f"{difference}. Give another --out.")

    def part(self, name: str) -> dict[str, Any]:
        return self.all["parts"].setdefault(name, {"status": "left", "rows": {}})

    def whole(self, name: str) -> list[str]:
        """Rows of a part that need not be made again."""
        return [row for row, found in self.part(name)["rows"].items() if "failed" not in found]

    def failed(self, name: str) -> dict[str, str]:
        """Errors of the rows that failed."""
        return {row: found["failed"] for row, found in self.part(name)["rows"].items() if "failed" in found}

    def put(self, name: str, row: str, found: dict[str, Any]) -> None:
        with self._lock:
            self.part(name)["rows"][row] = found
            self.save()

    def end(self, name: str, status: str, **more: Any) -> None:
        with self._lock:
            self.all["parts"][name] = {"status": status, "rows": self.part(name)["rows"], **more}
            self.save()

    def save(self) -> None:
        write_json(self.path, self.all)


def _read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        found = json.loads(path.read_text())
        rows = [row for part in found["parts"].values() if part["status"] for row in part["rows"].values()]
        if isinstance(found["calls"], list) and all(isinstance(each, dict) for each in [*rows, found["made_with"]]):
            return found
    raise OtherResults(f"{path} is no whole file of results of this script. Give another --out.")


@dataclass
class Runner:
    results: Results
    device: str
    tiny: bool
    minutes: float
    script: Path = HERE / "gpu_parts.py"

    def __post_init__(self) -> None:
        self.deadline = time.monotonic() + 60 * self.minutes

    def run(self, parts: Iterable[Part]) -> None:
        for part in parts:
            if self.results.part(part.name)["status"] == "done":
                continue
            missing = [name for name in part.packages if importlib.util.find_spec(name) is None]
            left = self.deadline - time.monotonic()
            if missing:
                self.results.end(part.name, "skipped", reason=f"not installed: {', '.join(missing)}")
            elif left < LEAST_SECONDS:
                self.results.end(part.name, "left", reason="the minutes are over")
            else:
                self._run(part, min(part.limit * max(1.0, self.minutes / MINUTES), left), left)
            _print_outcome(part.name, self.results.part(part.name))
            if part.name == FIRST and self.results.part(FIRST)["status"] != "done":
                break

    def job_of(self, part: str, scratch: str) -> dict[str, Any]:
        """Return what the part's process is given; it reads what is known so far from the file."""
        self.results.save()
        return {
            "part": part,
            "device": self.device,
            "tiny": self.tiny,
            "seconds": SECONDS[self.tiny],
            "scratch": scratch,
            "results": str(self.results.path),
            "have": self.results.whole(part),
        }

    def _run(self, part: Part, limit: float, left: float) -> None:
        """Run a part in a process of its own, with all that it starts in a group that is ended with it."""
        begun = time.monotonic()
        with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
            worker = subprocess.Popen(
                [sys.executable, str(self.script), json.dumps(self.job_of(part.name, scratch))],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled"},
                start_new_session=True,
            )
            reader = threading.Thread(target=self._read, args=(part.name, worker), daemon=True)
            reader.start()
            ended = True
            try:
                worker.wait(limit)
            except subprocess.TimeoutExpired:
                ended = False
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(worker.pid, signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the driver: leave it
                    worker.wait(10)
                reader.join(10)
            taken = {"seconds": round(time.monotonic() - begun, 1), "date": datetime.now(UTC).isoformat("T", "seconds")}
            log.seek(0)
            tail = log.read().decode(errors="replace")[-TAIL:]
            failed = self.results.failed(part.name)
            if not ended and limit >= left:
                status, reason = "left", "the minutes were over"
            elif not ended:
                status, reason = "failed", f"not done after {limit:.0f} s"
            elif worker.returncode:
                status, reason = "failed", f"its process ended with {worker.returncode}"
            elif failed and part.packages and all(raised.startswith(LACKING) for raised in failed.values()):
                status, reason = "skipped", f"rows lack what {', '.join(part.packages)} need"
            elif failed:
                status, reason = "failed", f"rows failed: {', '.join(failed)}"
            else:
                status, reason = "done", ""
            self.results.end(part.name, status, **({"reason": reason, "log": tail} if reason else {}), **taken)
        if part.name.startswith("steps ") and LAST in self.results.all["parts"]:
            self.results.end(LAST, "left", reason="more steps were taken since")

    def _read(self, part: str, worker: "subprocess.Popen[str]") -> None:
        assert worker.stdout is not None
        with worker.stdout:
            for line in worker.stdout:
                if line.endswith("\n"):  # else it was ended in the midst of it
                    row = json.loads(line)
                    self.results.put(part, row["row"], row["found"])


def _print_outcome(name: str, part: dict[str, Any]) -> None:
    failed = next((row["failed"] for row in part["rows"].values() if "failed" in row), "")
    words = [f"{name}: {part['status']}", part.get("reason", ""), failed.partition("\n")[0][:300]]
    print("; ".join(filter(None, words)), flush=True)


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"more than 0, not {text}")
    return value


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="shapes that take no time")
    parser.add_argument("--minutes", type=_positive, default=MINUTES, help="in all")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.json"))
    parser.add_argument("--parts", nargs="+", metavar="PART", help="some of them, after the first")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts or ()) - {part.name for part in PARTS}:
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(part.name for part in PARTS)}")
    return arguments


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is running is ended, and what is there stays
    arguments = parse()
    made_with = {"device": arguments.device, "tiny": arguments.tiny}
    made_with |= {"endwise": __version__, "torch": version("torch")}
    try:
        results = Results(arguments.out, made_with)
        results.all["calls"].append(
            {"command": shlex.join(["python", *sys.argv]), "date": datetime.now(UTC).date().isoformat()}
        )
        results.save()
    except OtherResults as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{arguments.out} cannot be read or written: {error}. Give another --out.", file=sys.stderr)
        return 2
    parts = [part for part in PARTS if arguments.parts is None or part.name in (FIRST, *arguments.parts)]
    try:
        Runner(results, arguments.device, arguments.tiny, arguments.minutes).run(parts)
    except KeyboardInterrupt:
        return 130
    finally:
        write_report(results.all, arguments.out)
        print(summary(results.all, arguments.out), flush=True)
    status = {name: part["status"] for name, part in results.all["parts"].items()}
    if status[FIRST] != "done":
        return 2
    return int("failed" in status.values())


if __name__ == "__main__":
    sys.exit(main())
