"""sparsify (eai-sparsify): its sparse coder, and its trainer on a model of one module that gives the stored batches."""

import contextlib
import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from rival_packages import making
from rival_packages.making import FEATURES, LEARNING_RATE, ROWS, STEPS, WIDTH, Stored, under


@dataclass(frozen=True)
class Case:
    """One sparse coder and its training: settings beyond the common ones."""

    name: str
    coder: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def transcode(self) -> bool:
        """True if it predicts another tensor from its input."""
        return bool(self.coder.get("transcode"))


AUX = {"auxk_alpha": 0.5}
CASES = (
    Case("topk", training=AUX),
    Case("topk_window", training=AUX | {"dead_feature_threshold": 32}),
    Case("topk_free", {"normalize_decoder": False}, AUX),
    Case("topk_k_decay", training={"k_decay_steps": 10}),
    Case("groupmax", {"activation": "groupmax"}, AUX),
    Case("multi_topk", {"multi_topk": True}, AUX),
    Case("transcoder", {"transcode": True}, AUX),
    Case("skip_transcoder", {"transcode": True, "skip_connection": True}, AUX),
)

OWN_START = ("topk", "topk_free", "skip_transcoder")
"""The cases whose file also has what the rival starts from by itself."""


def targets(x: Tensor) -> Tensor:
    """Targets of a transcoder: a fixed function of its input."""
    return (x.flip(-1) * 0.8).sin() + 0.3 * x


def start_weights(case: Case) -> dict[str, Tensor]:
    """The common weights in the rival's names; unit rows where it keeps them."""
    free = case.transcode or case.coder.get("normalize_decoder") is False
    common = making.weights(unit=not free)
    names = {"encoder.weight": common["W_enc"].T, "encoder.bias": common["b_enc"]}
    return names | {key: common[key] for key in ("W_dec", "b_dec", "W_skip")}


def settings(case: Case) -> Any:
    from sparsify import SparseCoderConfig  # type: ignore[pyrefly:missing-import]

    return SparseCoderConfig(num_latents=FEATURES, k=4, **case.coder)


def fill(coder: Any, case: Case) -> Any:
    """The coder, with the weights that all cases start from."""
    start = start_weights(case)
    with torch.no_grad():
        for name, parameter in coder.named_parameters():
            parameter.copy_(start[name])
    return coder


def new_coder(case: Case, start: bool = True) -> Any:
    from sparsify import SparseCoder  # type: ignore[pyrefly:missing-import]

    torch.manual_seed(making.SEED)
    coder = SparseCoder(WIDTH, settings(case), dtype=torch.float32)
    return fill(coder, case) if start else coder


def dense(acts: Tensor, indices: Tensor) -> Tensor:
    return torch.zeros(len(acts), FEATURES).scatter(1, indices, acts.detach())


def terms(case: Case, result: Any) -> dict[str, Tensor]:
    """The rival's terms, and the total that its trainer makes of them."""
    alpha = case.training.get("auxk_alpha", 0.0)
    total = result.fvu + alpha * result.auxk_loss + result.multi_topk_fvu / 8
    return {"fvu": result.fvu, "auxk_loss": result.auxk_loss, "multi_topk_fvu": result.multi_topk_fvu, "total": total}


def one_pass(case: Case, x: Tensor) -> dict[str, Tensor]:
    """Latents, reconstruction, losses and gradients on the first batch, without and with dead features."""
    y = targets(x) if case.transcode else x
    coder = new_coder(case)
    tensors = {"x": x} | under("start", coder.state_dict()) | ({"y": y} if case.transcode else {})
    tensors |= under("init", new_coder(case, start=False).state_dict()) if case.name in OWN_START else {}
    result, (acts, indices, pre) = coder(x, y), coder.encode(x)
    # With multi_topk, `sae_out` is the wider reconstruction.
    out = coder.decode(acts, indices) + (x @ coder.W_skip.mT if coder.W_skip is not None else 0)
    tensors |= {"pre": pre, "latents": dense(acts, indices), "out": out}
    losses = terms(case, result)
    tensors |= under("loss", losses) | under("grad", making.gradients(losses["total"], dict(coder.named_parameters())))
    if case.training.get("auxk_alpha"):
        coder, mask = new_coder(case), making.dead_mask()
        losses = terms(case, coder(x, y, dead_mask=mask))
        tensors |= {"dead.mask": mask} | under("dead.loss", losses)
        tensors |= under("dead.grad", making.gradients(losses["total"], dict(coder.named_parameters())))
    return tensors | (few(case, x) if case.name in ("topk", "groupmax") else {})


