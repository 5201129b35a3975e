"""A trial on a real Llama of 260k parameters, where it lies beside the project."""

import json

import pytest
import torch

from endwise import SAE, RunConfig, evaluate, load_model, spliced, train
from places import ROOT

ASSETS = ROOT.parent / "shared" / "assets"
SITE = "blocks.2.hook_resid_pre"

pytestmark = pytest.mark.skipif(not (ASSETS / "stories260K-hf").exists(), reason="the model is not here")


@pytest.fixture(scope="module")
def model():
    return load_model(str(ASSETS / "stories260K-hf"))


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    path = tmp_path_factory.mktemp("stories") / "stories.jsonl"
    texts = json.loads((ASSETS / "tinystories_1000.json").read_text(encoding="utf-8"))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def test_training_end_to_end_brings_the_loss_down(model, stories, tmp_path):
    config = RunConfig.build(
        {
            "model": {"name": str(ASSETS / "stories260K-hf")},
            "site": SITE,
            "dictionary": {"ratio": 8},
            "objective": {"kind": "e2e", "sparsity": {"coefficient": 0.3}},
            "data": {"source": str(stories), "context": 128},
            "training": {"tokens": 32_768, "batch": 8, "learning_rate": 3e-3, "log_every": 1},
            "evaluation": {"tokens": 4_096, "during_training_tokens": 2_048},
            "out": tmp_path / "run",
        }
    )
    run = train(config, model=model, display=False)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    evaluation = evaluate(run.folder, model=model)[run.folder]
    assert 1 < evaluation.baselines.clean < 3
    assert 0 < evaluation["ce_increase"] < evaluation.baselines.mean_ablated - evaluation.baselines.clean
    sae = SAE.load(run.folder)
    tokens = torch.tensor([[1, 403, 407, 261]])
    with spliced(model, {SITE: sae}):
        text = model.model.generate(tokens, max_new_tokens=8, do_sample=False)
    assert text.shape == (1, 12)
