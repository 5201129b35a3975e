"""Identity and execution: keys that say what is computed must agree; those that say how may change at any time."""

import json
import signal
from pathlib import Path
from typing import Annotated

import pytest
import torch
import yaml
from typer.testing import CliRunner

from endwise import train, train_together
from endwise.cli import app
from endwise.common.errors import ConfigError, Interrupted, RunFolderError
from endwise.config.base import Config
from endwise.config.fields import EXECUTION, SHARED, differing, identity, shared
from endwise.config.run import RunConfig
from endwise.runs.folder import RunFolder
from endwise.sweeps.points import Point, fingerprint, placed
from own_training import Act, acting, raising, stopping, train_with
from places import FIXTURES
from small_gpt2 import recipe

EXECUTED = {
    "model.device",
    "model.attention",
    "model.sharded",
    "data.cache",
    "data.activations",
    "training.accumulation",
    "training.microbatch",
    "training.shards",
    "training.log_every",
    "training.evaluate_every",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.save_at",
    "evaluation.batch",
    "trackers",
    "out",
}


class Inner(Config):
    what: int = 1
    how: Annotated[int, EXECUTION] = 1


class Outer(Config):
    one: Inner = Inner()
    several: tuple[Inner, ...] = (Inner(),)
    length: Annotated[int, SHARED] = 3


def changed(config: RunConfig, **training) -> RunConfig:
    return config.model_copy(update={"training": config.training.model_copy(update=training)})


def interrupted(config, model, corpora, after):
    with pytest.raises(Interrupted):
        train_with(acting(stopping(after - 1, signal.SIGTERM)), [config], model, corpora)


def lines(folder):
    return [json.loads(line) for line in RunFolder(folder).metrics_file.read_text().splitlines()]


def test_of_nested_sections_only_what_is_computed_is_identity():
    config = Outer(one=Inner(how=2), several=(Inner(what=5, how=7),))
    assert identity(config) == {"one": {"what": 1}, "several": [{"what": 5}], "length": 3}
    assert identity(config, short=True) == {"several": [{"what": 5}]}
    assert shared(config) == {"length": 3}
    assert differing(identity(config), identity(Outer())) == {"several": ([{"what": 5}], [{"what": 1}])}


def test_what_a_recipe_executes_with_is_what_this_page_says():
    config = RunConfig.build(recipe(Path("run")).model_dump())
    assert set(differing(config.model_dump(mode="json"), identity(config))) <= EXECUTED
    everything = {
        "model": {"device": "cpu", "attention": "eager", "sharded": True},
        "data": {"cache": "a"},
        "evaluation": {"batch": 3},
    }
    everything["data"] |= {"activations": "b"}
    values = yaml.safe_load(config.to_yaml())
    for section, keys in everything.items():
        values[section] |= keys
    values["training"] |= {"shards": 2, "microbatch": 1, "accumulation": 2, "log_every": 7, "evaluate_every": 8}
    values["training"] |= {"checkpoint_every": 9, "keep_checkpoints": 3, "save_at": "log"}
    other = RunConfig.build(values | {"out": "elsewhere", "trackers": ["any"]})
    assert set(differing(config.model_dump(mode="json"), other.model_dump(mode="json"))) == EXECUTED
    assert identity(config) == identity(other)


def test_a_point_of_a_sweep_is_what_it_computes(tmp_path):
    config = recipe(tmp_path / "any", "e2e")
    other = changed(config, microbatch=1, log_every=7)
    assert Point(config).key == Point(other).key and fingerprint(config) == fingerprint(other)
    assert fingerprint(config) != fingerprint(changed(config, learning_rate=0.5))


def test_a_point_that_0_1_made_keeps_its_folder():
    written = FIXTURES / "v0.1" / "sweep" / "runs"
    for folder in written.iterdir():
        config = RunFolder(folder).config()
        assert placed(config, written).out == folder
        assert placed(config, Path("elsewhere")).out.name != folder.name  # which counted log_every


@pytest.mark.parametrize("settings", [{"accumulation": 2}, {"accumulation": 4, "microbatch": 1}, {"microbatch": 3}])
def test_passes_and_microbatches_change_the_rounding_alone(model, corpora, tmp_path, settings):
    whole = train(recipe(tmp_path / "whole", "e2e_ds"), model=model, corpora=corpora, display=False)
    parts = train(recipe(tmp_path / "parts", "e2e_ds", **settings), model=model, corpora=corpora, display=False)
    for one, other in zip(lines(whole.folder), lines(parts.folder), strict=True):
        assert one.keys() == other.keys()
        assert all(other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6) for name in one if name != "heldout")
    for name, tensor in whole.sae.state_dict().items():
        torch.testing.assert_close(parts.sae.state_dict()[name], tensor, rtol=1e-3, atol=1e-5)


