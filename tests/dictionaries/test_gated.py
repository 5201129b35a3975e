"""Gated dictionaries against their formulas in float64, against what rivals computed, and through whole runs."""

import json

import pytest
import torch

import endwise
from endwise import SAE
from endwise.config.run import RunConfig
from endwise.dictionaries import GatedSAE, SparseLatents, TrainingPass
from endwise.dictionaries.gated import GatedConfig
from rivals import batches, rival, rivals

D, F = 12, 90
MASK = torch.rand(3, 20, generator=torch.Generator().manual_seed(2)) < 0.7


def dictionary(norm="unit", share=0.0):
    """With gates and magnitudes that differ, and a feature whose gate never opens."""
    generator = torch.Generator().manual_seed(3)
    sae = GatedSAE.build(GatedConfig(size=F, decoder_norm=norm), D, seed=1).double().train()
    with torch.no_grad():
        sae.b_enc -= 0.4
        sae.b_enc[4] = -100.0
        sae.b_mag += torch.randn(F, generator=generator) / 3
        sae.r_mag += torch.randn(F, generator=generator) / 3
        sae.decoder *= torch.linspace(0.1, 3.0, F)[:, None]
    sae.sparse_below = share
    return sae


def definition(sae, x):
    """π and f, one feature at a time."""
    gates, values = [], []
    for i in range(sae.d_sae):
        shared = x @ sae.encoder[i]
        gates.append(shared + sae.b_enc[i])
        magnitude = torch.exp(sae.r_mag[i]) * shared + sae.b_mag[i]
        values.append((gates[-1] > 0) * magnitude.clamp(min=0))
    return torch.stack(gates, -1), torch.stack(values, -1)


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["dense", "sparse"])
@pytest.mark.parametrize("norm", ["unit", "free"])
@pytest.mark.parametrize("p", [1.0, 0.5])
def test_latents_penalty_and_gradients_are_the_definitions(norm, share, p):
    sae, x = dictionary(norm, share), torch.randn(3, 20, D, dtype=torch.float64)
    latents = sae.encode(x, MASK)
    assert isinstance(latents, SparseLatents) == (share == 1.0)
    loss = (sae.reconstruct(latents, x)[MASK] - 2 * x[MASK]).square().sum() + 0.7 * latents.penalty(p, MASK).sum()
    loss.backward()
    found = {name: each.grad.clone() for name, each in sae.named_parameters()}
    sae.zero_grad()
    pi, f = definition(sae, x)
    positive = pi[MASK].clamp(min=0) * sae.W_dec.norm(dim=1)
    penalty = positive[positive > 0].pow(p).sum()
    expected = ((f @ sae.W_dec + sae.b_dec)[MASK] - 2 * x[MASK]).square().sum() + 0.7 * penalty
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, {name: each.grad for name, each in sae.named_parameters()})
    kept = latents.dense()
    torch.testing.assert_close(kept, f)
    assert ((pi > 0) & (f == 0)).any() and 0 < float(latents.l0().mean()) < F / 2
    assert torch.equal(latents.l0(), (kept != 0).sum(-1).float())
    assert torch.equal(latents.firings(MASK), (kept[MASK] != 0).sum(0))


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["dense", "sparse"])
def test_training_and_inference_are_one_function(share):
    sae, x = dictionary(share=share), torch.randn(3, 20, D, dtype=torch.float64)
    trained, finished = sae.encode(x), sae.eval().encode(x)
    torch.testing.assert_close(finished.dense(), trained.dense())
    assert torch.equal(finished.l0(), trained.l0())
    assert sae.encode(x.index_fill(1, torch.tensor([2]), float("nan"))).dense()[:, 2].isnan().any()
    assert sae.train().encode(x.index_fill(1, torch.tensor([2]), float("nan"))).dense()[:, 2].isnan().any()


