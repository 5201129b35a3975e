"""Formats of other packages: read as those compute them, written so that they do, and refused in words where broken."""

import json
import pickle
import warnings
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from endwise import SAE
from endwise.common.errors import FormatError
from endwise.config.dictionary import ARCHITECTURES
from endwise.dictionaries import NormedSAE, ReluSAE
from endwise.formats import FORMATS, format_at, metadata_at, weights_file
from endwise.formats.reading import site_of_module
from made_formats import CENTRED, KINDS, MLP, D, F, X, drawn, one_of_each, site

READ = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
PICKLED = {name: kind for name, kind in KINDS.items() if kind.file.endswith((".pt", ".pth"))}


def load(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SAE.load(path)


@READ
def test_read_as_its_own_package_computes_it(tmp_path, kind):
    path = kind.made(tmp_path)
    for given in (path, tmp_path / kind.file):  # a folder, or its weights
        assert format_at(given)[0].name == kind.format and weights_file(given) == tmp_path / kind.file
        sae = load(given)
        latents, output = kind.oracle(X)
        torch.testing.assert_close(sae.encode(X).dense(), latents, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sae(X), output, rtol=1e-5, atol=1e-5)
        assert 0.02 < (latents != 0).float().mean() < 0.98
        assert metadata_at(given) == kind.about


@READ
def test_a_file_cut_off_is_refused(tmp_path, kind):
    path = kind.made(tmp_path)
    file = tmp_path / kind.file
    whole = file.read_bytes()
    for length in (0, 3, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(FormatError) as refused:
            load(path)
        assert str(file) in str(refused.value) and "\n" not in str(refused.value)


@one_of_each(lambda kind: frozenset(kind.tensors))
@pytest.mark.parametrize(
    "how", ["missing", "another", "of another shape", "NaN", "whole numbers", "no tensor", "empty"]
)
def test_tensors_that_are_wrong_are_refused(tmp_path, kind, how):
    names = [name for name, each in kind.tensors.items() if isinstance(each, torch.Tensor) and each.is_floating_point()]
    for name in [each for each in names if each not in ("threshold", "latents_mean_square")][:4]:
        tensor = kind.tensors[name]
        nan = tensor.clone()
        nan[(0,) * nan.ndim] = torch.nan
        if how == "no tensor" and not kind.file.endswith((".pt", ".pth")):
            continue
        wrong = {
            "missing": {name: None},
            "another": {"W_other": drawn(3)},
            "of another shape": {name: torch.cat([tensor, tensor], -1) if tensor.ndim else tensor.repeat(2)},
            "NaN": {name: nan},
            "whole numbers": {name: tensor.round().long()},
            "no tensor": {name: "text"},
            "empty": {name: tensor.new_zeros((0,) * tensor.ndim)},
        }[how]
        path = kind.but(**wrong).made(tmp_path)
        with pytest.raises(FormatError) as refused:
            load(path)
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 900


@pytest.mark.parametrize("kind", PICKLED.values(), ids=PICKLED)
def test_a_pickle_with_code_is_not_run(tmp_path, kind):
    class Runs:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    path, file = kind.made(tmp_path), tmp_path / kind.file
    for written in (
        lambda: torch.save({**kind.tensors, "more": Runs()}, file),
        lambda: file.write_bytes(pickle.dumps(Runs())),
    ):
        written()
        with pytest.raises(FormatError, match="no code that one names is run") as refused:
            load(path)
        assert "\n" not in str(refused.value) and not (tmp_path / "ran").exists()


def test_pickles_that_hold_more_than_they_are_or_something_else(tmp_path):
    file = tmp_path / "Llama-3.1-8B-Instruct-SAE-l19.pth"
    huge = torch.zeros(1).expand(10**6, 10**6)
    for content, says in (
        ({**KINDS["goodfire"].tensors, "encoder_linear.weight": huge}, "more numbers than the file"),
        ({**KINDS["goodfire"].tensors, "encoder_linear.weight": torch.eye(3).to_sparse()}, "not dense"),
        ([torch.zeros(3)], "holds a list, no tensors by name"),
        ({1: torch.zeros(3)}, "holds a dict, no tensors by name"),
        ({"some": torch.zeros(3)}, "holds some, not an SAE in a format that endwise knows: .*saelens"),
    ):
        torch.save(content, file)
        with pytest.raises(FormatError, match=says):
            load(file)


def test_arrays_of_objects_and_bombs_are_refused(tmp_path):
    kind = KINDS["gemma-scope res"]
    path, file = kind.made(tmp_path), tmp_path / kind.file
    np.savez(file, W_enc=np.array([{}], dtype=object))
    with pytest.raises(FormatError, match="cannot be read as NumPy arrays"):
        load(path)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("W_enc.npy", bytes(10**6))
    with pytest.raises(FormatError, match="more than 100 times its size"):
        load(path)


CONFIGURED = {name: kind for name, kind in KINDS.items() if kind.config_file.endswith("json")}
WRONG = [
    ("sparsify", {"activation": "gelu"}, "activation is 'gelu'"),
    ("sparsify", {"signed": True}, "signed is True"),
    ("sparsify", {"k": 0}, "k must be a whole number from 1 to 12"),
    ("sparsify", {"k": True}, "k must be a whole number"),
    ("sparsify", {"d_in": "6"}, "d_in must be a whole number above 0, not '6'"),
    ("sparsify", {"num_latents": 13}, r"W_enc must have the shape \(6, 13\)"),
    ("sparsify", {"transcode": "yes"}, "transcode must be true or false"),
    ("sparsify", {"skip_connection": True}, "lacks W_skip"),
    ("AutoEncoder", {"trainer": {"dict_class": "CrossCoder"}}, "dict_class is 'CrossCoder', and endwise computes"),
    ("AutoEncoder", {"trainer": 3}, "must have a section trainer"),
    ("AutoEncoderTopK", {"trainer": {**KINDS["AutoEncoderTopK"].config["trainer"], "k": 4}}, "disagree in k"),
    ("gemma-scope-2", {"architecture": "topk"}, "architecture is 'topk'"),
    ("gemma-scope-2", {"affine_connection": True}, "lacks affine_skip_connection"),
    ("gemma-scope-2", {"width": 13}, r"W_enc must have the shape \(6, 13\)"),
    ("llama-scope", {"act_fn": "topk"}, "act_fn is 'topk'"),
    ("llama-scope", {"gate": "some"}, "gate is 'some'"),
    ("llama-scope", {"jump_relu_threshold": -1}, "jump_relu_threshold.* must be a number above 0"),
    ("llama-scope", {"dataset_average_activation_norm": {"in": 0, "out": 1}}, "must be a number above 0, not 0"),
    ("llama-scope", {"use_glu_encoder": True}, "use_glu_encoder is True"),
    ("llamascopium", {"act_fn": "batchtopk"}, "act_fn is 'batchtopk'"),
    ("llamascopium", {"sae_type": "crosscoder"}, "sae_type is 'crosscoder'"),
    ("llamascopium", {"norm_activation": "token-wise"}, "norm_activation is 'token-wise'"),
    ("llamascopium", {"hook_point_in": "blocks.4.hook_resid_post"}, "neither file holds it"),
    ("qwen-scope", {"k": 13}, "k must be a whole number from 1 to 12"),
    ("qwen-scope", {"hook_point": "mlp"}, "hook_point is 'mlp'"),
    ("qwen-scope", {"model_type": "other"}, "k, is neither in a config.json"),
]


@pytest.mark.parametrize(("name", "config", "says"), WRONG, ids=str)
def test_settings_that_are_not_understood_are_refused(tmp_path, name, config, says):
    with pytest.raises(FormatError, match=says) as refused:
        load(KINDS[name].but(config).made(tmp_path))
    assert "\n" not in str(refused.value)


def test_llama_scopes_own_defaults_hold_where_nothing_is_said(tmp_path):
    """lm-saes subtracts the decoder's bias, and takes the norm of each token, unless a file says otherwise."""
    kind = KINDS["llama-scope"]
    for key, says in (("apply_decoder_bias_to_pre_encoder", "True"), ("norm_activation", "'token-wise'")):
        path = replace(kind, config={name: kind.config[name] for name in kind.config if name != key}).made(
            tmp_path / key
        )
        with pytest.raises(FormatError, match=f"{key} is {says}"):
            SAE.load(path)


@pytest.mark.parametrize("kind", CONFIGURED.values(), ids=CONFIGURED)
def test_settings_that_are_no_json_are_refused(tmp_path, kind):
    path = kind.made(tmp_path)
    for content in ("[1]", "{", "[" * 20_000, ""):
        (tmp_path / kind.config_file).write_text(content)
        with pytest.raises(FormatError) as refused:
            load(path)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"activation": "Identity"}, "activation is 'Identity'"),
        ({"activation": "TopK"}, "activation_state_dict must hold the k"),
        ({"activation": "TopK", "activation_state_dict": {"k": 0}}, "k must be a whole number"),
        ({"activation": "TopK", "activation_state_dict": {"k": 3, "postact_fn": "Identity"}}, "postact_fn is"),
    ],
)
def test_openai_activations_that_are_others_are_refused(tmp_path, state, says):
    with pytest.raises(FormatError, match=says):
        load(KINDS["openai"].but(**state).made(tmp_path))


