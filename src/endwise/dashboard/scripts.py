"""Data as scripts: Chromium lets a page that was opened from a disk load scripts beside it, but fetch nothing.

Every such file is one call, `endwise.receive("key", value);`, in ASCII, so that no reader needs to know its
encoding, and without `<`, so that nothing in it could end or open a script, wherever it is put.
"""

import json
from base64 import b64encode
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from endwise.common.text import printable


def script(key: str, value: Any) -> bytes:
    """The file that hands `value` to the page under `key`.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot say; `packed` arrays may hold both.
    """
    return f"endwise.receive({as_json(key)}, {as_json(value)});\n".encode("ascii")


def as_json(value: Any) -> str:
    """JSON that is a JavaScript expression as well, in printable ASCII without `<`."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def packed(values: NDArray[Any], kind: str = "f4") -> str:
    """An array's little-endian bytes in base64: `f4`, `f8` or `i4`; NaN for what is not there."""
    return b64encode(np.ascontiguousarray(values, dtype=f"<{kind}").tobytes()).decode("ascii")


def short(values: Iterable[float], digits: int = 4) -> list[float | int | None]:
    """Numbers in as few characters as `digits` significant digits take; 0 as one, what is not finite as null."""
    written = f"%.{digits}g"
    return [0 if value == 0 else _finite(float(written % value)) for value in values]


def _finite(value: float) -> float | int | None:
    if value - value != 0:  # NaN and infinity
        return None
    return int(value) if value.is_integer() and abs(value) < 1e6 else value


class Texts:
    """Texts by number, each kept once and made safe to show."""

    def __init__(self) -> None:
        self.all: list[str] = []
        self._places: dict[str, int] = {}

    def place(self, text: str) -> int:
        found = self._places.get(text)
        if found is None:
            found = self._places[text] = len(self.all)
            self.all.append(printable(text))
        return found
