"""dictionary_learning: its trainers, driven on given tensors through `update`."""

import copy
import sys
import types
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from rival_packages import making
from rival_packages.making import FEATURES, LEARNING_RATE, STEPS, WIDTH, Stored, under

COMMON = {"activation_dim": WIDTH, "dict_size": FEATURES, "layer": 1, "lm_name": "made-up", "steps": STEPS}
COMMON |= {"lr": LEARNING_RATE, "warmup_steps": 0, "device": "cpu", "submodule_name": "resid"}
TOP = {"k": 4, "auxk_alpha": 0.5, "threshold_beta": 0.9, "threshold_start_step": 4}
ANNEALED = {"initial_sparsity_penalty": 0.1, "anneal_start": 4, "anneal_end": 16, "p_end": 0.2, "n_sparsity_updates": 4}
ANNEALED |= {"sparsity_queue_length": 3, "sparsity_warmup_steps": None}


@dataclass(frozen=True)
class Case:
    """One trainer: its module, its class, and its settings beyond the common ones."""

    name: str
    module: str
    trainer: str
    settings: Mapping[str, Any]
    unit: bool = True
    """True if it starts from a decoder of unit norm, as the trainer keeps it."""
    dead_after: int = 10_000_000
    """`dead_feature_threshold`, in tokens."""

    @property
    def variant(self) -> bool:
        """True if another case has the same start and the same single pass but for a setting."""
        return self.name.endswith(("_warm", "_window", "_power", "_april"))

    @property
    def top(self) -> bool:
        """True if it is of the top-k family."""
        return "k" in self.settings


L1 = {"l1_penalty": 0.3, "sparsity_warmup_steps": None}
L0 = {"bandwidth": 0.4, "sparsity_penalty": 0.8, "target_l0": 5.0, "sparsity_warmup_steps": None}
CASES = (
    Case("standard", "standard", "StandardTrainer", L1),
    Case("standard_april", "standard", "StandardTrainerAprilUpdate", L1, unit=False),
    Case("standard_warm", "standard", "StandardTrainer", L1 | {"sparsity_warmup_steps": 10}),
    Case("p_anneal", "p_anneal", "PAnnealTrainer", ANNEALED | {"sparsity_function": "Lp"}),
    Case("p_anneal_power", "p_anneal", "PAnnealTrainer", ANNEALED | {"sparsity_function": "Lp^p"}),
    Case("gated", "gdm", "GatedSAETrainer", L1),
    Case("topk", "top_k", "TopKTrainer", TOP),
    Case("topk_window", "top_k", "TopKTrainer", TOP, dead_after=32),
    Case("batchtopk", "batch_top_k", "BatchTopKTrainer", TOP),
    Case(
        "matryoshka",
        "matryoshka_batch_top_k",
        "MatryoshkaBatchTopKTrainer",
        TOP | {"group_fractions": [0.25, 0.25, 0.5]},
    ),
    Case("jumprelu", "jumprelu", "JumpReluTrainer", L0),
)
OURS = {
    "W_enc": ("W_enc", False),
    "W_dec": ("W_dec", False),
    "b_enc": ("b_enc", False),
    "b_dec": ("b_dec", False),
    "threshold": ("threshold", False),
    "encoder.weight": ("W_enc", True),
    "decoder.weight": ("W_dec", True),
    "encoder.bias": ("b_enc", False),
    "bias": ("b_dec", False),
    "decoder_bias": ("b_dec", False),
    "gate_bias": ("b_gate", False),
    "mag_bias": ("b_mag", False),
    "r_mag": ("r_mag", False),
}
"""Common weight that each parameter starts from, and whether it is stored transposed."""


def import_rival() -> None:
    """Its activation buffer imports nnsight, which does not import beside transformers 5; no trainer uses either."""
    module = types.ModuleType("nnsight")
    module.LanguageModel = object  # type: ignore[pyrefly:missing-attribute]
    sys.modules.setdefault("nnsight", module)


def new_trainer(case: Case, start: bool = True) -> Any:
    """The rival's trainer: from the common weights, or as it initialises itself.

    The top-k trainers put the geometric median of the first batch into b_dec before their first step; here it is there
    from the start.
    """
    module = import_module(f"dictionary_learning.trainers.{case.module}")
    torch.manual_seed(making.SEED)
    trainer = getattr(module, case.trainer)(**COMMON, **case.settings)
    if case.top:
        trainer.dead_feature_threshold = case.dead_after
    if start:
        common = making.weights(case.unit)
        with torch.no_grad():
            for name, parameter in trainer.ae.named_parameters():
                ours, transposed = OURS[name]
                parameter.copy_(common[ours].T if transposed else common[ours])
            if case.top:
                median = getattr(module, "geometric_median", None) or trainer.geometric_median
                trainer.ae.b_dec.copy_(median(making.batches()[0]))
    return trainer


