"""Paths that users give: in recipes, on the command line and in Python."""

import re
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from endwise import SAE, load_model, read_harvest
from endwise.cli import app
from endwise.common.errors import ConfigError, ModelError, RunFolderError
from endwise.common.files import check_can_write, write_atomic
from endwise.config.recipes import find_recipe, find_sweep
from endwise.config.run import RunConfig
from endwise.dashboard import write_dashboard
from endwise.paper.study_config import find_study
from endwise.runs.folder import RunFolder
from endwise.sweeps import SweepConfig
from made_harvests import write_harvested_run

RECIPE = {
    "site": "blocks.1.hook_resid_pre",
    "dictionary": {"ratio": 1},
    "objective": {"kind": "e2e", "sparsity": {"coefficient": 1}},
    "training": {"tokens": 8},
    "out": "~/out",
    "init_from": "~/run/sae",
    "data": {"cache": "~/cache"},
}


def test_every_path_may_begin_at_home(tmp_path, monkeypatch):
    """`~` is the user's folder, wherever it stands, and never a new one of that name."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.chdir(here)
    write_harvested_run(home / "run", d_sae=12)
    config = RunConfig.build(RECIPE)
    assert (config.out, config.init_from, config.data.cache) == (home / "out", home / "run/sae", home / "cache")
    assert SweepConfig.build({"recipe": RECIPE, "grids": [{}], "out": "~/sweep"}).out == home / "sweep"
    for name in ("recipe.yaml", "study.yaml"):
        (home / name).write_text(config.to_yaml())
    assert find_recipe("~/recipe.yaml") == find_sweep("~/recipe.yaml") == home / "recipe.yaml"
    assert RunConfig.read(Path("~/recipe.yaml")) == config
    with pytest.raises(ConfigError, match=r"study\.yaml is not valid"):
        find_study("~/study.yaml")
    with pytest.raises(ModelError, match=re.escape(str(home / "model"))):
        load_model("~/model")
    assert RunFolder(Path("~/run")).path == home / "run"
    assert read_harvest(Path("~/run")).d_sae == SAE.load("~/run").d_sae
    SAE.load("~/run").save("~/copy")
    assert (home / "copy" / "cfg.json").exists()
    write_atomic(Path("~/file"), b"")
    assert write_dashboard(["~/run"], "~/site").is_relative_to(home)
    done = CliRunner().invoke(app, ["dashboard", "~/run", "--out=~/again"])
    assert done.exit_code == 0, done.output
    assert all((home / name).exists() for name in ("file", "site", "again"))
    assert not list(here.iterdir())


def test_where_nothing_can_be_written_is_told_before_the_work(tmp_path):
    (tmp_path / "file").write_text("text")
    check_can_write(tmp_path)
    check_can_write(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RunFolderError, match=r"Cannot write .*file.*Not a directory.*choose another folder"):
            check_can_write(folder)


GROUP = get_command(app)
WRITING = [name for name, each in GROUP.commands.items() if any(option.name == "out" for option in each.params)]
COMPARING = ["compare-explanations", "directions", "geometry", "importance", "pareto"]


def refused(*arguments):
    """The message of a command that must end before the work."""
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code == RunFolderError.exit_code, done.output
    return done.stderr


@pytest.mark.parametrize("name", WRITING)
def test_every_command_with_an_out_asks_before_the_work_if_it_can_be_written(name, tmp_path, monkeypatch):
    """Before anything else is read: no run that is named is there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("text")
    assert set(COMPARING) < set(WRITING)
    needed = [each for each in GROUP.commands[name].params if each.param_type_name == "argument" and each.required]
    assert f"Cannot write {Path('file/out')}" in refused(name, *["no-such"] * len(needed), "--out", "file/out")


@pytest.mark.parametrize("name", COMPARING)
def test_where_results_go_by_themselves_is_asked_for_too(name, tmp_path):
    (tmp_path / "file").write_text("text")
    assert f"Cannot write {tmp_path / 'file'}" in refused(name, tmp_path / "file" / "run")


def test_a_dashboard_that_cannot_be_written_is_not_begun(tmp_path):
    write_harvested_run(tmp_path / "run", d_sae=12)
    (tmp_path / "run" / "dashboard").write_text("text")
    said = []
    with pytest.raises(RunFolderError, match="Cannot write"):
        write_dashboard([tmp_path / "run"], say=said.append)
    assert not said
