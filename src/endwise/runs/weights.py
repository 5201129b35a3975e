"""Checks that something a run keeps was gathered from the weights that its SAE has now."""

from pathlib import Path

from endwise.common.errors import FormatError
from endwise.runs.folder import RunFolder


def weights_digest(run: Path) -> str:
    """SHA-256 of the file that holds the SAE's weights.

    Raises:
        FormatError: there is no such file, or it holds other weights than training wrote.
    """
    return RunFolder(run).weights_digest()


def check_same_weights(run: Path, digest: object, done: str, again: str) -> None:
    """
    Args:
        digest: of the weights that it was gathered from.
        done: what was done to the run with them, `harvested`.
        again: the remedy.

    Raises:
        FormatError: the SAE has other weights now.
    """
    if digest != weights_digest(run):
        raise FormatError(f"{run} was {done} with other weights than its SAE has now. {again}")
