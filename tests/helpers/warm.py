"""Processes for tests that begin at once: forked from one that has imported torch and the rest (see `warm_server`)."""

import fcntl
import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

from places import HELPERS

_PYTHON = (sys.executable, "-E", "-S")
PATIENCE = 120
SHARED = "ENDWISE_TESTS_WARM"
"""Environment variable that names the server's folder."""
_started: list[subprocess.Popen] = []


def shared(folder: Path) -> None:
    """Have this process and those that it starts use one server, from a folder of its own until this process ends."""
    os.mkfifo(folder / "open")
    os.open(folder / "open", os.O_RDWR)  # until this process ends, what reads from it waits
    os.environ[SHARED] = str(folder)


@cache
def _server() -> str:
    """Its socket; the server is started by whoever needs it first."""
    folder = Path(os.environ[SHARED])
    path = folder / "socket"
    with (folder / "starting").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return str(path)
        opened = os.open(folder / "open", os.O_RDONLY)
        server = subprocess.Popen(
            [sys.executable, str(HELPERS / "warm_server.py"), str(path)], stdin=opened, stdout=subprocess.DEVNULL
        )
        os.close(opened)
        _started.append(server)  # it outlives this process, if others use it
        deadline = time.monotonic() + PATIENCE
        while not path.exists():  # who connects from then on waits until everything is imported
            assert server.poll() is None and time.monotonic() < deadline, "the warm server did not start"
            time.sleep(0.01)
    return str(path)


def command(*arguments: object) -> list[str]:
    """Command that runs `python ARGUMENT...` in a warm process: a script or `-m` and a module, and its arguments."""
    return [*_PYTHON, str(HELPERS / "warm_client.py"), _server(), *map(str, arguments)]


class Warm(subprocess.Popen):
    """`python ARGUMENT...` in a warm process, to which signals go directly."""

    def __init__(self, *arguments: object, env: dict[str, str] | None = None, **options: object) -> None:
        reads, writes = os.pipe()
        environment = {**(os.environ if env is None else env), "WARM_TOLD": str(writes)}
        super().__init__(command(*arguments), env=environment, pass_fds=[writes], **options)
        os.close(writes)
        with os.fdopen(reads) as told:
            self.program = int(told.readline())

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.program, sig)


def run(*arguments: object, **options: object) -> "subprocess.CompletedProcess[str]":
    """Like `subprocess.run` of `python ARGUMENT...`, with its output as text."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, check=False, **options)