def test_execution_changes_on_resuming_and_is_noted(model, corpora, tmp_path):
    config = recipe(tmp_path / "run", "e2e")
    interrupted(config, model, corpora, after=6)
    other = changed(config, microbatch=1, log_every=1, checkpoint_every=4)
    run = train(other, model=model, corpora=corpora, display=False, resume=True)
    folder = RunFolder(run.folder)
    assert folder.config() == other
    (change,) = (json.loads(line) for line in folder.changes_file.read_text().splitlines())
    assert change["step"] == 6 and change["changes"]["training.log_every"] == [config.training.log_every, 1]
    assert set(change["changes"]) == {"training.microbatch", "training.log_every", "training.checkpoint_every"}
    whole = train(recipe(tmp_path / "whole", "e2e"), model=model, corpora=corpora, display=False)
    for name, tensor in whole.sae.state_dict().items():
        torch.testing.assert_close(run.sae.state_dict()[name], tensor, rtol=1e-3, atol=1e-5)


def test_what_is_computed_cannot_change(model, corpora, tmp_path):
    config = recipe(tmp_path / "run", "e2e")
    interrupted(config, model, corpora, after=2)
    before = RunFolder(config.out).config_file.read_bytes()
    with pytest.raises(RunFolderError, match=r"another recipe.*training\.warmup .*\(now 0\.5\)"):
        train(changed(config, warmup=0.5), model=model, corpora=corpora, display=False, resume=True)
    assert RunFolder(config.out).config_file.read_bytes() == before and not RunFolder(config.out).changes_file.exists()


def test_the_command_line_changes_execution_alone(made, tmp_path, monkeypatch):
    values = yaml.safe_load(recipe(tmp_path / "run", "e2e", tokens=64, checkpoint_every=1).to_yaml())
    values["model"]["name"], values["data"]["source"] = str(made / "model"), str(made / "train.npy")
    values["data"]["heldout"] = str(made / "heldout.npy")
    train(values, display=False)
    call = ["train", "--resume", str(tmp_path / "run"), "--quiet"]
    refused = CliRunner().invoke(app, [*call, "seed=4", "training.warmup=0.5", "training.microbatch=1"])
    assert refused.exit_code == ConfigError.exit_code
    assert "training.warmup, seed: what a run computes cannot change" in " ".join(refused.output.split())
    assert CliRunner().invoke(app, [*call, "out=elsewhere"]).exit_code == ConfigError.exit_code
    done = CliRunner().invoke(app, [*call, "training.microbatch=1", "training.keep_checkpoints=3"])
    assert done.exit_code == 0, done.output
    assert RunFolder(tmp_path / "run").config().training.microbatch == 1
    assert CliRunner().invoke(app, ["train", "embedded-layer3-e2e", *call[1:]]).exit_code == ConfigError.exit_code


def test_out_of_memory_names_the_command_that_helps(model, corpora, tmp_path):
    config = recipe(tmp_path / "run", "e2e", microbatch=2)
    full = Act("accumulate", 3, raising(torch.OutOfMemoryError("CUDA out of memory.")))
    with pytest.raises(Exception, match=r"`endwise train --resume \S*run training\.microbatch=1`") as stopped:
        train_with(acting(full), [config], model, corpora)
    change = str(stopped.value).split("`")[1].split()[-1]
    done = RunConfig.read(RunFolder(config.out).config_file, [change])
    assert train(done, model=model, corpora=corpora, display=False, resume=True).sae is not None


def test_recipes_of_one_pass_may_differ_in_their_own_execution(model, corpora, tmp_path):
    one, other = recipe(tmp_path / "a", "e2e"), recipe(tmp_path / "b", "e2e", log_every=3, microbatch=1)
    assert len(train_together([one, other], model=model, corpora=corpora, display=False)) == 2
    with pytest.raises(ConfigError, match=r"differ in training\.batch"):
        train_together([one, recipe(tmp_path / "c", "e2e", batch=2)], model=model, corpora=corpora, display=False)
