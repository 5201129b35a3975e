"""Dictionaries whose features are split over processes train as whole ones do, and are saved and resumed whole."""

import shutil
from dataclasses import dataclass

import pytest
import torch

from endwise import SAE, train
from endwise.common.errors import ConfigError
from endwise.common.processes import ALONE, World
from endwise.config.dictionary import ARCHITECTURES, of_architecture
from endwise.dictionaries.selection import best_places
from endwise.runs.checkpoints import read_checkpoint
from endwise.runs.folder import RunFolder
from places import HELPERS
from sharded_runs import RUNS, config, run
from spread import TOLERANCE, assert_close, spread

RESUMED = ("relu", "batchtopk", "steered")


def launched(processes, folder, tokens, *runs, **environment):
    done = spread(processes, HELPERS / "sharded_runs.py", folder, tokens, *runs, **environment)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def alone(token_files, tmp_path_factory):
    """What one process makes of each recipe."""
    folder = tmp_path_factory.mktemp("alone")
    for name in RUNS:
        run(folder, token_files, name)
    return folder


@pytest.fixture(scope="module")
def split(token_files, tmp_path_factory):
    """What two processes make of it, with half of the features each."""
    folder = tmp_path_factory.mktemp("split")
    launched(2, folder, token_files, *(f"{name}:2:0" for name in RUNS))
    return folder


def assert_same(folder, whole):
    ours, theirs = RunFolder(folder).metrics(), RunFolder(whole).metrics()
    assert len(ours) == len(theirs) == 8 and any("heldout" in line for line in theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other, f"step {other['step']}")
    kept, expected = (read_checkpoint(RunFolder(each).latest_checkpoint()) for each in (folder, whole))
    assert kept.tensors.keys() == expected.tensors.keys() and kept.state["step"] == expected.state["step"]
    assert torch.equal(kept.tensors["last_fired"], expected.tensors["last_fired"])
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(kept.tensors[name], tensor, rtol=TOLERANCE, atol=TOLERANCE, msg=name)


@pytest.mark.parametrize("name", RUNS)
def test_two_shards_give_the_curve_of_one_process(alone, split, name):
    assert_same(split / name, alone / name)
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(0))
    ours, theirs = (SAE.load(folder / name) for folder in (split, alone))
    assert ours.architecture == theirs.architecture
    torch.testing.assert_close(ours(x), theirs(x), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("of", ["alone", "split"])
def test_other_numbers_of_processes_and_shards_resume(request, alone, token_files, tmp_path, of):
    for name in RESUMED:
        for how in ("whole", "halves", "replicas"):
            shutil.copytree(request.getfixturevalue(of) / name, tmp_path / f"{name}-{how}")
        run(tmp_path, token_files, f"{name}-whole", 1, step=4)
    ways = [(f"{name}-halves:2:4", f"{name}-replicas:1:4") for name in RESUMED]
    launched(2, tmp_path, token_files, *(way for pair in ways for way in pair))
    for name in RESUMED:
        for how in ("whole", "halves", "replicas"):
            assert_same(tmp_path / f"{name}-{how}", alone / name)


def test_shards_beside_data_parallel_processes(alone, token_files, tmp_path):
    shutil.copytree(alone / "relu", tmp_path / "relu")
    launched(4, tmp_path, token_files, "relu:2:4", "batchtopk:2:0", "topk:2:0", "means:2:0")
    for name in ("relu", "batchtopk", "topk", "means"):
        assert_same(tmp_path / name, alone / name)


def test_a_process_that_fails_ends_all(token_files, tmp_path):
    done = spread(2, HELPERS / "sharded_runs.py", tmp_path, token_files, "relu:2:0", FAIL_AT="6", ENDWISE_TIMEOUT="60")
    assert done.returncode != 0 and "ArithmeticError: only here" in done.stderr
    assert RunFolder(tmp_path / "relu").saved_steps() == [4]


@dataclass(frozen=True)
class Supposed(World):
    """A process whose others are not there."""

    others: tuple[torch.Tensor, ...] = ()

    def stack(self, tensor):
        return torch.stack(self.others)


def of_shards(rank, size):
    return World(rank, size, grid=(ALONE, Supposed(rank, size)))


@pytest.mark.parametrize("k", [1, 3, 7, 20])
def test_best_of_shards_are_the_best_of_all(k):
    generator = torch.Generator().manual_seed(k)
    values = torch.randint(-2, 6, (50, 24), generator=generator).clamp(min=0).float()  # many are equal
    by_value_then_place = values.sort(-1, descending=True, stable=True).indices[:, :k]
    expected = torch.zeros_like(values, dtype=torch.bool).scatter_(-1, by_value_then_place, True) & (values > 0)
    parts, own = values.chunk(3, -1), min(k, 8)
    largest = [
        part.gather(-1, part.sort(-1, descending=True, stable=True).indices[:, :own].sort(-1).values) for part in parts
    ]
    found = [best_places(part, own, k, Supposed(rank, 3, others=tuple(largest))) for rank, part in enumerate(parts)]
    assert torch.equal(torch.cat(found, -1) & (values > 0), expected)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"architecture": "gated"}, "dictionary.architecture is gated"),
        ({"architecture": "matryoshka_batchtopk", "k": 3}, "dictionary.architecture is matryoshka_batchtopk"),
        ({"architecture": "topk", "k": 3, "aux": 0.03}, "dictionary.aux is 0.03"),
        ({"architecture": "topk", "k": 3, "revive": 0.1}, "dictionary.revive is 0.1"),
        ({"architecture": "standard", "resample_at": [0.5]}, "dictionary.resample_at is set"),
        ({"architecture": "jumprelu", "penalty": "quadratic", "target_l0": 5}, "dictionary.penalty is quadratic"),
        ({"architecture": "standard", "size": 41}, "does not divide the 41 features"),
    ],
)
def test_what_cannot_be_split_is_refused(settings, named):
    section = of_architecture({"size": 40, **settings})
    whole = ARCHITECTURES[section.architecture].build(section, 16, 0)
    with pytest.raises(ConfigError, match=f"training.shards is 2, .*{named}"):
        whole.split(of_shards(0, 2))
    assert whole.split(ALONE) is whole


def test_shards_need_as_many_processes(token_files, tmp_path):
    with pytest.raises(ConfigError, match=r"training.shards is 2, .* 1 is no multiple of it.*nproc-per-node=2"):
        train(config("relu", tmp_path, token_files, 2), display=False)
    assert not (tmp_path / "relu").exists()
