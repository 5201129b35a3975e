"""`endwise inspect` and `endwise convert`: what a file says, held to what it does; the same SAE in other formats."""

import numpy as np
import pytest
import torch

from bad_input import HOSTILE, hidden_in, ran, refused, write_place
from endwise import SAE, ReluSAE
from endwise.evaluation.inspecting import inspect
from endwise.formats import FORMATS, format_at, metadata_at
from made_formats import KINDS, MLP, D, F, site
from small_gpt2 import CONTEXT, WIDTH


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("place"))


def identity(folder, l0, sign=1.0):
    """Features of both signs of every dimension, which give back what they read; of these half are active."""
    eye = np.concatenate([np.eye(WIDTH), -np.eye(WIDTH)]).astype(np.float32)
    path = folder / f"gemma-scope-2b-pt-res/layer_1/width_1k/average_l0_{l0}"
    path.mkdir(parents=True)
    zeros = {"b_enc": np.zeros(2 * WIDTH, np.float32), "b_dec": np.zeros(WIDTH, np.float32)}
    np.savez(path / "params.npz", W_enc=eye.T, W_dec=sign * eye, threshold=zeros["b_enc"], **zeros)
    return path


def measured(path, place, *more):
    data = ("--data", place / "train.npy", "--tokens", 64, "--context", CONTEXT)
    return ("inspect", path, "--model", place / "model", *data, *more)


def test_what_a_file_says(tmp_path):
    for name, lines in (
        (
            "gemma-scope transcoders",
            [
                "gemma-scope, a jumprelu transcoder of 12 features, width 6",
                "place: blocks.3.mlp_in -> blocks.3.hook_mlp_out of google/gemma-2-2b, context_size 1024",
                "read as: z = x·W_enc + b_enc; f = z where z > θ; output f·W_dec + b_dec",
                "states: L0 71",
            ],
        ),
        ("openai topk", ["z = (layer_norm(x) − b_dec)·W_enc + b_enc; f = the 3 largest of ReLU(z)", "norm undone"]),
        ("GatedAutoEncoder", ["z = (x − b_dec)·W_enc; f = ReLU(e^r_mag·z + b_mag) where z + b_gate > 0"]),
        ("sparsify, transcoder", ["topk transcoder", "+ x·W_skipᵀ", "hf_hook_name layers.3.mlp"]),
        ("llama-scope", ["! ", "disputed for Llama Scope", "states: L0 50"]),
    ):
        said = ran("inspect", KINDS[name].made(tmp_path / name)).stdout
        assert all(line in said for line in lines), said
    assert "cfg.json" in refused("inspect", tmp_path, code=6)


def test_what_is_as_stated_is_measured(place, tmp_path):
    said = ran(*measured(identity(tmp_path, WIDTH), place)).stdout
    assert f"L0 {WIDTH}.0, explained variance 1.0000" in said and "(+0.0000)" in said
    assert said.count("!") == 1 and "begins with BOS, but" in said
    assert ran(*measured(identity(tmp_path, 9), place)).stdout.count("! L0 is 16.0 where 9 is stated") == 1


def test_what_is_far_from_what_is_stated_is_refused(place, tmp_path):
    assert "L0 is 16.0 where 4 is stated" in refused(*measured(identity(tmp_path, 4), place), code=6)
    assert "L0 is 16.0 where 70 is stated" in refused(*measured(identity(tmp_path, 70), place), code=6)
    assert "less than the mean does" in refused(*measured(identity(tmp_path, 16, -1.0), place), code=6)


def test_where_it_is_measured_must_be_known_and_fit(place, tmp_path):
    ReluSAE(WIDTH, 8).save(tmp_path / "nowhere")
    assert "Name the place with --site" in refused(*measured(tmp_path / "nowhere", place), code=2)
    named = ran(*measured(tmp_path / "nowhere", place, "--site", "blocks.2.hook_mlp_out"))
    assert "at blocks.2.hook_mlp_out of" in named.stdout or named.exit_code == 6
    ReluSAE(5, 8).save(tmp_path / "narrow", site("hook_resid_pre", 1))
    assert "width 5, and blocks.1.hook_resid_pre of" in refused(*measured(tmp_path / "narrow", place), code=3)


@pytest.mark.parametrize(
    ("name", "to", "under"),
    [
        ("JumpReluAutoEncoder", "saelens", "s"),
        ("JumpReluAutoEncoder", "gemma-scope", "gemma-scope-2b-pt-res/layer_3"),
        ("GatedAutoEncoder", "saelens", "s"),
        ("sparsify, old", "dictionary_learning", "s"),
        ("AutoEncoderTopK", "sparsify", "layers.3"),
        ("gemma-scope transcoders", "circuit-tracer", "layer_3.safetensors"),
        ("gemma-scope-2 affine", "saelens", "s"),
        ("openai topk", "saelens", "s"),
        ("llamascopium topk", "sparsify", "layers.3"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*fewer than k positive")
def test_converted_it_is_the_same(tmp_path, name, to, under):
    path, target = KINDS[name].made(tmp_path / "from"), tmp_path / under
    assert f"{to}, latents and outputs within" in ran("convert", path, "--to", to, target).stdout
    assert format_at(target)[0].name == to
    x = torch.randn(30, D)
    torch.testing.assert_close(SAE.load(target)(x), SAE.load(path)(x), rtol=1e-5, atol=1e-5)
    assert metadata_at(target)["hook_name"] == KINDS[name].about["hook_name"]
    assert "is there already" in refused("convert", path, "--to", to, target, code=2)


def test_what_cannot_be_converted_is_said(tmp_path):
    path = KINDS["AutoEncoderTopK"].made(tmp_path / "from")
    for to, says, code in (
        ("openai", "openai can be read but not written. Written are circuit-tracer, dictionary_learning", 2),
        ("gemma-scope", "would be topk", 6),
        ("some", "There is no 'some' among the formats", 2),
    ):
        assert says in refused("convert", path, "--to", to, tmp_path / "to", code=code)
    assert "Cannot write" in refused("convert", path, "--to", "saelens", path / "ae.pt" / "to", code=5)
    assert not (tmp_path / "to").exists()


def test_names_that_are_hostile_are_shown_plainly(tmp_path):
    about = {"hook_name": HOSTILE, "model_name": HOSTILE * 100, "hf_hook_name": ["some"], "prepend_bos": {}, "l0": True}
    about |= {"endwise": "some", "model_from_pretrained_kwargs": ["some"]}
    ReluSAE(D, F).save(tmp_path, about)
    said = ran("inspect", tmp_path).stdout
    assert not hidden_in(said) and len(said) < 1500 and "states" not in said
    assert "A site is named" in refused("inspect", tmp_path, "--model", "embedded", code=3)
    ran("convert", tmp_path, "--to", "saelens", tmp_path / "again")


def test_a_run_is_inspected(tmp_path):
    ReluSAE(D, F).save(tmp_path / "sae", {**MLP, "l0": 30.5, "model_name": "some"})
    found = inspect(tmp_path)
    assert found.weights == tmp_path / "sae" / "sae_weights.safetensors" and found.stated_l0 == 30.5
    assert found.place == "blocks.3.mlp_in -> blocks.3.hook_mlp_out" and FORMATS[found.format_name].writes
