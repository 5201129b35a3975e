"""Slow definitions of top-k dictionaries in float64, and recipes of theirs."""

import shutil
from contextlib import contextmanager

import pytest
import torch
from torch.func import functional_call

import endwise
from endwise.dictionaries import BatchTopKSAE
from endwise.runs.folder import RunFolder
from rivals import batches

KINDS = {"local": {}, "e2e": {}, "e2e_ds": {"downstream_mse": 1.0}}


def coarse(numbers):
    """Numbers of few bits, whose products are exact in float32 in whatever order they are added up; some are equal."""
    return (numbers * 16).round() / 16


def exact(sae):
    """The dictionary with an encoder of few bits."""
    with torch.no_grad():
        for parameter in (sae.encoder, sae.b_enc):
            parameter.copy_(coarse(parameter * 4))
    return sae


def before(sae, x):
    """Pre-activations, as the dictionary computes them."""
    return sae.before(x).detach().double()


def largest_of_row(z, k):
    """The k largest positive numbers of each row, one at a time, the first of equal ones; NaN beside them."""
    result = torch.zeros_like(z)
    for row, numbers in enumerate(z):
        left = numbers.nan_to_num(nan=torch.inf)
        for _ in range(min(k, len(left))):
            best = int(left.argmax())  # the first of equal ones
            if left[best] > 0:
                result[row, best] = numbers[best]
            left[best] = -torch.inf
    return result


def largest_of_step(z, k, counted):
    """The k·B largest positive numbers of the B rows that count, the first of equal ones; in other rows what exceeds
    the smallest of them. Returns them and that smallest one.
    """
    rows = zip(z.tolist(), counted.tolist(), strict=True)
    flat = [(-value, row, f) for row, (values, counts) in enumerate(rows) if counts for f, value in enumerate(values)]
    chosen = [entry for entry in sorted(flat) if entry[0] < 0][: round(k * int(counted.sum()))]
    smallest = -chosen[-1][0] if chosen else float("inf")
    result = torch.zeros_like(z)
    for value, row, feature in chosen:
        result[row, feature] = -value
    return torch.where(counted[:, None], result, z.where(z > smallest, 0.0)), smallest


def recipe(out, architecture, kind="local", seed=0, dictionary=(), **training):
    """8 steps on the embedded model; features enough for sparse latents."""
    return {
        "site": "blocks.2.hook_resid_pre",
        "dictionary": {"architecture": architecture, "size": 256, "k": 6, **dict(dictionary)},
        "objective": {"kind": kind, **KINDS[kind]},
        "data": {"context": 32},
        "training": {
            "tokens": 1024,
            "batch": 4,
            "learning_rate": 1e-2,
            "log_every": 1,
            "checkpoint_every": 4,
            **training,
        },
        "evaluation": {"tokens": 512, "during_training_tokens": 128, "bootstrap": 20},
        "out": str(out),
        "seed": seed,
    }


