"""The same seed gives the same bits; different purposes draw from different streams; every artefact tells its seed."""

import json
from itertools import combinations

import numpy as np
import torch
from safetensors import safe_open

from endwise import evaluate, train
from endwise.common.seeds import numpy_stream, shared_generators, torch_stream
from endwise.runs.folder import RunFolder
from small_gpt2 import recipe

PURPOSES = ("initialisation", "order", "bootstrap", "shared generators")


def test_streams_repeat_and_are_unrelated():
    cases = [(0, purpose) for purpose in PURPOSES] + [(1, "order"), (0, "order", 0), (0, "order", 1), (2**62, "order")]
    streams = {case: numpy_stream(*case).standard_normal(4000) for case in cases}
    for case, drawn in streams.items():
        assert np.array_equal(drawn, numpy_stream(*case).standard_normal(4000))
    for one, other in combinations(streams, 2):
        assert abs(np.corrcoef(streams[one], streams[other])[0, 1]) < 0.08, (one, other)  # 5 standard errors


def test_torch_streams_repeat_and_are_unrelated():
    drawn = {purpose: torch.randn(4000, generator=torch_stream(3, purpose)) for purpose in PURPOSES}
    for purpose, values in drawn.items():
        assert torch.equal(values, torch.randn(4000, generator=torch_stream(3, purpose)))
    for one, other in combinations(PURPOSES, 2):
        assert abs(torch.corrcoef(torch.stack([drawn[one], drawn[other]]))[0, 1]) < 0.08


def test_the_shared_generators_are_seeded_and_given_back():
    def draws():
        return torch.rand(2).tolist(), np.random.rand()  # noqa: NPY002

    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    outside = draws()
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    with shared_generators(1):
        first = draws()
    assert draws() == outside
    with shared_generators(1):
        assert draws() == first
    with shared_generators(2):
        assert draws() != first


def test_the_same_seed_twice_gives_the_same_bits(model, corpora, tmp_path):
    runs = {}
    for name, seed in (("one", 7), ("other", 7), ("another", 8)):
        torch.manual_seed(len(name))
        runs[name] = train(recipe(tmp_path / name, "e2e", seed), model=model, corpora=corpora, display=False)
    metrics = {name: RunFolder(run.folder).metrics_file.read_bytes() for name, run in runs.items()}
    assert metrics["one"] == metrics["other"] != metrics["another"]
    for one, other in zip(runs["one"].sae.parameters(), runs["other"].sae.parameters(), strict=True):
        assert torch.equal(one, other)


def test_every_artefact_tells_its_seed(model, corpora, tmp_path):
    config = recipe(tmp_path / "run", "local", seed=41).model_copy(
        update={"data": recipe(tmp_path).data.model_copy(update={"seed": 42})}
    )
    run = train(config, model=model, corpora=corpora, display=False)
    evaluate(run.folder, model=model, corpora=corpora)
    files = [file for file in run.folder.rglob("*") if file.is_file() and file.name != ".lock"]
    assert {file.name for file in files} >= {"data.json", "cfg.json", "evaluation.json", "timings.jsonl"}
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                told = json.dumps(opened.metadata())
        else:
            told = file.read_text()
        assert "seed" in told and ("42" if file.name == "data.json" else "41") in told, file
    for line in RunFolder(run.folder).metrics():
        assert line["seed"] == 41
