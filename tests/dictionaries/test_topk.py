"""The k largest features of every token: against slow definitions, rivals' numbers, and in training."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.func import functional_call

import endwise
from endwise.common.errors import ConfigError, FormatError
from endwise.config.method import Knob
from endwise.config.run import RunConfig
from endwise.dictionaries import DenseLatents, SparseLatents, TopKSAE, selection
from endwise.training.planning.plan import plan
from rivals import rival
from topk_family import (
    Trained,
    before,
    check_that_resuming_ends_in_the_same_bits,
    coarse,
    exact,
    largest_of_row,
    passed,
    recipe,
    trained_as,
)

pytestmark = pytest.mark.usefixtures("loaded_once")

D, F, ROWS = 12, 320, 150


def made(k=5, size=F, **settings):
    return exact(TopKSAE.build(TopKSAE.Config(size=size, k=k, **settings), D, 0))


def rows(n=ROWS, seed=1):
    return coarse(torch.randn(n, D, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("k", [1, 5, 10, 11, F])
def test_the_k_largest_are_those_of_the_definition(k):
    sae, x = made(k), rows()
    latents = sae.encode(x)
    assert isinstance(latents, SparseLatents if k <= 10 else DenseLatents)
    assert torch.equal(latents.dense().detach().double(), largest_of_row(before(sae, x), k))


@pytest.mark.parametrize("size", [32, F])
def test_of_equal_values_the_first_are_active(size):
    sae = made(4, size)
    with torch.no_grad():
        sae.encoder.copy_(sae.encoder[:1].abs().expand(size, D))
        sae.b_enc.zero_()
        sae.b_enc[size // 2 :] = 1.0
        sae.b_enc[-1] = 2.0
    dense = sae.encode(rows().abs()).dense()
    expected = torch.zeros(size, dtype=torch.bool)
    expected[[*range(size // 2, size // 2 + 3), size - 1]] = True
    assert (dense != 0).equal(expected.expand(ROWS, -1))


@pytest.mark.parametrize("size", [32, F])
def test_fewer_positive_ones_than_k_are_active_alone(size):
    sae = made(5, size)
    with torch.no_grad():
        sae.b_enc -= 1.2 * sae.before(rows()).max(0).values.median()
    latents = sae.encode(rows())
    assert torch.equal(latents.dense().detach().double(), largest_of_row(before(sae, rows()), 5))
    assert 0 < latents.l0().mean() < 4 and float(latents.l0().min()) == 0
    if latents.pairs() is not None:
        assert (latents.values != 0).all()


@pytest.mark.parametrize("size", [32, F])
def test_no_positive_one_at_all(size):
    sae = made(5, size)
    with torch.no_grad():
        sae.b_enc -= 1e3
    assert not sae.encode(rows()).dense().any()
    torch.testing.assert_close(sae(rows()), sae.b_dec.expand(ROWS, -1))


@pytest.mark.parametrize("size", [32, F])
def test_nan_stays_and_spoils_no_other_row(size):
    sae, x = made(5, size), rows()
    x[[0, 3, 70]] = torch.nan
    dense = sae.encode(x).dense()
    bad = dense.isnan().any(-1)
    assert bad.nonzero()[:, 0].tolist() == [0, 3, 70]
    assert torch.equal(dense[~bad].detach().double(), largest_of_row(before(sae, x[~bad]), 5))


@pytest.mark.parametrize("size", [32, F])
def test_activations_in_half_precision(size):
    sae, x = made(5, size), rows().bfloat16()
    latents = sae.encode(x)
    assert latents.dense().dtype == torch.float32
    assert torch.equal(latents.dense().detach().double(), largest_of_row(before(sae, x.float()), 5))


def test_products_in_half_precision_keep_k():
    sae = made(5, 32).bfloat16()
    latents = sae.encode(rows())
    assert (latents.l0() == 5).all() and latents.dense().dtype == torch.bfloat16


@pytest.mark.parametrize("size", [32, F])
@pytest.mark.parametrize("unit", ["unit", "free"])
def test_gradients_are_finite_differences(size, unit):
    """Check every parameter and the input, in float64, by changes too small to change which features are chosen."""
    sae, x = made(4, size, decoder_norm=unit).double(), rows(7).double()
    parts = {name: parameter.detach().clone() for name, parameter in sae.named_parameters()}
    target = torch.randn(7, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def loss(values, x):
        return (functional_call(sae, values, (x,)) - target).square().sum()

    for name in [*parts, "x"]:
        leaf = (x if name == "x" else parts[name]).clone().requires_grad_()
        call = (lambda v: loss(parts, v)) if name == "x" else (lambda v, name=name: loss(parts | {name: v}, x))
        (gradient,) = torch.autograd.grad(call(leaf), leaf)
        way = torch.randn(leaf.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        step = 1e-6 * way
        measured = (call(leaf.detach() + step) - call(leaf.detach() - step)) / 2e-6
        torch.testing.assert_close((gradient * way).sum(), measured, rtol=1e-5, atol=1e-6)


def test_sparse_and_dense_latents_have_the_same_gradients():
    sparse, dense = made(5), made(5)
    for sae, share in ((sparse, 1 / 32), (dense, 0.0)):
        sae.sparse_below = share
        assert isinstance(sae.encode(rows()), SparseLatents if share else DenseLatents)
        (sae(rows()) - rows(seed=2)).square().sum().backward()
    for name, parameter in sparse.named_parameters():
        torch.testing.assert_close(parameter.grad, dense.get_parameter(name).grad, rtol=1e-4, atol=1e-4)


def test_k_moves_in_the_first_share_of_the_steps():
    sae = made(4, k_start=40, k_steps=0.5).train()
    wanted = {0.0: 40, 0.125: 31, 0.25: 22, 0.5: 4, 0.9: 4}
    for done, k in wanted.items():
        sae.begin_step(done)
        assert float(sae.encode(rows()).l0().mean()) == k
    sae.begin_step(0.0)
    assert float(sae.eval().encode(rows()).l0().mean()) == 4


SUBTRACT = ["sae_lens/topk", "dictionary_learning/topk", "eai_sparsify/topk_free"]


def of_width_8():
    return TopKSAE(8, 24, k=selection.Annealed(4), unit_norm=False, initialisation=None)


@pytest.mark.parametrize("name", SUBTRACT)
def test_a_rivals_pass(name):
    stored = rival(name)
    latents, out, _ = passed(of_width_8(), stored.under("start"), stored.tensors["x"])
    torch.testing.assert_close(latents, stored.tensors["latents"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, stored.tensors["out"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["sae_lens/topk", "dictionary_learning/topk"])
def test_fewer_than_k_as_a_rival_has_it(name):
    stored = rival(name)
    bias = "encoder.bias" if "encoder.bias" in stored.under("start") else "b_enc"
    p = stored.under("start") | {bias: stored.tensors["few.b_enc"]}
    latents, out, _ = passed(of_width_8(), p, stored.tensors["x"])
    assert (latents > 0).sum(-1).min() < 4
    torch.testing.assert_close(latents, stored.tensors["few.latents"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, stored.tensors["few.out"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["sae_lens/topk", "dictionary_learning/topk"])
def test_a_rivals_weights_after_20_steps(name):
    """Their squared error is summed over the width; no feature is dead there, so that there is no other term."""
    sae = of_width_8()
    trained_as(rival(name), lambda p, x: (passed(sae, p, x)[1] - x).square().sum(-1).mean())


def test_sparsify_trains_a_transcoder_to_the_same_weights():
    """Nothing subtracted, directions of any norm; the loss is the share of the batch's variance not explained."""
    sae = of_width_8()

    def loss(p, x):
        y = (x.flip(-1) * 0.8).sin() + 0.3 * x
        return (passed(sae, p, x, subtracts=False)[1] - y).square().sum() / (y - y.mean(0)).square().sum()

    trained_as(rival("eai_sparsify/transcoder"), loss)


