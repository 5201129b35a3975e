"""Dictionaries whose features are split over processes train as whole ones do, and are saved and resumed whole."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from threading import Barrier

import pytest
import torch

from endwise import SAE, train
from endwise.common.errors import ConfigError
from endwise.common.processes import ALONE, World
from endwise.config.dictionary import ARCHITECTURES, of_architecture
from endwise.dictionaries import TrainingPass
from endwise.dictionaries.sharing import best_places
from endwise.kernels import Rooms, kept_per_row, standing_in
from endwise.runs.checkpoints import read_checkpoint
from endwise.runs.folder import RunFolder
from own_kernels import HeldKernels
from places import HELPERS
from sharded_runs import RUNS, config, run
from spread import TOLERANCE, assert_close, spread

IN_SLOTS = ("batchtopk-replicas:1:0", "batchtopk-halves:2:0", "topk-halves:2:0")
RESUMED = ("relu", "batchtopk", "transcoder")


def launched(processes, folder, tokens, *runs, **environment):
    done = spread(processes, HELPERS / "sharded_runs.py", folder, tokens, *runs, **environment)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def alone(token_files, tmp_path_factory):
    """Runs of each recipe in one process."""
    folder = tmp_path_factory.mktemp("alone")
    for name in RUNS:
        run(folder, token_files, name)
    return folder


@pytest.fixture(scope="module")
def split(token_files, tmp_path_factory):
    """Runs in two processes, with half of the features each; also of `IN_SLOTS`."""
    folder = tmp_path_factory.mktemp("split")
    launched(2, folder, token_files, *(f"{name}:2:0" for name in RUNS), "IN_SLOTS", *IN_SLOTS)
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
        none = name == "random.python.gauss"  # NaN stands for none drawn ahead
        close = {"rtol": TOLERANCE, "atol": TOLERANCE, "equal_nan": none, "msg": name}
        torch.testing.assert_close(kept.tensors[name], tensor, **close)


@pytest.mark.parametrize("name", RUNS)
def test_two_shards_give_the_curve_of_one_process(alone, split, name):
    assert_same(split / name, alone / name)
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(0))
    ours, theirs = (SAE.load(folder / name) for folder in (split, alone))
    assert ours.architecture == theirs.architecture
    steps = [[file.name for file in sorted((folder / name).glob("saes/*"))] for folder in (split, alone)]
    assert steps[0] == steps[1] and bool(steps[0]) == (name == "relu")  # which alone asks for them
    torch.testing.assert_close(ours(x), theirs(x), rtol=TOLERANCE, atol=TOLERANCE)


def test_other_numbers_of_processes_and_shards_resume(alone, split, token_files, tmp_path):
    """One process, two with a share of each batch, two with half of the features."""
    ways = {"whole": split, "replicas": split, "halves": alone}
    for name in RESUMED:
        for way, before in ways.items():
            shutil.copytree(before / name, tmp_path / f"{name}-{way}")
        run(tmp_path, token_files, f"{name}-whole", 1, step=4)
    of_two = [(f"{name}-halves:2:4", f"{name}-replicas:1:4") for name in RESUMED]
    launched(2, tmp_path, token_files, *(each for pair in of_two for each in pair))
    for name in RESUMED:
        for way in ways:
            assert_same(tmp_path / f"{name}-{way}", alone / name)


def test_shards_beside_data_parallel_processes(alone, token_files, tmp_path):
    shutil.copytree(alone / "relu", tmp_path / "relu")
    launched(4, tmp_path, token_files, "relu:2:4", "batchtopk:2:0", "topk:2:0", "means:2:0")
    for name in ("relu", "batchtopk", "topk", "means"):
        assert_same(tmp_path / name, alone / name)


def test_processes_that_hold_pairs_in_slots_give_the_curve_of_one(alone, split):
    """With features in the whole or in halves; a step is taken again by all where one lacks room."""
    for name in (each.partition(":")[0] for each in IN_SLOTS):
        assert_same(split / name, alone / name.partition("-")[0])
    missing = (json.loads((split / f"missing-{rank}.json").read_text()) for rank in range(2))
    for one, other in zip(*missing, strict=True):
        assert len(one) == len(other) > 8 and one != other


def test_a_process_that_fails_ends_all(token_files, tmp_path):
    done = spread(2, HELPERS / "sharded_runs.py", tmp_path, token_files, "relu:2:0", FAIL_AT="6", ENDWISE_TIMEOUT="60")
    assert done.returncode != 0 and "ArithmeticError: only here" in done.stderr
    assert RunFolder(tmp_path / "relu").saved_steps() == [4]


class Meeting:
    """Meeting point at which threads that stand for processes exchange tensors."""

    def __init__(self, size):
        self._barrier, self._given = Barrier(size, timeout=60), [None] * size

    def exchange(self, rank, value):
        self._given[rank] = value
        self._barrier.wait()
        given = list(self._given)
        self._barrier.wait()
        return given


@dataclass(frozen=True)
class InThreads(World):
    meeting: Meeting | None = None

    def add(self, tensors):
        for tensor in tensors:
            tensor.copy_(sum(self.meeting.exchange(self.rank, tensor.clone())))

    def stack(self, tensor):
        return torch.stack(self.meeting.exchange(self.rank, tensor))

    def gather(self, value):
        return self.meeting.exchange(self.rank, value)

    @classmethod
    def run(cls, size, act):
        """Results of `act` in each shard's world."""
        all_of_them, shards = Meeting(size), Meeting(size)
        grids = [(ALONE, cls(rank, size, meeting=shards)) for rank in range(size)]
        worlds = [cls(rank, size, grid=grid, meeting=all_of_them) for rank, grid in enumerate(grids)]
        with ThreadPoolExecutor(size) as threads:
            return list(threads.map(act, worlds))


