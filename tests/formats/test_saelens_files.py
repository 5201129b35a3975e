"""SAELens's layout, for every architecture and for transcoders: files that SAELens wrote, and files for it."""

import json
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file

from endwise import SAE, LanguageModel
from endwise.common.errors import FormatError
from endwise.config.dictionary import ARCHITECTURES
from endwise.dictionaries import NormedSAE, ReluSAE
from endwise.formats import FORMATS, Stored, metadata_at
from endwise.models.sites import Site
from rivals import rival, rivals
from small_gpt2 import CONTEXT, VOCAB, WIDTH, small_model

D, F, OUT = 6, 20, 5
AT_RUN_TIME = ("_layer_norm", "_constant_norm")
UNFOLDED = "sae_lens/inference/standard_expected_average"
TRANSCODES = {"hook_name": "blocks.3.mlp_in", "hook_name_out": "blocks.3.hook_mlp_out"}


def opens(name):
    cfg = json.loads((rival(name).folder / "cfg.json").read_text())
    known = cfg["architecture"].partition("_")[0] in {*ARCHITECTURES.names(), "transcoder", "skip"}
    return known and not name.endswith(AT_RUN_TIME) and name != UNFOLDED


@pytest.mark.parametrize("name", [name for name in rivals("sae_lens", "inference") if opens(name)])
def test_what_saelens_saved_opens_as_it_is(name):
    theirs, sae = rival(name), SAE.load(rival(name).folder)
    joined = [theirs.tensors[key].reshape(16, -1) for key in ("inputs", "latents", "outputs")]
    torch.testing.assert_close(sae.encode(joined[0]).dense(), joined[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(joined[0]), joined[2], rtol=1e-5, atol=1e-5)


def test_a_scale_that_was_not_folded_is_asked_for():
    with pytest.raises(FormatError, match="fold_activation_norm_scaling_factor"):
        SAE.load(rival(UNFOLDED).folder)


def transcoder(d_out=OUT, skip=True):
    sae = ReluSAE(D, F, d_out, seed=3, skip=skip)
    if sae.W_skip is not None:
        torch.nn.init.normal_(sae.W_skip, generator=torch.Generator().manual_seed(4))
    return sae.requires_grad_(False)


@pytest.mark.parametrize(
    ("d_out", "skip", "metadata", "name"),
    [
        (D, False, {}, "standard"),
        (D, False, {"hook_name": "blocks.1.hook_resid_pre"}, "standard"),
        (D, False, TRANSCODES, "transcoder"),
        (D, False, TRANSCODES | {"hook_name_out": "blocks.3.mlp_in"}, "standard"),
        (OUT, False, {}, "transcoder"),
        (D, True, {}, "skip_transcoder"),
        (OUT, True, TRANSCODES, "skip_transcoder"),
        (OUT, False, TRANSCODES | {"hook_name": "blocks.3.attn.hook_z"}, "transcoder"),
    ],
)
def test_a_transcoder_is_written_under_saelens_name(tmp_path, d_out, skip, metadata, name):
    sae, x = transcoder(d_out, skip), torch.randn(7, D)
    sae.save(tmp_path, metadata)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    assert cfg["architecture"] == name and cfg.get("d_out") == (None if name == "standard" else d_out)
    assert cfg["apply_b_dec_to_input"] is False and cfg["reshape_activations"] == "none"
    assert set(load_file(tmp_path / "sae_weights.safetensors")) == {
        *("W_enc", "b_enc", "W_dec", "b_dec"),
        *(["W_skip"] if skip else []),
    }
    read = SAE.load(tmp_path)
    assert (read.d_in, read.d_sae, read.d_out) == (D, F, d_out)
    torch.testing.assert_close(read(x), sae(x))
    read.save(tmp_path / "again", metadata)
    assert (tmp_path / "again" / "cfg.json").read_bytes() == (tmp_path / "cfg.json").read_bytes()


def test_a_transcoder_that_saelens_has_no_name_for_is_named_alike(tmp_path):
    tensors = {"W_enc": torch.ones(D, F), "b_enc": torch.ones(F), "W_dec": torch.ones(F, OUT), "b_dec": torch.ones(OUT)}
    FORMATS["saelens"].write(tmp_path, Stored("unheard", {"d_in": D, "d_sae": F, "d_out": OUT}, tensors))
    assert json.loads((tmp_path / "cfg.json").read_text())["architecture"] == "unheard_transcoder"
    with pytest.raises(FormatError, match=r"'unheard_transcoder' is not one of .*nor a transcoder of one"):
        SAE.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"d_out": None}, "d_out must be a whole number above 0, not None"),
        ({"d_out": -5}, "d_out must be a whole number above 0, not -5"),
        ({"d_out": D}, r"W_dec must have the shape \(20, 6\)"),
        ({"apply_b_dec_to_input": True}, "cannot be subtracted from what it reads"),
        ({"apply_b_dec_to_input": None}, "must be true or false"),
        ({"architecture": "transcoder"}, "also holds W_skip"),
        ({"architecture": "standard"}, "d_out=5 may change|also holds W_skip"),
        ({"architecture": "quantum_transcoder"}, "'quantum_transcoder' is not one of"),
        ({"architecture": "_transcoder"}, "is not one of"),
        ({"architecture": "skip_skip_transcoder"}, "is not one of"),
        ({"architecture": "crosscoder"}, "is not one of"),
    ],
    ids=str,
)
def test_a_transcoders_file_that_is_wrong(tmp_path, change, says):
    transcoder().save(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(cfg | change))
    with pytest.raises(FormatError, match=says):
        SAE.load(tmp_path)


