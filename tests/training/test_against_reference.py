"""The paper's own code is the oracle: its activations, losses and gradients, stored by tools/reference_fixtures.py."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from endwise import LanguageModel, RunConfig
from endwise.dictionaries import ReluSAE
from endwise.tokens import TokenBatch
from endwise.training.making import new_trainee
from endwise.training.step import take_step
from places import FIXTURES

FOLDER = FIXTURES / "reference"
CASES = ("local", "e2e", "e2e_ds", "e2e_attn_out", "e2e_ds_mlp_out")
TERMS = {"logits_kl": "kl", "in_to_orig": "downstream_mse", "out_to_in": "local_mse", "sparsity": "sparsity"}
"""Our name of each of the reference's terms."""
OURS = {"encoder": "encoder.0.weight", "b_enc": "encoder.0.bias", "decoder": "decoder.weight", "b_dec": "decoder.bias"}
"""The reference's name of each of our parameters; it stores the decoder transposed, `[d_model d_sae]`."""


@dataclass(frozen=True)
class Stored:
    """One file of the reference's numbers."""

    about: dict
    tensors: dict

    @classmethod
    def read(cls, name):
        path = FOLDER / f"{name}.safetensors"
        with safe_open(path, "pt") as file:
            return cls(json.loads(file.metadata()["about"]), load_file(path))

    def under(self, prefix):
        start = f"{prefix}."
        return {key.removeprefix(start): tensor for key, tensor in self.tensors.items() if key.startswith(start)}


@pytest.fixture(scope="module")
def inputs():
    return Stored.read("inputs")


@pytest.fixture(scope="module")
def model(inputs):
    gpt2 = GPT2LMHeadModel(GPT2Config(**inputs.about["gpt2"], bos_token_id=0, eos_token_id=0))
    gpt2.load_state_dict(inputs.under("model"))
    return LanguageModel(gpt2, None)


@pytest.fixture(params=CASES)
def stored(request):
    return Stored.read(request.param)


@pytest.fixture
def batch(inputs):
    tokens = inputs.tensors["tokens"]
    return TokenBatch(tokens, torch.ones_like(tokens, dtype=torch.bool))


def in_our_layout(tensors):
    ours = {name: tensors[theirs] for name, theirs in OURS.items()}
    return {**ours, "decoder": ours["decoder"].T.contiguous()}


def recipe(case, **training):
    """A case as a recipe; the weights of its terms are the presets', except β."""
    objective = {"kind": case["kind"], "sparsity": {"coefficient": case["sparsity"]}}
    if case["kind"] == "e2e_ds":
        objective |= {"downstream_mse": case["downstream_mse"]}
        if case["name"] != "e2e_ds":  # that one's sites are the default
            objective |= {"downstream_sites": case["downstream_sites"]}
    settings = {"tokens": 16, "batch": 2, "gradient_clip": None, "warmup": 0, "learning_rate": 1e-30, **training}
    return RunConfig.build(
        {"site": case["site"], "dictionary": {"size": 40}, "objective": objective, "training": settings}
    )


def trained_one_step(case, model, inputs, batch, **training):
    config = recipe(case, **training)
    trainee = new_trainee(config, model, steps=1)
    trainee.sae.load_state_dict(in_our_layout(inputs.under("sae")))
    take_step(model, [trainee], batch, config.training.accumulation)
    return trainee


