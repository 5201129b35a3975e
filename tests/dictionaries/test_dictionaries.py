"""The paper's SAE against its formulas, and its file against hostile and foreign ones."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from endwise import SAE
from endwise.common.errors import FormatError
from endwise.dictionaries import DenseLatents, ReluSAE, read_cfg

D, F = 6, 20


@pytest.fixture
def sae():
    return ReluSAE(D, F, seed=3)


def test_forward_is_the_papers_formula(sae):
    x = torch.randn(2, 5, D, dtype=torch.float64)
    sae.requires_grad_(False)
    direction = sae.decoder.double() / sae.decoder.double().norm(dim=-1, keepdim=True)
    expected = torch.empty_like(x)
    for b in range(2):
        for t in range(5):
            c = [max(0.0, float(sae.encoder[j].double() @ x[b, t] + sae.b_enc[j])) for j in range(F)]
            expected[b, t] = sum(c[j] * direction[j] for j in range(F)) + sae.b_dec.double()
    torch.testing.assert_close(sae(x.float()).double(), expected, rtol=1e-5, atol=1e-6)


def test_initialisation_is_the_references(sae):
    wide = ReluSAE(D, 60 * D).requires_grad_(False)
    gram = wide.decoder.T @ wide.decoder
    torch.testing.assert_close(gram, torch.eye(D), rtol=0, atol=1e-5)
    assert float(wide.decoder.norm(dim=-1).mean()) == pytest.approx((1 / 60) ** 0.5, rel=0.2)
    torch.testing.assert_close(wide.W_dec.norm(dim=-1), torch.ones(60 * D))
    assert wide.encoder.abs().max() <= D**-0.5
    assert wide.b_dec.abs().max() <= (60 * D) ** -0.5
    assert torch.equal(ReluSAE(D, F, seed=3).encoder, sae.encoder)
    assert not torch.equal(ReluSAE(D, F, seed=4).encoder, sae.encoder)


@pytest.mark.parametrize("p", [1.0, 0.5, 2.0])
def test_penalty_and_counts(p):
    values = torch.tensor([[0.0, 2.0, 0.5], [0.0, 0.0, 0.0]], requires_grad=True)
    latents = DenseLatents(values)
    torch.testing.assert_close(latents.penalty(p), torch.tensor([2.0**p + 0.5**p, 0.0]))
    assert latents.l0().tolist() == [2.0, 0.0]
    assert latents.fired(torch.tensor([True, True])).tolist() == [False, True, True]
    assert latents.fired(torch.tensor([False, True])).tolist() == [False, False, False]
    latents.penalty(p).sum().backward()
    assert torch.isfinite(values.grad).all()
    assert values.grad[0, 1] == pytest.approx(p * 2.0 ** (p - 1))


def test_saved_and_loaded_is_the_same_function(sae, tmp_path):
    sae.save(tmp_path, {"hook_name": "blocks.0.hook_resid_pre"})
    loaded = SAE.load(tmp_path)
    x = torch.randn(4, D)
    torch.testing.assert_close(loaded(x), sae(x), rtol=1e-6, atol=1e-6)
    weights = load_file(tmp_path / "sae_weights.safetensors")
    assert {name: tuple(w.shape) for name, w in weights.items()} == {
        "W_enc": (D, F),
        "b_enc": (F,),
        "W_dec": (F, D),
        "b_dec": (D,),
    }
    torch.testing.assert_close(weights["W_dec"].norm(dim=-1), torch.ones(F))
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    assert cfg["architecture"] == "standard"
    assert cfg["apply_b_dec_to_input"] is False
    assert cfg["metadata"]["hook_name"] == "blocks.0.hook_resid_pre"
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_foreign_saes_keep_their_function(tmp_path):
    """SAELens's default subtracts b_dec from the input, and its decoder rows need not have unit norm."""
    w = {"W_enc": torch.randn(D, F), "b_enc": torch.randn(F), "W_dec": torch.randn(F, D), "b_dec": torch.randn(D)}
    save_file(w, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({"architecture": "standard", "d_in": D, "d_sae": F}))
    x = torch.randn(7, D)
    expected = torch.relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) @ w["W_dec"] + w["b_dec"]
    torch.testing.assert_close(SAE.load(tmp_path)(x), expected, rtol=1e-4, atol=1e-4)


