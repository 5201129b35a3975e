"""Files of a local source: those of one split, in a fixed order. Files left out are reported."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath

from endwise.common.errors import DataError
from endwise.common.processes import is_first_process
from endwise.common.remedies import reason, remedy
from endwise.common.terminal import note

DEFAULT_SPLIT = "train"
_SPLITS = {
    "train": DEFAULT_SPLIT,
    "training": DEFAULT_SPLIT,
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Words that `datasets` looks for in the names of files and folders."""
_READ = "Give one with .txt, .jsonl, .json, .csv, .parquet or .npy files."
_NAMED = 3
"""Left-out files that a line names."""


def split_of(path: PurePath) -> str:
    """The split that a file's name holds as a word of its own, or else a folder's, the nearest first: `test` for
    `test-00000.parquet`, `test/a.txt` and `my_eval.jsonl`. `train` for what names none.
    """
    for part in reversed(path.parts):
        for word in re.split("[^a-z]+", part.lower()):
            if word in _SPLITS:
                return _SPLITS[word]
    return DEFAULT_SPLIT


def files_of_split(path: Path, split: str, readable: Callable[[Path], bool]) -> list[Path]:
    """The files of one split of a folder, those in folders within it included. Links are followed.

    Raises:
        DataError: it has no file that can be read, none of that split, or a folder in it may not be read.
    """
    found = {file: _is_data(file, readable) for file in sorted(_walk(path))}
    left = [_below(path, file) for file, is_data in found.items() if not is_data]
    splits = {file: split_of(file.relative_to(path)) for file, is_data in found.items() if is_data}
    if not splits:
        raise DataError(f"The folder {path} holds no file that can be read{_named(left)}. {_READ}")
    if split not in splits.values():
        raise no_split(path, split, sorted(set(splits.values())))
    others = [_below(path, file) for file, own in splits.items() if own != split]
    left_out = [f"{len(others)} of other splits{_named(others)}"] if others else []
    left_out += [f"{len(left)} that hold no data{_named(left)}"] if left else []
    if left_out and is_first_process():
        note(f"{path}, split {split}: files left out: {'; '.join(left_out)}.")
    return [file for file, own in splits.items() if own == split]


def check_split(path: Path, split: str) -> None:
    """Check the split of a source that has only one: it is `train`, or what its name says.

    Raises:
        DataError: another one is asked for.
    """
    if split not in (own := {DEFAULT_SPLIT, split_of(PurePath(path.name))}):
        raise no_split(path, split, sorted(own))


def no_split(name: object, split: str, there: Sequence[str]) -> DataError:
    return DataError(
        f"{name} has no split {split!r}; it has {', '.join(there)}. Set data.split (or data.heldout_split, if it was "
        "asked for as held-out text)."
    )


def files_below(folder: Path) -> list[Path]:
    """All files below a folder that may be read as data, those that links lead to included.

    Raises:
        DataError: a folder in it may not be read.
    """
    return sorted(path for path in _walk(folder) if not path.name.startswith(".") and path.is_file())


def _is_data(file: Path, readable: Callable[[Path], bool]) -> bool:
    """A link that leads nowhere counts: reading it fails, and says so."""
    return not file.name.startswith(".") and readable(file) and (file.is_file() or not file.exists())


def _walk(folder: Path) -> Iterator[Path]:
    """Everything below a folder that is no folder; of hidden folders, which programs keep for themselves, the folder.
    One that a link leads to again is not entered twice.
    """
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        real = os.path.realpath(place)
        hidden = [name for name in folders if name.startswith(".")]
        folders[:] = [] if real in seen else sorted(set(folders) - set(hidden))
        if real not in seen:
            yield from (Path(place, name) for name in [*hidden, *names])
        seen.add(real)


def _refuse(error: OSError) -> None:
    raise DataError(f"Cannot read the folder {error.filename}: {reason(error)}. {remedy(error, 'move it away')}")


def _below(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f" ({', '.join(names[:_NAMED])}{more})" if names else ""