def test_a_site_of_several_is_named(tmp_path):
    kind = KINDS["e2e_sae"]
    more = {name.replace("blocks-3", "blocks-5"): each.clone() for name, each in kind.tensors.items()}
    more["blocks-5-hook_resid_pre.decoder.bias"] += 1
    path = kind.but(**more).made(tmp_path)
    with pytest.raises(FormatError, match=r"several sites\. Name one: .*samples_9\.pt/blocks\.3\.hook_resid_pre"):
        load(path)
    named = path / "blocks.5.hook_resid_pre"
    sae = SAE.load(named)
    torch.testing.assert_close(sae(X), kind.oracle(X)[1] + 1)
    assert weights_file(named) == path and metadata_at(named)["hook_name"] == "blocks.5.hook_resid_pre"
    assert metadata_at(named)["model_from_pretrained_kwargs"] == CENTRED["model_from_pretrained_kwargs"]


def test_what_is_not_in_the_path_is_said(tmp_path):
    kind = KINDS["gemma-scope res"]
    (tmp_path / "some").mkdir()
    kind.made(tmp_path)
    (tmp_path / kind.file).rename(tmp_path / "some" / "params.npz")
    with pytest.warns(UserWarning, match="its place is not in its path"):
        sae = SAE.load(tmp_path / "some")
    torch.testing.assert_close(sae(X), kind.oracle(X)[1], rtol=1e-5, atol=1e-5)
    assert metadata_at(tmp_path / "some") == {}
    with pytest.warns(UserWarning, match="disputed for Llama Scope. Read as 'released'"):
        SAE.load(KINDS["llama-scope"].made(tmp_path))