def training_latents(case: Case, ae: Any, x: Tensor) -> Tensor:
    """Latents as in training: the top-k family without its threshold, and JumpReLU with it."""
    return ae.encode(x, use_threshold=False) if case.top else ae.encode(x)


def auxiliary(case: Case, x: Tensor) -> dict[str, Tensor]:
    """The aux-k term with a given mask, before its coefficient; by itself, a feature that fires is not dead."""
    trainer, mask = new_trainer(case), making.dead_mask()
    returned = {"return_topk": True} if case.module == "top_k" else {"return_active": True}
    latents, *_, post_relu = trainer.ae.encode(x, use_threshold=False, **returned)
    trainer.num_tokens_since_fired[mask] = trainer.dead_feature_threshold
    loss = trainer.get_auxiliary_loss((x - trainer.ae.decode(latents)).detach(), post_relu)
    tensors = {"dead.mask": mask, "dead.loss.auxk_loss": loss}
    return tensors | under("dead.grad_of.auxk_loss", making.gradients(loss, dict(trainer.ae.named_parameters())))


def few(case: Case, x: Tensor) -> dict[str, Tensor]:
    """Latents where biases leave fewer positives than k."""
    ae = new_trainer(case).ae
    bias = ae.encoder.bias if hasattr(ae, "encoder") else ae.b_enc
    with torch.no_grad():
        bias -= 1.0
        latents = training_latents(case, ae, x)
        return {"few.b_enc": bias, "few.latents": latents, "few.out": ae.decode(latents)}


def one_pass(case: Case, x: Tensor) -> dict[str, Tensor]:
    """Latents, reconstruction, losses and gradients on the first batch, in step 0."""
    trainer = new_trainer(case)
    tensors = {"x": x} | under("start", trainer.ae.state_dict())
    tensors |= {} if case.variant else under("init", new_trainer(case, start=False).ae.state_dict())
    latents = training_latents(case, trainer.ae, x)
    tensors |= {"latents": latents, "out": trainer.ae.decode(latents)}
    logged = copy.deepcopy(trainer).loss(x, step=0, logging=True)
    terms = logged[-1] if isinstance(logged, tuple) else {}
    terms = {key: value for key, value in terms.items() if "loss" in key and key != "loss"}
    tensors |= under("loss", {key: torch.tensor(float(value)) for key, value in terms.items()})
    loss = trainer.loss(x, step=0)
    tensors |= {"loss.total": loss} | under("grad", making.gradients(loss, dict(trainer.ae.named_parameters())))
    if case.name in ("gated", "jumprelu"):
        trainer = new_trainer(case)
        trainer.l1_penalty = trainer.sparsity_coefficient = 0.0
        without = making.gradients(trainer.loss(x, step=0), dict(trainer.ae.named_parameters()))
        tensors |= under("grad_without_sparsity", without)
    if case.top and not case.variant:
        tensors |= auxiliary(case, x) | few(case, x)
    return tensors


def run(case: Case, x: Tensor) -> dict[str, Tensor]:
    """Trains from the common weights, one batch a step, and encodes the first batch as at inference."""
    trainer, losses = new_trainer(case), []
    own_loss = trainer.loss

    def loss(*given: Any, **named: Any) -> Tensor:
        losses.append(own_loss(*given, **named))
        return losses[-1]

    trainer.loss = loss

    def step(batch: Tensor) -> dict[str, Tensor | float]:
        used = {name: getattr(trainer, name) for name in ("p", "sparsity_coeff") if hasattr(trainer, name)}
        trainer.update(len(losses), batch)
        dead = {"dead": float(trainer.dead_features)} if case.top else {}
        threshold = {"threshold": trainer.ae.threshold.clone()} if case.top else {}
        return {"total": losses[-1], **used, **dead, **threshold}

    tensors = making.trained(step, trainer.ae.state_dict)
    with torch.no_grad():
        latents = trainer.ae.encode(x)
        tensors |= {"infer.latents": latents, "infer.out": trainer.ae(x)}
        if case.module == "top_k":
            tensors |= {"infer.by_threshold": trainer.ae.encode(x, use_threshold=True)}
    return tensors


def write() -> None:
    """Writes all fixtures of dictionary_learning."""
    warnings.simplefilter("ignore")
    import_rival()
    stored, x = Stored("dictionary-learning"), making.batches()[0]
    for case in CASES:
        trainer = new_trainer(case)
        group = trainer.optimizer.param_groups[0]
        settings = {"trainer": case.trainer, "settings": COMMON | dict(case.settings)}
        settings |= {"optimiser": type(trainer.optimizer).__name__, "betas": list(group["betas"]), "eps": group["eps"]}
        settings |= {"learning_rate": group["lr"]}
        settings |= {"dead_feature_threshold": case.dead_after} if case.top else {}
        stored.add(case.name, settings, one_pass(case, x) | run(case, x))
    stored.close()
