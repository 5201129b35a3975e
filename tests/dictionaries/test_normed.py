"""Norms of the input: against their formulas, folded into what is saved, right in attribution, trained and measured."""

import json
import math

import pytest
import torch

import endwise
from endwise import SAE
from endwise.common.errors import ConfigError, FormatError
from endwise.config.dictionary import ARCHITECTURES
from endwise.config.run import RunConfig
from endwise.dictionaries import ReluSAE
from endwise.dictionaries.normed import RIDGE, Fitted, NormedSAE, normed
from endwise.features.attribution import Attribution
from endwise.features.spliced import SplicedBatch
from rivals import rival, rivals
from small_gpt2 import SHIPPED

D, F = 8, 24
NEEDED = {"k": 4}
"""Values for keys that an architecture may ask for."""
FITTED, PER_TOKEN = ("scalar", "whitening"), ("layer_norm", "constant_norm_rescale", "centred")
THEIRS = [name for name in rivals("sae_lens", "inference") if name.endswith(("_layer_norm", "_constant_norm"))]


def activations(width=D, rows=400, seed=1):
    """Activations of unequal variances, correlated, away from 0."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) * torch.linspace(0.2, 2, width)
    return torch.randn(rows, width, generator=generator) @ mixing + torch.randn(width, generator=generator)


def built(name, kind, **settings):
    section = ARCHITECTURES[name].Config
    own = {key: value for key, value in NEEDED.items() if key in section.model_fields}
    config = section.model_validate({"architecture": name, "size": F, "normalize": kind, **own, **settings})
    return ARCHITECTURES[name].build(config, D, 3, d_out=settings.get("d_out", D)), config


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in THEIRS
        if json.loads((rival(name).folder / "cfg.json").read_text())["architecture"] in ARCHITECTURES
    ],
)
def test_what_saelens_saved_with_a_norm_opens_as_it_is(name, tmp_path):
    theirs, sae = rival(name), SAE.load(rival(name).folder)
    for each in (sae, saved(sae, tmp_path)):
        torch.testing.assert_close(
            each.encode(theirs.tensors["inputs"]).dense(), theirs.tensors["latents"], rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(each(theirs.tensors["inputs"]), theirs.tensors["outputs"], rtol=1e-5, atol=1e-5)


def saved(sae, path):
    sae.save(path)
    return SAE.load(path)


def test_a_scale_brings_the_mean_norm_to_the_root_of_the_width():
    norm, x = Fitted("scalar", D, D), activations()
    norm.fit(x, 3 * x)
    assert float(norm.of(x).norm(dim=1).mean()) == pytest.approx(math.sqrt(D), rel=1e-5)
    assert float(norm.target(3 * x, x).norm(dim=1).mean()) == pytest.approx(math.sqrt(D), rel=1e-5)
    torch.testing.assert_close(norm.back(norm.target(x, x), x), x)


def test_a_whitening_is_symmetric_and_leaves_a_covariance_of_one():
    norm, x = Fitted("whitening", D, D), activations()
    norm.fit(x, x)
    covariance = torch.cov(x.double().T)
    ridged = covariance + RIDGE * covariance.trace() / D * torch.eye(D)
    matrix = norm.read.matrix.double()
    torch.testing.assert_close(matrix, matrix.T)
    torch.testing.assert_close(matrix @ ridged @ matrix, torch.eye(D).double(), atol=1e-5, rtol=1e-5)
    assert norm.of(x).mean(0).abs().max() < 1e-4
    torch.testing.assert_close(norm.back(norm.target(x, x), x), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [*FITTED, *PER_TOKEN])
def test_what_is_undone_and_its_gradient(kind):
    norm = NormedSAE(ReluSAE(D, F), kind).norm
    x = activations().double()
    norm.double()
    if isinstance(norm, Fitted):
        norm.fit(x, x)
    y, upstream = torch.randn(400, D, dtype=torch.float64, requires_grad=True), torch.randn(400, D, dtype=torch.float64)
    result = norm.back(y, x)
    torch.testing.assert_close(norm.target(result, x), y)
    (gradient,) = torch.autograd.grad(result, y, upstream)
    torch.testing.assert_close(norm.gradient(upstream, x), gradient)


@pytest.mark.parametrize("kind", [*FITTED, *PER_TOKEN])
@pytest.mark.parametrize("name", SHIPPED)
def test_every_architecture_is_saved_as_it_is_used(name, kind, tmp_path):
    """Trained or not, what is saved computes the same, and what depends on the token is in the file alone."""
    inner, config = built(name, kind)
    sae, x = normed(inner, config), activations(rows=2000)
    with torch.no_grad():
        for parameter in inner.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
        sae.see_first(x, x)
        sae.train()
        sae.encode(x)
        sae.after_step()
        if sae.last_tokens:
            sae.see_last(x, x)
        sae.eval()
        read, rows = saved(sae, tmp_path), x[:50]
        assert isinstance(read, NormedSAE) == (kind in PER_TOKEN)
        assert float(sae.encode(rows).l0().mean()) > 0
        torch.testing.assert_close(read.encode(rows).dense(), sae.encode(rows).dense(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(read(rows), sae(rows), rtol=1e-4, atol=1e-4)
        whole = sae.decode(sae.encode(rows))
        torch.testing.assert_close(read.decode(read.encode(rows)), whole, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(read.W_dec, sae.W_dec, rtol=1e-4, atol=1e-5)
    told = json.loads((tmp_path / "cfg.json").read_text())["normalize_activations"]
    assert told == (kind if kind in PER_TOKEN and kind != "centred" else "none")


@pytest.mark.parametrize("kind", FITTED)
@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoders_two_sides_are_fitted_apart(kind, skip, tmp_path):
    inner = ReluSAE(D, F, 5, seed=3, skip=skip)
    sae = NormedSAE(inner, kind).requires_grad_(False)
    if skip:
        torch.nn.init.normal_(inner.W_skip)
    x, y = activations(), 7 * activations(5, seed=2) + 1
    sae.see_first(x, y)
    assert float(sae.norm.target(y, x).norm(dim=1).mean()) == pytest.approx(math.sqrt(5), rel=0.1)
    torch.testing.assert_close(saved(sae, tmp_path)(x), sae(x), rtol=1e-4, atol=1e-3)


@pytest.fixture(scope="module")
def model():
    return endwise.load_model("embedded")


def recipe(kind, out="x", **changes):
    return {
        "site": "blocks.2.hook_resid_pre",
        "dictionary": {"size": F, "normalize": kind},
        "objective": {"kind": "local", "sparsity": {"coefficient": 0.1}},
        "data": {"context": 16},
        "training": {"tokens": 128, "batch": 2, "learning_rate": 1e-3, "log_every": 1, "checkpoint_every": 2},
        "evaluation": {"tokens": 64, "during_training_tokens": 16, "bootstrap": 5},
        "out": str(out),
        **changes,
    }


def test_runs_with_every_norm(model, tmp_path, monkeypatch):
    """Measured as trained; started again from a checkpoint, they end in the same bits."""
    monkeypatch.setattr("endwise.dictionaries.normed.FITTED_ON", 4096)
    configs = [RunConfig.build(recipe(kind, tmp_path / kind)) for kind in (*FITTED, *PER_TOKEN)]
    runs = endwise.train_together(configs, model=model, display=False)
    found = endwise.evaluate([run.folder for run in runs], model=model)
    for run in runs:
        assert 0 < found[run.folder]["l0"] <= F and math.isfinite(found[run.folder]["kl"])
        x = activations(run.sae.d_in, 20)
        torch.testing.assert_close(SAE.load(run.folder)(x), run.sae.eval()(x), rtol=1e-4, atol=1e-3)
    first = {run.folder: (run.folder / "sae" / "sae_weights.safetensors").read_bytes() for run in runs}
    for run in endwise.train_together(configs, model=model, resume=True, from_step=2, display=False):
        assert (run.folder / "sae" / "sae_weights.safetensors").read_bytes() == first[run.folder]
    on = recipe("none", tmp_path / "on", init_from=str(runs[2].folder))
    with pytest.raises(ConfigError, match=r"Set dictionary\.normalize=layer_norm"):
        endwise.train(on, model=model, display=False)
    on["dictionary"]["normalize"] = "layer_norm"
    assert isinstance(endwise.train(on, model=model, display=False).sae, NormedSAE)


@pytest.mark.parametrize("kind", PER_TOKEN)
def test_attribution_is_the_derivative_of_the_loss(model, kind):
    """A feature's −Σ c·∂CE/∂c, against the difference of the CE with the feature a little weaker and stronger."""
    place, step = model.place("blocks.2.hook_resid_pre"), 1e-2
    sae = NormedSAE(ReluSAE(model.width(place.reads), F, seed=3), kind).requires_grad_(False).eval()
    data = RunConfig.build(recipe(kind)).data
    batch = endwise.corpora_for(model, data, training_tokens=128, evaluation_tokens=64).heldout.batch(range(4))
    clean = model.clean(batch.tokens, place.sites, final=True)
    attribution = Attribution(sae, 4, 1)
    attribution.add(model, clean, place, batch.mask)
    whole = SplicedBatch.of(model, sae, clean, place, batch.mask)
    found, latents = attribution.result().ce, whole.latents.dense()
    for feature in abs(found).argsort()[-3:]:
        rises = []
        for sign in (1, -1):
            changed = latents.clone()
            changed[..., feature] *= 1 - sign * step
            value = sae.reconstruct(endwise.dictionaries.DenseLatents(changed), whole.read)
            rises.append(whole.rises(model, value, torch.arange(4))[0].sum())
        slope = (rises[0] - rises[1]) / (2 * step) / int(whole.whole.predicts.sum())
        assert found[feature] == pytest.approx(slope, rel=0.05)


def test_a_norm_of_each_token_is_not_undone_elsewhere(tmp_path):
    with pytest.raises(ConfigError, match=r"normalize is layer_norm, which is undone at what is read"):
        RunConfig.build(recipe("layer_norm", writes="blocks.2.hook_mlp_out"))
    ReluSAE(D, F, 5, seed=3).save(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(cfg | {"normalize_activations": "layer_norm"}))
    with pytest.raises(FormatError, match="undoes it nowhere"):
        SAE.load(tmp_path)
