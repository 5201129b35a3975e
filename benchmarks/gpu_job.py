"""Ground that the parts of `gpu.py` share: what they are given, the shapes, and a training step of random weights."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from card import NUMBERS, Host, device_named
from endwise.models.gpt_neo_attention import use_sdpa
from endwise.models.language_model import LanguageModel
from endwise.tokens import TokenBatch
from endwise.training.making import new_trainee
from endwise.training.step import tail_model, take_step
from ours import CALIBRATION_ROWS, bias_shift, run_config
from roofline import H200, L0, Machine
from shapes import CARD_SHAPES, OBJECTIVES, STEPS, Shape, random_model

Row = tuple[str, Callable[[], dict[str, Any]]]
"""Its name within the part, and what makes it."""
_TINY = {"layers": 3, "d_model": 16, "vocab": 50, "positions": 16, "context": 8, "batch": 2, "layer": 1, "d_sae": 64}
TINY = {
    "gpt2-small": Shape("gpt2", heads=2, **_TINY),
    "smollm2-135m": Shape("llama", heads=4, kv_heads=2, d_mlp=24, mlp_matrices=3, **_TINY),
    "tinystories-1m": Shape("gpt_neo", heads=2, window=4, **_TINY),
    "gemma-2-2b": Shape("gemma2", heads=2, kv_heads=1, d_head=8, d_mlp=24, mlp_matrices=3, **_TINY),
}
TINY_L0 = 5


@dataclass
class Job:
    """Settings and findings that a part is made with."""

    device: str
    tiny: bool
    seconds: float
    """Time that is spent on each figure."""
    scratch: Path
    """A folder that goes away after the part."""
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Rows of all parts so far, by part."""

    @cached_property
    def host(self) -> Host:
        return device_named(self.device)

    def shape(self, name: str) -> Shape:
        return (TINY if self.tiny else CARD_SHAPES)[name]

    @property
    def l0(self) -> float:
        return TINY_L0 if self.tiny else L0

    @property
    def machine(self) -> Machine:
        """As measured by the part `card`, or else the paper's H200."""
        rows = self.found.get("card", {})
        rates = {numbers: rows.get(numbers, {}).get("flops_per_second") for numbers in NUMBERS}
        bandwidth = rows.get("memory", {}).get("bytes_per_second")
        if bandwidth is None or None in rates.values():
            return H200
        return Machine("measured", bandwidth, rates, bandwidth * H200.cached / H200.bandwidth)

    def noise(self, *shape: int, scale: float = 1.0, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator(self.host.device).manual_seed(seed)
        return (torch.randn(*shape, generator=generator, device=self.host.device) * scale).to(dtype)


class Step:
    """A training step on random tokens; of a new SAE whose bias is lowered until `l0` features are active."""

    def __init__(self, model: LanguageModel, shape: Shape, objective: str, precision: str, l0: float) -> None:
        own = "mixed" if precision == "mixed" else "exact"
        config = run_config({"shape": asdict(shape), "precision": own}, OBJECTIVES[objective])
        self.model, self.trainee = model, new_trainee(config, model, STEPS)
        tokens = torch.randint(shape.vocab, (shape.batch, shape.context), device=model.device)
        self.batch = TokenBatch(tokens, torch.ones_like(tokens, dtype=torch.bool))
        self.tail = tail_model(model, config.training)
        site, sae = self.trainee.site, self.trainee.sae
        rows = model.clean(tokens, record=[site]).activations[site].flatten(0, 1)[:CALIBRATION_ROWS].float()
        encoder, bias = sae.get_parameter("encoder"), sae.b_enc
        with torch.no_grad():
            bias.sub_(bias_shift(rows, encoder, bias, l0))

    def __call__(self) -> None:
        take_step(self.model, [self.trainee], self.batch, tail=self.tail)


def made_model(job: Job, shape: Shape, precision: str) -> LanguageModel:
    """A model of random weights, made on the device, in the numbers that training would load it in there."""
    half = precision == "mixed" and job.host.device.type == "cuda"
    torch.manual_seed(0)
    with torch.device(job.host.device):
        model = random_model(shape)
    use_sdpa(model)
    for parameter in model.parameters():  # not buffers: rotary frequencies stay in fp32
        parameter.data = parameter.data.to(torch.bfloat16 if half else torch.float32)
    return LanguageModel(model, None, shape.family)


def apart(one: Tensor, other: Tensor) -> float:
    """Relative difference in the Frobenius norm."""
    return float((one - other).norm() / other.norm().clamp_min(1e-30))