def few(case: Case, x: Tensor) -> dict[str, Tensor]:
    """Latents and gradients where biases leave fewer positives than k."""
    coder = new_coder(case)
    with torch.no_grad():
        coder.encoder.bias -= 1.0
    acts, indices, _ = coder.encode(x)
    tensors = {"few.b_enc": coder.encoder.bias, "few.latents": dense(acts, indices), "few.indices": indices}
    total = terms(case, coder(x))["total"]
    return tensors | under("few.grad", making.gradients(total, dict(coder.named_parameters())))


class Targets(nn.Module):
    """The module that a transcoder stands for."""

    def forward(self, x: Tensor) -> Tensor:
        return targets(x)


class OneModule(nn.Module):
    """A language model in name: token i is row i of all batches, which its only module receives."""

    def __init__(self, transcode: bool) -> None:
        super().__init__()
        self.rows = making.batches().reshape(-1, WIDTH)
        self.site = Targets() if transcode else nn.Identity()
        self.config, self.device = SimpleNamespace(num_hidden_layers=1), torch.device("cpu")
        self.dummy_inputs = {"input_ids": torch.arange(ROWS)[None]}

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.site(self.rows[input_ids])


def run(case: Case) -> dict[str, Tensor]:
    """Trains from the common weights with the rival's own trainer, one batch a step, at a constant rate."""
    from sparsify import TrainConfig, Trainer  # type: ignore[pyrefly:missing-import]

    ids = [{"input_ids": row} for row in torch.arange(STEPS * ROWS).reshape(STEPS, ROWS)]
    more = {"optimizer": "adam", "lr": LEARNING_RATE, "log_to_wandb": False, "save_every": 1000}
    # A run that finetunes does not put means into the biases.
    config = TrainConfig(settings(case), batch_size=1, hookpoints=["site"], finetune="given", **more, **case.training)
    trainer: Any = Trainer(config, ids, OneModule(case.transcode))  # pyright: ignore[reportArgumentType]
    coder = fill(trainer.saes["site"], case)
    trainer.lr_schedulers, trainer.save = [], lambda: None
    for group in trainer.optimizers[0].param_groups:
        group["lr"] = LEARNING_RATE  # the schedule, gone now, had set it to its first value, 0
    rows, states = [], {}
    own_forward, own_step = coder.forward, trainer.optimizers[0].step

    def forward(*given: Any, **named: Any) -> Any:
        result = own_forward(*given, **named)
        mask = named.get("dead_mask")
        dead = 0.0 if mask is None else mask.float().sum()
        rows.append({**terms(case, result), "dead": dead, "k": float(coder.cfg.k)})
        return result

    def step() -> None:
        own_step()
        if len(rows) in (1, STEPS):
            states.update(under(f"after_{len(rows)}", coder.state_dict()))

    coder.forward, trainer.optimizers[0].step = forward, step
    trainer.fit()
    return states | making.series(rows)


def write() -> None:
    """Writes all fixtures of sparsify."""
    warnings.simplefilter("ignore")
    stored, x = Stored("eai-sparsify"), making.batches()[0]
    for case in CASES:
        about = {"coder": settings(case).to_dict() | {"d_in": WIDTH}, "training": dict(case.training)}
        about |= {"optimiser": "torch Adam", "learning_rate": LEARNING_RATE, "betas": [0.9, 0.999]}
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            stored.add(case.name, about, one_pass(case, x) | run(case))
    for case in (CASES[0], CASES[-1]):
        coder, folder = new_coder(case), stored.folder / "inference" / case.name
        coder.save_to_disk(folder)
        acts, indices, _ = coder.encode(x)
        tensors = {"inputs": x, "latents": dense(acts, indices), "outputs": coder(x).sae_out}
        stored.add(f"inference/{case.name}", {"coder": settings(case).to_dict() | {"d_in": WIDTH}}, tensors)
    stored.close()
