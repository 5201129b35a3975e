"""Text from files and recipes, made safe to show: on a terminal it could otherwise move the cursor or hide itself."""

import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode's categories of what has no shape of its own: control, format (bidirectional overrides among them), halves of
surrogate pairs, line and paragraph separators."""
_KEPT = frozenset("\n\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}")
"""Hidden characters that only choose how their neighbours are drawn (Persian and Hindi need them), and line ends."""

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_CACHED = "models--"
_SIGN = re.compile(r"(?<![\w.)-])-(?=\.?\d|inf)|(?<=\de)(?<![a-z]\de)-(?=\d)")
"""Hyphens that stand for minus signs."""


def printable(text: object) -> str:
    """The text with every hidden character written out as Python writes it, `\\x1b` for an escape; lines stay lines."""
    text = str(text)
    # What Python calls printable holds nothing hidden; it is nearly every text, and recognised a hundred times as fast.
    return text if text.isprintable() else "".join(map(_written_out, text))


def minus(text: str) -> str:
    """Numbers in a text, written with minus signs, as all that is drawn for people has them; files keep hyphens."""
    return _SIGN.sub("−", text)


def model_title(name: str) -> str:
    """Name a model where a title has room for a name: its folder's, not the path on somebody's machine.

    Args:
        name: as a recipe has it: `embedded`, a local folder, or a hub id, which stays whole.
    """
    path = Path(os.path.expanduser(name))  # noqa: PTH111  Of a user that is not there, as it stands.
    if not name or (_HUB_ID.fullmatch(name) and not path.exists()):
        return name
    parts = path.resolve().parts if path.name in ("", "..") else path.parts
    cached = [part for part in parts if part.startswith(_CACHED)]  # <cache>/models--<owner>--<name>/snapshots/<commit>
    return cached[-1].removeprefix(_CACHED).replace("--", "/") if cached else parts[-1] if parts else name


def model_titles(names: Iterable[str]) -> dict[str, str]:
    """`model_title` of each name; of different folders that would be called alike, as much of the path as tells them
    apart.
    """
    titles = {name: model_title(name) for name in names}
    for title in set(titles.values()):
        alike = [name for name, own in titles.items() if own == title]
        ends = [list(reversed(Path(name).parts)) for name in alike]
        for name, parts in zip(alike, ends, strict=True) if len(alike) > 1 else ():
            others = [other for other in ends if other is not parts]
            common = max(len(os.path.commonprefix([parts, other])) for other in others)  # noqa: RUF071  of parts
            titles[name] = str(Path(*reversed(parts[: common + 1])))
    return titles


def storable(text: str) -> str:
    """The text with a question mark for each half of a surrogate pair, which JSON may hold and no file takes."""
    return text.encode("utf-8", "replace").decode()


def _written_out(character: str) -> str:
    if character in _KEPT or unicodedata.category(character) not in _HIDDEN:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
