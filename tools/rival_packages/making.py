"""Shared parts of all rivals' fixtures: the batches, the weights they start from, and how they are stored."""

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

TARGET = Path(__file__).parents[2] / "tests" / "fixtures" / "rivals"
SEED = 20261129
WIDTH, FEATURES, ROWS, STEPS = 8, 24, 16, 20
LEARNING_RATE, BETAS = 3e-3, (0.9, 0.999)
DEAD = tuple(range(1, FEATURES, 4))
"""The features that a given mask calls dead: 6 of the 24, more than half the width, in every group of a Matryoshka."""


def batches() -> Tensor:
    """`[STEPS ROWS WIDTH]`: sparse sums of twelve directions off the origin, with a little noise; norms near √WIDTH."""
    generator = torch.Generator().manual_seed(SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    directions = normal(12, WIDTH)
    directions /= directions.norm(dim=1, keepdim=True)
    present = torch.rand((STEPS, ROWS, 12), generator=generator) < 0.3
    strengths = present * (1.0 + 0.5 * normal(STEPS, ROWS, 12).abs())
    return strengths @ directions + 0.4 * normal(WIDTH) + 0.05 * normal(STEPS, ROWS, WIDTH)


def weights(unit: bool = False) -> dict[str, Tensor]:
    """One draw of every tensor that some architecture starts from, none of them at a special value.

    `W_enc [WIDTH FEATURES]`, `W_dec [FEATURES WIDTH]` with rows of norm 0.4 to 1.6, or 1 if `unit`.
    """
    generator = torch.Generator().manual_seed(SEED + 1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    W_dec = normal(FEATURES, WIDTH)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    W_enc = 0.7 * W_dec.T + 0.15 * normal(WIDTH, FEATURES)
    norms = 0.4 + 1.2 * torch.rand((FEATURES, 1), generator=generator)
    return {
        "W_enc": W_enc.contiguous(),
        "W_dec": W_dec if unit else W_dec * norms,
        "b_enc": 0.1 * normal(FEATURES),
        "b_dec": 0.2 * normal(WIDTH),
        "threshold": 0.2 + 0.4 * torch.rand(FEATURES, generator=generator),
        "b_gate": 0.2 * normal(FEATURES),
        "b_mag": 0.2 * normal(FEATURES),
        "r_mag": 0.3 * normal(FEATURES),
        "W_skip": 0.3 * normal(WIDTH, WIDTH),
    }


def dead_mask() -> Tensor:
    """`bool[FEATURES]`, true at `DEAD`."""
    mask = torch.zeros(FEATURES, dtype=torch.bool)
    mask[list(DEAD)] = True
    return mask


def under(prefix: str, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors, each named `prefix.name`, as copies of their own."""
    return {f"{prefix}.{name}": tensor.detach().clone().contiguous() for name, tensor in dict(tensors).items()}


def gradients(loss: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """∂loss/∂ every parameter, zeros where the loss does not depend on it; the graph is kept."""
    if not loss.requires_grad:
        return {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
    values = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(tensor) if value is None else value
        for (name, tensor), value in zip(parameters.items(), values, strict=True)
    }


@dataclass
class Stored:
    """The fixtures of one rival: a folder of safetensors, and one json with the settings of each file."""

    package: str
    cases: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return TARGET / self.package.replace("-", "_")

    def add(self, name: str, settings: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Writes one file; every tensor is float32, except masks and a threshold that the rival keeps in float64."""
        path = self.folder / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}, path)
        self.cases[name] = settings

    def close(self) -> None:
        """Writes the settings, and the batches that all rivals have in common."""
        save_file({"batches": batches()}, TARGET / "inputs.safetensors")
        about = {
            "package": self.package,
            "version": version(self.package),
            "torch": torch.__version__,
            "command": f"python tools/rival_fixtures.py {self.package}",
            "cases": self.cases,
        }
        text = json.dumps(about, indent=1, sort_keys=True, default=str)
        self.folder.with_suffix(".json").write_text(text + "\n")
        sys.stdout.write(f"{self.package} {about['version']}: {len(self.cases)} files\n")


def series(rows: Sequence[Mapping[str, Tensor | float]]) -> dict[str, Tensor]:
    """The numbers of every step as `steps.name [STEPS]`; a number that one step lacks is zero there."""
    names = sorted({name for row in rows for name in row})
    columns = {name: torch.stack([torch.as_tensor(row.get(name, 0.0)).detach() for row in rows]) for name in names}
    return under("steps", columns)


def trained(
    step: Callable[[Tensor], Mapping[str, Tensor | float]], state: Callable[[], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Takes one step on each batch: `after_1.*`, `after_20.*`, and `steps.*` with what `step` returns."""
    rows, states = [], {}
    for index, batch in enumerate(batches()):
        rows.append(dict(step(batch)))
        if index + 1 in (1, STEPS):
            states |= under(f"after_{index + 1}", state())
    return states | series(rows)
