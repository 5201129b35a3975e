"""Between two reports the host never waits for the device: no value is read back, no shape depends on values."""

import copy
from contextlib import ExitStack, nullcontext

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from endwise import LanguageModel, RunConfig
from endwise.kernels import standing_in
from endwise.training.trainee import Trainee
from own_kernels import DenseKernels, HeldKernels, OwnKernels, TightRooms
from own_training import train_with
from small_gpt2 import recipe, small_corpora, small_model, write_tokens

READS = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__"}
COUNTS = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "_unique2", "repeat_interleave"}
"""ATen operations that a GPU's host waits for; the last are those whose result's shape depends on values."""


class Waited(Exception):
    pass


class NoReads(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in READS:
            raise Waited(function.__name__)
        return function(*args, **(kwargs or {}))


class NoCounts(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        places = args[1] if name.startswith("index") and isinstance(args[1], list | tuple) else ()
        masks = any(index is not None and index.dtype == torch.bool for index in places)
        if name in COUNTS or masks:
            raise Waited(name)
        return function(*args, **(kwargs or {}))


def no_waiting():
    guards = ExitStack()
    guards.enter_context(NoReads())
    guards.enter_context(NoCounts())
    return guards


def no_synchronisation():
    guards = ExitStack()
    guards.callback(torch.cuda.set_sync_debug_mode, torch.cuda.get_sync_debug_mode())
    torch.cuda.set_sync_debug_mode("error")
    return guards


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: bool(x.sum() > 0),
        lambda x: float(x.sum()),
        lambda x: range(x.int().sum()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.__setitem__(x > 0, torch.ones(3)),
        lambda x: torch.bincount(x.long()),
        lambda x: x.cpu(),
        lambda x: x.unique(),
    ],
)
def test_the_guard_notices(waits):
    with pytest.raises(Waited), no_waiting():
        waits(torch.ones(3))


def test_the_guard_lets_arithmetic_pass():
    with no_waiting():
        x = torch.ones(3, requires_grad=True)
        (torch.where(x > 0, x, 0.0)[:2] * len(x)).sum().backward()


def guarded_training(model, folder, guard, monkeypatch):
    """Trains all kinds, guarded from one step's beginning to that of a later one; nothing is reported in between."""
    # Once a pass transformers reads back whether position ids start again within a sequence; with ours they never do.
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    tokens = write_tokens(folder)
    kinds = ("local", "e2e", "e2e_ds")
    configs = [recipe(folder / kind, kind, tokens=256, log_every=1000, accumulation=2, microbatch=1) for kind in kinds]
    guarded, left = ExitStack(), []

    class Guarded(Trainee):
        def begin_step(self):
            if self.objective.final and self.objective.sites:
                if self.step == 2:
                    guarded.enter_context(guard())
                if self.step == 7:
                    left.append(self.step)
                    guarded.close()
            super().begin_step()

    with guarded:
        runs = train_with(Guarded, configs, model, small_corpora(tokens))
    assert left == [7] and len(runs) == 3


def test_on_the_cpu(tmp_path, monkeypatch):
    # Sparse latents, which the CPU uses where few features are active, are found by counting.
    with standing_in("cpu", DenseKernels()):
        guarded_training(small_model(), tmp_path, no_waiting, monkeypatch)


DICTIONARIES = (
    {"architecture": "standard"},
    {"architecture": "standard", "decoder_norm": "free"},
    {"architecture": "jumprelu"},
    {"architecture": "gated"},
    {"architecture": "topk", "k": 4},
    {"architecture": "batchtopk", "k": 4},
    {"architecture": "matryoshka_batchtopk", "k": 4},
)


def sparse_training(folder, kernels, trainee):
    """Train one of each kind of dictionary, with sparse latents whatever their number, and return their tensors."""
    tokens, runs = write_tokens(folder), []
    for number, dictionary in enumerate(DICTIONARIES):
        config = recipe(folder / f"{trainee.__name__}{number}", tokens=96, microbatch=1).model_dump(mode="json")
        config["dictionary"] = {"size": 40, **dictionary}
        if "k" in dictionary:
            config["objective"]["sparsity"] = None
        runs.append(RunConfig.build(config))
    seen = []

    class Sparse(trainee):
        def __init__(self, sae, *given):
            super().__init__(sae, *given)
            sae.sparse_below = 1.0
            seen.append(self)

    with standing_in("cpu", kernels):
        train_with(Sparse, runs, small_model(), small_corpora(tokens))
    return [{name: tensor.clone() for name, tensor in each.sae.state_dict().items()} for each in seen]


def test_pairs_held_in_slots_train_as_those_that_are_counted_and_nothing_waits_for_their_number(tmp_path, monkeypatch):
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    rooms = []

    class Held(Trainee):
        def __init__(self, *given):
            super().__init__(*given)
            self.rooms = TightRooms()
            rooms.append(self.rooms)

        def accumulate(self, *given):
            with no_waiting() if self.step else nullcontext():  # the first counts what it needs
                super().accumulate(*given)

    held = sparse_training(tmp_path, HeldKernels(), Held)
    counted = sparse_training(tmp_path, OwnKernels(screened=False), Trainee)
    again = [missing for each in rooms for missing in each.missing]
    assert any(again) and not all(again)
    torch.testing.assert_close(held, counted, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(tmp_path, monkeypatch):
    model = LanguageModel(copy.deepcopy(small_model().model).cuda())
    guarded_training(model, tmp_path, no_synchronisation, monkeypatch)
