"""Checkpoints: one safetensors file with the tensors, and the counters as JSON in its header.

A checkpoint holds the *raw* decoder (training on from unit columns would be a different run), the optimiser's moments
and every counter. Nothing in it can execute code.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
            return Checkpoint({name: file.get_tensor(name) for name in file.keys()}, state)  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
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