OLD = {
    "d_in": D,
    "d_sae": F,
    "dtype": "float32",
    "device": "cpu",
    "model_name": "gpt2-small",
    "hook_point": "blocks.6.hook_resid_pre",
    "hook_point_layer": 6,
    "activation_fn_str": "relu",
    "activation_fn_kwargs": {},
    "normalize_activations": False,
    "finetuning_scaling_factor": False,
    "l1_coefficient": 5,
    "normalize_sae_decoder": True,
}
"""A configuration of SAELens before version 6: one flat object, without an architecture."""


@pytest.fixture
def drawn():
    return {"W_enc": torch.randn(D, F), "b_enc": torch.randn(F), "W_dec": torch.randn(F, D), "b_dec": torch.randn(D)}


def written(folder, tensors, cfg):
    save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return folder


@pytest.mark.parametrize("scales", ["none", "ones", "factors"])
@pytest.mark.parametrize("subtracts", [None, True, False])
def test_files_from_before_version_6_keep_their_function(tmp_path, drawn, subtracts, scales):
    factors = {"none": torch.ones(F), "ones": torch.ones(F), "factors": torch.rand(F) + 0.5}[scales]
    cfg = OLD if subtracts is None else OLD | {"apply_b_dec_to_input": subtracts}
    cfg = cfg | {"finetuning_scaling_factor": scales == "factors"}
    written(tmp_path, drawn if scales == "none" else drawn | {"scaling_factor": factors}, cfg)
    x = torch.randn(7, D)
    acts = torch.relu((x - drawn["b_dec"] * (subtracts is not False)) @ drawn["W_enc"] + drawn["b_enc"])
    sae = SAE.load(tmp_path)
    torch.testing.assert_close(sae.encode(x).dense(), acts, rtol=1e-4, atol=1e-4)
    expected = (acts * factors) @ drawn["W_dec"] + drawn["b_dec"]
    torch.testing.assert_close(sae(x), expected, rtol=1e-4, atol=1e-4)


V6 = {"architecture": "standard", "d_in": D, "d_sae": F, "metadata": {"sae_lens_version": "6.1.0"}}


