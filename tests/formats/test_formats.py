"""A format that is known here alone is detected, read, written, trained from and measured, as the field's own is."""

import json
import shutil

import numpy as np
import pytest
import torch

from endwise import SAE, ReluSAE, evaluate, train
from endwise.common.errors import FormatError
from endwise.evaluation.finished import unfinished
from endwise.formats import FORMATS, Format, Stored, format_at, weights_file
from endwise.formats.base import TENSORS, added, check_tensors
from endwise.runs.folder import RunFolder
from places import FIXTURES
from small_gpt2 import WIDTH, recipe


@added
class OneFile(Format):
    """One `.npz` with everything, or a folder that holds one of the name `sae.npz`."""

    name = "npz"

    def detects(self, path):
        return self.weights(path).is_file() and self.weights(path).suffix == ".npz"

    def weights(self, path):
        return path / "sae.npz" if path.is_dir() else path

    def metadata(self, path):
        return self._told(path)["metadata"]

    def _told(self, path):
        with np.load(self.weights(path)) as arrays:
            return json.loads(str(arrays["told"]))

    def read(self, path, layouts):
        told = self._told(path)
        with np.load(self.weights(path)) as arrays:
            tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != "told"}
        layout = layouts.get(told["architecture"], layouts["standard"])
        check_tensors(path, tensors, layout.shapes(told["config"]))
        return Stored(told["architecture"], told["config"], tensors, told["metadata"], told["subtracts_b_dec"])

    def write(self, path, stored):
        told = {"architecture": stored.architecture, "config": dict(stored.config), "metadata": dict(stored.metadata)}
        told["subtracts_b_dec"] = stored.subtracts_b_dec
        arrays = {name: tensor.detach().numpy() for name, tensor in stored.tensors.items()}
        np.savez(path, told=json.dumps(told), **arrays)


def same(one: SAE, other: SAE) -> bool:
    x = torch.randn(5, one.d_in, generator=torch.Generator().manual_seed(1))
    return torch.equal(one(x), other(x)) and torch.equal(one.encode(x).dense(), other.encode(x).dense())


@pytest.fixture
def sae():
    return ReluSAE(WIDTH, 40, seed=3)


def test_written_detected_and_read(sae, tmp_path):
    sae.save(tmp_path / "one.npz", {"from": "here"}, format_name="npz")
    sae.save(tmp_path / "folder")
    assert format_at(tmp_path / "one.npz") == (FORMATS["npz"], tmp_path / "one.npz")
    assert format_at(tmp_path / "folder") == (FORMATS["saelens"], tmp_path / "folder")
    assert format_at(tmp_path / "nothing") is None
    assert same(SAE.load(tmp_path / "one.npz"), SAE.load(tmp_path / "folder"))
    assert FORMATS["npz"].metadata(tmp_path / "one.npz") == {"from": "here"}


@pytest.mark.parametrize("name", ["npz", "saelens"])
def test_the_files_rule_is_kept_to(sae, tmp_path, name):
    tensors = {each: getattr(sae, each).detach() for each in TENSORS}
    FORMATS[name].write(
        tmp_path / "its.npz", Stored("standard", {"d_in": WIDTH, "d_sae": 40}, tensors, subtracts_b_dec=True)
    )
    x = torch.randn(5, WIDTH)
    latents = torch.relu((x - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"])
    torch.testing.assert_close(SAE.load(tmp_path / "its.npz")(x), latents @ tensors["W_dec"] + tensors["b_dec"])


def test_what_is_not_as_it_says_is_refused(sae, tmp_path):
    tensors = {each: getattr(sae, each).detach() for each in TENSORS}
    FORMATS["npz"].write(tmp_path / "a.npz", Stored("standard", {"d_in": WIDTH, "d_sae": 41}, tensors))
    with pytest.raises(FormatError, match=r"W_enc must have the shape \(16, 41\)"):
        SAE.load(tmp_path / "a.npz")
    FORMATS["npz"].write(tmp_path / "b.npz", Stored("unheard", {"d_in": WIDTH, "d_sae": 40}, tensors))
    with pytest.raises(FormatError, match="'unheard' is not one of"):
        SAE.load(tmp_path / "b.npz")


def test_training_starts_from_it(model, corpora, sae, tmp_path):
    sae.save(tmp_path / "start.npz", format_name="npz")
    sae.save(tmp_path / "start")
    runs = []
    for start in ("start", "start.npz"):
        config = recipe(tmp_path / f"from {start}", tokens=64).model_copy(update={"init_from": tmp_path / start})
        runs.append(train(config, model=model, corpora=corpora, display=False))
    assert same(runs[0].sae, runs[1].sae)
    sae.save(tmp_path / "start.npz", {"another": "file"}, format_name="npz")
    with pytest.raises(Exception, match="other SAE that it started from"):
        train(config, model=model, corpora=corpora, display=False, resume=True, from_step=0)


def test_a_run_whose_sae_is_in_it_is_measured(made, tmp_path):
    values = recipe(tmp_path / "run", tokens=64).model_dump()
    values["model"]["name"], values["data"]["source"] = str(made / "model"), str(made / "train.npy")
    values["data"]["heldout"] = str(made / "heldout.npy")
    config = train(values, display=False).config
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    run, metadata = RunFolder(tmp_path / "other"), FORMATS["saelens"].metadata(tmp_path / "run" / "sae")
    trained = SAE.load(run.path)
    shutil.rmtree(run.sae)
    run.sae.mkdir()
    trained.save(run.sae / "sae.npz", metadata, format_name="npz")
    with pytest.raises(FormatError, match="does not hold the weights that training wrote"):
        run.weights_digest()
    run.note_weights(whole=True)
    assert weights_file(run.sae) == run.sae / "sae.npz" and unfinished(run.path, config) is None
    (ours,), (theirs,) = evaluate(tmp_path / "run").values(), evaluate(run.path).values()
    assert ours.metrics == theirs.metrics and ours.alive == theirs.alive


def test_the_native_one_is_written_as_before(tmp_path):
    written = FIXTURES / "v0.1" / "run" / "sae"
    cfg = json.loads((written / "cfg.json").read_text())
    SAE.load(written).save(tmp_path, {key: value for key, value in cfg["metadata"].items() if key[:3] != "sae"})
    for file in ("cfg.json", "sae_weights.safetensors"):
        assert (tmp_path / file).read_bytes() == (written / file).read_bytes()
