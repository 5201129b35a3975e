"""Digests: short names of contents, by which what a run stands on is known again.

That of a file is the SHA-256 of its bytes. A gigabyte takes about a second, so that of a large file is kept in the
cache, beside the size, the times, the place and the number of the file that it was made of: one in which any of these
is another is read again.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from endwise.common.errors import FormatError, RunFolderError
from endwise.common.files import expanded, read_json, write_json

LARGE = 64 << 20
"""Bytes from which on a file's digest is kept."""
SETTLED_NS = 2_000_000_000
"""So long a file must have lain untouched: one written twice within its clock's tick looks like one that was
written once.
"""
PROBE = (
    "The quick brown fox, aged 3.14159, didn't jump over 1,024 lazy dogs!\n\n\tdef f(x): return x**2  # naïve café\n"
    "Größe Ελλάδα Москва 東京 عربى 🙂 <|endoftext|> <s></s>   three spaces\r\n"
)
"""Text encoded to distinguish tokenizers of one vocabulary."""


def cache_folder() -> Path:
    """`$ENDWISE_CACHE`, or `~/.cache/endwise`."""
    return expanded(os.environ.get("ENDWISE_CACHE") or "~/.cache/endwise")


def of_text(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def of_file(path: Path) -> str:
    """SHA-256 of a file's content.

    Raises:
        OSError: it cannot be read.
    """
    stat = path.stat()
    if stat.st_size < LARGE:
        return _read(path)
    name = str(path.resolve())
    state = [name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]
    kept = cache_folder() / "digests" / f"{of_text(name)}.json"
    with suppress(OSError, FormatError):
        found = read_json(kept)
        if found.get("state") == state and isinstance(found.get("sha256"), str):
            return found["sha256"]
    digest = _read(path)
    if time.time_ns() - stat.st_ctime_ns > SETTLED_NS:
        with suppress(OSError, RunFolderError):
            write_json(kept, {"state": state, "sha256": digest})
    return digest


def _read(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_files(files: Iterable[Path], folder: Path) -> str:
    """Digest several files of a folder, by their names in it; wherever the folder lies.

    Raises:
        OSError: one cannot be read.
    """
    return of_text(*(f"{file.relative_to(folder).as_posix()} {of_file(file)}" for file in sorted(set(files))))


_PASSING = ("transformers_version", "_name_or_path", "torch_dtype", "dtype", "_commit_hash")
"""Keys of a `config.json` that change when it is saved again, or are recorded elsewhere."""


def of_stored_model(folder: Path, gguf_file: str | None = None, *, with_code: bool = False) -> str:
    """Digest the files that transformers makes a model of: its configuration, its weights and an adapter beside them.

    Args:
        with_code: Python files count too.

    Raises:
        OSError: one cannot be read.
        FormatError: its configuration cannot be.
    """
    if gguf_file is not None:
        return of_files([folder / gguf_file], folder)
    weights = [folder / "model.safetensors"]
    if not weights[0].exists():
        index = folder / "model.safetensors.index.json"
        shards = read_json(index)["weight_map"].values() if index.exists() else ()
        weights = [folder / name for name in set(shards)] or sorted(folder.glob("*.safetensors"))
    names = ("adapter_config.json", "adapter_model.safetensors")
    others = [folder / name for name in names if (folder / name).exists()]
    code = sorted(folder.rglob("*.py")) if with_code else []
    config = {key: value for key, value in read_json(folder / "config.json").items() if key not in _PASSING}
    return of_text(json.dumps(config, sort_keys=True), of_files([*weights, *others, *code], folder))


def of_tensors(tensors: Mapping[str, Tensor], before: str = "") -> str:
    """Digest a text and each tensor's name, type, shape and bytes; about a second a gigabyte."""
    whole = {key: each for name, tensor in tensors.items() for key, each in tensor_parts(name, tensor)}
    digest = hashlib.sha256(before.encode())
    for name, tensor in sorted(whole.items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tensor_parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors that one is made of: itself, or of a quantiser's its numbers and scales."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield name, tensor
        return
    for part in flatten()[0]:
        yield from tensor_parts(f"{name}.{part}", getattr(tensor, part))


def of_tokenizer(tokenizer: Any | None) -> str | None:
    """Equal for tokenizers of one vocabulary that encode a probe alike, whatever version of their library wrote them;
    None for none.
    """
    if tokenizer is None:
        return None
    encoded = [tokenizer(PROBE, add_special_tokens=special)["input_ids"] for special in (False, True)]
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return of_text(json.dumps([sorted(tokenizer.get_vocab().items()), encoded, special]))
