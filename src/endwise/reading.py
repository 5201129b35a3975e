"""Reading what anyone may have written: JSON within bounds, and names that may not lead out of their folder."""

import json
import os
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from endwise.errors import FormatError
from endwise.remedies import reason, remedy

LARGEST_JSON = 32 << 20
"""Bytes; the index of a model in a thousand shards has less than a tenth of it."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        FormatError: it cannot be read, is larger than `LARGEST_JSON`, or holds no object in JSON.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_JSON + 1)
        if len(content) > LARGEST_JSON:
            raise ValueError(f"it has more than {LARGEST_JSON:,} bytes")
        value = json.loads(content.decode("utf-8-sig"))
        if not isinstance(value, dict):
            raise ValueError(f"it must hold an object, not {type(value).__name__}")
    except FileNotFoundError:
        raise
    except RecursionError:
        raise FormatError(f"{path} cannot be read as JSON: it is nested too deeply. {_REMEDY}") from None
    except OSError as error:
        raise FormatError(f"{path} cannot be read as JSON: {reason(error)}. {remedy(error)}") from None
    except ValueError as error:
        raise FormatError(f"{path} cannot be read as JSON: {error}. {_REMEDY}") from None
    return value


def read_format(path: Path, version: int) -> dict[str, Any]:
    """The object in a JSON file of ours, which says by `format` how it is to be read.

    Raises:
        FileNotFoundError, FormatError: as `read_json`.
        ValueError: it is of another version than the one that is read.
    """
    value = read_json(path)
    if value.get("format") != version:
        raise ValueError(f"its format is {value.get('format')!r:.40}, this version reads {version}")
    return value


_REMEDY = "Restore it from a copy, or have it written again."


def there_is(path: Path) -> bool:
    """Whether there is such a file or folder. A name that the file system does not take (too long, a NUL) names none,
    where `Path.exists` raises.
    """
    return os.path.exists(path)  # noqa: PTH110


def at_home(name: str) -> str:
    """The name of a path with `~` resolved; where there is no such user, as it stands (`Path.expanduser` raises)."""
    return os.path.expanduser(name)  # noqa: PTH111


def expanded(path: str | Path) -> Path:
    """A path that a user gave, as `at_home`: every one of them goes through here, so that none makes a folder `~`."""
    return Path(at_home(str(path)))


def stays_inside(name: str) -> bool:
    """Whether a relative file name, taken from a folder, names something in it, on any operating system."""
    paths = (PurePosixPath(name), PureWindowsPath(name))
    return bool(name) and not any(path.is_absolute() or path.anchor or ".." in path.parts for path in paths)
