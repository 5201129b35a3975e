"""Trains the embedded language model: GPT-2's architecture, small enough for a laptop's processor.

Two phases, each a trapezoid of the learning rate (warm-up, constant, linear decay to zero): AdamW for every weight,
then Muon for the blocks' matrices. Training order and weights follow from the seed; every `SAVE_EVERY` steps the state
is written, and a second start continues from it.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from transformers import GPT2Config, GPT2LMHeadModel

CONTEXT, BATCH, WARMUP, SAVE_EVERY = 256, 16, 100, 200
WIDTH, LAYERS, HEADS = 128, 6, 4


class Muon(Optimizer):
    """Momentum whose update of a weight matrix is replaced by the nearest orthogonal matrix (Jordan et al., 2024).

    `torch.optim.Muon` iterates in bf16, which a processor without units for it runs many times slower than fp32.
    """

    def __init__(
        self, groups: Iterable[dict[str, object]], lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "pieces": 1})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[pyrefly:bad-override]
        for group in self.param_groups:
            for weight in group["params"]:
                if "momentum" not in self.state[weight]:
                    self.state[weight]["momentum"] = torch.zeros_like(weight)
                average = self.state[weight]["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(average, group["momentum"])
                # GPT-2's `c_attn [d 3d]` is three matrices side by side.
                pieces = update.unflatten(1, (group["pieces"], -1)).transpose(0, 1)
                rows, columns = pieces.shape[1:]
                update = orthogonal(pieces).transpose(0, 1).flatten(1) * max(1.0, columns / rows) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * update)


def orthogonal(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Singular values of `[n rows columns]` brought near 1 by Newton and Schulz's iteration."""
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(iterations):
        gram = x @ x.mT if x.shape[1] <= x.shape[2] else x.mT @ x
        polynomial = -4.7750 * gram + 2.0315 * gram @ gram
        x = 3.4445 * x + (polynomial @ x if x.shape[1] <= x.shape[2] else x @ polynomial)
    return x


def new_model(vocab_size: int, seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=CONTEXT,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own function, in PyTorch's fused form
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def adamw(model: GPT2LMHeadModel) -> list[Optimizer]:
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    vectors = [weight for weight in model.parameters() if weight.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return [AdamW(groups, lr=3e-3, betas=(0.9, 0.95), fused=True)]


def muon(model: GPT2LMHeadModel) -> list[Optimizer]:
    blocks = {name: weight for name, weight in model.transformer.h.named_parameters() if weight.ndim == 2}
    joined = [weight for name, weight in blocks.items() if "c_attn" in name]
    single = [weight for name, weight in blocks.items() if "c_attn" not in name]
    theirs = {id(weight) for weight in blocks.values()}
    rest = [weight for weight in model.parameters() if id(weight) not in theirs]
    return [
        Muon([{"params": joined, "pieces": 3}, {"params": single}], lr=1e-2, weight_decay=0.05),
        AdamW(rest, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


@dataclass(frozen=True)
class Phase:
    name: str
    tokens: int
    optimizers: Callable[[GPT2LMHeadModel], list[Optimizer]]
    decay_share: float
    """Share of the steps, at the end, over which the learning rate falls to zero."""

    def rate_factor(self, step: int) -> float:
        return min(1.0, (step + 1) / WARMUP, (self.steps - step) / (self.decay_share * self.steps))

    @property
    def steps(self) -> int:
        return self.tokens // (BATCH * CONTEXT)


PHASES = (Phase("adamw", 12_000_000, adamw, 0.3), Phase("muon", 10_000_000, muon, 0.5))


def batches(tokens: np.ndarray, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches `[BATCH, CONTEXT]`; each epoch cuts the stream at another offset and shuffles again."""
    epoch = 0
    while True:
        rng = np.random.default_rng([seed, epoch])
        offset = int(rng.integers(CONTEXT))
        rows = tokens[offset : offset + (len(tokens) - offset) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
        order = rng.permutation(len(rows))
        for start in range(0, len(rows) - BATCH + 1, BATCH):
            yield torch.from_numpy(rows[np.sort(order[start : start + BATCH])].astype(np.int64))
        epoch += 1


def next_token_loss(model: GPT2LMHeadModel, tokens: torch.Tensor) -> torch.Tensor:
    hidden = model.transformer(tokens, use_cache=False).last_hidden_state[:, :-1]
    logits = model.lm_head(hidden.reshape(-1, hidden.shape[-1]))
    return torch.nn.functional.cross_entropy(logits, tokens[:, 1:].reshape(-1))


@torch.no_grad()
def heldout_loss(model: GPT2LMHeadModel, tokens: np.ndarray) -> float:
    """Mean next-token cross-entropy in nats over whole windows of `CONTEXT` tokens."""
    rows = torch.from_numpy(tokens[: len(tokens) // CONTEXT * CONTEXT].reshape(-1, CONTEXT).astype(np.int64))
    losses = [next_token_loss(model, chunk) * len(chunk) for chunk in rows.split(BATCH)]
    return float(torch.stack(losses).sum() / len(rows))


def train(
    model: GPT2LMHeadModel, phase: Phase, tokens: np.ndarray, heldout: np.ndarray, folder: Path, seed: int
) -> None:
    optimizers = phase.optimizers(model)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    full_rates, first = [group["lr"] for group in groups], 0
    state_file, log_file = folder / f"{phase.name}_state.pt", folder / f"{phase.name}_log.jsonl"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        first = state["step"]
    stream, started = batches(tokens, seed), time.monotonic()
    for step in range(phase.steps):
        batch = next(stream)
        if step < first:
            continue
        for group, full in zip(groups, full_rates, strict=True):
            group["lr"] = full * phase.rate_factor(step)
        loss = next_token_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        done = step + 1
        if done % 50 == 0:
            speed = (done - first) * batch.numel() / (time.monotonic() - started)
            print(f"{phase.name} {done}/{phase.steps}  loss {loss.item():.3f}  {speed:.0f} tokens/s", flush=True)
        if done % SAVE_EVERY == 0 or done == phase.steps:
            sample = heldout[: 64 * CONTEXT] if done < phase.steps else heldout
            with log_file.open("a") as log:
                log.write(json.dumps({"step": done, "heldout_loss": round(heldout_loss(model, sample), 4)}) + "\n")
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": done}
            torch.save(state, state_file.with_suffix(".new"))
            state_file.with_suffix(".new").replace(state_file)
