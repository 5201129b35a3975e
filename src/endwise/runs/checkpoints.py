"""Checkpoints: one safetensors file with the tensors; the counters as JSON, and a checksum of both, in its header.

A checkpoint holds all that a run is resumed from: the *raw* decoder (training on from unit columns would be a different
run), the optimiser's moments, the states of the random generators and every counter. Nothing in it can execute code.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from endwise.common.digests import of_tensors
from endwise.common.errors import FormatError
from endwise.common.remedies import unreadable
from endwise.common.tensor_files import laid_out, write_tensors

STATE, CHECKSUM = "endwise", "sha256"
"""Keys of the header."""


@dataclass(frozen=True)
class Checkpoint:
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """
    Raises:
        RunFolderError: the disk is full or the folder cannot be written; no file, or the old one, is at `path`.
    """
    tensors = laid_out(checkpoint.tensors)
    state = json.dumps(checkpoint.state, allow_nan=False)
    write_tensors(path, tensors, {STATE: state, CHECKSUM: checksum(tensors, state)})


def read_checkpoint(path: Path) -> Checkpoint:
    """
    Raises:
        FormatError: the file is damaged or not a checkpoint of ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        state, expected = header[STATE], header[CHECKSUM]
        found = checksum(tensors, state)
        if found != expected:
            raise FormatError(f"{path} was altered: its content has the checksum {found:.16}, not {expected:.16}.")
        counters = json.loads(state)
        if not isinstance(counters, dict):
            raise ValueError("its counters are no JSON object")
        return Checkpoint(tensors, counters)
    except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
        damaged = FormatError(f"{path} is not a whole checkpoint ({type(error).__name__}: {error}).")
        raise unreadable(path, error) or damaged from None


def checksum(tensors: Mapping[str, Tensor], state: str) -> str:
    """SHA-256 of the state and of every tensor's name, type, shape and bytes."""
    return of_tensors(tensors, state)


def optimizer_tensors(optimizer: Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """The optimiser's state by the names of the module's parameters."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    return {
        f"optimizer.{names[parameter]}.{key}": value
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }


def restore_optimizer(optimizer: Optimizer, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, parameter in module.named_parameters():
        prefix = f"optimizer.{name}."
        values = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        # Adam keeps its step counter where it made it; the moments live beside the parameter.
        optimizer.state[parameter] = {
            key: value if value.ndim == 0 and parameter.device.type == "cpu" else value.to(parameter.device)
            for key, value in values.items()
        }


def check_fits(checkpoint: Checkpoint, own: Mapping[str, Tensor], steps: int) -> None:
    """Verify that a checkpoint, whole as it may be, is one of the run that is to be resumed from it.

    Args:
        own: the run's tensors by their names in a checkpoint, the optimiser's aside.
        steps: how many the run has in all, from which its schedule follows.

    Raises:
        FormatError: a tensor is missing or of another shape or type, or a counter is no number of this run's.
    """
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in own.items()}
    for name, tensor in checkpoint.tensors.items():
        if name.startswith("optimizer."):
            parameter, _, key = name.removeprefix("optimizer.").rpartition(".")
            like = shapes.get(f"sae.{parameter}", ((), tensor.dtype))
            shapes[name] = ((), torch.float32) if key == "step" else like
    for name, expected in shapes.items():
        found = checkpoint.tensors.get(name)
        if found is None or (tuple(found.shape), found.dtype) != expected:
            raise _does_not_fit(f"{name} must be {list(expected[0])} {expected[1]}, not {_kind(found)}")
    for name, least, most in (("step", 0, steps), ("tokens", 0, 2**63 - 1), ("total_steps", steps, steps)):
        count = checkpoint.state.get(name)
        if type(count) is not int or not least <= count <= most:
            raise _does_not_fit(f"{name} must be a whole number from {least} to {most}, not {count!r:.80}")


def _kind(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{list(tensor.shape)} {tensor.dtype}"


def _does_not_fit(reason: str) -> FormatError:
    return FormatError(f"The checkpoint is not of this run: {reason}. Remove it to resume from the one before.")
