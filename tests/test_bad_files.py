"""Files that are damaged, or made to do harm: every reader refuses them in words, and none runs or follows them."""

import json
import pickle
import shutil
import struct

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from safetensors.torch import load_file, save, save_file

from bad_input import HOSTILE, refused, told
from endwise import SAE, train
from endwise.errors import EndwiseError, FormatError, RunFolderError
from endwise.reading import LARGEST_JSON, read_json, stays_inside
from endwise.run_folder import RunFolder
from small_gpt2 import VOCAB, data, recipe, small_model, write_tokens

repeated = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
DEEP = "[" * 200_000
LONG_NUMBER = "1" * 5000


class Payload:
    """What a pickle can do: the folder it makes shows that it was run."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        import os

        return os.mkdir, (self.folder,)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, tokens, and a trained run."""
    folder = tmp_path_factory.mktemp("place")
    small_model().model.save_pretrained(folder / "model")
    values = recipe(folder / "run", "e2e").model_dump(mode="json")
    values["model"]["name"] = str(folder / "model")
    values["data"] = data(write_tokens(folder)).model_dump(mode="json")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    train(folder / "recipe.yaml", display=False)
    return folder


@pytest.fixture
def model(place, tmp_path):
    return shutil.copytree(place / "model", tmp_path / "model")


@pytest.fixture
def run(place, tmp_path):
    return shutil.copytree(place / "run", tmp_path / "run")


def with_header(header, body=b"\0" * 64):
    """A safetensors file."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def of(dtype="F32", shape=(16,), offsets=(0, 64)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


BAD_SAFETENSORS = {
    "empty": b"",
    "cut off in the length": b"\0\0\0",
    "a length of 2**63": struct.pack("<Q", 2**63) + b"{}",
    "a length of 2**64-1": struct.pack("<Q", 2**64 - 1) + b"{}",
    "a length beyond the end": struct.pack("<Q", 1000) + b"{}",
    "a header that is not JSON": with_header(b"{'a': 1}"),
    "a header that is not UTF-8": with_header(b"\xff\xfe\xfd"),
    "a header that is a list": with_header([1, 2]),
    "a deep header": with_header(DEEP.encode()),
    "a header of long numbers": with_header(b'{"a": {"dtype": "F32", "shape": [' + LONG_NUMBER.encode() + b"]}}"),
    "negative offsets": with_header({"a": of(offsets=(-64, 0))}),
    "overlapping offsets": with_header({"a": of(), "b": of(offsets=(32, 96))}, b"\0" * 96),
    "backward offsets": with_header({"a": of(offsets=(64, 0))}),
    "offsets beyond the end": with_header({"a": of(offsets=(0, 640), shape=(160,))}),
    "an unknown dtype": with_header({"a": of("PICKLE")}),
    "a shape that overflows": with_header({"a": of(shape=(2**62, 2**62))}),
    "a negative shape": with_header({"a": of(shape=(-16,))}),
    "a shape that is no list": with_header({"a": {"dtype": "F32", "shape": 16, "data_offsets": [0, 64]}}),
    "no tensors": with_header({}, b""),
    "a pickle": pickle.dumps({"a": [1.0]}),
    "text": HOSTILE.encode(),
}


@pytest.mark.parametrize("content", BAD_SAFETENSORS.values(), ids=BAD_SAFETENSORS)
def test_safetensors_that_are_none(model, run, content):
    (model / "model.safetensors").write_bytes(content)
    assert str(model) in refused("sites", model, code=3)
    (run / "sae" / "sae_weights.safetensors").write_bytes(content)
    message = refused("evaluate", run, code=6)
    assert "sae_weights.safetensors" in message
    RunFolder(run).latest_checkpoint().write_bytes(content)
    message = refused("train", "--resume", run, code=6)
    assert "not a whole checkpoint" in message and "step-" in message


JSON_BOMBS = {
    "deep": DEEP,
    "deep objects": '{"a":' * 100_000,
    "a long number": f'{{"d_in": {LONG_NUMBER}}}',
    "a list": "[]",
    "a number": "3",
    "nothing": "",
    "text": HOSTILE,
    "half an object": '{"d_in": 16',
    "not UTF-8": b"\xff\xfe{}".decode("latin-1"),
}


@pytest.mark.parametrize("text", JSON_BOMBS.values(), ids=JSON_BOMBS)
def test_json_that_is_none(model, run, tmp_path, text):
    content = text.encode("latin-1", "replace")
    for file, command in (
        (model / "config.json", ("sites", model)),
        (run / "sae" / "cfg.json", ("evaluate", run)),
        (run / "data.json", ("train", "--resume", run)),
    ):
        file.write_bytes(content)
        assert str(file) in refused(*command, code=6) or text == JSON_BOMBS["a long number"]
    (run / "evaluation.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"evaluation\.json"):
        RunFolder(run).evaluation()
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "dataset_dict.json").write_bytes(content)
    assert "dataset_dict.json" in refused("train", tmp_path.parent / "none" if False else _recipe(run, saved), code=4)


def _recipe(run, source):
    """A recipe for the run's model and another source."""
    values = yaml.safe_load((run / "config.yaml").read_text())
    values["data"] = {"source": str(source), "context": 8}
    values["out"] = str(run.parent / "another run")
    path = run.parent / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_json_too_large_to_be_ours_is_not_read_whole(tmp_path):
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(LARGEST_JSON * 100)
    with pytest.raises(FormatError, match="more than"):
        read_json(tmp_path / "large.json")
