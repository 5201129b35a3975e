"""Recipes: every broken rule gives a line that names the field, the value and the remedy."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from endwise import Site
from endwise.common.errors import ConfigError
from endwise.common.showing import Several
from endwise.config.base import apply_overrides
from endwise.config.places import build_recipe
from endwise.config.run import RunConfig
from endwise.sweeps.sweep_config import as_sweep

RECIPE = {
    "site": "blocks.1.hook_resid_pre",
    "dictionary": {"ratio": 4},
    "objective": {"kind": "e2e", "sparsity": {"coefficient": 1}},
    "training": {"tokens": 1000},
}


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["objective.sparsty.coefficient=3"], r"objective\.sparsty: .*did you mean 'sparsity'"),
        (["objective.sparsity.coefficient=-1"], r"objective\.sparsity\.coefficient: .*greater than or equal to 0.*-1"),
        (["objective.sparsity.coefficient=.nan"], r"objective\.sparsity\.coefficient"),
        (["objective.kind=global"], r"objective\.kind: .*'local', 'e2e', 'e2e_ds', 'horizon' or 'finetune'"),
        (["objective.kind=e2e_ds"], r"objective: .*downstream_mse"),
        (["dictionary.size=5"], r"dictionary: .*exactly one"),
        (["training.batch=0"], r"training\.batch"),
        (["training.accumulation=3"], r"accumulation \(3\) must divide batch \(16\)"),
        (["training.tokens=many"], r"training\.tokens.*many"),
        (["nonsense"], "section.key=value"),
        (["site.x=1"], "'site' is a value"),
        (["a..b=1"], "section.key=value"),
    ],
)
def test_broken_rules_are_named(overrides, says):
    with pytest.raises(ConfigError, match=says):
        RunConfig.build(apply_overrides(RECIPE, overrides))


def test_overrides_are_yaml_and_leave_the_original_alone():
    config = RunConfig.build(apply_overrides(RECIPE, ["training.learning_rate=1e-3", "data.prepend_bos=true"]))
    assert config.training.learning_rate == 1e-3
    assert config.data.prepend_bos is True
    assert "data" not in RECIPE


def test_presets_give_the_papers_weights():
    def weights(**objective):
        values = {**RECIPE, "objective": {"sparsity": {"coefficient": 1}, **objective}}
        return RunConfig.build(values).objective.weights

    assert weights(kind="local") == {"kl": 0, "local_mse": 1, "downstream_mse": 0}
    assert weights(kind="e2e") == {"kl": 1, "local_mse": 0, "downstream_mse": 0}
    assert weights(kind="e2e_ds", downstream_mse=2.5) == {"kl": 0.5, "local_mse": 0, "downstream_mse": 2.5}
    assert weights(kind="local", kl=2) == {"kl": 2, "local_mse": 1, "downstream_mse": 0}


def test_what_python_has_for_a_name_is_taken_as_its_text():
    objects = {
        "site": Site.parse(RECIPE["site"]),
        "model": {"name": Path("a/model")},
        "data": {"source": Path("t.txt")},
    }
    texts = {"site": RECIPE["site"], "model": {"name": "a/model"}, "data": {"source": "t.txt"}}
    assert RunConfig.build({**RECIPE, **objects}) == RunConfig.build({**RECIPE, **texts})
    found = Several({Path("a/run"): 1})
    assert found["a/run"] == found[Path("a/run")] == 1
    with pytest.raises(KeyError):
        found["another"]
    with pytest.raises(ConfigError, match=r"is a sweep, of many runs\. Train them: endwise\.sweep"):
        build_recipe({"recipe": RECIPE, "grids": []})
    with pytest.raises(ConfigError, match=r"is a recipe, of one run\. Train it: endwise\.train"):
        as_sweep(RECIPE)


def test_resolved_recipe_survives_its_own_yaml(tmp_path):
    config = RunConfig.build(RECIPE)
    (tmp_path / "recipe.yaml").write_text(config.to_yaml())
    assert RunConfig.read(tmp_path / "recipe.yaml") == config


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "", "\0"])
def test_files_that_are_no_recipe(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"recipe\.yaml"):
        RunConfig.read(tmp_path / "recipe.yaml")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="There is no file"):
        RunConfig.read(tmp_path / "none.yaml")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(section=st.sampled_from(sorted(RunConfig.model_fields)), value=json_values)
def test_any_value_anywhere_is_accepted_or_refused_plainly(section, value):
    refused = None
    try:
        RunConfig.build({**RECIPE, section: value})
    except ConfigError as error:
        refused = str(error)
    assert refused is None or section in refused