def test_a_skip_connection_that_is_missing(tmp_path):
    transcoder(skip=False).save(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(cfg | {"architecture": "skip_transcoder"}))
    with pytest.raises(FormatError, match=r"W_skip must have the shape \(5, 6\)"):
        SAE.load(tmp_path)


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale"])
def test_a_transcoder_behind_a_norm_of_each_token_is_not_written(tmp_path, norm):
    with pytest.raises(FormatError, match=f"a transcoder behind {norm} cannot be written"):
        NormedSAE(transcoder(D, skip=False), norm).save(tmp_path / "t", TRANSCODES)
    assert not (tmp_path / "t").exists()
    NormedSAE(transcoder(D, skip=False), norm).save(tmp_path / "sae")


def test_what_is_older_than_version_6_tells_where_it_belongs(tmp_path):
    """The paper's own SAEs are stored so."""
    ReluSAE(D, F).save(tmp_path)
    old = {"d_in": D, "d_sae": F, "hook_point": "blocks.6.hook_resid_pre", "hook_point_head_index": None}
    old |= {"model_name": "gpt2-small", "context_size": 512, "prepend_bos": False, "l1_coefficient": 5, "seed": 0}
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    expected = {"hook_name": "blocks.6.hook_resid_pre", "model_name": "gpt2-small", "context_size": 512}
    assert metadata_at(tmp_path) == expected | {"prepend_bos": False}


def centred(gpt2):
    """A GPT-2's weights as TransformerLens centres those that write to the residual stream, in place; what reads it
    does so behind layer norms, so that the function stays.
    """
    gpt2.lm_head.weight = torch.nn.Parameter(gpt2.lm_head.weight.detach().clone())  # tied to what is centred
    body = gpt2.transformer
    writing = [body.wte.weight, body.wpe.weight]
    for block in body.h:
        writing += [each for part in (block.attn, block.mlp) for each in (part.c_proj.weight, part.c_proj.bias)]
    with torch.no_grad():
        for each in writing:
            each -= each.mean(-1, keepdim=True)
    return gpt2


@pytest.mark.parametrize(
    "name", ["blocks.1.hook_resid_pre", "blocks.2.hook_resid_mid", "blocks.3.hook_mlp_out", "blocks.0.hook_attn_out"]
)
def test_an_sae_of_a_centred_model_is_the_same_on_the_model_as_it_is(tmp_path, name):
    """As TransformerLens 3.9 was seen to do: what a site has there is what it has here less each token's mean."""
    plain, where = small_model(), Site.parse(name)
    processed = LanguageModel(centred(deepcopy(plain.model)), None)
    tokens = torch.randint(1, VOCAB, (6, CONTEXT), generator=torch.Generator().manual_seed(0))
    here, there = (each.clean(tokens, {where}, True).activations[where] for each in (plain, processed))
    assert (here.mean(-1).abs() > 0.1).any() and there.mean(-1).abs().max() < 1e-3
    inside = ReluSAE(WIDTH, F, seed=1).requires_grad_(False)
    told = {"model_name": "gpt2-small", "hook_name": name}
    inside.save(tmp_path, told | {"model_from_pretrained_kwargs": {"center_writing_weights": True}})
    sae = SAE.load(tmp_path)
    torch.testing.assert_close(sae.encode(here).dense(), inside.encode(there).dense(), rtol=1e-4, atol=1e-3)
    assert abs(explained(sae(here), here) - explained(inside(there), there)) < 1e-4
    sae.save(tmp_path / "again")
    assert torch.equal(SAE.load(tmp_path / "again")(here), sae(here))
    cfg = json.loads((tmp_path / "again" / "cfg.json").read_text())
    assert cfg["normalize_activations"] == "none" and cfg["metadata"]["model_from_pretrained_kwargs"]
    torch.testing.assert_close(load_file(tmp_path / "again" / "sae_weights.safetensors")["W_enc"], inside.W_enc)
    other = told | {"hook_name": name.replace(name.rpartition(".")[2], "mlp_in")}
    inside.save(tmp_path, other | {"model_from_pretrained_kwargs": {"center_writing_weights": True}})
    with pytest.warns(UserWarning, match="is unknown at this place"):
        assert torch.equal(SAE.load(tmp_path)(here), inside(here))


def explained(estimate, x):
    """Share of the variance of what the SAE reads, each token's mean taken out, that it explains."""
    estimate, x = (each - each.mean(-1, keepdim=True) for each in (estimate, x))
    return float(1 - (estimate - x).square().sum() / (x - x.mean((0, 1))).square().sum())