def seen_by(sae, x, target, loss):
    """A pass, with the gradient of `loss(x̂)` as the trainee gives it."""
    latents = sae.encode(x, MASK)
    out = sae.reconstruct(latents, x)
    free = out.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(free)[MASK].sum(), free)
    dead = torch.zeros(F, dtype=torch.bool)
    return TrainingPass(x, target, latents, out, MASK, dead, at_site=gradient), out, gradient


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["dense", "sparse"])
@pytest.mark.parametrize("norm", ["unit", "free"])
def test_for_local_mse_the_gates_term_is_the_papers(norm, share):
    """The error of what the gates reconstruct through a frozen decoder, in the objective's own unit."""
    sae, x, y = dictionary(norm, share), *torch.randn(2, 3, 20, D, dtype=torch.float64)
    weight = 0.3
    seen, *_ = seen_by(sae, x, y, lambda out: weight * (out - y).square().mean(-1))
    own = sae.auxiliary(seen)["gate_reconstruction"]
    own.backward()
    found = {name: each.grad for name, each in sae.named_parameters()}
    made = definition(sae, x)[0].clamp(min=0) @ sae.W_dec.detach() + sae.b_dec.detach()
    expected = weight * (made - y).square().mean(-1)[MASK].sum()
    torch.testing.assert_close(own, expected)
    encoder, gate = torch.autograd.grad(expected, [sae.encoder, sae.b_enc])
    torch.testing.assert_close((found["encoder"], found["b_enc"]), (encoder, gate), rtol=1e-4, atol=1e-5)
    assert not any(found[name] is not None and found[name].any() for name in ("decoder", "b_dec", "b_mag", "r_mag"))


