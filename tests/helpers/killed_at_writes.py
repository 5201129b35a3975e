"""Trains and is killed just before it makes, renames or removes a file, or opens one to write, at each of these in
turn; then resumes: `python killed_at_writes.py FOLDER TOKENS`.

Every training is a forked process of its own, so that the libraries are imported only once. Prints, for each kill, a
line of JSON: what was about to happen, the step that the killed process had saved, whether the run then ended in the
same bits and lines as one left alone.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch

from endwise import train
from endwise.runs.checkpoints import read_checkpoint
from endwise.runs.folder import RunFolder
from small_gpt2 import recipe, small_corpora, small_model

torch.set_num_threads(1)
NEEDED = {"os.mkdir": False, "os.rename": True, "os.remove": True, "os.rmdir": True, "os.truncate": True}
"""Audit events of Python besides opening to write: True if the path is there before, False if not."""


def act_before_changes(below: Path, act) -> None:
    """Call `act` with a word for what is about to be changed in a folder, each time."""

    def hook(event: str, arguments: tuple) -> None:
        if event != "open" and event not in NEEDED:
            return
        path = Path(str(arguments[0]))
        changes = arguments[2] & (os.O_WRONLY | os.O_RDWR) if event == "open" else path.exists() == NEEDED[event]
        if changes and path.is_relative_to(below):
            act(f"{event} {path.name}")

    sys.addaudithook(hook)


def forked(act) -> int:
    """The wait status of a process that does it."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    status = 1
    try:
        act()
        status = 0
    except BaseException:  # noqa: BLE001  The process ends here in any case.
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def end_of(folder: Path):
    run = RunFolder(folder)
    tensors = read_checkpoint(run.latest_checkpoint()).tensors
    return run.metrics_file.read_bytes(), {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def main(folder: Path, tokens: Path) -> None:
    model, corpora = small_model(), small_corpora(tokens)

    def run(name: str) -> None:
        settings = {"tokens": 96, "log_every": 1, "checkpoint_every": 2, "keep_checkpoints": 1}
        config = recipe(folder / name, **settings, evaluate_every=3, accumulation=2)
        train(config, model=model, corpora=corpora, display=False, resume="if_started")

    def noted() -> None:
        changes: list[str] = []
        act_before_changes(folder / "whole", changes.append)
        run("whole")
        (folder / "changes.json").write_text(json.dumps(changes))

    def killed(name: str, at: int) -> None:
        seen: list[str] = []

        def count(change: str) -> None:
            seen.append(change)
            if len(seen) == at + 1:
                os.kill(os.getpid(), signal.SIGKILL)

        act_before_changes(folder / name, count)
        run(name)

    if forked(noted):
        raise SystemExit("A process that was left alone failed.")
    expected = end_of(folder / "whole")
    for at, change in enumerate(json.loads((folder / "changes.json").read_text())):
        name = str(at)
        status = forked(lambda name=name, at=at: killed(name, at))
        saved = RunFolder(folder / name).saved_steps()
        if not os.WIFSIGNALED(status) or forked(lambda name=name: run(name)):
            raise SystemExit(f"Killed before {change}: status {status}")
        same = end_of(folder / name) == expected
        print(json.dumps({"change": change, "saved": saved[-1] if saved else 0, "same": same}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
