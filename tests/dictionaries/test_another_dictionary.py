"""An architecture that lives in the tests alone is trained, resumed, measured, saved, swept and drawn by everything."""

import json

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import counting_sae
import endwise
from endwise.cli import app
from endwise.common.errors import ConfigError
from endwise.config.run import RunConfig

pytestmark = pytest.mark.usefixtures("loaded_once")

KINDS = {"local": {}, "e2e": {}, "e2e_ds": {"downstream_mse": 1.0}}


def recipe(out, kind="local", seed=0, **dictionary):
    return {
        "site": "blocks.4.hook_resid_pre",
        "dictionary": {"architecture": "counting", "size": 24, **dictionary},
        "objective": {"kind": kind, "sparsity": {"coefficient": 1.0}, **KINDS[kind]},
        "data": {"context": 32},
        "training": {"tokens": 1024, "batch": 4, "learning_rate": 1e-2, "log_every": 1, "checkpoint_every": 4},
        "evaluation": {"tokens": 512, "during_training_tokens": 128, "bootstrap": 20},
        "out": str(out),
        "seed": seed,
    }


@pytest.fixture(scope="module")
def model():
    return endwise.load_model("embedded")


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory):
    """One run of each kind, measured."""
    folder = tmp_path_factory.mktemp("counting")
    runs = {kind: endwise.train(recipe(folder / kind, kind), model=model, display=False) for kind in KINDS}
    endwise.evaluate([run.folder for run in runs.values()], model=model)
    return runs


