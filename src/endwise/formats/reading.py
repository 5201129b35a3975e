"""Reading of tensors and settings for all formats, without running or trusting what the files hold."""

import re
import warnings
import zipfile
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from endwise.common.errors import FormatError
from endwise.common.files import read_json, there_is
from endwise.common.remedies import unreadable
from endwise.formats.base import Layout, Stored, check_tensors

LARGEST_YAML = 1_000_000
"""Bytes of a configuration."""
MOST_PACKED = 100
"""Bytes that one byte of a compressed file may stand for."""
TRANSPOSED = ".T"
"""Ends a name of ours whose tensor a file holds transposed."""
Named = Mapping[str, str]
"""A file's names of its tensors, each with ours."""
LINEAR = {
    "encoder.weight": "W_enc.T",
    "encoder.bias": "b_enc",
    "decoder.weight": "W_dec.T",
    "decoder.bias": "b_dec",
}
"""Names in the state of two `nn.Linear`."""


def safetensors_at(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        FormatError: it is missing or damaged.
    """
    try:
        return load_file(path)
    except FileNotFoundError:
        raise FormatError(f"{path.parent} holds no {path.name}; only safetensors weights are read.") from None
    except (OSError, SafetensorError, ValueError) as error:
        damaged = FormatError(f"{path} is not a valid safetensors file ({error}). Restore it.")
        raise unreadable(path, error) or damaged from None


def pickle_at(path: Path) -> dict[str, Any]:
    """Read a PyTorch file of plain tensors and numbers, by `weights_only` alone: nothing that it asks to run is run.

    Raises:
        FormatError: it is missing or damaged, holds something else, or tensors larger than itself.
    """
    try:
        size, packed = path.stat().st_size, zipfile.is_zipfile(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is refused below
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=packed)
    except Exception as error:  # noqa: BLE001  a made-up pickle raises what it likes
        reason = " ".join(str(error).partition("\n")[0].split())[:160]
        damaged = FormatError(
            f"{path} cannot be read as tensors ({type(error).__name__}: {reason}). Pickles are read as plain tensors "
            "alone, and no code that one names is run. Restore it, or save a state dict."
        )
        raise unreadable(path, error) or damaged from None
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise FormatError(f"{path} holds a {type(found).__name__}, no tensors by name. Save a state dict.")
    tensors = {name: each.detach() for name, each in found.items() if isinstance(each, Tensor)}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.numel() * tensor.itemsize > size:
            raise FormatError(f"{path}: {name:.80} holds more numbers than the file, or is not dense. Restore it.")
    return {**found, **tensors}


def arrays_at(path: Path) -> dict[str, Tensor]:
    """Read NumPy's `.npz`; arrays of objects, which are pickles, are refused.

    Raises:
        FormatError: it is missing or damaged, or much larger unpacked than packed.
    """
    try:
        with zipfile.ZipFile(path) as packed:
            if sum(each.file_size for each in packed.infolist()) > MOST_PACKED * path.stat().st_size:
                raise ValueError(f"unpacked it has more than {MOST_PACKED} times its size")
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, TypeError, EOFError, KeyError, zipfile.BadZipFile, NotImplementedError) as error:
        damaged = FormatError(f"{path} cannot be read as NumPy arrays ({str(error)[:160]}). Restore it.")
        raise unreadable(path, error) or damaged from None


def config_at(path: Path) -> dict[str, Any]:
    """Read a configuration in JSON.

    Raises:
        FormatError: it is missing or none.
    """
    try:
        return read_json(path)
    except FileNotFoundError:
        raise FormatError(f"{path.parent} holds no {path.name}, which says what the SAE computes.") from None


def yaml_at(path: Path) -> dict[str, Any]:
    """Read a configuration in YAML.

    Raises:
        FormatError: it is missing, larger than `LARGEST_YAML`, or none.
    """
    try:
        if path.stat().st_size > LARGEST_YAML:
            raise FormatError(f"{path} has more than {LARGEST_YAML:,} bytes, which no configuration needs. Restore it.")
        config = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise FormatError(f"{path.parent} holds no {path.name}, which says what the SAE computes.") from None
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise FormatError(f"{path} cannot be read as YAML: {error!s:.200}. Restore it.") from None
    if not isinstance(config, dict):
        raise FormatError(f"{path} must hold a mapping. Restore it.")
    return config


READERS: Mapping[str, Callable[[Path], Mapping[str, Any]]] = {
    ".safetensors": safetensors_at,
    ".npz": arrays_at,
    ".pt": pickle_at,
    ".pth": pickle_at,
}
"""Readers of a file of tensors, by the end of its name."""


def names_in(path: Path) -> frozenset[str]:
    """Return the names of what a file of tensors holds; none, where it cannot be read."""
    if path.suffix not in READERS or not there_is(path) or not path.is_file():
        return frozenset()
    stat = path.stat()
    return _names(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=64)
def _names(path: Path, _time: int, _size: int) -> frozenset[str]:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return frozenset(file.keys())
        return frozenset(READERS[path.suffix](path))
    except (FormatError, OSError, SafetensorError, ValueError):
        return frozenset()


def taken(path: Path, found: Mapping[str, Any], names: Named, left: Collection[str] = ()) -> dict[str, Tensor]:
    """Return tensors by our names, as we have them.

    Args:
        left: what else a file may hold, which says nothing of the function.

    Raises:
        FormatError: one is missing, or no matrix where one must be, or the file holds something else.
    """
    if missing := sorted(set(names) - set(found)):
        raise FormatError(f"{path} lacks {', '.join(missing)[:200]}; it holds {', '.join(sorted(found))[:200]}.")
    if others := sorted(set(found) - set(names) - set(left)):
        raise FormatError(
            f"{path} also holds {', '.join(others)[:200]}, which may change what the SAE computes, and endwise does "
            "not know how."
        )
    tensors: dict[str, Tensor] = {}
    for theirs, ours in names.items():
        tensor, name = found[theirs], ours.removesuffix(TRANSPOSED)
        if not isinstance(tensor, Tensor) or (name.startswith("W_") and tensor.ndim != 2):
            kind = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise FormatError(
                f"{path}: {theirs} must have the shape of a {'matrix' if name[:2] == 'W_' else 'tensor'}, found {kind}."
            )
        tensors[name] = tensor.mT if ours.endswith(TRANSPOSED) else tensor
    return tensors


def assembled(
    path: Path,
    architecture: str,
    tensors: Mapping[str, Tensor],
    layouts: Mapping[str, Layout],
    *,
    config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    subtracts_b_dec: bool = False,
    transcodes: bool = False,
    origin: str = "its W_enc",
) -> Stored:
    """Check what a reader found, and put it together.

    Args:
        tensors: by our names; a threshold may be one number for all features.
        config: sizes that the file states, and the architecture's settings; sizes that are not stated are those of
            `W_enc` and, of a transcoder, `W_dec`.
        origin: what states the sizes, for errors.

    Raises:
        FormatError: the architecture is none of `layouts`, or a tensor is missing, of another shape or not finite.
    """
    if architecture not in layouts:
        raise FormatError(f"{path}: {architecture} is not one of {', '.join(layouts)}.")
    layout, own = layouts[architecture], dict(tensors)
    if transcodes:
        layout = layout.of_transcoder("W_skip" in own)
    d_in, d_sae = _sizes(own.get("W_enc"))
    stated = {"d_in": d_in, "d_sae": d_sae}
    if transcodes and (d_out := _sizes(own.get("W_dec"))[1]) != d_in:
        stated["d_out"] = d_out
    stated |= config or {}
    if "threshold" in own and own["threshold"].numel() == 1:
        own["threshold"] = own["threshold"].reshape(1).expand(stated["d_sae"])
    shapes = layout.shapes(stated)
    if others := sorted(set(own) - set(shapes)):
        raise FormatError(f"{path} also holds {', '.join(others)[:200]}, which a {architecture} SAE has not.")
    check_tensors(path, own, shapes, origin)
    return Stored(architecture, stated, own, metadata or {}, subtracts_b_dec)


def checked(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors in float32, to be made another function of: of the sizes of `W_enc`, all of them.

    Raises:
        FormatError: one has another shape, or is not finite.
    """
    d_in, d_sae = _sizes(tensors.get("W_enc"))
    shapes = Layout(tensors={"threshold": ("d_sae",)}).shapes({"d_in": d_in, "d_sae": d_sae})
    check_tensors(path, tensors, {name: shape for name, shape in shapes.items() if name in tensors}, "its W_enc")
    return {name: tensor.float() for name, tensor in tensors.items()}


def unit_directions(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the same function with directions of norm 1: pre-activations are linear, so that the norms can be moved
    from the decoder into the encoder. Latents, and what is chosen among them, are multiplied by them.
    """
    W_dec = tensors["W_dec"].float()
    norms = W_dec.norm(dim=-1)
    moved = {name: tensors[name].float() * norms for name in ("W_enc", "b_enc")}
    return {**tensors, **moved, "W_dec": W_dec / norms.clamp_min(1e-12)[:, None]}


def _sizes(matrix: Tensor | None) -> tuple[int, int]:
    return (matrix.shape[0], matrix.shape[1]) if matrix is not None and matrix.ndim == 2 else (0, 0)


def whole(path: Path, config: Mapping[str, Any], key: str, most: int | None = None) -> int:
    """Return a setting that must be a whole number above 0.

    Raises:
        FormatError: it is missing, or another value.
    """
    value = config.get(key)
    if type(value) is not int or value < 1 or (most is not None and value > most):
        upto = "above 0" if most is None else f"from 1 to {most}, the features"
        raise FormatError(f"{path}: {key} must be a whole number {upto}, not {value!r:.80}. Correct it.")
    return value


def yes(path: Path, config: Mapping[str, Any], key: str, default: bool) -> bool:
    """Return a setting that must be true or false.

    Raises:
        FormatError: it is another value.
    """
    value = config.get(key, default)
    if type(value) is not bool:
        raise FormatError(f"{path}: {key} must be true or false, not {value!r:.80}. Correct it.")
    return value


def known(path: Path, config: Mapping[str, Any], key: str, values: Collection[Any], default: Any = None) -> Any:
    """Return a setting that must be one of some values.

    Raises:
        FormatError: it is another one.
    """
    value = config.get(key, default)
    if not any(value is each or (type(value) is type(each) and value == each) for each in values):
        allowed = ", ".join(repr(each) for each in values)
        raise FormatError(f"{path}: {key} is {value!r:.80}, and endwise computes {allowed} alone.")
    return value


_MODULE = re.compile(r"(?:^|.*\.)(?:layers|h|blocks)\.([0-9]{1,6})(?:\.(.+))?")
_PLACES = {
    "": "hook_resid_post",
    "input": "hook_resid_pre",
    "self_attn.o_proj.input": "attn.hook_z",
    "pre_feedforward_layernorm": "mlp_in",
    "mlp.input": "mlp_in",
    "post_feedforward_layernorm": "hook_mlp_out",
}
_BEFORE_A_NORM = {
    **dict.fromkeys(("mlp",), "hook_mlp_out"),
    **dict.fromkeys(("attention", "attn", "self_attn"), "hook_attn_out"),
}
_POST_NORMS = re.compile(r"gemma-?[23]|olmo-?2", re.IGNORECASE)


def site_of_module(module: str, model_name: str = "") -> str | None:
    """Return our name of what a module of a Hugging Face model gives (`model.layers.3.output`, `layers.3.mlp`), or
    receives (`….o_proj.input`); None: there is none, or, in a model that norms what its parts give, not for sure.
    """
    match = _MODULE.fullmatch(module)
    if match is None:
        return None
    inside = re.sub(r"\.?output$", "", match[2] or "")
    part = _PLACES.get(inside)
    if part is None and not _POST_NORMS.search(model_name):
        part = _BEFORE_A_NORM.get(inside)
    return None if part is None else f"blocks.{int(match[1])}.{part}"


def meta(**facts: Any) -> dict[str, Any]:
    """Return the facts that are known: those that are not None."""
    return {name: value for name, value in facts.items() if value is not None}
