"""Twenty steps of a trainee, sparse and in microbatches, against autograd through the whole model and dense Adam."""

import copy

import pytest
import torch
from torch.nn.functional import normalize

from endwise import LanguageModel
from endwise.tokens import TokenBatch
from endwise.training.course import rate_factor
from endwise.training.making import new_trainee
from endwise.training.step import take_step
from small_gpt2 import LAYERS, VOCAB, recipe, small_model

STEPS, LAYER = 20, 1


@pytest.fixture(scope="module")
def model():
    return LanguageModel(copy.deepcopy(small_model().model).double())


def batches():
    generator = torch.Generator().manual_seed(3)
    for _ in range(STEPS):
        mask = torch.rand(4, 8, generator=generator) < 0.9
        yield TokenBatch(torch.randint(1, VOCAB, (4, 8), generator=generator), mask)


def dense_loss(gpt2, weights, config, batch):
    """The objective written out: a clean and a spliced pass of the whole model, logits, a dense dictionary."""
    encoder, b_enc, decoder, b_dec = weights
    count, objective = batch.mask.sum(), config.objective
    clean = gpt2(batch.tokens, output_hidden_states=True)
    x = clean.hidden_states[LAYER].detach()
    latents = torch.relu(x @ encoder.T + b_enc)
    estimate = latents @ normalize(decoder, dim=-1) + b_dec
    patched = torch.where(batch.mask[..., None], estimate, x)
    block = gpt2.transformer.h[LAYER]
    handle = block.register_forward_pre_hook(lambda _, arguments: (patched, *arguments[1:]))
    spliced = gpt2(batch.tokens, output_hidden_states=True)
    handle.remove()
    log_p, log_q = clean.logits.detach().log_softmax(-1), spliced.logits.log_softmax(-1)
    terms = {
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1),
        "local_mse": (estimate - x).square().mean(-1),
        "downstream_mse": torch.stack(
            [
                (spliced.hidden_states[layer] - clean.hidden_states[layer].detach()).square().mean(-1)
                for layer in range(LAYER + 1, LAYERS)
            ]
        ).mean(0),
    }
    loss = objective.sparsity.coefficient * latents.sum(-1) / x.shape[-1]
    for name, weight in objective.weights.items():
        loss = loss + weight * terms[name]
    return (loss * batch.mask).sum() / count


@pytest.mark.parametrize(
    ("kind", "clip"),
    [
        pytest.param(kind, clip, marks=() if (kind, clip) in (("local", 0.05), ("e2e_ds", None)) else pytest.mark.slow)
        for kind in ("local", "e2e", "e2e_ds")
        for clip in (None, 0.05)
    ],
)
def test_twenty_steps_in_float64_are_those_of_dense_adam(kind, clip, model, tmp_path):
    config = recipe(tmp_path, kind, learning_rate=3e-3, gradient_clip=clip, microbatch=1)
    trainee = new_trainee(config, model, STEPS)
    sae = trainee.sae.double()
    sae.sparse_below = 1.0
    weights = [p.detach().clone().requires_grad_() for p in (sae.encoder, sae.b_enc, sae.decoder, sae.b_dec)]
    optimizer = torch.optim.Adam(weights, foreach=False, fused=False)
    for step, batch in enumerate(batches()):
        take_step(model, [trainee], batch)
        loss = dense_loss(model.model, weights, config, batch)
        assert float(trainee.report()["loss"]) == pytest.approx(loss.item(), rel=1e-5)
        optimizer.param_groups[0]["lr"] = config.training.learning_rate * rate_factor(step, STEPS, config.training)
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(weights, clip)
        optimizer.step()
    # The fused optimiser takes the clipping factor in fp32, whose rounding is all that may differ.
    tolerance = 1e-9 if clip is None else 1e-6
    for ours, plain in zip((sae.encoder, sae.b_enc, sae.decoder, sae.b_dec), weights, strict=True):
        assert (ours - plain).abs().max() <= tolerance * plain.abs().max()
        assert not torch.equal(plain, torch.zeros_like(plain))
