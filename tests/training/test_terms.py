"""A term that the package does not bring is trained, logged, resumed, measured, swept and drawn as the others are."""

import json
import shutil

import pytest
import torch

import own_terms
from endwise import RunConfig, evaluate, pareto, train
from endwise.analysis.pareto.page import write_pareto
from endwise.common.errors import ConfigError
from endwise.config.objective import TERMS, ObjectiveConfig
from endwise.sweeps import sweep
from endwise.training.objectives import build_objective
from small_gpt2 import SITE, recipe
from small_sweeps import small_sweep

MATRICES = ("W_enc", "W_dec", "b_enc", "b_dec")


def objective(**fields):
    return ObjectiveConfig.build({"sparsity": {"coefficient": 0.3}, **fields})


def with_term(out, kind="e2e", terms=None, **training):
    config = recipe(out, kind, **training)
    given = {**config.objective.model_dump(), "terms": terms or {"next_cosine": 2.0}}
    return config.model_copy(update={"objective": ObjectiveConfig.build(given)})


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(model, corpora, tmp_path_factory):
    folder = tmp_path_factory.mktemp("term") / "run"
    return train(with_term(folder, checkpoint_every=10), model=model, corpora=corpora, display=False)


def test_it_is_known_by_its_name_and_builds_itself(model):
    assert {"kl", "downstream_mse", "local_mse", "sparsity", "next_cosine"} <= set(TERMS.names())
    settings = objective(kind="e2e", terms={"next_cosine": {"weight": 2, "ahead": 2}, "bound": 0.5})
    built = build_objective(settings, model, model.site(SITE))
    assert {term.name: term.coefficient for term in built.terms} == {
        "kl": 1.0,
        "next_cosine": 2.0,
        "bound": 0.5,
        "sparsity": 0.3,
    }
    assert [str(site) for site in built.sites] == ["blocks.3.hook_resid_pre"]  # recorded because the term says so
    assert isinstance(built.spliced_terms[-1], own_terms.NextCosine)


def test_kind_can_be_left_out(model):
    alone = objective(terms={"next_cosine": 1})
    assert alone.weights == {"kl": 0, "local_mse": 0, "downstream_mse": 0, "next_cosine": 1}
    assert not build_objective(alone, model, model.site(SITE)).final
    by_weights = objective(kl=0.5, downstream_mse=2)
    assert by_weights.weights == objective(kind="e2e_ds", downstream_mse=2).weights
    assert (alone.name, by_weights.name) == ("next_cosine", "e2e_ds")
    assert objective(kind="e2e", terms={"next_cosine": 1, "bound": 0}).name == "e2e+next_cosine"


def test_a_weight_alone_and_a_section_with_it_are_the_same_recipe():
    plain, written = (
        objective(kind="e2e", terms={"next_cosine": 1}),
        objective(kind="e2e", terms={"next_cosine": {"weight": 1.0}}),
    )
    assert plain == written == ObjectiveConfig.build(plain.model_dump(mode="json"))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"kind": "e2e", "terms": {"next_cosin": 1}}, "'next_cosin'.*Did you mean next_cosine"),
        ({"kind": "e2e", "terms": {"kl": 1}}, "set objective.kl"),
        ({"kind": "e2e", "terms": {"l0": 1}}, "metrics.jsonl has such a number"),
        ({"kind": "e2e", "terms": {"next_cosine": -1}}, "weight.*greater than or equal to 0"),
        ({"kind": "e2e", "terms": {"next_cosine": {"weight": 1, "ahed": 2}}}, "ahed.*did you mean 'ahead'"),
        ({"kind": "e2e", "terms": {"next_cosine": {"ahead": 2}}}, "weight: this key is required"),
        ({"kind": "e2e", "terms": 3}, "terms"),
        ({}, "give kind .local, e2e, e2e_ds, horizon, finetune., or a weight"),
    ],
)
def test_a_recipe_that_has_it_wrong_is_refused(fields, says):
    with pytest.raises(ConfigError, match=says):
        objective(**fields)


def test_it_is_trained_and_logged_by_its_name(trained, model, corpora, tmp_path):
    first, *_, last = lines(trained.folder)
    assert {"kl", "next_cosine", "sparsity"} <= set(last)
    assert last["loss"] == pytest.approx(last["kl"] + 2 * last["next_cosine"] + 0.3 * last["sparsity"])
    assert 0 < last["next_cosine"] < first["next_cosine"]
    plain = train(recipe(tmp_path / "plain"), model=model, corpora=corpora, display=False)
    assert not torch.equal(plain.sae.W_dec, trained.sae.W_dec)  # it was in the gradient


def test_it_is_resumed_to_the_same_bits(trained, model, corpora, tmp_path):
    folder = shutil.copytree(trained.folder, tmp_path / "run")
    config = RunConfig.read(folder / "config.yaml", [f"out={folder}"])
    assert config.objective == trained.config.objective
    again = train(config, model=model, corpora=corpora, display=False, resume=True, from_step=10)
    assert lines(folder) == lines(trained.folder)
    for name in MATRICES:
        assert torch.equal(getattr(again.sae, name), getattr(trained.sae, name))


def test_it_is_swept_measured_and_drawn(made, models_outlined_once, tmp_path, undrawn):
    grids = (
        {"objective.kind": "e2e", "objective.sparsity.coefficient": [0.1, 0.3]},
        {
            "objective.kind": "e2e",
            "objective.terms.next_cosine": [0.5, {"weight": 0.5, "ahead": 2}],
            "objective.sparsity.coefficient": [0.1, 0.3],
        },
    )
    swept = sweep(small_sweep(made, tmp_path / "sweep", *grids, training={"tokens": 160}))
    assert len(swept.runs) == 6
    names = sorted(path.name.partition("-")[0] for path in (tmp_path / "sweep" / "runs").iterdir())
    assert names == ["e2e"] * 2 + ["e2e+next_cosine"] * 4
    (measured,) = evaluate(next((tmp_path / "sweep" / "runs").glob("e2e+*"))).values()
    assert measured["kl"] > 0
    (one,) = pareto([tmp_path / "sweep"])
    first, second, third = (method.label for method in one.methods)
    assert (first, second) == ("e2e", "e2e+next_cosine")
    assert third.startswith('e2e+next_cosine, terms.next_cosine {"ahead": ')
    assert write_pareto([one], tmp_path / "page").exists()
