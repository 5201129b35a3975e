"""Weights of GGUF files: unpacked once by transformers, which takes longest, and kept in the cache as safetensors."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import transformers
from transformers.utils.hub import extract_commit_hash

from endwise.common.digests import cache_folder, of_file, of_text
from endwise.common.files import PARTIAL, flush
from endwise.common.machine import free_disk
from endwise.models.files import hub_file

SUFFIX = ".gguf"
SPARED = 2
"""The disk must have room for so many times what is kept."""
_ON_HUB = re.compile(r"([\w.-]+/[\w.-]+)/(.+\.gguf)", re.IGNORECASE)


def with_gguf_file(name: str, gguf_file: str | None) -> tuple[str, str | None]:
    """Split a GGUF file's name, a path or `owner/name/FILE.gguf` on the hub, into what it lies in and its own."""
    path = Path(name)
    if gguf_file is not None or path.suffix.lower() != SUFFIX or path.is_dir():
        return name, gguf_file
    if path.is_file():
        return str(path.parent), path.name
    on_hub = None if path.is_absolute() or name.startswith(".") else _ON_HUB.fullmatch(name)
    return (on_hub[1], on_hub[2]) if on_hub else (name, None)


def kept_weights(source: str, shared: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return what to read a model from, and with which arguments: of a GGUF file the folder that it was unpacked to
    before, if it was.
    """
    folder = _folder(source, shared)
    if folder is None or not (folder / "config.json").is_file():
        return source, shared
    return str(folder), {"revision": "main", "trust_remote_code": False}


def keep_weights(source: str, shared: dict[str, Any], model: Any, tokenizer: Any) -> None:
    """Keep what a GGUF file was unpacked to, in float32, if the disk has room.

    Args:
        tokenizer: or why there is none, in which case nothing is kept.
    """
    folder = _folder(source, shared)
    if folder is None or isinstance(tokenizer, str):
        return
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    partial = folder.with_name(f".{folder.name}.{os.getpid()}{PARTIAL}")
    try:
        if free_disk(folder) < SPARED * size:
            return
        for each in (model, tokenizer):
            each.save_pretrained(partial)
        for file in partial.iterdir():
            flush(file)
        partial.rename(folder)
    except OSError:  # a cache that cannot be written: it is unpacked again the next time
        pass
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def commit_of(source: str, shared: dict[str, Any]) -> str | None:
    """Return the commit of a GGUF file on the hub, or of a snapshot in the cache; None: it is none of them."""
    return extract_commit_hash(str(_file(source, shared) or Path(source, "config.json")), None)


def _file(source: str, shared: dict[str, Any]) -> Path | None:
    name = shared.get("gguf_file")
    return None if name is None else hub_file(source, name, shared["revision"])


def _folder(source: str, shared: dict[str, Any]) -> Path | None:
    """Name the folder in the cache by the file's content and by what unpacks it."""
    try:
        file = _file(source, shared)
        digest = None if file is None else of_file(file)
    except OSError:  # which reading it will report
        return None
    return None if digest is None else cache_folder() / "gguf" / of_text(digest, transformers.__version__)