@contextmanager
def fitted_on_few(tokens=4096):
    """Fit thresholds to fewer tokens at the end, where a test does not measure them; also a decorator."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchTopKSAE, "last_tokens", tokens)
        yield


class Trained(dict):
    """Runs by their kind of objective, each trained when it is first looked at."""

    def __init__(self, folder, architecture, model):
        self._folder, self._architecture, self._model = folder, architecture, model

    @fitted_on_few()
    def __missing__(self, kind):
        config = recipe(self._folder / kind, self._architecture, kind)
        self[kind] = endwise.train(config, model=self._model, display=False)
        return self[kind]


def check_that_resuming_ends_in_the_same_bits(run, model, folder):
    """From the middle of a copy of the run."""
    shutil.copytree(run.folder, folder)
    config = RunFolder(folder).config().model_copy(update={"out": folder})
    endwise.train(config, model=model, resume=True, from_step=4, display=False)
    for name in ("sae/sae_weights.safetensors", "metrics.jsonl"):
        assert (folder / name).read_bytes() == (run.folder / name).read_bytes()


def heldout_l0(folder, model, tokens=20_000):
    """Features of the SAE in a run folder that are active on a held-out token, on average, in sequences spread over all
    of the text; no pass is spliced.
    """
    config, sae = RunFolder(folder).config(), endwise.SAE.load(folder)
    text = endwise.corpora_for(model, config.data, training_tokens=1024, evaluation_tokens=tokens).heldout
    site, active, counted = model.site(config.site), 0.0, 0
    spread = range(0, len(text), max(1, len(text) * config.data.context // tokens))
    for first in range(0, len(spread), 64):
        batch = text.batch(spread[first : first + 64])
        with torch.no_grad():
            latents = sae.encode(model.clean(batch.tokens, [site]).activations[site])
        active += float(latents.l0()[batch.mask].sum())
        counted += int(batch.mask.sum())
    assert counted > 0.9 * tokens
    return active / counted


# Rivals' numbers. Those that subtract b_dec from the input are ours with another encoder bias.


class Passed(torch.nn.Module):
    """A dictionary whose pass gives latents, reconstruction and nested reconstructions."""

    def __init__(self, sae):
        super().__init__()
        self.sae = sae

    def forward(self, x):
        latents = self.sae.encode(x)
        return latents.dense(), self.sae.reconstruct(latents, x), self.sae.nested(latents, x)


def of_rival(p, subtracts=True):
    """Our parameters, as functions of a rival's."""
    encoder = p["encoder.weight"] if "encoder.weight" in p else p["W_enc"].T
    decoder = p["decoder.weight"].T if "decoder.weight" in p else p["W_dec"]
    bias = p["encoder.bias"] if "encoder.bias" in p else p["b_enc"]
    bias = bias - encoder @ p["b_dec"] if subtracts else bias
    return {"sae.encoder": encoder, "sae.b_enc": bias, "sae.decoder": decoder, "sae.b_dec": p["b_dec"]}


def passed(sae, p, x, **options):
    """A pass with a rival's parameters."""
    return functional_call(Passed(sae), of_rival(p, **options), (x,))


def stored_parameters(stored, when="start"):
    """Parameters that the rival trains."""
    return {name: stored.under(when)[name].clone().requires_grad_() for name in stored.under("grad")}


def trained_as(stored, loss_of, after_step=lambda: None):
    """Train a rival's parameters for its 20 steps, as its trainer does, and compare: every loss, the first gradient,
    and the weights at the end.

    Args:
        loss_of: from parameters and a batch to the loss.
    """
    settings, p = stored.settings, stored_parameters(stored)
    unit = "trainer" in settings  # dictionary_learning keeps directions at norm 1
    adam = torch.optim.Adam(p.values(), lr=settings["learning_rate"], betas=tuple(settings["betas"]))
    for step, batch in enumerate(batches()):
        loss = loss_of(p, batch)
        torch.testing.assert_close(loss.detach(), stored.tensors["steps.total"][step], rtol=1e-4, atol=1e-5)
        adam.zero_grad()
        loss.backward()
        if step == 0:
            for name, parameter in p.items():
                torch.testing.assert_close(parameter.grad, stored.under("grad")[name], rtol=1e-4, atol=1e-5)
        name, axis = ("W_dec", 1) if "W_dec" in p else ("decoder.weight", 0)
        if unit:
            rows = p[name].detach() / (p[name].detach().norm(dim=axis, keepdim=True) + 1e-6)
            p[name].grad -= (p[name].grad * rows).sum(axis, keepdim=True) * rows
        if unit or "clip_grad_norm" in settings:
            torch.nn.utils.clip_grad_norm_(p.values(), 1.0)
        adam.step()
        if unit:
            p[name].data /= p[name].data.norm(dim=axis, keepdim=True) + torch.finfo(torch.float32).eps
        after_step()
    for name, parameter in p.items():
        torch.testing.assert_close(parameter.detach(), stored.under("after_20")[name], rtol=1e-3, atol=1e-4)
