"""SAEs at heads' results of a model whose value biases TransformerLens folded, as they are read here."""

import pytest
import torch

from endwise import SAE, LanguageModel, ReluSAE
from endwise.common.errors import FormatError
from endwise.dictionaries import GatedSAE, NormedSAE
from endwise.evaluation.inspecting import belonging, inspect
from endwise.models.sites import Part, Site
from made_saes import filled
from tiny_models import FAMILIES, HEADS, build, tiny, tokens

Z = Site(0, Part.ATTN_Z)
ABOUT = {"hook_name": Z.name, "model_from_pretrained_kwargs": {"fold_value_biases": True}}
BIASES = {
    "gpt2": lambda block: block.attn.c_attn.bias.view(3, -1)[2],
    "pythia": lambda block: block.attention.query_key_value.bias.view(HEADS, 3, -1)[:, 2],
    "neox_sequential": lambda block: block.attention.query_key_value.bias.view(HEADS, 3, -1)[:, 2],
    "qwen2": lambda block: block.self_attn.v_proj.bias,
}
"""Getters of value biases; other families here have none."""


def heads(model, ids):
    return model.clean(ids, [Z]).activations[Z]


def folded(family):
    """A model, and the same less the value biases of its first block."""
    model, other = tiny(family), LanguageModel(build(family), name=family)
    with torch.no_grad():
        BIASES[family](other._blocks[0].module)[...] = 0
    return model, other


OFTEN = {*BIASES, "gpt_neo", "llama_grouped_tied", "phi3"}
"""With biases, and without: of projections each by itself, of grouped ones, and of one for all three."""


@pytest.mark.parametrize("family", [pytest.param(f, marks=[] if f in OFTEN else pytest.mark.slow) for f in FAMILIES])
def test_they_are_what_heads_results_lack_without_them(family):
    if family not in BIASES:
        assert not tiny(family).value_bias(0).any()
        return
    model, other = folded(family)
    bias, ids = model.value_bias(0), tokens()
    assert bias.abs().max() > 0.1
    torch.testing.assert_close(heads(model, ids) - bias, heads(other, ids), rtol=1e-4, atol=1e-5)


def test_moved_into_what_attention_adds_the_model_is_the_same():
    """As TransformerLens folds them: b_V · W_O goes to b_O."""
    model, other = folded("gpt2")
    attention = other._blocks[0].module.attn
    with torch.no_grad():
        attention.c_proj.bias += model.value_bias(0) @ attention.c_proj.weight
    torch.testing.assert_close(model.logits(tokens()), other.logits(tokens()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
@pytest.mark.parametrize("architecture", [ReluSAE, GatedSAE])
@pytest.mark.filterwarnings("ignore:.*fold_value_biases")
def test_an_sae_of_it_is_read(family, architecture, tmp_path):
    model, other = folded(family)
    theirs, ids = filled(architecture(model.width(Z), 40)), tokens()
    with torch.no_grad():
        theirs.b_dec.normal_()
    theirs.save(tmp_path, ABOUT)
    place, stored = belonging(inspect(tmp_path), model)
    ours = SAE.of(stored)
    x, y = heads(model, ids), heads(other, ids)
    assert (theirs.encode(y).dense() > 0).any() and not torch.allclose(theirs(x) - x, theirs(y) - y, atol=0.1)
    torch.testing.assert_close(ours.encode(x).dense(), theirs.encode(y).dense(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(ours(x) - model.value_bias(0), theirs(y), rtol=1e-3, atol=1e-5)
    ours.save(tmp_path / "again", stored.metadata)
    torch.testing.assert_close(SAE.of(belonging(inspect(tmp_path / "again"), model)[1])(x), ours(x))
    assert place.name == Z.name and not inspect(tmp_path / "again").remarks


def test_what_cannot_be_read_so_is_refused(tmp_path):
    model = tiny("gpt2")
    sae = filled(ReluSAE(model.width(Z), 40))
    NormedSAE(sae, "layer_norm").save(tmp_path / "normed", ABOUT)
    sae.save(tmp_path / "transcoder", {**ABOUT, "hook_name_out": "blocks.0.hook_attn_out"})
    for name in ("normed", "transcoder"):
        with pytest.warns(UserWarning, match="fold_value_biases"):
            SAE.load(tmp_path / name)
        with pytest.raises(FormatError, match="value biases were folded"):
            belonging(inspect(tmp_path / name), model)


def test_where_there_are_none_all_is_read(tmp_path):
    model = tiny("gpt_neo")
    sae = filled(ReluSAE(model.width(Z), 40))
    sae.save(tmp_path, {**ABOUT, "hook_name_out": "blocks.0.hook_attn_out"})
    _, stored = belonging(inspect(tmp_path), model)
    torch.testing.assert_close(SAE.of(stored)(torch.ones(1, sae.d_in)), sae(torch.ones(1, sae.d_in)))
