"""Folders of models that are damaged or made to do harm."""

import json
import pickle
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bad_input import ODD_JSON, ran, refused, write_place
from small_gpt2 import small_model

repeated = settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


class Payload:
    """Pickle that runs code: the folder it makes shows that it was run."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        import os

        return os.mkdir, (self.folder,)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("place"))


@pytest.fixture
def model(place, tmp_path):
    return shutil.copytree(place / "model", tmp_path / "model")


CONFIG = small_model().model.config.to_dict()


@settings(repeated, max_examples=20)
@given(key=st.sampled_from(sorted({*CONFIG, "auto_map", "quantization_config", "text_config"})), value=ODD_JSON)
def test_any_value_in_a_models_configuration(place, tmp_path, key, value):
    file = place / "model" / "config.json"
    original = file.read_bytes()
    try:
        file.write_text(json.dumps(json.loads(original) | {key: value}))
        result = ran("sites", place / "model")
    finally:
        file.write_bytes(original)
    assert result.exit_code in (0, 3), result.output
    assert result.exit_code == 0 or str(place / "model") in result.stderr


@repeated
@given(content=st.binary(max_size=64) | st.text().map(str.encode) | ODD_JSON.map(lambda v: json.dumps(v).encode()))
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_any_bytes_beside_a_model(place, name, content):
    file = place / "model" / name
    original = file.read_bytes() if file.exists() else None
    try:
        file.write_bytes(content)
        assert ran("sites", place / "model").exit_code in (0, 3)
    finally:
        file.unlink()
        if original is not None:
            file.write_bytes(original)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_models_pickle_is_refused_with_the_reason_and_not_run(model, tmp_path, name):
    (model / name).write_bytes(pickle.dumps(Payload(tmp_path / "run by a pickle")))
    assert ran("sites", model).exit_code == 0  # what is beside safetensors is not read
    (model / "model.safetensors").unlink()
    message = refused("sites", model, code=3)
    assert name in message and "can run any code" in message and "Convert it to safetensors" in message
    (model / "model.safetensors").write_bytes((model / name).read_bytes())
    refused("sites", model, code=3)
    assert not (tmp_path / "run by a pickle").exists()


@pytest.mark.parametrize(
    "shard", ["../elsewhere/model.safetensors", "/etc/passwd", "a/../../x", "..\\x", "C:\\x", 3, None]
)
def test_a_models_index_may_not_lead_out_of_its_folder(model, shard):
    weights = load_file(model / "model.safetensors")
    elsewhere = model.parent / "elsewhere"
    elsewhere.mkdir()
    (model / "model.safetensors").rename(elsewhere / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, shard)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"unused": torch.zeros(1)}, model / "other.safetensors")
    message = refused("sites", model, code=3)
    assert "must name files inside its folder" in message and "index.json" in message


def test_a_models_index_that_maps_nothing(model):
    (model / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')
    assert "weight_map" in refused("sites", model, code=3)


@pytest.mark.parametrize("layers", [10**9, 0, -1, 4.0, "4", True])
def test_a_models_depth_is_believed_only_within_reason(model, layers):
    file = model / "config.json"
    original = json.loads(file.read_text())
    for key, changed in (
        ("n_layer", {"n_layer": layers}),
        ("num_hidden_layers", {"text_config": {"num_hidden_layers": layers}}),
    ):
        file.write_text(json.dumps(original | changed))
        assert f"{key} must be a whole number from 1 to 10,000" in refused("sites", model, code=3)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + b"\xff" * 64, pickle.dumps([1])])
def test_a_gguf_file_that_is_none(model, content):
    (model / "a.gguf").write_bytes(content)
    assert str(model) in refused("sites", model, "--gguf-file", "a.gguf", code=3)
    for name in ("../a.gguf", str(model / "a.gguf"), "..\\a.gguf"):
        assert "model.gguf_file must name a file inside" in refused("sites", model, "--gguf-file", name, code=2)


def test_what_is_no_folder_of_a_model_is_said_to_be_what_it_is(tmp_path):
    (tmp_path / "file").write_text("text")
    (tmp_path / "run" / "sae").mkdir(parents=True)
    assert "is a file, and a model is a folder" in refused("sites", tmp_path / "file", code=3)
    assert "is the folder of a run, not of a model" in refused("sites", tmp_path / "run", code=3)


def test_a_log_holds_no_bars_of_the_loading(model):
    result = ran("sites", model)
    assert result.exit_code == 0 and "Loading weights" not in result.stderr
