"""Which format an SAE at a path has, and reading it by that."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from endwise.common.errors import FormatError
from endwise.common.files import there_is
from endwise.formats.base import FORMATS, NATIVE, Format, Layout, Stored
from endwise.formats.reading import READERS

_CENTRED_ELSEWHERE = (
    "this SAE was trained on a model loaded with center_writing_weights, whose activations have their mean over the "
    "dimensions taken out; the Hugging Face model's may have it, and whether is not known at this place of this model, "
    "so that the SAE may read them wrongly."
)


def format_at(path: Path) -> tuple[Format, Path] | None:
    """The format of the SAE at a path and where it lies: there, in the path's `sae`, as in a run folder, or in the
    folder whose file of weights the path names.
    """
    for place in (path, path / "sae"):
        for name in FORMATS.names():
            if FORMATS[name].detects(place):
                return FORMATS[name], place
    for folder in (path.parent, path.parent.parent) if path.suffix in READERS else ():
        for name in FORMATS.names():
            if FORMATS[name].detects(folder) and FORMATS[name].weights(folder) == path:
                return FORMATS[name], folder
    return None


def stored_at(path: Path, layouts: Mapping[str, Layout]) -> Stored:
    """Read the SAE at a path, in whatever format it is.

    Raises:
        FormatError: see `Format.read`; of a folder in which no format detects one, as the native format tells it, and
            of a file, what it holds.
    """
    form, place = located(path)
    stored = form.read(place, layouts)
    if stored.architecture not in layouts:
        raise FormatError(f"{place}: architecture {stored.architecture!r:.80} is not one of {', '.join(layouts)}.")
    if stored.of_centred and stored.norm is None:
        warnings.warn(f"{place}: {_CENTRED_ELSEWHERE}", stacklevel=3)
    return stored


def weights_file(path: Path) -> Path:
    """The file that holds the weights of the SAE at a path; the native format's, where there is none."""
    form, place = format_at(path) or (FORMATS[NATIVE], path)
    return form.weights(place)


def metadata_at(path: Path) -> Mapping[str, Any]:
    """Read what the file at a path says beside the function.

    Raises:
        FormatError: see `Format.metadata`.
    """
    form, place = located(path)
    return form.metadata(place)


def located(path: Path) -> tuple[Format, Path]:
    """Return `format_at`, or the native format where a path is no file of tensors.

    Raises:
        FormatError: it is one in no format that is known.
    """
    if (found := format_at(path)) is not None:
        return found
    if path.suffix in READERS and there_is(path) and path.is_file():
        holds = ", ".join(sorted(READERS[path.suffix](path)))
        raise FormatError(
            f"{path} holds {holds[:300] or 'nothing'}, which is no SAE in a format that endwise knows: "
            f"{', '.join(FORMATS.names())}. Give the whole folder, if settings lie beside it."
        )
    return FORMATS[NATIVE], path
