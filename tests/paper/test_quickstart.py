"""The quickstart from end to end, at a hundredth of its size, in a folder whose name is made to do harm."""

import json
import math
from pathlib import Path

import pytest

from bad_input import HOSTILE, hidden_in, ran
from endwise import pareto
from endwise.common.errors import RunFolderError
from endwise.config.method import Method
from endwise.config.recipes import find_recipe
from endwise.config.run import RunConfig
from endwise.paper.quickstart import quickstart, recipes
from endwise.runs.folder import RunFolder
from pages import Page

pytestmark = pytest.mark.usefixtures("fitted_on_little")
NAME = HOSTILE.replace("/", "|")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, fitted_on_little):
    """Its folder, the runs as its summary has them, and what the command printed."""
    out = tmp_path_factory.mktemp("quickstart") / NAME
    small = ("data.context=64", "training.tokens=512", "dictionary.ratio=1")
    quick = ("evaluation.tokens=512", "evaluation.during_training_tokens=256", "evaluation.bootstrap=50")
    said = ran("quickstart", *small, *quick, "--seed", 3, "--out", out)
    assert said.exit_code == 0, said.output
    return out, json.loads((out / "summary.json").read_text()), said.output


def test_it_may_be_put_anywhere(finished):
    out, _, printed = finished
    markup = "[red]x[/][/nope]".replace("/", "|")
    assert markup in NAME and markup in printed.replace("\n", "") and not hidden_in(printed)
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    assert page.tags.count("script") == 2 and markup in page.text


def test_summary_has_the_promised_fields(finished):
    out, content, _ = finished
    assert 2 < content["clean_ce"] < 5
    assert len(content["runs"]) == len(recipes(out, 3))
    for run in content["runs"]:
        assert {"kind", "site", "coefficient", "seed", "l0", "alive", "d_sae", "ce_increase", "kl"} <= set(run)
        assert {"explained_variance", "downstream_mse", "tokens", "seconds", "folder"} <= set(run)
        assert run["seed"] == 3 and run["d_sae"] == 128 and run["tokens"] == 512
        assert math.isfinite(run["ce_increase"]) and run["l0"] > 0 and run["seconds"] > 0
        assert len(run["downstream_mse"]) == 3
        assert RunFolder.open(Path(run["folder"])).evaluation()["l0"] == run["l0"]
    assert set(content["features_at_equal_ce"]) == {"e2e", "e2e_ds", "staged", "staged-batchtopk"}


def test_report_shows_every_run(finished):
    out, summary, _ = finished
    page = (out / "report.html").read_text()
    for run in summary["runs"]:
        assert f"{run['l0']:.1f}" in page


def test_trained_in_phases_or_not_they_are_one_comparison(finished):
    out, summary, _ = finished
    (compared,) = pareto(out)
    folders = [RunFolder.open(Path(run["folder"])) for run in summary["runs"]]
    assert {run.method for run in compared.runs} == {Method.of(folder.config()) for folder in folders}


def test_a_folder_in_use_is_refused_before_any_work(finished):
    out, _, _ = finished
    with pytest.raises(RunFolderError, match="not an empty folder"):
        quickstart(out, display=False)


def test_each_kind_gets_the_same_setting(tmp_path):
    configs = list(recipes(tmp_path, 0))
    assert {Method.of(config).key for config in configs} == {"local", "e2e_ds", "staged", "staged-batchtopk"}
    for config in configs:
        ours, first = config.training.model_dump(), configs[0].training.model_dump()
        assert ours | {"learning_rate": 0} == first | {"learning_rate": 0}
        assert (config.site, config.dictionary.ratio, config.seed) == (configs[0].site, configs[0].dictionary.ratio, 0)
    paper = [config for config in configs if config.dictionary.architecture == "standard"]
    assert len(paper) == 9 and all(config.dictionary == configs[0].dictionary for config in paper)


def test_what_it_recommends_is_the_recipe_that_ships(tmp_path):
    """At another length."""
    default = RunConfig.read(find_recipe("embedded-default"))
    recommended = [config for config in recipes(tmp_path, 0) if Method.of(config) == Method.of(default)]
    assert default.dictionary in [config.dictionary for config in recommended]
    for config in recommended:
        assert (config.objective, config.phases) == (default.objective, default.phases)
        assert config.training.learning_rate == default.training.learning_rate