@pytest.mark.parametrize(
    ("module", "model", "expected"),
    [
        ("model.layers.3.output", "", "hook_resid_post"),
        ("layers.3", "", "hook_resid_post"),
        ("transformer.h.3.mlp", "gpt2", "hook_mlp_out"),
        ("layers.3.attention", "", "hook_attn_out"),
        ("layers.3.input", "", "hook_resid_pre"),
        ("layers.3.mlp", "google/gemma-2-2b", None),
        ("model.layers.3.mlp.input", "google/gemma-2-2b", "mlp_in"),
        ("layers.3.some", "", None),
        ("embed_tokens", "", None),
    ],
)
def test_modules_are_our_sites(module, model, expected):
    assert site_of_module(module, model) == (None if expected is None else f"blocks.3.{expected}")


def finished(architecture, skip=False, d_out=D):
    tensors = {
        "W_enc": drawn(D, F, seed=20),
        "b_enc": drawn(F, seed=21),
        "W_dec": drawn(F, d_out, seed=22),
        "b_dec": drawn(d_out, seed=23),
        "threshold": drawn(F, seed=24).abs(),
        **{name: drawn(F, seed=seed) for seed, name in enumerate(("b_gate", "b_mag", "r_mag"), 25)},
        **({"W_skip": drawn(d_out, D, seed=28)} if skip else {}),
    }
    config = {"d_in": D, "d_sae": F, "d_out": d_out, "k": 3}
    return ARCHITECTURES[architecture].from_tensors(tensors, config).requires_grad_(False).eval()


