"""Processes for tests that begin at once: forked from one that has imported torch and the rest (see `warm_server`)."""

import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

from filelock import FileLock

from places import HELPERS

_PYTHON = (sys.executable, "-E", "-S")
PATIENCE = 120
_started: list["subprocess.Popen[bytes]"] = []


@cache
def _server() -> str:
    """Its socket; the server is started by the first of pytest's processes that needs it, and ends with the last."""
    folder = Path(os.environ["ENDWISE_TESTS_WARM"])
    path = folder / "socket"
    with FileLock(folder / "lock"):
        if not path.exists():
            command = [sys.executable, str(HELPERS / "warm_server.py"), str(path)]
            with (folder / "alive").open() as alive:
                server = subprocess.Popen(command, stdin=alive, stdout=subprocess.DEVNULL)
            _started.append(server)
            deadline = time.monotonic() + PATIENCE
            while not path.exists():  # who connects from then on waits until everything is imported
                assert server.poll() is None and time.monotonic() < deadline, "the warm server did not start"
                time.sleep(0.01)
    return str(path)


def command(*arguments: object) -> list[str]:
    """What runs `python ARGUMENT...` in a warm process: a script or `-m` and a module, and what it is given."""
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
