"""Checks that something a run keeps was gathered from the weights that its SAE has now."""

from pathlib import Path

from endwise.common.errors import FormatError
from endwise.runs.folder import RunFolder


def check_same_weights(run: Path, digest: object, done: str, again: str) -> None:
    """
    Args:
        digest: of the weights that it was gathered from.
        done: what was done to the run with them, `harvested`.
        again: the remedy.

    Raises:
        FormatError: the SAE has other weights now, or see `RunFolder.weights_digest`.
    """
    if digest != RunFolder(run).weights_digest():
        raise FormatError(f"{run} was {done} with other weights than its SAE has now. {again}")
