"""What a process elsewhere does with a task: in the directory of the sweep, and whatever happens comes back as text."""

import os
import socket
from pathlib import Path

import torch

from endwise.common.errors import Interrupted, RunFolderError
from endwise.common.remedies import reason, remedy
from endwise.sweeps.tasks import ModelCache, Outcome, Task, carry_out, folder_of

_loaded = ModelCache()
"""Of the tasks that this process carried out before."""


def work(task: Task, directory: Path, threads: int) -> list[Outcome] | None:
    """Carries out a task; None: it was told to stop, and what it had done is saved.

    Args:
        directory: the sweep's working directory. Paths in recipes mean the same there as they did to the sweep, and run
            folders hold the recipes as they were given, whoever writes them.
        threads: to compute with.
    """
    try:
        _enter(directory, task)
        torch.set_num_threads(threads)
        return carry_out(task, _loaded)
    except (Interrupted, KeyboardInterrupt):
        return None
    except Exception as error:  # noqa: BLE001  Another process may not know its class.
        return failed(task, one_line(error))


def failed(task: Task, told: str) -> list[Outcome]:
    return [Outcome(folder_of(config), told) for config in task]


def one_line(error: BaseException) -> str:
    """An error's name and the end of what it says, where a traceback has its reason."""
    told = " ".join(str(error).split())
    return f"{type(error).__name__}: {told if len(told) <= 600 else f'... {told[-600:]}'}"


_SHARED = "start the sweep in a directory that all machines share, or give it an absolute `out` that they share"


def _enter(directory: Path, task: Task) -> None:
    """
    Raises:
        RunFolderError: this machine has no such directory, and a run folder is given relative to it.
    """
    try:
        os.chdir(directory)
    except OSError as error:
        relative = [folder_of(config) for config in task if not folder_of(config).is_absolute()]
        if relative:
            raise RunFolderError(
                f"{socket.gethostname()} does not have the directory that the sweep was started in, {directory} "
                f"({reason(error)}), and so not {relative[0]} within it. {remedy(error, _SHARED)}"
            ) from None