@pytest.mark.parametrize("k", [1, 3, 7, 20])
def test_best_of_shards_are_the_best_of_all(k):
    values = torch.randint(-2, 6, (50, 24), generator=torch.Generator().manual_seed(k)).float()  # many are equal
    first = values.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    found = InThreads.run(3, lambda world: best_places(values.chunk(3, -1)[world.rank], min(k, 8), k, world.shards))
    kept = torch.cat(found, -1)
    assert (kept.sum(-1) == k).all()
    assert torch.equal(values.where(kept, -9).sort(-1).values[:, -k:], values.gather(-1, first).flip(-1))
    beyond = min(k, 8) < 8  # of equal ones within a shard any may be kept, between shards the first
    assert beyond or torch.equal(kept, torch.zeros_like(kept).scatter_(-1, first, True))


class Slots(HeldKernels):
    """Counts how often slots are filled; in float64 too."""

    filled = 0

    def largest_held(self, x, weight, bias, k, room):
        def chosen(_pairs, z):
            return (kept_per_row(z.view(len(x), -1), k) & (z.view(len(x), -1) > 0)).view(-1)

        return self._held(x, weight, bias, room, chosen)

    def _held(self, x, weight, bias, room, chosen):
        self.filled += room.pairs > 0
        return super()._held(x, weight, bias, room, chosen)


@pytest.mark.parametrize("in_slots", [False, True], ids=["counted", "in_slots"])
@pytest.mark.parametrize(
    "settings",
    [
        {"architecture": "standard", "decoder_norm": "free", "aux": 0.5, "aux_negative": True},
        {"architecture": "jumprelu", "bandwidth": 2.0, "revive": 0.1, "revives": "all"},
        {"architecture": "topk", "k": 7, "aux": 0.5, "aux_k": 4, "revive": 0.1},
        {"architecture": "topk", "k": 4, "size": 384},
        {"architecture": "batchtopk", "k": 7, "aux": 0.5, "revive": 0.1},
        {"architecture": "batchtopk", "k": 4, "size": 384},
    ],
    ids=lambda settings: f"{settings['architecture']}-{settings.get('size', 24)}",
)
def test_gradients_of_shards_are_those_of_the_whole(settings, in_slots):
    section = of_architecture({"size": 24, **settings})
    whole = ARCHITECTURES[section.architecture].build(section, 6, 0).double()
    x, target = torch.randn(2, 40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    counted, dead = (
        torch.arange(40) % 5 > 0,
        torch.arange(whole.d_sae) % 24 < 10,
    )  # all of the first shard, some of the next

    def learned(sae):
        with torch.no_grad():
            sae.see_first(x, target)
        sae.train().begin_step(0.0)
        rooms = Rooms()
        with rooms.in_use():
            latents = sae.encode(x, counted)
        assert not rooms.settle()
        reconstruction = sae.reconstruct(latents, x)
        own = sae.own_terms(TrainingPass(x, target, latents, reconstruction, counted, dead))
        loss = (target - reconstruction)[counted].square().sum() + latents.penalty(1.0, counted).sum()
        loss = loss + sum(weight * own[name] for name, weight in sae.own_weights.items())
        loss.backward()
        gradients = {name: each.grad for name, each in sae.named_parameters() if each.grad is not None}
        return loss.detach(), latents.l0(), latents.fired(counted), gradients

    loss, l0, fired, gradients = learned(whole)
    if in_slots:
        whole.sparse_below = 1.0  # any number of pairs
    slots = Slots()
    with standing_in("cpu", slots) if in_slots else nullcontext():
        found = InThreads.run(3, lambda world: learned(whole.split(world)))
    assert slots.filled == 3 * in_slots
    for of_shard in found:
        torch.testing.assert_close(of_shard[0], loss)
        assert torch.equal(of_shard[1], l0) and torch.equal(of_shard[2], fired)
    for name, gradient in gradients.items():
        parts = [of_shard[3][name] for of_shard in found if name in of_shard[3]]
        assert len(parts) == (1 if name == "b_dec" else 3)
        torch.testing.assert_close(torch.cat(parts), gradient, msg=name)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"architecture": "gated"}, "dictionary.architecture is gated"),
        ({"architecture": "matryoshka_batchtopk", "k": 3}, "dictionary.architecture is matryoshka_batchtopk"),
        ({"architecture": "standard", "resample_at": [0.5]}, "dictionary.resample_at is set"),
        ({"architecture": "jumprelu", "penalty": "quadratic", "target_l0": 5}, "dictionary.penalty is quadratic"),
        ({"architecture": "standard", "size": 41}, "does not divide the 41 features"),
    ],
)
def test_what_cannot_be_split_is_refused(settings, named):
    section = of_architecture({"size": 40, **settings})
    whole = ARCHITECTURES[section.architecture].build(section, 16, 0)
    with pytest.raises(ConfigError, match=f"training.shards is 2, .*{named}"):
        whole.split(World(0, 2, grid=(ALONE, World(0, 2))))
    assert whole.split(ALONE) is whole


def test_shards_need_as_many_processes(token_files, tmp_path):
    with pytest.raises(ConfigError, match=r"training.shards is 2, .* 1 is not a multiple of it.*nproc-per-node=2"):
        train(config("relu", tmp_path, token_files, 2), display=False)
    assert not (tmp_path / "relu").exists()