@pytest.mark.parametrize("name", ["topk", "topk_rescaled", "trained_topk", "trained_topk_rescaled"])
def test_saelens_files_open(name):
    stored = rival(f"sae_lens/inference/{name}")
    sae = endwise.SAE.load(stored.folder)
    assert isinstance(sae, TopKSAE)
    x = stored.tensors["inputs"]
    torch.testing.assert_close(sae.encode(x).dense(), stored.tensors["latents"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(x), stored.tensors["outputs"], rtol=1e-5, atol=1e-5)


def test_what_is_saved_is_as_saelens_has_it(tmp_path):
    sae = made()
    sae.save(tmp_path)
    cfg = endwise.dictionaries.read_cfg(tmp_path)
    told = {name: cfg[name] for name in ("architecture", "k", "rescale_acts_by_decoder_norm", "apply_b_dec_to_input")}
    expected = {"architecture": "topk", "k": 5, "rescale_acts_by_decoder_norm": False, "apply_b_dec_to_input": False}
    assert told == expected
    again = endwise.SAE.load(tmp_path)
    torch.testing.assert_close(again.encode(rows()).dense(), sae.encode(rows()).dense().detach())
    torch.testing.assert_close(load_file(tmp_path / "sae_weights.safetensors")["W_dec"].norm(dim=-1), torch.ones(F))


@pytest.mark.parametrize("k", [None, 0, 400, "5", 2.5])
def test_a_file_without_a_sensible_k_is_refused(tmp_path, k):
    made().save(tmp_path)
    file = tmp_path / "cfg.json"
    cfg = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in (cfg | {"k": k}).items() if value is not None}))
    with pytest.raises(FormatError, match=f"k must be a whole number from 1 to .*{F}"):
        endwise.SAE.load(tmp_path)


