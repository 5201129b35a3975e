"""Prompts: plain text files with places to fill in, `{{examples}}`; those that ship can be replaced one by one."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from endwise.common.errors import ConfigError
from endwise.common.files import expanded
from endwise.common.remedies import reason, remedy

PLACE = re.compile(r"\{\{\s*(\w+)\s*\}\}")
LARGEST = 1 << 20
"""Bytes of a prompt file."""


@dataclass(frozen=True)
class Places:
    """Places that a prompt of one purpose may and must have filled in."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ("count",)


@dataclass(frozen=True)
class Prompt:
    """A template, known to have the places that its purpose asks for."""

    name: str
    text: str

    def filled(self, **parts: object) -> str:
        """The text with every place filled in once: what is put in is not looked through for places again."""
        return PLACE.sub(lambda match: str(parts[match[1]]), self.text)


def read_prompts(purposes: Mapping[str, Places], folder: Path | None = None) -> dict[str, Prompt]:
    """Read prompts by purpose, `<folder>/<purpose>.txt`, or the file that ships where the folder has none.

    Raises:
        ConfigError: the folder has none of these files, one cannot be read, lacks a place or has an unknown one.
    """
    folder = None if folder is None else expanded(folder)
    if folder is not None and not any((folder / f"{purpose}.txt").is_file() for purpose in purposes):
        names = ", ".join(f"{purpose}.txt" for purpose in purposes)
        raise ConfigError(f"{folder} holds no prompt. Put one or more of {names} there, or leave out --prompts.")
    return {purpose: _read(purpose, places, folder) for purpose, places in purposes.items()}


def _read(purpose: str, places: Places, folder: Path | None) -> Prompt:
    own = None if folder is None else folder / f"{purpose}.txt"
    if own is not None and own.exists():
        text = _text(own)
        _check(own, text, places)
        return Prompt(purpose, text)
    resource = files("endwise.explaining").joinpath("prompt_files", f"{purpose}.txt")
    return Prompt(purpose, resource.read_text(encoding="utf-8"))


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ConfigError(f"The prompt {path} has more than {LARGEST:,} bytes. Shorten it.")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"The prompt {path} cannot be read: {reason(error)}. {remedy(error)}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"The prompt {path} cannot be read as UTF-8 ({error}). Save it as UTF-8.") from None


def _check(path: Path, text: str, places: Places) -> None:
    found = PLACE.findall(text)
    if missing := [name for name in places.required if name not in found]:
        raise ConfigError(f"The prompt {path} lacks {_listed(missing)}, where what is asked about goes. Add it.")
    allowed = (*places.required, *places.optional)
    if unknown := [name for name in dict.fromkeys(found) if name not in allowed]:
        raise ConfigError(f"The prompt {path} has {_listed(unknown)}; it may have {_listed(allowed)}. Correct it.")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"{{{{{name}}}}}" for name in names)
