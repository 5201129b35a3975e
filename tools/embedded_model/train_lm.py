"""Trains the embedded language model: GPT-2's architecture, small enough for a laptop's processor.

AdamW with a trapezoidal learning rate (warm-up, constant, linear decay to zero over the last 30 %). Training order
and weights follow from the seed; every `SAVE_EVERY` steps the state is written, and a second start goes on from it.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

CONTEXT, BATCH, LEARNING_RATE, WARMUP, DECAY_SHARE, SAVE_EVERY = 256, 16, 3e-3, 100, 0.3, 200


def new_model(vocab_size: int, seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=CONTEXT,
        n_embd=128,
        n_layer=6,
        n_head=4,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own function, in PyTorch's fused form
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def batches(tokens: np.ndarray, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches `[BATCH, CONTEXT]`; each epoch cuts the stream at another offset and shuffles anew."""
    epoch = 0
    while True:
        rng = np.random.default_rng([seed, epoch])
        offset = int(rng.integers(CONTEXT))
        rows = tokens[offset : offset + (len(tokens) - offset) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
        order = rng.permutation(len(rows))
        for start in range(0, len(rows) - BATCH + 1, BATCH):
            yield torch.from_numpy(rows[np.sort(order[start : start + BATCH])].astype(np.int64))
        epoch += 1


def rate(step: int, steps: int) -> float:
    return LEARNING_RATE * min(1.0, (step + 1) / WARMUP, (steps - step) / (DECAY_SHARE * steps))


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


def train_lm(
    tokens: np.ndarray, heldout: np.ndarray, vocab_size: int, folder: Path, total_tokens: int, seed: int
) -> GPT2LMHeadModel:
    model = new_model(vocab_size, seed)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    steps, first = total_tokens // (BATCH * CONTEXT), 0
    state_file, log_file = folder / "training_state.pt", folder / "training_log.jsonl"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    stream, started = batches(tokens, seed), time.monotonic()
    for step in range(steps):
        batch = next(stream)
        if step < first:
            continue
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        loss = next_token_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = step + 1
        if done % 50 == 0:
            speed = (done - first) * batch.numel() / (time.monotonic() - started)
            print(f"step {done}/{steps}  loss {loss.item():.3f}  {speed:.0f} tokens/s", flush=True)
        if done % SAVE_EVERY == 0 or done == steps:
            sample = heldout[: 64 * CONTEXT] if done < steps else heldout
            with log_file.open("a") as log:
                log.write(json.dumps({"step": done, "heldout_loss": round(heldout_loss(model, sample), 4)}) + "\n")
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done}
            torch.save(state, state_file.with_suffix(".new"))
            state_file.with_suffix(".new").replace(state_file)
    return model
