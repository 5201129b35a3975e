"""Every architecture, transcoders, heads and norms through every command that comes after training, as a user calls
them.
"""

import csv
import json
import math

import pytest
from typer.testing import CliRunner

import endwise
from chat_server import chat_server
from endwise.cli import app
from endwise.config.dictionary import ARCHITECTURES
from endwise.config.run import RunConfig

MLP = {"site": "blocks.2.mlp_in", "writes": "blocks.2.hook_mlp_out"}
SITE = {"site": "blocks.2.hook_resid_pre"}
OWN = {
    "standard": ("objective.sparsity.p", [0.5, 1.0]),
    "gated": ("dictionary.gate_reconstruction", [0.5, 1.0]),
    "topk": ("dictionary.k", [2, 4]),
    "jumprelu": ("dictionary.bandwidth", [0.5, 1.0]),
    "batchtopk": ("dictionary.k", [2, 4]),
    "matryoshka_batchtopk": ("dictionary.random_prefixes", [2, 3]),
}
"""A field of each architecture that a sweep varies."""
GROUPS = {
    "SAEs": {name: SITE | {"dictionary": {"architecture": name}} for name in OWN}
    | {
        "whitened": SITE | {"dictionary": {"architecture": "jumprelu", "normalize": "whitening"}},
        "of layer norm": SITE | {"dictionary": {"normalize": "layer_norm"}},
    },
    "transcoders": {
        "skip": MLP | {"dictionary": {"architecture": "batchtopk", "skip": True}},
        "nested": MLP | {"dictionary": {"architecture": "matryoshka_batchtopk"}},
        "gated": MLP | {"dictionary": {"architecture": "gated", "normalize": "scalar"}},
    },
    "heads": {"heads": {"site": "blocks.2.attn.hook_z", "dictionary": {"architecture": "topk"}}},
}
FEATURES, FITTED_ON = 32, 256
pytestmark = pytest.mark.usefixtures("undrawn", "loaded_once", "fitted_on_little", "models_outlined_once")


def recipe(out, dictionary, **place):
    architecture = dictionary.get("architecture", "standard")
    penalised = ARCHITECTURES[architecture].Config.penalised
    k = {} if penalised else {"k": 4}
    return {
        **place,
        "dictionary": {"size": FEATURES, **k, **dictionary},
        "objective": {"kind": "local", **({"sparsity": {"coefficient": 0.1}} if penalised else {})},
        "data": {"context": 16},
        "training": {"tokens": 128, "batch": 4, "learning_rate": 3e-3, "log_every": 2},
        "evaluation": {"tokens": 128, "during_training_tokens": 32, "bootstrap": 10},
        "out": str(out),
    }


def command(*arguments):
    """Output of a command, which must succeed."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (arguments, result.output, result.exception)
    return result.stdout


def rows(file):
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The run folders of each group, trained in one pass and measured."""
    folder = tmp_path_factory.mktemp("runs")
    made = {group: {name: folder / group / name for name in of} for group, of in GROUPS.items()}
    configs = [
        RunConfig.build(recipe(made[group][name], **GROUPS[group][name])) for group in made for name in made[group]
    ]
    endwise.train_together(configs, display=False)
    said = command("evaluate", *(path for of in made.values() for path in of.values()), "--csv", folder / "all.csv")
    assert "CE" in said
    measured = rows(folder / "all.csv")
    assert len(measured) == len(configs) and all(math.isfinite(float(row["ce_increase"])) for row in measured)
    return {group: list(of.values()) for group, of in made.items()}


@pytest.mark.parametrize("group", GROUPS)
def test_pareto(runs, group, tmp_path):
    command("pareto", *runs[group], "--out", tmp_path)
    assert len(rows(tmp_path / "points.csv")) == len(runs[group])
    nested = rows(tmp_path / "prefixes.csv") if (tmp_path / "prefixes.csv").exists() else []
    of = [name for name, each in GROUPS[group].items() if "matryoshka" in each["dictionary"].get("architecture", "")]
    assert [int(row["features"]) for row in nested] == [1, 3, 7, 15, FEATURES] * len(of)
    assert (tmp_path / "prefixes-1.png").exists() == bool(of)
    for row in nested:
        record = json.loads(
            (next(run for run in runs[group] if str(run) == row["run"]) / "evaluation.json").read_text()
        )
        whole = row["features"] == str(FEATURES)
        assert float(row["l0"]) == (record["l0"] if whole else record["prefix_l0"][row["features"]])


@pytest.mark.parametrize("group", GROUPS)
def test_geometry(runs, group, tmp_path):
    command("geometry", *runs[group], "--out", tmp_path, "--quiet")
    assert (tmp_path / "geometry.html").exists()


@pytest.mark.parametrize("group", GROUPS)
def test_importance(runs, group, tmp_path):
    command("importance", *runs[group], "--tokens", 64, "--ablate", 2, "--kl", "--out", tmp_path)
    assert (tmp_path / "importance.html").exists()


@pytest.mark.parametrize("group", GROUPS)
def test_directions(runs, group, tmp_path):
    command("directions", *runs[group], "--tokens", 256, "--directions", 2, "--out", tmp_path)
    assert (tmp_path / "directions.html").exists()


@pytest.fixture(scope="module")
def harvested(runs):
    for group in runs.values():
        said = command("harvest", *group, "--tokens", 512, "--quiet")
        assert said.count(f"of {FEATURES} features fired") == len(group)
    return runs


@pytest.mark.parametrize("group", GROUPS)
def test_dashboard_and_export(harvested, group, tmp_path):
    command("dashboard", *harvested[group], "--out", tmp_path / "site", "--quiet")
    assert (tmp_path / "site" / "index.html").exists()
    for number, run in enumerate(harvested[group]):
        assert "features with" in command("export-neuronpedia", run, "--out", tmp_path / str(number))


@pytest.mark.parametrize("group", GROUPS)
def test_explained(harvested, group, tmp_path):
    with chat_server() as served:
        given = ("--endpoint", served.url, "--model", "m", "--features", "random:2", "--random", 1, "--yes")
        given += ("--shown", 4, "--scored", 4)
        command("explain", *harvested[group], *given)
    command("compare-explanations", *harvested[group], "--out", tmp_path)
    assert (tmp_path / "interpretability.html").exists()


@pytest.mark.parametrize("name", OWN)
def test_swept_over_a_field_of_its_own_and_planned(name, tmp_path):
    field, values = OWN[name]
    given = recipe(tmp_path / "x", **GROUPS["SAEs"][name])
    del given["out"]
    text = {"recipe": given, "grids": [{field: values}], "out": str(tmp_path / "sweep")}
    (tmp_path / "sweep.yaml").write_text(json.dumps(text))
    assert "2 of 2 runs finished" in command("sweep", tmp_path / "sweep.yaml", "--quiet")
    assert "2" in command("sweep", tmp_path / "sweep.yaml", "--dry-run")
    (tmp_path / "recipe.yaml").write_text(json.dumps(given))
    options = (
        "dictionary.aux=0.1",
        "dictionary.revive=0.1",
        "dictionary.resample_at=[0.5]",
        "dictionary.normalize=scalar",
    )
    all_at_once = (*options, *(f"{key}={value}" for key, value in MLP.items()), "dictionary.skip=true")
    for changes in ((), all_at_once) if name == "standard" else (all_at_once,):
        planned = json.loads(command("plan", tmp_path / "recipe.yaml", *changes, "--json"))
        assert planned["d_sae"] == FEATURES and planned["stages"]
