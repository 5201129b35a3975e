"""Wrong settings of dictionaries, as a user gives them to the command line: one line, before any folder is made."""

import json
import shutil

import pytest
import yaml
from typer.testing import CliRunner

import endwise
from endwise.cli import app
from small_gpt2 import SITE
from small_sweeps import small_recipe

pytestmark = pytest.mark.filterwarnings("ignore:objective.sparsity is left out")

MORE = "more than the 4 features there are. Lower it, or raise dictionary.ratio"
NESTED = {"architecture": "matryoshka_batchtopk", "k": 2}
TOPK = {"architecture": "topk", "ratio": 0.25}
JUMP = {"architecture": "jumprelu", "ratio": 0.25, "penalty": "quadratic"}
BAD = {
    "k above a size": ({"architecture": "topk", "size": 40, "k": 41}, "k is 41, more than the 40 features there are"),
    "k above a ratio": ({**TOPK, "k": 5}, f"dictionary: k is 5, {MORE}"),
    "k_start above a ratio": ({**TOPK, "k": 2, "k_start": 9}, f"k_start is 9, {MORE}"),
    "target_l0 above a ratio": ({**JUMP, "target_l0": 4.5}, f"target_l0 is 4.5, {MORE}"),
    "too many prefixes": ({**NESTED, "ratio": 0.25, "random_prefixes": 5}, f"random_prefixes is 5, {MORE}"),
    "one prefix": ({**NESTED, "size": 9, "random_prefixes": 1}, "random_prefixes: Input should be greater than or"),
    "no groups": ({**NESTED, "size": 9, "groups": []}, "dictionary.groups: must hold at least 1 (given [])"),
}


def refused(tmp_path, made, *command, **changes):
    """Message of a command about a recipe that breaks a rule."""
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump({**small_recipe(made), **changes, "out": str(tmp_path / "run")})
    )
    result = CliRunner().invoke(app, [*command, str(tmp_path / "recipe.yaml")])
    assert result.exit_code in (2, 3, 5, 6), result.output
    assert not (tmp_path / "run").exists()
    return result.output


@pytest.mark.parametrize("command", ["train", "plan"])
@pytest.mark.parametrize("name", BAD)
def test_what_a_dictionary_cannot_have_is_one_line(made, tmp_path, name, command):
    dictionary, told = BAD[name]
    said = refused(tmp_path, made, command, dictionary=dictionary)
    assert told in " ".join(said.split()) and "Traceback" not in said


def test_a_target_above_the_number_of_features_is_one_line(made, tmp_path):
    objective = {"kind": "local", "sparsity": {"target_l0": 41}}
    said = " ".join(refused(tmp_path, made, "train", objective=objective).split())
    assert "objective.sparsity.target_l0 is 41, more than the 40 features there are. Lower it, or raise" in said


@pytest.fixture(scope="module")
def trained(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    return endwise.train({**small_recipe(made), "out": str(out)}, display=False).folder


def test_a_run_is_not_resumed_as_another_architecture(trained, tmp_path):
    """Whoever writes another one into its recipe: the tensors of some are called and shaped alike."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    recipe["dictionary"] = {"architecture": "topk", "size": 40, "k": 4}
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    weights = (run / "sae" / "sae_weights.safetensors").read_bytes()
    result = CliRunner().invoke(app, ["train", "--resume", str(run)])
    assert result.exit_code == 5
    assert "holds a checkpoint of a standard dictionary, but its config.yaml says topk. Restore" in result.output
    assert (run / "sae" / "sae_weights.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    ("kept", "told"),
    [
        (SITE, None),
        ("blocks.0.hook_resid_post", None),
        ("transformer.h.1", None),
        ("blocks.2.hook_resid_pre", f"was trained at blocks.2.hook_resid_pre, and would continue at {SITE}. If"),
    ],
)
def test_a_start_from_another_site_is_told(trained, made, tmp_path, capsys, kept, told):
    start = tmp_path / "start"
    shutil.copytree(trained / "sae", start)
    cfg = json.loads((start / "cfg.json").read_text())
    cfg["metadata"]["hook_name"] = kept
    (start / "cfg.json").write_text(json.dumps(cfg))
    endwise.train({**small_recipe(made), "init_from": str(start), "out": str(tmp_path / "run")}, display=False)
    said = capsys.readouterr().err
    assert (told in said) if told else ("was trained at" not in said)
