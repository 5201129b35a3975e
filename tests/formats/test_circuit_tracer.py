"""circuit-tracer's sets of transcoders, against its formula; read, written, and refused in words."""

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from endwise import SAE
from endwise.common.errors import FormatError
from endwise.config.dictionary import ARCHITECTURES
from endwise.dictionaries import NormedSAE, ReluSAE
from endwise.formats import FORMATS, Layout, format_at, metadata_at

D, F = 6, 20
SET = {
    "model_kind": "transcoder_set",
    "model_name": "a model",
    "feature_input_hook": "mlp.hook_in",
    "feature_output_hook": "mlp.hook_out",
}
PLACE = {"hook_name": "blocks.3.mlp_in", "hook_name_out": "blocks.3.hook_mlp_out", "model_name": "a model"}


def tensors(**more):
    draw = torch.Generator().manual_seed(1)
    shapes = {"W_enc": (F, D), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,), "W_skip": (D, D)}
    return {name: torch.randn(*shape, generator=draw) for name, shape in shapes.items()} | more


def written(folder, found, **config):
    (folder / "config.yaml").write_text(yaml.safe_dump(SET | config))
    save_file(found, folder / "layer_3.safetensors")
    return folder / "layer_3.safetensors"


def theirs(w, x, activation):
    latents = activation(x @ w["W_enc"].T + w["b_enc"])
    return latents, latents @ w["W_dec"] + w["b_dec"] + (x @ w["W_skip"].T if "W_skip" in w else 0)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize(
    "kind", [kind for kind in ("relu", "jumprelu", "scalar threshold") if "jumprelu" in ARCHITECTURES]
)
def test_a_layer_is_read_as_circuit_tracer_computes_it(tmp_path, kind, skip):
    w = tensors()
    w = w if skip else {name: value for name, value in w.items() if name != "W_skip"}
    threshold = {"relu": None, "jumprelu": torch.rand(F), "scalar threshold": torch.tensor(0.3)}[kind]
    more = {} if threshold is None else {"activation_function.threshold": threshold}
    path = written(tmp_path, w | more, **({"activation": "relu"} if kind == "relu" else {}))
    x, edge = torch.randn(9, D), 0.0 if threshold is None else threshold
    latents, output = theirs(w, x, lambda z: z * (z > edge))
    sae = SAE.load(path)
    torch.testing.assert_close(sae.encode(x).dense(), latents)
    torch.testing.assert_close(sae(x), output)
    assert metadata_at(path) == PLACE and format_at(path)[0].name == "circuit-tracer"
    assert format_at(tmp_path)[0].name == "circuit-tracer"
    with pytest.raises(FormatError, match=r"one for each layer\. Give the file of one: layer_3\.safetensors"):
        SAE.load(tmp_path)


@pytest.mark.parametrize("skip", [True, False])
def test_a_layer_is_written_as_circuit_tracer_reads_it(tmp_path, skip):
    sae, x = ReluSAE(D, F, seed=3, skip=skip).requires_grad_(False), torch.randn(9, D)
    if skip:
        torch.nn.init.normal_(sae.W_skip)
    sae.save(tmp_path / "layer_3.safetensors", PLACE, format_name="circuit-tracer")
    w, config = load_file(tmp_path / "layer_3.safetensors"), yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert set(w) == {"W_enc", "W_dec", "b_enc", "b_dec"} | ({"W_skip"} if skip else set())
    latents, output = theirs(w, x, torch.relu)
    torch.testing.assert_close(latents, sae.encode(x).dense())
    torch.testing.assert_close(output, sae(x))
    assert config == SET | {"activation": "relu", "feature_output_hook": "hook_mlp_out"}
    torch.testing.assert_close(SAE.load(tmp_path / "layer_3.safetensors")(x), sae(x))
    there = {"hook_name": "blocks.0.mlp_in", "hook_name_out": "blocks.0.hook_mlp_out", "model_name": "a model"}
    sae.save(tmp_path / "layer_0.safetensors", there, format_name="circuit-tracer")
    for other in (there | {"model_name": "another"}, there | {"hook_name": "blocks.0.hook_resid_mid"}):
        with pytest.raises(FormatError, match="is of another set, which differs in"):
            sae.save(tmp_path / "layer_0.safetensors", other, format_name="circuit-tracer")


@pytest.mark.parametrize(
    ("change", "config", "says"),
    [
        ({"b_dec": torch.ones(F)}, {}, r"b_dec must have the shape \(6,\)"),
        ({"W_enc": torch.ones(F)}, {}, "must have the shape"),
        ({"W_enc": torch.full((F, D), torch.nan)}, {}, "finite"),
        ({"extra": torch.ones(3)}, {}, "also holds extra"),
        ({"activation_function.threshold": torch.ones(F)}, {"activation": "relu"}, "holds thresholds, while"),
        ({"activation_function.threshold": -torch.ones(F)}, {}, "at least 0|is not one of"),
        ({}, {"activation": "gelu"}, "'gelu' is unknown to endwise"),
    ],
    ids=str,
)
def test_what_is_wrong_is_refused(tmp_path, change, config, says):
    with pytest.raises(FormatError, match=says):
        SAE.load(written(tmp_path, tensors(**change), **config))


def test_what_circuit_tracer_has_not_is_not_written(tmp_path):
    path = tmp_path / "layer_3.safetensors"
    for sae, to, place, says in (
        (ReluSAE(D, F, 5), path, PLACE, "as wide as they read"),
        (NormedSAE(ReluSAE(D, F), "layer_norm"), path, PLACE, "no standard with a norm of each token"),
        (ReluSAE(D, F), tmp_path / "sae.safetensors", PLACE, "layer_<number>"),
        (ReluSAE(D, F), tmp_path / "layer_4.safetensors", PLACE, "not a place in block 4"),
        (ReluSAE(D, F), path, {}, "not a place in block 3"),
    ):
        with pytest.raises(FormatError, match=says):
            sae.save(to, place, format_name="circuit-tracer")
    assert not list(tmp_path.iterdir())


def test_the_k_largest_are_read_with_a_word_on_what_differs(tmp_path):
    layouts = {"topk": Layout(settings=frozenset({"k"}), transcodes=True, skip=True)}
    path = written(tmp_path, tensors(k=torch.tensor(4)), activation="topk", k=4)
    with pytest.warns(UserWarning, match="fewer than k positive"):
        stored = FORMATS["circuit-tracer"].read(path, layouts)
    assert (stored.architecture, stored.config) == ("topk", {"d_in": D, "d_sae": F, "k": 4})
    assert set(stored.tensors) == {"W_enc", "b_enc", "W_dec", "b_dec", "W_skip"}
    with pytest.warns(UserWarning, match="fewer than k positive"):
        FORMATS["circuit-tracer"].write(tmp_path / "again" / path.name, stored)
    again = yaml.safe_load((tmp_path / "again" / "config.yaml").read_text())
    assert again == SET | {"activation": "topk", "k": 4, "feature_output_hook": "hook_mlp_out"}
    with pytest.raises(FormatError, match="k must be a whole number from 1 to 20"):
        FORMATS["circuit-tracer"].read(written(tmp_path, tensors(), activation="topk", k=21), layouts)


def test_other_yaml_is_no_set(tmp_path):
    path = written(tmp_path, tensors())
    for content in ("[1]", "a: [", "model_kind: cross_layer_transcoder", "[" * 1000):
        (tmp_path / "config.yaml").write_text(content)
        assert format_at(path) is None and format_at(tmp_path) is None