WRITTEN = [
    ("sparsify", "topk", False, site("hook_resid_post"), "layers.3"),
    ("sparsify", "topk", False, MLP, "layers.3.mlp"),
    ("sparsify", "topk", True, MLP, "layers.3.mlp"),
    *[
        ("dictionary_learning", each, False, site("hook_resid_pre"), "t")
        for each in ("standard", "gated", "topk", "jumprelu", "batchtopk", "matryoshka_batchtopk")
    ],
    ("gemma-scope", "standard", False, site("hook_resid_post"), "gemma-scope-2b-pt-res/layer_3"),
    ("gemma-scope", "jumprelu", False, MLP, "gemma-scope-2b-pt-transcoders/layer_3"),
    ("gemma-scope-2", "standard", False, site("attn.hook_z"), "s"),
    ("gemma-scope-2", "jumprelu", True, MLP | {"model_name": "google/gemma-3-1b-pt", "stated_l0": 60.0}, "s"),
]


@pytest.mark.parametrize(("name", "architecture", "skip", "about", "folder"), WRITTEN)
def test_written_and_read_again(tmp_path, name, architecture, skip, about, folder):
    sae = finished(architecture, skip)
    sae.save(tmp_path / folder, about, format_name=name)
    assert format_at(tmp_path / folder)[0].name == name
    read = load(tmp_path / folder)
    for x in (X, X * 3):
        torch.testing.assert_close(read.encode(x).dense(), sae.encode(x).dense(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(read(x), sae(x), rtol=1e-5, atol=1e-5)
    assert about.items() <= metadata_at(tmp_path / folder).items()


def test_what_is_written_has_their_names(tmp_path):
    finished("topk").save(tmp_path / "s", format_name="sparsify")
    assert set(load_file(tmp_path / "s" / "sae.safetensors")) == {"encoder.weight", "encoder.bias", "W_dec", "b_dec"}
    cfg = json.loads((tmp_path / "s" / "cfg.json").read_text())
    assert (cfg["k"], cfg["num_latents"], cfg["d_in"], cfg["transcode"]) == (3, F, D, False)
    finished("topk").save(tmp_path / "d", format_name="dictionary_learning")
    kept = torch.load(tmp_path / "d" / "ae.pt", weights_only=True)
    assert {name: tuple(each.shape) for name, each in kept.items()} == {
        "encoder.weight": (F, D),
        "encoder.bias": (F,),
        "decoder.weight": (D, F),
        "b_dec": (D,),
        "k": (),
        "threshold": (),
    }
    finished("jumprelu").save(tmp_path / "g", format_name="gemma-scope")
    with np.load(tmp_path / "g" / "params.npz") as arrays:
        assert set(arrays.files) == {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}
        assert all(each.dtype == np.float32 for each in arrays.values())


@pytest.mark.parametrize(
    ("name", "sae", "says"),
    [
        ("sparsify", lambda: finished("jumprelu"), "sparsify has topk alone, and no jumprelu"),
        ("sparsify", lambda: finished("topk", d_out=5), "as wide as they read"),
        ("dictionary_learning", lambda: finished("topk", True), "no such transcoder"),
        ("dictionary_learning", lambda: NormedSAE(ReluSAE(D, F), "layer_norm"), "no norm of each token"),
        ("gemma-scope", lambda: finished("topk"), "would be topk"),
        ("gemma-scope-2", lambda: finished("topk"), "would be topk"),
        ("gemma-scope-2", lambda: finished("jumprelu"), "has places of hook_resid_post, .* this one is None"),
        ("gemma-scope", lambda: NormedSAE(finished("jumprelu"), "centred"), "a norm of each token"),
        ("dictionary_learning", lambda: NormedSAE(finished("jumprelu"), "centred"), "no norm of each token"),
        ("sparsify", lambda: NormedSAE(finished("topk"), "centred"), "no topk with a norm of each token"),
        ("openai", lambda: finished("topk"), "openai can only be read"),
    ],
)
def test_what_a_format_cannot_say_is_not_written(tmp_path, name, sae, says):
    with pytest.raises(FormatError, match=says):
        sae().save(tmp_path / "s", format_name=name)
    assert not (tmp_path / "s").exists() and FORMATS[name].writes is (name != "openai")
