"""Training on a model whose blocks lie in parts, one in each process, is training on the whole one."""

import json
import shutil

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from endwise import RunConfig, load_model, train, train_together
from endwise.common.errors import ConfigError, ModelError
from endwise.common.processes import ALONE
from endwise.models.loading import _weighted
from endwise.models.sharding import sharder, shares
from endwise.runs.folder import RunFolder
from endwise.training.setup import check_sharded
from places import HELPERS
from sharded_model import KINDS, configs
from small_gpt2 import recipe, small_model
from spread import assert_close, spread


@pytest.mark.skipif(not hasattr(FSDPModule, "reset_iter_state"), reason="this torch cannot divide a model")
def test_two_processes_with_half_a_model_each(made, tmp_path):
    alone = tmp_path / "alone"
    train_together(configs(made, alone, sharded=False), display=False)
    shutil.copytree(alone, tmp_path / "resumed")
    done = spread(2, HELPERS / "sharded_model.py", made, tmp_path / "two", tmp_path / "resumed")
    assert done.returncode == 0, done.stderr
    of_one = configs(made, tmp_path / "two", sharded=False)[-1]
    assert_same_curves(tmp_path / "two", alone, KINDS)
    assert_same_curves(tmp_path / "resumed", alone, KINDS[-1:])
    train(of_one, resume=True, from_step=2, display=False)
    assert_same_curves(tmp_path / "two", alone, KINDS[-1:])


def test_a_torch_that_cannot_is_refused(monkeypatch):
    monkeypatch.delattr(FSDPModule, "reset_iter_state", raising=False)
    with pytest.raises(ModelError, match=r"needs a later torch than .*\. Install the newest, or unset it"):
        sharder(ALONE, torch.device("cpu"))


def assert_same_curves(folder, alone, kinds):
    for kind in kinds:
        ours, theirs = (RunFolder(each / kind).metrics() for each in (folder, alone))
        assert len(ours) == len(theirs) == 4 and "heldout" in theirs[-1]
        for one, other in zip(ours, theirs, strict=True):
            assert_close(one, other, f"{kind} {other['step']}")


@pytest.mark.parametrize(
    ("changes", "processes", "given", "why"),
    [
        ({}, 1, False, "there is one process only. Start several"),
        ({"training.shards": 2}, 2, False, "training.shards=2 divides its dict.* Set training.shards=1, or unset"),
        ({}, 2, True, "was loaded whole. Let the recipe load it"),
        ({"model.quantization": "torchao-8bit"}, 2, False, "packed by torchao-8bit cannot be divided"),
        ({"training.precision": "mixed"}, 2, False, "mixed copies a model in float32. Set model.dtype=bfloat16"),
    ],
)
def test_what_cannot_be_sharded_is_refused_first(tmp_path, changes, processes, given, why):
    values = RunConfig.changed(recipe(tmp_path).model_dump(), {"model.sharded": True, "model.device": "cpu", **changes})
    config = RunConfig.build(values)
    with pytest.raises(ConfigError, match=why):
        check_sharded(config, processes, given=small_model() if given else None)
    check_sharded(RunConfig.build(RunConfig.changed(values, {"model.sharded": False})), processes)


def test_packed_weights_are_not_sharded(made, tmp_path):
    shutil.copytree(made / "model", tmp_path / "packed")
    file, method = tmp_path / "packed" / "config.json", {"quant_method": "bitsandbytes", "load_in_8bit": True}
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": method}))
    shared = {"revision": "main", "trust_remote_code": False}
    with pytest.raises(ModelError, match=r"it is quantised by bitsandbytes .*packed weights cannot be sharded"):
        _weighted(str(tmp_path / "packed"), "it", shared, None, torch.float32, None)


def test_alone_it_is_whole(made):
    assert shares(load_model(str(made / "model"), sharded=True).model) == 1