@pytest.mark.parametrize("kind", KINDS)
def test_its_own_term_is_trained_and_logged(runs, kind):
    lines = [json.loads(line) for line in (runs[kind].folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["wake"] == 0 < max(line["wake"] for line in lines)  # nothing is dead in the first step
    weights = {"wake": 0.5, "sparsity": 1.0} | RunConfig.build(recipe("x", kind)).objective.weights
    loss = sum(weight * lines[-1][name] for name, weight in weights.items() if name in lines[-1])
    assert lines[-1]["loss"] == pytest.approx(loss, rel=1e-5)


def test_its_statistics_follow_the_tokens_that_count(model):
    sae = counting_sae.CountingSAE.build(counting_sae.CountingConfig(size=24), model.d_model, 0)
    x = torch.randn(2, 5, model.d_model)
    counted = torch.tensor([[True] * 5, [False] * 5])
    sae.train().encode(x, counted)
    (seen,) = sae.step_statistics()
    torch.testing.assert_close(seen, torch.relu(x[0] @ sae.W_enc).sum(0).detach())


def test_it_is_saved_as_it_is_used_after_training(runs):
    run = runs["local"]
    sae = endwise.SAE.load(run.folder)
    assert type(sae).__name__ == "CountingSAE" and not sae.training and sae.share == 0.1
    torch.testing.assert_close(sae.largest, run.sae.largest)
    x = torch.randn(3, sae.d_in)
    torch.testing.assert_close(sae(x), run.sae(x))
    assert (sae.encode(x).dense() == 0).sum() > (sae.train().encode(x).dense() == 0).sum()


def test_it_is_measured_as_it_is_used_after_training(runs, model):
    found = endwise.evaluate(runs["local"].folder, model=model)[runs["local"].folder]
    sae = endwise.SAE.load(runs["local"].folder)
    corpora = endwise.corpora_for(model, RunConfig.build(recipe("x")).data, training_tokens=1024, evaluation_tokens=512)
    batch = corpora.heldout.batch(range(512 // 32))
    clean = model.clean(batch.tokens, [model.site("blocks.4.hook_resid_pre")])
    latents = sae.encode(clean.activations[model.site("blocks.4.hook_resid_pre")])
    assert found["l0"] == pytest.approx(float(latents.l0()[batch.mask].mean()), rel=1e-6)


def test_a_resumed_run_ends_in_the_same_bits(runs, model, tmp_path):
    config = RunConfig.build(recipe(tmp_path / "run", "e2e"))
    endwise.train(config, model=model, display=False)
    endwise.train(config, model=model, resume=True, from_step=4, display=False)
    for name in ("sae/sae_weights.safetensors", "metrics.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (runs["e2e"].folder / name).read_bytes()
    state = load_file(tmp_path / "run" / "checkpoints" / "step-000000008.safetensors")
    assert state["sae.steps"] == 8


def test_training_starts_from_a_saved_one(runs, model, tmp_path):
    config = {**recipe(tmp_path / "run"), "init_from": str(runs["local"].folder)}
    assert endwise.train(config, model=model, display=False).sae.largest.sum() >= runs["local"].sae.largest.sum()


def test_another_architecture_is_refused_as_a_start(runs, model, tmp_path):
    config = {**recipe(tmp_path / "run"), "init_from": str(runs["local"].folder), "dictionary": {"size": 24}}
    with pytest.raises(ConfigError, match=r"counting SAE cannot be trained on as standard.*architecture=counting"):
        endwise.train(config, model=model, display=False)


def test_its_settings_are_checked_by_name():
    with pytest.raises(ConfigError, match=r"dictionary\.shar: there is no such key; did you mean 'share'"):
        RunConfig.build(recipe("x", shar=1))
    with pytest.raises(ConfigError, match=r"dictionary\.share: .*number"):
        RunConfig.build(recipe("x", share="much"))
    with pytest.raises(ConfigError, match=r"dictionary\.architecture: .*'countin'.*Did you mean counting"):
        RunConfig.build(recipe("x", architecture="countin"))


def test_a_recipe_is_written_and_read_with_its_settings(tmp_path):
    config = RunConfig.build(recipe("x", share=0.3))
    (tmp_path / "recipe.yaml").write_text(config.to_yaml())
    assert RunConfig.read(tmp_path / "recipe.yaml") == config and config.dictionary.share == 0.3


@pytest.mark.parametrize("word", ["standard", "relu", None])
def test_words_for_the_papers_dictionary(word):
    section = {"size": 24} | ({} if word is None else {"architecture": word})
    config = RunConfig.build({**recipe("x"), "dictionary": section})
    assert config.dictionary.architecture == "standard"
    assert config == RunConfig.build({**recipe("x"), "dictionary": {"size": 24}})


def test_it_is_swept_and_drawn(model, tmp_path):
    base = {key: value for key, value in recipe("x").items() if key not in ("out", "seed")}
    grids = [{"dictionary.share": [0.1, 0.3], "objective.sparsity.coefficient": [0.5, 2.0]}]
    swept = endwise.sweep({"recipe": base, "grids": grids, "out": str(tmp_path / "sweep")}, display=False)
    assert len(swept.folders) == 4 and {row["dictionary.share"] for row in swept.rows} == {0.1, 0.3}
    found = endwise.pareto(swept.folders)
    assert sum(len(each.runs) for each in found) == 4


def test_it_is_planned_with_its_own_term():
    """Encoder and decoder, three gradients; its term encodes once more, and has that product's gradient."""
    from endwise.training.planning.plan import plan

    found = plan(RunConfig.build(recipe("x")))
    product = 2 * 24 * found.d_model
    assert found.d_sae == 24
    flops = found.flops
    assert [flops.sae_forward, flops.sae_backward, flops.sae_own] == [2 * product, 3 * product, 2 * product]


def test_it_is_drawn_shown_and_exported_by_every_command(runs, tmp_path, undrawn):
    """Curves, geometry, importance, the dashboard, and Neuronpedia's files, as from the command line."""
    folders = [str(run.folder) for run in runs.values()]
    commands = {
        "pareto/pareto.html": ["pareto", *folders, "--out", str(tmp_path / "pareto")],
        "geometry/geometry.html": ["geometry", *folders, "--out", str(tmp_path / "geometry")],
        "importance/importance.html": [
            *("importance", *folders, "--tokens", "256", "--ablate", "2", "--out", str(tmp_path / "importance"))
        ],
        "": ["harvest", *folders, "--tokens", "512"],
        "dashboard/index.html": ["dashboard", *folders, "--out", str(tmp_path / "dashboard"), "--quiet"],
        "exported": ["export-neuronpedia", folders[0], "--out", str(tmp_path / "exported")],
    }
    for made, command in commands.items():
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        assert (tmp_path / made).exists(), (made, result.output)


def test_its_features_are_harvested(runs, model):
    harvest = endwise.harvest([runs["local"].folder], model=model)[runs["local"].folder]
    assert len(harvest.features) == 24