def assert_close(ours, theirs, tolerance=1e-5):
    """Differences are measured against the largest number of the tensor: float32 cancels within one."""
    torch.testing.assert_close(ours.float(), theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


def test_fixtures_say_where_they_come_from(inputs, stored):
    for about in (inputs.about, stored.about):
        assert about["versions"]["e2e-sae"] == "2.1.1"
        assert about["versions"]["transformer-lens"].startswith("3.")
        assert about["seed"] == 20240517


def test_every_case_is_tested():
    assert {path.stem for path in FOLDER.iterdir()} == {"inputs", *CASES}


def test_clean_activations_and_predictions(model, stored, batch):
    """The sites named as in TransformerLens are TransformerLens's."""
    expected = stored.under("clean")
    logits = expected.pop("logits", None)
    clean = model.clean(batch.tokens, record=[model.site(name) for name in expected], final=logits is not None)
    for name, activation in expected.items():
        assert_close(clean.activations[model.site(name)], activation)
    if logits is not None:
        assert_close(model.readout.logits(clean.final), logits)


def test_sae_forward(inputs, stored):
    sae = ReluSAE(16, 40)
    sae.load_state_dict(in_our_layout(inputs.under("sae")))
    latents = sae.encode(stored.tensors[f"clean.{stored.about['case']['site']}"])
    expected = stored.tensors["latents"]
    assert_close(latents.dense(), expected)
    assert torch.equal(latents.dense() > 0, expected > 0)
    assert torch.equal(latents.l0(), (expected > 0).sum(-1).float())
    assert 0.2 < float((expected > 0).float().mean()) < 0.8
    assert_close(sae.decode(latents), stored.tensors["reconstruction"])


def test_spliced_activations_and_predictions(model, stored, batch):
    """The replay of the tail from the reference's own reconstruction."""
    case, expected = stored.about["case"], stored.under("spliced")
    if case["kind"] == "local":
        assert not expected
        return
    site, later = model.site(case["site"]), [model.site(name) for name in case["downstream_sites"]]
    clean = model.clean(batch.tokens, record=[site, *later], final=True)
    with torch.no_grad():
        spliced = model.replay(clean, {site: stored.tensors["reconstruction"]}, record=later)
    assert_close(model.readout.logits(spliced.final), expected.pop("logits"))
    assert {place.name for place in later} == set(expected)
    for place in later:
        assert_close(spliced.activations[place], expected[place.name])


def test_every_term_and_the_total(model, inputs, stored, batch):
    """The reference keeps one downstream term per site; ours is their mean."""
    by_term = {}
    for name, value in stored.under("term").items():
        by_term.setdefault(TERMS[name.split(".")[0]], []).append(float(value))
    expected = {term: sum(values) / len(values) for term, values in by_term.items()}
    trainee = trained_one_step(stored.about["case"], model, inputs, batch)
    report = trainee.report()
    assert {term.name for term in trainee.objective.terms} == set(expected)
    assert {term: report[term] for term in expected} == pytest.approx(expected, rel=1e-5)
    assert report["loss"] == pytest.approx(float(stored.tensors["loss"]), rel=1e-5)
    assert report["l0"] == pytest.approx(float((stored.tensors["latents"] > 0).sum(-1).float().mean()), rel=1e-6)


@pytest.mark.parametrize("cut", [{}, {"microbatch": 1}, {"accumulation": 2}], ids=["whole", "microbatch", "accumulate"])
def test_gradients(model, inputs, stored, batch, cut):
    trainee = trained_one_step(stored.about["case"], model, inputs, batch, **cut)
    expected = in_our_layout(stored.under("gradient"))
    for name, parameter in trainee.sae.named_parameters():
        assert_close(parameter.grad, expected.pop(name))
    assert not expected
    dead = inputs.about["dead_feature"]
    assert not trainee.sae.encoder.grad[dead].any() and not trainee.sae.decoder.grad[dead].any()


@pytest.mark.parametrize("name", ["e2e", "e2e_attn_out"])
def test_the_opposite_direction_of_the_kl_would_be_noticed(name):
    """KL(spliced ‖ original) of the reference's logits is not the number it trained on."""
    stored = Stored.read(name)
    clean, spliced = (stored.tensors[f"{which}.logits"].double().log_softmax(-1) for which in ("clean", "spliced"))
    forward, backward = (float((a.exp() * (a - b)).sum(-1).mean()) for a, b in ((clean, spliced), (spliced, clean)))
    assert float(stored.tensors["term.logits_kl"]) == pytest.approx(forward, rel=1e-5)
    assert abs(backward / forward - 1) > 0.05


def test_padding_beside_the_reference_s_tokens_changes_nothing(model, inputs, stored, batch):
    """Three more sequences, masked from end to end, leave the reference's losses and gradients as they are."""
    padded = replace(
        batch,
        tokens=torch.cat([batch.tokens, torch.randint(31, (3, 8))]),
        mask=torch.cat([batch.mask, torch.zeros(3, 8, dtype=torch.bool)]),
    )
    trainee = trained_one_step(stored.about["case"], model, inputs, padded)
    assert trainee.report()["loss"] == pytest.approx(float(stored.tensors["loss"]), rel=1e-5)
    for name, gradient in in_our_layout(stored.under("gradient")).items():
        assert_close(trainee.sae.get_parameter(name).grad, gradient)
