"""One face for callers: paths as text or as `Path`, mappings where recipes are, names where sites are."""

from pathlib import Path

import pytest
import torch

import endwise
from endwise.common.errors import ConfigError, EndwiseError, SiteError
from small_gpt2 import recipe

SITE = "blocks.1.hook_resid_pre"


@pytest.fixture(scope="module")
def trained(model, corpora, tmp_path_factory):
    """Two runs of mappings, in a folder of runs."""
    folder = tmp_path_factory.mktemp("runs")
    values = [recipe(folder / name, "local", seed=seed).model_dump() for seed, name in enumerate(("one", "two"))]
    return endwise.train_together(values, model=model, corpora=corpora, display=False)


def test_mappings_and_names_stand_for_recipes_and_sites(trained, model, corpora):
    run = trained[0]
    assert run.config.site == SITE and isinstance(run.config, endwise.RunConfig)
    settings = {"tokens": 64, "during_training_tokens": 64}
    by_name = endwise.measure(model, {"it": (SITE, run.sae)}, corpora.heldout, settings)["it"]
    by_site = endwise.measure(
        model, {"it": (model.site(SITE), run.sae)}, corpora.heldout, endwise.EvaluationConfig(**settings)
    )["it"]
    assert by_name["ce_increase"] == by_site["ce_increase"]
    tokens = corpora.heldout.batch([0]).tokens
    clean = model.clean(tokens, [SITE])
    replayed = model.replay(clean, {SITE: clean.activations[model.site(SITE)]}, ["blocks.2.hook_resid_pre"])
    assert [site.name for site in replayed.activations] == ["blocks.2.hook_resid_pre"]
    assert clean.activations[SITE] is clean.activations[model.site(SITE)]
    with pytest.raises(SiteError, match=f"blocks.2.hook_mlp_out was not recorded .*; recorded: {SITE}"):
        clean.activations["blocks.2.hook_mlp_out"]


def test_a_tensor_stands_for_latents(trained, model):
    sae = trained[0].sae
    latents = sae.encode(torch.randn(5, sae.d_in))
    assert torch.equal(sae.decode(latents.dense()), sae.decode(latents))
    with pytest.raises(ConfigError, match=f"each of the {sae.d_sae} features"):
        sae.decode(torch.zeros(5, sae.d_sae + 1))


def test_a_folder_of_runs_stands_for_its_runs_and_a_path_may_be_text(trained, model, corpora):
    folder = trained[0].folder.parent
    evaluations = endwise.evaluate(str(folder), model=model, corpora=corpora, tokens=64)
    assert list(evaluations) == [run.folder for run in trained]
    assert len(endwise.pareto(str(folder))[0].runs) == 2
    (unread,) = {endwise.read_harvest(str(run.folder)) for run in trained}
    assert unread is None and endwise.read_importance(str(folder)) is None is endwise.read_patterns(str(folder))
    harvests = endwise.harvest(str(folder), tokens=64, importance=False, model=model, corpora=corpora)
    assert list(harvests) == list(evaluations)
    assert endwise.read_harvest(str(trained[0].folder)).d_sae == trained[0].sae.d_sae


@pytest.mark.parametrize(
    "call",
    [
        lambda path: endwise.train({}),
        lambda path: endwise.train_together([{"site": 3}]),
        lambda path: endwise.evaluate(path),
        lambda path: endwise.evaluate([path / "nothing"]),
        lambda path: endwise.pareto(str(path / "nothing")),
        lambda path: endwise.harvest(path),
        lambda path: endwise.SAE.load(str(path)),
        lambda path: endwise.load_model(str(path)),
        lambda path: endwise.sweep({}),
        lambda path: endwise.reproduce(Path("nothing")),
    ],
)
def test_what_cannot_be_is_an_error_of_ours(call, tmp_path):
    with pytest.raises(EndwiseError):
        call(tmp_path)
