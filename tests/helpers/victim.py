"""The command line with a fault built in: `python victim.py FAULT ARGUMENT...`, for tests that need it to happen."""

import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch

from endwise.cli import main
from endwise.training.trainee import Trainee

FAULTY_STEP = 5


def _at_the_step(act):
    plain, done = Trainee.accumulate, []

    def accumulate(self, *arguments, **named):
        if self.step == FAULTY_STEP and not done:
            done.append(act)
            act()
        return plain(self, *arguments, **named)

    Trainee.accumulate = accumulate


def holds():
    """Says so on standard output in the midst of a step, and never continues."""
    print("holding", flush=True)
    time.sleep(600)


def waits_for_a_signal():
    """Says so on standard output in the midst of a step, and continues once a signal has come."""
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    signal.set_wakeup_fd(writes)
    print("waiting", flush=True)
    os.read(reads, 1)


def asks_for_too_much():
    """More memory than the limit leaves, which the allocator itself refuses."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2**28, resource.RLIM_INFINITY))
    torch.empty(2**30)


def asks_the_gpu_for_too_much():
    torch.empty(2**44, device="cuda")


def dies_as_second_process():
    if os.environ.get("RANK") == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    _is_ended_while_it_reports()


def raises_as_second_process():
    if os.environ.get("RANK") == "1":
        raise ArithmeticError("only here")
    _is_ended_while_it_reports()


def _is_ended_while_it_reports():
    """By torchrun, at the worst moment."""
    command_line = sys.modules["endwise.cli.app"]
    fail = command_line._fail

    def ended(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        fail(*arguments)

    command_line._fail = ended


def is_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def is_told_to_stop():
    """As a scheduler tells one of several processes."""
    if os.environ.get("RANK", "1") == "1":
        os.kill(os.getpid(), signal.SIGTERM)


FAULTS = (
    holds,
    waits_for_a_signal,
    asks_for_too_much,
    asks_the_gpu_for_too_much,
    dies_as_second_process,
    raises_as_second_process,
    is_killed,
    is_told_to_stop,
)

if __name__ == "__main__":
    name = sys.argv.pop(1)
    for fault in FAULTS:
        if fault.__name__ == name:
            _at_the_step(fault)
    torch.set_num_threads(1)
    main()
