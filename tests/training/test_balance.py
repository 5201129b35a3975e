"""Weights of spliced terms as shares of the local error, against the definition differentiated as a whole."""

import json

import pytest
import torch

import endwise
from endwise.common.errors import ConfigError
from endwise.config.places import PlacesConfig
from endwise.config.run import RunConfig, TrainingConfig
from endwise.dictionaries import ReluSAE
from endwise.training.objectives import KL, DownstreamMSE, LocalMSE, Objective, Sparsity
from endwise.training.step import take_step
from endwise.training.trainee import Trainee
from small_gpt2 import SITE, recipe

WEIGHTS = {"kl": 0.5, "downstream_mse": 0.3, "local_mse": 0.7, "sparsity": 0.1}


def trainee_of(model, balance, microbatch, terms=("kl", "downstream_mse", "local_mse", "sparsity")):
    site = model.site(SITE)
    made = {
        "kl": KL(WEIGHTS["kl"]),
        "downstream_mse": DownstreamMSE(WEIGHTS["downstream_mse"], (model.site("blocks.3.hook_resid_pre"),)),
        "local_mse": LocalMSE(WEIGHTS["local_mse"]),
        "sparsity": Sparsity(WEIGHTS["sparsity"]),
    }
    objective = Objective.of([made[name] for name in terms], balance)
    sae = ReluSAE(model.width(site), 40, seed=3)
    config = TrainingConfig(tokens=1000, microbatch=microbatch, warmup=0.0, gradient_clip=None)
    return Trainee(sae, site, objective, config, 10)


def by_definition(trainee, model, batch):
    """The step's loss as one graph: terms as means over the tokens that count, α taken out of it as constants."""
    site, mask = trainee.site, batch.mask
    later = [model.site("blocks.3.hook_resid_pre")]
    clean = model.clean(batch.tokens, record=[site, *later], final=True)
    x = clean.activations[site]
    latents = trainee.sae.encode(x, mask)
    estimate = trainee.sae.reconstruct(latents, x)
    value = torch.where(mask[..., None], estimate, x)
    spliced = model.replay(clean, {site: value}, record=later, final=True)
    count, terms = mask.sum(), {}
    logits = [model.readout.logits(each) for each in (clean.final, spliced.final)]
    p, q = (each.double().log_softmax(-1) for each in logits)
    terms["kl"] = (p.exp() * (p - q)).sum(-1)[mask].sum() / count
    error = (spliced.activations[later[0]] - clean.activations[later[0]]).square().mean(-1)
    terms["downstream_mse"] = error[mask].sum() / count
    terms["local_mse"] = (estimate - x).square().mean(-1)[mask].sum() / count
    terms["sparsity"] = latents.dense().abs().sum(-1)[mask].sum() / count / x.shape[-1]
    return terms, estimate


@pytest.mark.parametrize("microbatch", [None, 1])
@pytest.mark.parametrize("balance", ["loss", "gradient"])
def test_a_steps_gradient_is_that_of_the_definition(model, corpora, balance, microbatch):
    batch = corpora.train.batch(range(4))
    batch.mask[1, 3:] = False
    trainee = trainee_of(model, balance, microbatch)
    terms, estimate = by_definition(trainee, model, batch)
    if balance == "loss":
        share = {name: (terms["local_mse"] / (terms[name] + 1e-8)).detach() for name in ("kl", "downstream_mse")}
    else:
        norms = {
            name: torch.autograd.grad(terms[name], estimate, retain_graph=True)[0].norm()
            for name in ("kl", "downstream_mse", "local_mse")
        }
        share = {name: norms["local_mse"] / norms[name] for name in ("kl", "downstream_mse")}
    loss = sum(WEIGHTS[name] * share.get(name, 1.0) * term for name, term in terms.items())
    parameters = list(trainee.sae.parameters())
    wanted = torch.autograd.grad(loss, parameters)
    seen = {}
    trainee.update = lambda *_: seen.update(  # the gradient as the optimiser would meet it
        {number: parameter.grad.clone() for number, parameter in enumerate(parameters)}
    )
    take_step(model, [trainee], batch)
    for number, gradient in enumerate(wanted):
        torch.testing.assert_close(seen[number], gradient, rtol=2e-4, atol=1e-6)


def test_what_is_logged_adds_up(model, corpora, tmp_path):
    config = recipe(tmp_path / "run", tokens=512)
    values = config.model_dump(mode="json")
    values["objective"] = {"kl": 0.5, "local_mse": 0.5, "balance": "loss", "sparsity": {"coefficient": 0.1}}
    endwise.train(RunConfig.build(values), model=model, corpora=corpora, display=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["kl_coefficient"] == pytest.approx(0.5 * line["local_mse"] / (line["kl"] + 1e-8), rel=1e-4)
        assert line["loss"] == pytest.approx(line["local_mse"] + 0.1 * line["sparsity"], rel=1e-4)


def test_a_balanced_run_resumes_to_the_same_bits(model, corpora, tmp_path):
    config = recipe(tmp_path / "run", "e2e_ds", tokens=512, checkpoint_every=3, keep_checkpoints=10)
    config = RunConfig.build(RunConfig.changed(config.model_dump(mode="json"), {"objective.balance": "gradient"}))
    endwise.train(config, model=model, corpora=corpora, display=False)
    kept = (tmp_path / "run" / "sae" / "sae_weights.safetensors").read_bytes()
    endwise.train(config, model=model, corpora=corpora, resume=True, from_step=3, display=False)
    assert (tmp_path / "run" / "sae" / "sae_weights.safetensors").read_bytes() == kept


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"objective.balance": "size"}, "balance"),
        ({"training.accumulation": 2}, "accumulation is 2, but objective.balance weighs"),
        ({"dictionary.resample_at": [0.5]}, "resample_at asks for the loss of each token"),
        ({"objective.terms": {"kl_coefficient": 1.0}}, "no term can be called kl_coefficient"),
    ],
)
def test_what_cannot_be_balanced_is_refused(tmp_path, changes, told):
    values = recipe(tmp_path / "run").model_dump(mode="json", exclude_defaults=True)
    with pytest.raises(ConfigError, match=told):
        RunConfig.build(RunConfig.changed(values, {"objective.balance": "loss", **changes}))


def test_a_joint_pass_is_not_balanced():
    values = {
        "places": [{"site": SITE}, {"site": "blocks.2.hook_resid_pre"}],
        "dictionary": {"size": 40},
        "objective": {"kl": 1.0, "balance": "loss", "sparsity": {"coefficient": 0.1}},
        "training": {"tokens": 512},
    }
    with pytest.raises(ConfigError, match="joint pass is of several"):
        PlacesConfig.build(values)
    assert PlacesConfig.build({**values, "joint": False}).recipes[0].objective.balance == "loss"
