"""The paper's SAE against its formulas, and its file against hostile and foreign ones."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from endwise import SAE
from endwise.dictionaries import DenseLatents, ReluSAE
from endwise.errors import FormatError

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


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architecture": "quantum"}, "quantum"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations"),
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
    with pytest.raises(FormatError, match=r"cfg\.json"):
        SAE.load(tmp_path)
    sae.save(tmp_path)
    weights = tmp_path / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(FormatError, match="not a valid safetensors"):
        SAE.load(tmp_path)
    (tmp_path / "cfg.json").write_text("[" * 100_000)
    with pytest.raises(FormatError, match="JSON"):
        SAE.load(tmp_path)
