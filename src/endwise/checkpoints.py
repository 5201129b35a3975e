"""Checkpoints: one safetensors file with the tensors, and the counters as JSON in its header.

A checkpoint holds the *raw* decoder (training on from unit columns would be a different run), the optimiser's moments
and every counter. Nothing in it can execute code.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import Optimizer

from endwise.errors import FormatError
from endwise.files import write_atomic


@dataclass(frozen=True)
class Checkpoint:
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomic(path, save(contiguous, metadata={"endwise": json.dumps(dict(state), allow_nan=False)}))


def read_checkpoint(path: Path) -> Checkpoint:
    """
    Raises:
        FormatError: the file is damaged or not a checkpoint of ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {})["endwise"])
            if not isinstance(state, dict):
                raise ValueError("its counters are no JSON object")
            return Checkpoint({name: file.get_tensor(name) for name in file.keys()}, state)  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise FormatError(
            f"{path} is not a whole checkpoint ({error}). Remove it to go on from the one before."
        ) from None


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
    """Verifies that a checkpoint, whole as it may be, is one of the run that is to go on from it.

    Args:
        own: the run's tensors by their names in a checkpoint, the optimiser's aside.
        steps: the run's last step.

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
    for name, most in (("step", steps), ("tokens", 2**63 - 1)):
        count = checkpoint.state.get(name)
        if type(count) is not int or not 0 <= count <= most:
            raise _does_not_fit(f"{name} must be a whole number from 0 to {most}, not {count!r:.80}")


def _kind(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{list(tensor.shape)} {tensor.dtype}"


def _does_not_fit(reason: str) -> FormatError:
    return FormatError(f"The checkpoint is none of this run's: {reason}. Remove it to go on from the one before.")
