"""Whether something that a run keeps was gathered from the weights that its SAE has now."""

import hashlib
import shlex
from pathlib import Path

from endwise.dictionaries.saelens import WEIGHTS_FILE
from endwise.errors import FormatError


def weights_digest(run: Path) -> str:
    """SHA-256 of the file that holds the SAE's weights.

    Raises:
        FormatError: there is no such file.
    """
    path = run / "sae" / WEIGHTS_FILE
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise FormatError(
            f"{path} is not there. Restore it, or train it: endwise train --resume {shlex.quote(str(run))}"
        ) from None


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