@pytest.mark.parametrize(
    ("cfg", "says"),
    [
        (OLD | {"activation_fn_str": "tanh-relu"}, "'tanh-relu'.*version that wrote it: since 6, .* for ReLU"),
        (OLD | {"activation_fn_kwargs": {"k": 3}}, "activation_fn_kwargs"),
        (OLD | {"activation_fn": "gelu"}, "activation_fn is 'gelu'"),
        (OLD | {"normalize_activations": True}, "expected_average_only_in.*fold_activation_norm_scaling_factor"),
        (V6 | {"reshape_activations": "by head"}, "'by head', which endwise does not know"),
        (V6 | {"normalize_activations": "covariance_whitening"}, "fold_activation_whitening"),
        (V6 | {"normalize_activations": "quantum"}, "does not know"),
        *(
            (V6 | {"architecture": other}, "no conversion keeps it. Use it with SAELens")
            for other in ("abstopk", "temporal", "matching_pursuit")
        ),
        *(
            (V6 | {"architecture": other}, r"TrainingSAE\.load_from_disk and save it for inference")
            for other in ("batchtopk", "matryoshka_batchtopk")
        ),
        (V6 | {"architecture": ["standard"]}, "does not know it"),
        (V6 | {"architecture": "quantum"}, "'quantum' is not one of .*standard"),
        ({key: value for key, value in V6.items() if key != "architecture"}, "architecture None"),
        (V6 | {"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm=True"),
        (V6 | {"k": 3}, "k=3 may change"),
        (V6 | {"d_out": D}, "d_out"),
        (V6 | {"hook_name_out": "blocks.3.hook_mlp_out"}, "hook_name_out"),
        (V6 | {"finetuning_scaling_factor": True}, "finetuning_scaling_factor is true"),
        (OLD | {"finetuning_scaling_factor": "yes"}, "must be true or false"),
    ],
    ids=str,
)
def test_what_changes_the_function_is_refused_in_words_that_are_true(tmp_path, drawn, cfg, says):
    with pytest.raises(FormatError, match=says):
        SAE.load(written(tmp_path, drawn, cfg))


def test_an_sae_of_a_processed_model_says_so(tmp_path, drawn):
    processed = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    processed |= {"model_name": "some model"}  # which may have no layer norms, so that nothing would be centred
    for cfg in (OLD | processed, V6 | {"metadata": V6["metadata"] | processed}):
        with pytest.warns(UserWarning, match="center_writing_weights"):
            SAE.load(written(tmp_path, drawn, cfg))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"W_skip": torch.zeros(D, D)}, "also holds W_skip"),
        ({"threshold": torch.ones(F)}, "also holds threshold"),
        ({"b_mag": torch.ones(F), "r_mag": torch.ones(F)}, "b_mag, r_mag"),
        ({"scaling_factor": torch.full((F,), 2.0)}, "finetuning_scaling_factor is false"),
        ({"scaling_factor": torch.ones(3)}, "shape"),
        ({"scaling_factor": torch.full((F,), float("nan"))}, "finite"),
    ],
    ids=str,
)
@pytest.mark.parametrize("cfg", [OLD, V6], ids=["old", "version 6"])
def test_tensors_that_change_the_function_are_refused(tmp_path, drawn, more, says, cfg):
    with pytest.raises(FormatError, match=says):
        SAE.load(written(tmp_path, drawn | more, cfg))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architecture": "quantum"}, "quantum"),
        ({"normalize_activations": "covariance_whitening"}, "normalize_activations"),
        ({"d_sae": 21}, "shape"),
    ],
)
def test_cfg_that_cannot_be_honoured_is_refused(sae, tmp_path, change, says):
    sae.save(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(cfg | change))
    with pytest.raises(FormatError, match=says):
        SAE.load(tmp_path)


def test_broken_files_are_named(sae, tmp_path):
    with pytest.raises(FormatError, match="empty folder"):
        SAE.load(tmp_path)
    sae.save(tmp_path)
    weights = tmp_path / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(FormatError, match="not a valid safetensors"):
        SAE.load(tmp_path)
    (tmp_path / "cfg.json").write_text("[" * 100_000)
    with pytest.raises(FormatError, match="JSON"):
        SAE.load(tmp_path)


@pytest.mark.parametrize(
    "cfg", [OLD | {"hook_point": "blocks.6.attn.hook_z"}, V6 | {"reshape_activations": "hook_z"}], ids=str
)
def test_heads_set_one_after_the_other_are_what_the_site_has(tmp_path, drawn, cfg):
    """SAELens joins them before it encodes; `attn.hook_z` is where they are joined already."""
    plain, joined = written(tmp_path, drawn, {**cfg, "reshape_activations": "none"}), tmp_path / "joined"
    joined.mkdir()
    x = torch.randn(7, D)
    torch.testing.assert_close(SAE.load(written(joined, drawn, cfg))(x), SAE.load(plain)(x))
    SAE.load(plain).save(tmp_path / "saved", {"hook_name": "blocks.6.attn.hook_z"})
    assert read_cfg(tmp_path / "saved")["reshape_activations"] == "hook_z"
    SAE.load(plain).save(tmp_path / "saved", {"hook_name": "blocks.6.hook_attn_out"})
    assert read_cfg(tmp_path / "saved")["reshape_activations"] == "none"
