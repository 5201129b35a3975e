"""Transcoders with a skip connection: their gradients, and all that runs after training, with the linear path in it."""

import json

import pytest
import torch

import endwise
from endwise.analysis.importance.faithfulness import FaithfulnessSums
from endwise.common.errors import ConfigError
from endwise.config.run import RunConfig
from endwise.features.attribution import Attribution
from endwise.features.spliced import SplicedBatch
from endwise.models.sites import Site
from endwise.training.making import new_trainee
from tiny_models import patched_logits, tiny, tokens, values_at

READS, WRITES = "blocks.2.mlp_in", "blocks.2.hook_mlp_out"
NAME = f"{READS} -> {WRITES}"
KINDS = {"local": {}, "e2e": {}, "e2e_ds": {"downstream_mse": 1.0}}


def recipe(kind="local", skip=True, **changes):
    return {
        "site": READS,
        "writes": WRITES,
        "dictionary": {"size": 24, "skip": skip},
        "objective": {"kind": kind, "sparsity": {"coefficient": 0.1}, **KINDS[kind]},
        "data": {"context": 32},
        "training": {"tokens": 4096, "batch": 4, "learning_rate": 1e-2, "log_every": 1},
        "evaluation": {"tokens": 256, "during_training_tokens": 64, "bootstrap": 5},
        **changes,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_with_a_skip_connection_are_those_of_the_whole_model(kind):
    model, ids = tiny("gpt2"), tokens()
    places = {"site": "blocks.1.mlp_in", "writes": "blocks.1.hook_mlp_out"}
    trainee = new_trainee(RunConfig.build(recipe(kind, seed=3, **places)), model, 4)
    sae, mask = trainee.sae, torch.ones_like(ids, dtype=torch.bool)
    mask[0, 9:] = False
    torch.nn.init.normal_(sae.W_skip, std=0.1)
    trainee.begin_step()
    sites = trainee.objective.sites
    trainee.accumulate(model, model.clean(ids, {*trainee.place.sites, *sites}, final=True), mask, mask.sum())
    ours = {name: parameter.grad.clone() for name, parameter in sae.named_parameters()}
    sae.zero_grad()

    reads, writes = trainee.place.sites
    at = values_at("gpt2", model.model, ids, [reads, writes, *sites])
    latents = torch.relu(at[reads] @ sae.encoder.T + sae.b_enc)
    directions = sae.decoder / sae.decoder.norm(dim=1, keepdim=True)
    reconstruction = latents @ directions + sae.b_dec + at[reads] @ sae.W_skip.T
    loss = 0.1 * latents[mask].sum() / sae.d_in
    if kind == "local":
        loss = loss + (reconstruction - at[writes])[mask].square().mean(-1).sum()
    else:
        kept = {}
        acts = {writes: lambda value: torch.where(mask[..., None], reconstruction, value)}
        acts |= {site: lambda value, site=site: kept.__setitem__(site, value) for site in sites}
        changed = patched_logits("gpt2", model.model, ids, acts).log_softmax(-1)
        true = model.logits(ids).log_softmax(-1)
        kl = (true.exp() * (true - changed)).sum(-1)[mask].sum()
        loss = loss + (1.0 if kind == "e2e" else 0.5) * kl
        for site, value in kept.items():
            loss = loss + (value - at[site])[mask].square().mean(-1).sum() / len(kept)
    (loss / mask.sum()).backward()
    assert ours["W_skip"].abs().max() > 0
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-6)


@pytest.fixture(scope="module")
def model():
    return endwise.load_model("embedded")


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    return endwise.train(recipe(out=str(tmp_path_factory.mktemp("transcoder") / "run")), model=model, display=False)


@pytest.fixture
def batch(model):
    return endwise.corpora_for(model, RunConfig.build(recipe()).data, training_tokens=4096, evaluation_tokens=256)


def test_it_is_saved_as_saelens_has_it_and_trained_on(run, model, tmp_path):
    sae = endwise.SAE.load(run.folder)
    cfg = json.loads((run.folder / "sae" / "cfg.json").read_text())
    assert (cfg["architecture"], cfg["d_out"]) == ("skip_transcoder", sae.d_in)
    assert cfg["metadata"]["hook_name"] == READS and cfg["metadata"]["hook_name_out"] == WRITES
    assert sae.W_skip.abs().max() > 0
    values = recipe(out=str(tmp_path / "on"), init_from=str(run.folder))
    values["training"] = values["training"] | {"tokens": 128, "learning_rate": 1e-12}
    again = endwise.train(values, model=model, display=False).sae.eval()
    x = torch.randn(7, sae.d_in)
    torch.testing.assert_close(again(x), sae(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_is_measured_has_the_skip_connection_in_it(run, model, batch):
    found = endwise.evaluate(run.folder, model=model)[run.folder]
    sae, tokens_ = endwise.SAE.load(run.folder), batch.heldout.batch(range(8)).tokens
    clean = model.logits(tokens_).log_softmax(-1)
    at = model.clean(tokens_, [Site.parse(READS)]).activations[Site.parse(READS)]
    value = torch.relu(at @ sae.W_enc + sae.b_enc) @ sae.W_dec + sae.b_dec + at @ sae.W_skip.T
    with model.patched({Site.parse(WRITES): value}):
        changed = model.logits(tokens_).log_softmax(-1)
    assert found["kl"] == pytest.approx(float((clean.exp() * (clean - changed)).sum(-1).mean()), rel=1e-3)


@torch.no_grad()
def test_without_any_feature_the_linear_path_is_left(run, model, batch):
    sae, held = endwise.SAE.load(run.folder), batch.heldout.batch(range(4))
    place = model.place(NAME)
    attribution = Attribution(sae, 4, 2)
    clean = model.clean(held.tokens, place.sites, final=True)
    with torch.enable_grad():
        attribution.add(model, clean, place, held.mask)
    sums = FaithfulnessSums(sae, attribution.result(), seed=0)
    sums.add(model, SplicedBatch.of(model, sae, clean, place, held.mask))
    nothing = sums.result(*(torch.zeros(4, dtype=torch.float64).numpy() for _ in range(3))).ce[0]
    with model.patched({place.writes: clean.activations[place.reads] @ sae.W_skip.T + sae.b_dec}):
        logits = model.logits(held.tokens)[:, :-1].log_softmax(-1)
    ce = -logits.gather(-1, held.tokens[:, 1:, None])[..., 0].sum(1).double()
    torch.testing.assert_close(torch.from_numpy(nothing), ce, rtol=1e-4, atol=1e-3)


def test_an_sae_has_no_path_that_copies():
    with pytest.raises(ConfigError, match=r"what is read is what is written, blocks\.2\.mlp_in: a linear path would"):
        RunConfig.build(recipe(writes=None))