@pytest.fixture(scope="module")
def model():
    return endwise.load_model("embedded")


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory):
    return Trained(tmp_path_factory.mktemp("topk"), "topk", model)


@pytest.mark.parametrize("kind", ["local", "e2e", pytest.param("e2e_ds", marks=pytest.mark.slow)])
def test_every_objective_trains_it(runs, kind):
    lines = [json.loads(line) for line in (runs[kind].folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"] and all(line["l0"] <= 6 for line in lines)
    assert "sparsity" not in lines[0] and lines[-1]["heldout"]["l0"] == pytest.approx(6, rel=0.02)


def test_resumed_it_ends_in_the_same_bits(runs, model, tmp_path):
    for kind in ("local", "e2e"):
        check_that_resuming_ends_in_the_same_bits(runs[kind], model, tmp_path / kind)


def test_evaluated_opened_and_trained_on(runs, model, tmp_path):
    folder = runs["local"].folder
    found = endwise.evaluate(folder, model=model)[folder]
    assert found["l0"] == pytest.approx(6, rel=0.01)
    x = torch.randn(20, model.d_model)
    torch.testing.assert_close(endwise.SAE.load(folder)(x), runs["local"].sae(x))
    config = {**recipe(tmp_path / "on", "topk", tokens=256), "init_from": str(folder)}
    on = endwise.train(config, model=model, display=False)
    first = json.loads((on.folder / "metrics.jsonl").read_text().splitlines()[0])
    begun = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert first["local_mse"] < 0.8 * begun["local_mse"]


def test_unit_norms_that_would_choose_other_features_are_refused():
    sae = made(decoder_norm="free")
    with torch.no_grad():
        sae.decoder *= torch.linspace(0.5, 1.5, F)[:, None]
    with pytest.raises(ConfigError, match=r"norms from 0\.\d+ to .* Set dictionary\.decoder_norm=free"):
        sae.to_train(TopKSAE.Config(size=F, k=5))
    torch.testing.assert_close(sae.to_train(TopKSAE.Config(size=F, k=5, decoder_norm="free"))(rows()), sae(rows()))


def test_swept_by_k_and_to_a_target(model, tmp_path):
    base = {name: value for name, value in recipe("x", "topk", tokens=256).items() if name not in ("out", "seed")}
    swept = endwise.sweep(
        {
            "recipe": base,
            "grids": [{"dictionary.k": [3, 12]}, {"target": [{"l0": 9}]}],
            "search": {"tokens": 1.0},
            "out": str(tmp_path / "sweep"),
        },
        display=False,
    )
    assert [row["l0"] for row in swept.rows] == pytest.approx([3, 12, 9], rel=0.03)
    assert {row["knob"] for row in swept.rows} == {"k"}


def test_planned_and_known_by_its_k():
    config = RunConfig.build(recipe("x", "topk"))
    assert plan(config).d_sae == 256 and Knob.of(config) == Knob(6.0, "dictionary.k", "k", False)


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"k": 0}, r"dictionary\.k: .*greater than 0"), ({"k": 300}, r"k is 300, more than the 256 features there are")],
)
def test_a_k_that_cannot_be_is_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        RunConfig.build(recipe("x", "topk", dictionary=settings))


def test_a_coefficient_is_left_out_with_a_word():
    values = recipe("x", "topk")
    values["objective"]["sparsity"] = {"coefficient": 1.0}
    with pytest.warns(UserWarning, match="objective.sparsity is left out"):
        assert RunConfig.build(values).objective.sparsity is None
