"""Trains, is killed at a random moment, goes on; again and again. `python kill_often.py FOLDER TOKENS TIMES`.

Every training is a forked process of its own, so that the libraries are imported only once. Prints, for each kill, a
line of JSON: the moment as a share of a whole run, the step that the killed process had saved, whether the run then
ended in the same bits and lines as one left alone.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from endwise import train
from endwise.runs.checkpoints import read_checkpoint
from endwise.runs.folder import RunFolder
from small_gpt2 import recipe, small_corpora, small_model

torch.set_num_threads(1)


def started(act) -> int:
    child = os.fork()
    if child:
        return child
    try:
        act()
    except BaseException:  # noqa: BLE001  A child must not return into its parent's code.
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def ended(child: int) -> None:
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit(f"A process that was left alone ended with status {status}.")


def end_of(folder: Path):
    run = RunFolder(folder)
    tensors = read_checkpoint(run.latest_checkpoint()).tensors
    return run.metrics_file.read_bytes(), {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def main(folder: Path, tokens: Path, times: int) -> None:
    model, corpora = small_model(), small_corpora(tokens)

    def run(name: str) -> None:
        config = recipe(folder / name, tokens=640, log_every=1, checkpoint_every=3, evaluate_every=10, accumulation=2)
        train(config, model=model, corpora=corpora, display=False, resume="if_started")

    for name in ("warm up", "whole"):
        begun = time.monotonic()
        ended(started(lambda name=name: run(name)))
    duration, expected = time.monotonic() - begun, end_of(folder / "whole")
    moments = random.Random(0)
    for number in range(times):
        name, share = str(number), moments.uniform(0, 1)
        child = started(lambda name=name: run(name))
        time.sleep(share * duration)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        saved = RunFolder(folder / name).saved_steps()
        ended(started(lambda name=name: run(name)))
        same = end_of(folder / name) == expected
        print(json.dumps({"share": share, "saved": saved[-1] if saved else 0, "same": same}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
