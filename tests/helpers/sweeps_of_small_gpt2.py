"""Small sweeps for the tests of engines, and what is done to their workers while they train."""

import json
import os
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file

from endwise.runs.folder import RunFolder
from endwise.sweeps import SweepConfig
from holding import files
from small_gpt2 import data, recipe

FILES = ("metrics.jsonl", "evaluation.json", "evaluation_sums.safetensors")
PAIR = {"objective.kind": "e2e", "objective.sparsity.coefficient": [0.1, 0.3], "training.checkpoint_every": 10}
"""Two runs in one pass."""
LOCAL = {"objective.kind": "local"}
"""A run that saves nothing before its end, unless it is asked to stop."""


def a_sweep(made, out, *grids, engine="in_process", **settings):
    """Sweep of runs of 100 steps on the model and the tokens in `made`."""
    values = recipe(Path("unused"), tokens=3200, log_every=5).model_dump(mode="json", exclude={"out"})
    values["model"] |= {"name": str(made / "model"), "device": "cpu"}
    values["data"] = data(made).model_dump(mode="json") | {"epochs": 20}
    return SweepConfig.build({"recipe": values, "grids": grids, "engine": engine, "out": out, **settings})


def contents(out):
    """Final state of a sweep's runs by name, bit for bit, without wall-clock times."""
    runs = sorted((out / "runs").iterdir())
    return {run.name: {name: (run / name).read_bytes() for name in FILES} | weights(run) for run in runs}


def weights(run):
    return {
        name: tensor.numpy().tobytes() for name, tensor in load_file(run / "sae" / "sae_weights.safetensors").items()
    }


def timings(run):
    file = run / "timings.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


class Disturbed:
    """A run to whose process something is done in its midst."""

    def __init__(self, out, kind, act):
        self._wanted, self._held, self._over = files(out, kind)
        self._wanted.touch()
        self._act, self._error = act, None
        self._before = []
        self._ended = threading.Event()
        self.run = None
        self.thread = threading.Thread(target=self._wait_and_act)

    def _wait_and_act(self):
        try:
            while not self._held.exists():
                assert not self._ended.wait(0.01), f"the sweep ended, and no run came midway: {self._wanted}"
            process, run = self._held.read_text().split(" ", 1)
            self.run = Path(run)
            # Of the two runs in a pass one may have saved a step that the other has not: both have the one before.
            steps = RunFolder(self.run).saved_steps()
            self._before = [timing for timing in timings(self.run) if not steps or timing["step"] <= steps[0]]
            self._act(int(process))
        except BaseException as error:  # noqa: BLE001  It is raised where the test is.
            self._error = error
        finally:
            self._over.touch()

    def end(self):
        self._ended.set()
        self.thread.join()

    def check_went_on(self):
        """Check that the run kept the steps done before: a second start would differ in their wall-clock times."""
        if self._error is not None:
            raise self._error
        assert 2 <= len(self._before) < len(timings(self.run))
        assert timings(self.run)[: len(self._before)] == self._before


@contextmanager
def disturbed(out, kind, act=lambda process: os.kill(process, signal.SIGKILL)):
    """While the sweep within runs, does something to the process that trains the first run of a kind."""
    one = Disturbed(out, kind, act)
    one.thread.start()
    try:
        yield one
    finally:
        one.end()
