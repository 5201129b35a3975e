"""Runs over several processes under torchrun, or in one alone, and how near what they write may be."""

import os

import pytest

import warm
from places import HELPERS

TOLERANCE = 1e-4
"""Difference of fp32 sums made in another order, over some 20 steps."""


def launch(processes, *arguments, fault="none", **environment):
    """Under torchrun, or alone; the exit code and what was said."""
    done = spread(processes, HELPERS / "victim.py", fault, *arguments, **environment)
    return done.returncode, done.stdout, done.stderr


def spread(processes, *program, **environment):
    options = {"cwd": HELPERS, "timeout": 240, "env": {**os.environ, "OMP_NUM_THREADS": "1", **environment}}
    if processes == 1:
        return warm.run(*program, **options)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "--no-python"]
    return warm.run(*torchrun, *warm.command(*program), **options)


def assert_close(ours, theirs, path=""):
    assert type(ours) is type(theirs), path
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            assert_close(ours[key], theirs[key], f"{path}.{key}")
    elif isinstance(theirs, list):
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_close(one, other, f"{path}[{number}]")
    elif theirs is None or isinstance(theirs, int | str):
        assert ours == theirs, path
    else:
        assert ours == pytest.approx(theirs, rel=TOLERANCE, abs=TOLERANCE), path
