"""Run folders, sweeps and studies that 0.1.0 wrote (tests/fixtures/v0.1) open, measure, resume and compare."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import endwise
from endwise.config.run import RunConfig
from endwise.evaluation.summary import RunSummary
from places import FIXTURES

pytestmark = pytest.mark.usefixtures("loaded_once")

WRITTEN = FIXTURES / "v0.1"
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def run(tmp_path):
    return Path(shutil.copytree(WRITTEN / "run", tmp_path / "run"))


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_recipe_is_read(tmp_path):
    recipe = RunConfig.read(WRITTEN / "recipe.yaml")
    assert recipe.dictionary.size == 24 and recipe.objective.weights["kl"] == 0.5


def test_an_sae_opens_and_is_the_same_function(run):
    sae = endwise.SAE.load(run)
    tensors = load_file(run / "sae" / "sae_weights.safetensors")
    x = torch.randn(3, sae.d_in, generator=torch.Generator().manual_seed(0))
    latents = torch.relu(x @ tensors["W_enc"] + tensors["b_enc"])
    torch.testing.assert_close(sae(x), latents @ tensors["W_dec"] + tensors["b_dec"], **CLOSE)


def test_a_run_is_measured_with_the_same_numbers(run):
    kept = json.loads((run / "evaluation.json").read_text())
    (found,) = endwise.evaluate(run).values()
    for name in ("l0", "ce_increase", "kl"):
        assert found[name] == pytest.approx(kept[name], rel=1e-4, abs=1e-5)
    assert found.alive == kept["alive"]


def test_its_measurement_is_read():
    summary = RunSummary.read(WRITTEN / "run")
    assert (summary.kind, summary.coefficient, summary.seed) == ("e2e_ds", 1.0, 0)


def test_a_run_resumes_and_ends_as_it_did(run):
    before = lines(run / "metrics.jsonl")
    endwise.train(RunConfig.read(run / "config.yaml", [f"out={run}"]), resume=True, from_step=4, display=False)
    after = lines(run / "metrics.jsonl")
    assert [line["step"] for line in after] == [line["step"] for line in before]
    for old, new in zip(before, after, strict=True):
        assert new["loss"] == pytest.approx(old["loss"], rel=1e-5)
    for name, tensor in load_file(WRITTEN / "run" / "sae" / "sae_weights.safetensors").items():
        torch.testing.assert_close(load_file(run / "sae" / "sae_weights.safetensors")[name], tensor, **CLOSE)


def test_the_points_of_a_sweep_are_found_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(WRITTEN / "sweep", "sweep")
    shutil.copy(WRITTEN / "sweep.yaml", "sweep.yaml")
    swept = endwise.sweep("sweep.yaml")
    assert len(swept.runs) == 2 and not list(Path("sweep").rglob("checkpoints/*.safetensors"))  # none was trained again


def test_the_runs_of_a_sweep_are_compared():
    (found,) = endwise.pareto([WRITTEN / "sweep"])
    assert len(found.runs) == 2


def test_a_study_is_resumed_and_its_runs_are_not_trained_again(tmp_path, monkeypatch, undrawn):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(WRITTEN / "study", "study")
    endwise.reproduce(str(WRITTEN / "study.yaml"), "study")
    assert Path("study/report.html").exists()
    for written in (WRITTEN / "study" / "runs").iterdir():
        assert not list(Path("study", "runs", written.name).glob("checkpoints/*.safetensors"))
