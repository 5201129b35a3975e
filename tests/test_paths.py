"""Paths that users give: in recipes, on the command line and in Python."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from endwise import SAE, load_model, read_harvest
from endwise.cli import app
from endwise.dashboard import write_dashboard
from endwise.errors import ConfigError, ModelError, RunFolderError
from endwise.files import check_can_write, write_atomic
from endwise.recipes import find_recipe, find_sweep
from endwise.reproduction.study_config import find_study
from endwise.run_config import RunConfig
from endwise.run_folder import RunFolder
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