def test_for_any_objective_its_slope_is_the_objectives_and_its_minimum_as_far_as_the_input():
    sae, x = dictionary(), torch.randn(3, 20, D, dtype=torch.float64)
    mix = torch.randn(D, D, dtype=torch.float64)
    seen, out, g = seen_by(sae, x, x, lambda out: ((out - x) @ mix).square().sum(-1))
    own = sae.auxiliary(seen)["gate_reconstruction"]
    own.backward()
    x_gates = (definition(sae, x)[0].clamp(min=0) @ sae.W_dec + sae.b_dec).detach()
    out, delta = out.detach(), x_gates - out.detach()
    mu = g.norm(dim=-1) / (2 * (out - x).norm(dim=-1))
    each = (g * delta).sum(-1) + mu * delta.square().sum(-1) + g.square().sum(-1) / (4 * mu)
    torch.testing.assert_close(own.detach(), each[MASK].sum(), rtol=1e-4, atol=1e-4)
    slope = (g + 2 * mu[..., None] * delta) * MASK[..., None]  # at what the gates make
    pi = definition(sae, x)[0]
    expected = ((slope @ sae.W_dec.T) * (pi > 0)).detach().flatten(0, 1)
    torch.testing.assert_close(sae.b_enc.grad, expected.sum(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.encoder.grad, expected.T @ x.flatten(0, 1), rtol=1e-4, atol=1e-4)


def test_without_error_or_slope_the_gates_term_is_0():
    sae, x = dictionary(), torch.randn(3, 20, D, dtype=torch.float64)
    seen, *_ = seen_by(sae, x, x, lambda out: 0 * out.sum(-1))
    own = sae.auxiliary(seen)["gate_reconstruction"]
    own.backward()
    assert float(own.detach()) == pytest.approx(0, abs=1e-9) and sae.b_enc.grad.abs().max() < 1e-9


def test_a_perfect_reconstruction_does_not_blow_it_up():
    sae, x = dictionary(), torch.randn(3, 20, D, dtype=torch.float64)
    latents = sae.encode(x, MASK)
    out = sae.reconstruct(latents, x).detach()
    seen = TrainingPass(x, out, latents, out, MASK, torch.zeros(F).bool(), at_site=torch.ones_like(out))
    sae.auxiliary(seen)["gate_reconstruction"].backward()
    assert 0 < sae.encoder.grad.abs().max() < 1e7


NAMES = {"encoder": "W_enc", "decoder": "W_dec", "b_enc": "b_gate"}


def as_saved(tensors):
    return {NAMES.get(name, name): t.T if name == "encoder" else t for name, t in tensors.items()}


def of_rival(stored, norm):
    """Ours with a rival's weights; its input is less `b_dec`, which the caller subtracts."""
    sae = GatedSAE(8, 24, unit_norm=norm == "unit", initialisation=None).train()
    given = stored.under("start")
    if "encoder.weight" in given:
        names = {"gate_bias": "b_gate", "mag_bias": "b_mag", "r_mag": "r_mag", "decoder_bias": "b_dec"}
        given = {names[key]: given[key] for key in names} | {
            "W_enc": given["encoder.weight"].T,
            "W_dec": given["decoder.weight"].T,
        }
    sae.fill(given)
    return sae


def losses(sae, x, coefficient):
    """Error, penalty and the gates' term, summed over the width and averaged over rows."""
    seen = x - sae.b_dec
    latents = sae.encode(seen)
    out = sae.reconstruct(latents, seen)
    error = (out - x).square().sum(-1)
    rows = torch.ones(len(x), dtype=torch.bool)
    at_site = 2 * (out - x).detach()
    own = sae.auxiliary(TrainingPass(seen, x, latents, out, rows, rows, at_site=at_site))["gate_reconstruction"]
    return latents, out, error.mean(), coefficient * latents.penalty(1.0, rows).mean(), own / len(x)


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["dense", "sparse"])
def test_sae_lens_computes_the_same_but_for_the_decoder(share):
    """Its decoder is not frozen in the gates' term, and ours, as the paper's, is."""
    stored = rival("sae_lens/gated")
    sae = of_rival(stored, "free")
    sae.sparse_below = share
    latents, out, error, penalty, own = losses(sae, stored.tensors["x"], stored.settings["config"]["l1_coefficient"])
    torch.testing.assert_close(latents.dense().detach(), stored.tensors["latents"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.detach(), stored.tensors["out"], rtol=1e-5, atol=1e-5)
    theirs = stored.under("loss")
    for ours, key in ((error, "mse_loss"), (penalty, "l1_loss"), (own, "auxiliary_reconstruction_loss")):
        torch.testing.assert_close(ours.detach(), theirs[key], rtol=1e-5, atol=1e-5)
    (error + penalty + own).backward()
    gradients = as_saved({name: each.grad for name, each in sae.named_parameters()})
    frozen = {"W_dec", "b_dec"}
    for key, gradient in stored.under("grad").items():
        if key not in frozen:
            torch.testing.assert_close(gradients[key], gradient, rtol=2e-5, atol=2e-5)
    by_term = stored.under("grad_of.auxiliary_reconstruction_loss")
    own_b_dec = 2 * (latents.gates.dense() @ sae.W_dec + sae.b_dec - stored.tensors["x"]).mean(0).detach()
    torch.testing.assert_close(gradients["b_dec"] + own_b_dec, stored.under("grad")["b_dec"], rtol=2e-5, atol=2e-5)
    assert by_term["W_dec"].any()


def test_dictionary_learning_trains_the_same_weights():
    """Loss by loss in the first pass, and after 20 steps, with rows of norm 1 after each as it has them."""
    stored = rival("dictionary_learning/gated")
    sae, c = of_rival(stored, "unit"), stored.settings["settings"]["l1_penalty"]
    adam = torch.optim.Adam(sae.parameters(), lr=stored.settings["learning_rate"], betas=stored.settings["betas"])
    named = {"encoder": "encoder.weight", "b_enc": "gate_bias", "b_mag": "mag_bias", "b_dec": "decoder_bias"}
    for step, x in enumerate(batches()):
        adam.zero_grad()
        _, out, error, penalty, own = losses(sae, x, c)
        (error + penalty + own).backward()
        if step == 0:
            torch.testing.assert_close(out.detach(), stored.tensors["out"], rtol=1e-5, atol=1e-5)
            theirs = stored.under("loss")
            for ours, key in ((error, "mse_loss"), (penalty / c, "sparsity_loss"), (own, "aux_loss")):
                torch.testing.assert_close(ours.detach(), theirs[key], rtol=1e-5, atol=1e-5)
        adam.step()
        with torch.no_grad():
            sae.decoder.copy_(sae.W_dec)
    after = stored.under("after_20")
    for name, parameter in sae.named_parameters():
        expected = after["decoder.weight"].T if name == "decoder" else after[named.get(name, name)]
        torch.testing.assert_close(parameter.detach(), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", ["gated", "trained_gated"])
def test_files_of_sae_lens_are_the_same_function(name, tmp_path):
    """They hold no b_enc, and subtract b_dec from the input; ours do not."""
    stored = rival(f"sae_lens/inference/{name}")
    sae, x = SAE.load(stored.folder), stored.tensors["inputs"]
    torch.testing.assert_close(sae.encode(x).dense(), stored.tensors["latents"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(x), stored.tensors["outputs"], rtol=1e-5, atol=1e-5)
    sae.save(tmp_path)
    torch.testing.assert_close(SAE.load(tmp_path)(x), sae(x))
    assert json.loads((tmp_path / "cfg.json").read_text())["architecture"] == "gated"
    shapes = GatedSAE.layout.shapes({"d_in": 8, "d_sae": 24})
    assert sorted(shapes) == ["W_dec", "W_enc", "b_dec", "b_gate", "b_mag", "r_mag"]
    assert rivals("sae_lens", "inference")


def test_taken_over_with_unit_norms_it_is_the_same_function():
    sae = dictionary("free").float().eval()
    taken = GatedSAE.continuing(sae, GatedConfig(size=F)).eval()
    x = torch.randn(400, D)
    torch.testing.assert_close(taken.W_dec.norm(dim=1).detach(), torch.ones(F))
    torch.testing.assert_close(taken(x), sae(x), rtol=1e-5, atol=1e-5)


KINDS = {"local": {}, "e2e": {}, "e2e_ds": {"downstream_mse": 1.0}}


@pytest.fixture(scope="module")
def model():
    return endwise.load_model("embedded")


def test_behind_a_norm_the_gates_term_is_still_fed(model, tmp_path, monkeypatch):
    monkeypatch.setattr("endwise.dictionaries.normed.FITTED_ON", 4096)
    values = {
        "site": "blocks.4.hook_resid_pre",
        "dictionary": {"architecture": "gated", "size": 200, "normalize": "scalar"},
        "objective": {"kind": "local", "sparsity": {"coefficient": 0.3}},
        "data": {"context": 32},
        "training": {"tokens": 512, "batch": 4, "learning_rate": 1e-2, "log_every": 1},
        "evaluation": {"tokens": 512, "during_training_tokens": 128, "bootstrap": 20},
        "out": str(tmp_path / "run"),
    }
    run = endwise.train(values, model=model, display=False)
    line = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[0])
    assert line["gate_reconstruction"] > 0.1 * line["local_mse"]
    x = torch.randn(50, run.sae.d_in) * 3
    torch.testing.assert_close(SAE.load(run.folder)(x), run.sae(x).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["local", pytest.param("e2e", marks=pytest.mark.slow), "e2e_ds"])
def test_it_trains_resumes_and_is_measured(model, kind, tmp_path):
    config = RunConfig.build(
        {
            "site": "blocks.4.hook_resid_pre",
            "dictionary": {"architecture": "gated", "size": 200},
            "objective": {"kind": kind, "sparsity": {"coefficient": 0.3}, **KINDS[kind]},
            "data": {"context": 32},
            "training": {"tokens": 1024, "batch": 4, "learning_rate": 1e-2, "log_every": 1, "checkpoint_every": 4},
            "evaluation": {"tokens": 512, "during_training_tokens": 128, "bootstrap": 20},
            "out": str(tmp_path / "run"),
        }
    )
    run = endwise.train(config, model=model, display=False)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[-1]["gate_reconstruction"] < lines[0]["gate_reconstruction"]
    weights = (run.folder / "sae" / "sae_weights.safetensors").read_bytes()
    endwise.train(config, model=model, resume=True, from_step=4, display=False)
    assert (run.folder / "sae" / "sae_weights.safetensors").read_bytes() == weights
    (found,) = endwise.evaluate(run.folder, model=model).values()
    sae = SAE.load(run.folder)
    assert isinstance(sae, GatedSAE) and found["l0"] > 0
    x = torch.randn(50, sae.d_in)
    torch.testing.assert_close(sae(x), run.sae(x))
