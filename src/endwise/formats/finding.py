"""Detection of an SAE's format, by its path or its name (`naming`), and reading by that."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from endwise.common.errors import FormatError
from endwise.common.kinds import other_kind
from endwise.formats.base import FORMATS, NATIVE, PER_TOKEN, Format, Layout, Stored
from endwise.formats.naming import here
from endwise.formats.reading import READERS

_CENTRED_ELSEWHERE = (
    "this SAE was trained on a model loaded with center_writing_weights, whose activations have their mean over the "
    "dimensions taken out; whether the Hugging Face model's have it is unknown at this place of this model, so that "
    "the SAE may misread them."
)

_FOLDED_BIASES = (
    "this SAE was trained on heads' results without their value biases (fold_value_biases), but the Hugging Face "
    "model's include them. endwise adopt, which is given the model, makes an SAE of it that reads them as they are."
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


def stored_at(name: Path, layouts: Mapping[str, Layout]) -> Stored:
    """Read the SAE of a name, in whatever format it is. Facts of the registry that names it are added.

    Raises:
        FormatError: see `Format.read`; of a folder in which no format detects one, as the native format reports it, and
            of a file, what it holds.
        HubError: see `naming.here`.
    """
    found = here(name)
    form, place = located(found.path)
    stored = form.read(place, layouts)
    if stored.architecture not in layouts:
        raise FormatError(f"{place}: architecture {stored.architecture!r:.80} is not one of {', '.join(layouts)}.")
    stored = replace(stored, metadata=found.completed(stored.metadata))
    norm = None if found.named is None else found.named.overrides.get("normalize_activations")
    if norm in PER_TOKEN and layouts[stored.architecture].norms:
        stored = replace(stored, config={**stored.config, "normalize": norm})
    if (remark := processing_remark(stored)) is not None:
        warnings.warn(f"{place}: {remark}", stacklevel=3)
    return stored


def processing_remark(stored: Stored) -> str | None:
    """Remark on what TransformerLens did to the model that an SAE was trained on, and is not undone here."""
    if stored.lacks_value_biases:
        return _FOLDED_BIASES
    return _CENTRED_ELSEWHERE if stored.of_unknown_processing else None


def weights_file(name: Path) -> Path:
    """The file that holds the weights of the SAE of a name; the native format's, where there is none.

    Raises:
        HubError: see `naming.here`.
    """
    path = here(name).path
    form, place = format_at(path) or (FORMATS[NATIVE], path)
    return form.weights(place)


def metadata_at(name: Path) -> Mapping[str, Any]:
    """Read what the files of a name, and the registry that names it, say beside the function.

    Raises:
        FormatError: see `Format.metadata`.
        HubError: see `naming.here`.
    """
    found = here(name)
    form, place = located(found.path)
    return found.completed(form.metadata(place))


def located(path: Path) -> tuple[Format, Path]:
    """Return `format_at`, or the native format where it is no file of tensors.

    Raises:
        FormatError: it is one in no format that is known.
    """
    if (found := format_at(path)) is not None:
        return found
    if (other := other_kind(path, "SAE")) is not None:
        raise other
    if path.is_file():
        names = sorted(READERS[path.suffix](path)) if path.suffix in READERS else ["no tensors of an SAE"]
        raise FormatError(
            f"{path} holds {', '.join(names)[:300] or 'nothing'}, not an SAE in a format that endwise knows: "
            f"{', '.join(FORMATS.names())}. Give the whole folder, if settings lie beside it."
        )
    return FORMATS[NATIVE], path
