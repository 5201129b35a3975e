"""The k·B largest features of a step: against slow definitions, over processes, rivals' numbers, and in training."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.func import functional_call

import endwise
from endwise.common.errors import ConfigError, ElsewhereFailed
from endwise.common.processes import ALONE
from endwise.config.run import RunConfig
from endwise.dictionaries import BatchTopKSAE, DenseLatents, JumpReLUSAE, SparseLatents
from endwise.dictionaries.selection import (
    SPARSE_BELOW,
    Annealed,
    Encoder,
    _by_digits,
    candidates_of_step,
    cut_of,
    threshold_for,
)
from endwise.kernels import Rooms, standing_in
from endwise.kernels.interface import Room
from endwise.training.planning.plan import plan
from meeting import Meeting, of_process
from own_kernels import HeldKernels, OwnKernels
from rivals import rival
from topk_family import (
    Trained,
    before,
    check_that_resuming_ends_in_the_same_bits,
    coarse,
    exact,
    fitted_on_few,
    heldout_l0,
    largest_of_step,
    passed,
    recipe,
    trained_as,
)

pytestmark = pytest.mark.usefixtures("loaded_once")

D, F, ROWS = 12, 320, 150


def made(k=5, size=F, **settings):
    return exact(BatchTopKSAE.build(BatchTopKSAE.Config(size=size, k=k, **settings), D, 0))


def rows(n=ROWS, seed=1):
    """Rows of unequal norms, so that they have unequal numbers of active features."""
    generator = torch.Generator().manual_seed(seed)
    return coarse(torch.randn(n, D, generator=generator) * (0.5 + torch.rand(n, 1, generator=generator)))


def some(n=ROWS, share=0.7):
    return torch.rand(n, generator=torch.Generator().manual_seed(7)) < share


@pytest.mark.parametrize("k", [1, 5, 10, 11, F])
@pytest.mark.parametrize("share", [1.0, 0.7, 0.02])
def test_the_largest_of_a_step_are_those_of_the_definition(k, share):
    sae, x, counted = made(k), rows(), some(share=share)
    latents = sae.encode(x, counted)
    if share > 0.5:
        assert isinstance(latents, SparseLatents if k <= 10 else DenseLatents)
    expected, smallest = largest_of_step(before(sae, x), k, counted)
    assert torch.equal(latents.dense().detach().double(), expected)
    (kept,) = [float(sae._smallest)]
    assert kept == smallest


def test_without_a_mask_all_rows_count():
    sae = made()
    whole = sae.encode(rows(), torch.ones(ROWS, dtype=torch.bool)).dense()
    assert torch.equal(sae.encode(rows()).dense(), whole)
    assert torch.equal(sae.encode(rows().view(3, 50, D)).dense(), whole.view(3, 50, F))
    assert int((whole != 0).sum()) == 5 * ROWS
    assert (whole != 0).sum(-1).unique().numel() > 3


@pytest.mark.parametrize("size", [32, F])
def test_rows_that_do_not_count_compete_with_none(size):
    """Whatever they hold, the others' latents are the same."""
    sae, x, counted = made(5, size), rows(), some()
    alone = sae.encode(x[counted]).dense()
    for held in (1e4, 0.0, torch.nan):
        dense = sae.encode(x.where(counted[:, None], held), counted).dense()
        assert torch.equal(dense[counted], alone)
    dense = sae.encode(x, counted).dense()[~counted]
    z = sae.before(x[~counted])
    assert torch.equal(dense, z.where(z > sae._smallest, 0.0)) and dense.any()


@pytest.mark.parametrize("multiple", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("level", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("in_slots", [False, True])
def test_bounds_on_candidates_change_nothing(multiple, level, in_slots):
    """In slots one is tried: a step is taken again that it was too high for."""
    sae, x, rooms = made(), rows(), Rooms()

    class Other(Encoder):
        def bounds(self, counted, k):
            found = super().bounds(counted, k) * level
            found[0] *= multiple
            return found

    count = torch.tensor(5 * ROWS)
    with standing_in("cpu", HeldKernels() if in_slots else OwnKernels()), rooms.in_use():
        share = SPARSE_BELOW * (2 if in_slots else 1)  # for all that the second bound lets through
        among = candidates_of_step(Other(x, sae.encoder.detach(), sae.b_enc.detach(), share), None, 5.0, count)
    expected, _ = largest_of_step(before(sae, x), 5, some(share=1.0))
    if among is None:  # a bound too low, or after one too high the last, let through more than is worth it
        assert level != 1.0 or multiple < 1.0
        return
    found, cut = among.found, cut_of(among.found.values, count)
    among.check(cut)
    assert rooms.settle() == (in_slots and level == 100.0)
    if not in_slots or level == 1.0:
        kept = found.where(cut.kept(found.values))
        chosen = torch.zeros_like(expected)
        chosen[kept.pairs.rows, kept.pairs.features] = kept.values.double()
        assert torch.equal(chosen, expected)


@pytest.mark.parametrize("size", [32, F])
def test_of_equal_values_the_first_are_active(size):
    sae = made(2, size)
    with torch.no_grad():
        sae.encoder.zero_()
        sae.b_enc.fill_(-1.0)
        sae.b_enc[[3, 5, 9]] = 1.0
        sae.b_enc[7] = 2.0
    active = sae.encode(rows(10)).dense() != 0
    assert active[:, 7].all() and int(active.sum()) == 20
    assert active[:3][:, [3, 5, 9]].all() and active[3, [3]].all() and not active[3, [5, 9]].any()
    assert not active[4:][:, [3, 5, 9]].any()


@pytest.mark.parametrize("size", [32, F])
def test_fewer_positive_ones_than_wanted_are_active_alone(size):
    sae = made(5, size)
    with torch.no_grad():
        sae.b_enc -= 1.5 * sae.before(rows()).max(0).values.median()
    latents = sae.encode(rows())
    z = torch.relu(sae.before(rows()))
    assert torch.equal(latents.dense(), z) and 0 < latents.l0().mean() < 5
    assert sae._smallest == z[z > 0].min()
    with torch.no_grad():
        sae.b_enc -= 1e3
    assert not sae.encode(rows()).dense().any() and sae._smallest.isinf()
    sae.after_step()
    assert sae.weight == 0 and sae.threshold == 0


@pytest.mark.parametrize("size", [32, F])
def test_nan_stays_and_spoils_no_threshold(size):
    sae, x = made(5, size), rows()
    x[[0, 3, 70]] = torch.nan
    dense = sae.encode(x).dense()
    assert dense[[0, 3, 70]].isnan().all() and int(dense.isnan().any(-1).sum()) == 3
    sae.after_step()
    assert 0 < sae.threshold < 10


@pytest.mark.parametrize("size", [32, F])
def test_activations_in_half_precision(size):
    sae, x = made(5, size), rows().bfloat16()
    dense = sae.encode(x).dense()
    expected, _ = largest_of_step(before(sae, x.float()), 5, some(share=1.0))
    assert torch.equal(dense.detach().double(), expected)
    half = made(5, 32).bfloat16()
    assert int((half.encode(x).dense() != 0).sum()) == 5 * ROWS  # many are equal in bf16


@pytest.mark.parametrize("size", [32, F])
def test_gradients_are_finite_differences(size):
    sae, x = made(4, size).double(), rows(7).double()
    parts = {name: parameter.detach().clone() for name, parameter in sae.named_parameters()}
    target = torch.randn(7, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for name, part in parts.items():

        def call(value, name=name):
            return (functional_call(sae, parts | {name: value}, (x,)) - target).square().sum()

        leaf = part.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(call(leaf), leaf)
        way = torch.randn(leaf.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        measured = (call(leaf.detach() + 1e-6 * way) - call(leaf.detach() - 1e-6 * way)) / 2e-6
        torch.testing.assert_close((gradient * way).sum(), measured, rtol=1e-5, atol=1e-6)


class NoRooms(Rooms):
    """Too little for any pairs."""

    def _room(self, limit):
        return Room(0, 0)


@pytest.mark.parametrize("size", [32, F])
@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("slots", ["none", "all", "some"])
def test_processes_choose_as_one(size, processes, equal, slots):
    """Shares of unequal size and height; with equal rows ties go to the first process, which may be dense alone."""
    x, counted = rows(), some()
    x[:40] *= 3
    if equal:
        x = x[:1].expand(ROWS, -1).contiguous()
    alone = made(5, size)
    whole = alone.encode(x, counted).dense()

    def share(world):
        sae = made(5, size)
        sae.world, sae.sparse_below = world, SPARSE_BELOW if slots == "none" else 1.0
        own = of_process(world, ROWS)
        rooms = NoRooms() if slots == "some" and world.rank == 0 else Rooms()
        with rooms.in_use():
            latents = sae.encode(x[own], counted[own])
        sae.after_step()
        assert not rooms.settle()
        if slots != "none":
            assert (latents.pairs() is None) == isinstance(rooms, NoRooms)
        return latents.dense(), sae.threshold

    with standing_in("cpu", OwnKernels() if slots == "none" else HeldKernels()):
        found = Meeting(processes).run(share)
    alone.after_step()
    dense = torch.cat([each for each, _ in found])
    if equal:
        torch.testing.assert_close(dense, whole)
    else:
        assert torch.equal(dense != 0, whole != 0)
    assert all(torch.equal(threshold, alone.threshold) for _, threshold in found)


def test_what_fails_at_the_search_in_one_process_is_told_to_the_others():
    """None of them waits for it in the cut."""

    class Broken(Rooms):
        def find(self, limit, held):
            raise ArithmeticError("only here")

    def share(world):
        sae, rooms = made(5), Broken() if world.rank else Rooms()
        sae.world = world
        with rooms.in_use(), pytest.raises((ArithmeticError, ElsewhereFailed)) as error:
            sae.encode(rows()[of_process(world, ROWS)])
        return error.type

    with standing_in("cpu", HeldKernels()):
        assert Meeting(2).run(share) == [ElsewhereFailed, ArithmeticError]


def test_few_small_sums_find_the_smallest_kept_value():
    meeting, values = Meeting(2), torch.rand(1000, generator=torch.Generator().manual_seed(1))
    cuts = meeting.run(lambda world: cut_of(values[of_process(world, 1000)], torch.tensor(300), world))
    assert {float(cut.smallest) for cut in cuts} == {float(values.sort(descending=True).values[299])}
    assert meeting.sums == 1 + 8 + 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_process_may_have_values_of_half_precision(dtype):
    """Some values that exceed the other's smallest round to it."""
    draw = torch.Generator().manual_seed(2)
    shares = [(1 + torch.rand(40, generator=draw) / 16).to(dtype), 1 + torch.rand(40, generator=draw) / 16]
    together = torch.cat([each.double() for each in shares])
    for count in range(1, 80, 3):

        def kept(world, count=count):
            own = shares[world.rank]
            cut = cut_of(own.float(), torch.tensor(count), world).within(own.dtype)
            return own[cut.kept(own)].double()

        found = torch.cat(Meeting(2).run(kept))
        assert torch.equal(found.sort(descending=True).values, together.sort(descending=True).values[:count])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [0, 1, 40, 2000])
def test_the_smallest_kept_value_is_exact(dtype, count):
    generator = torch.Generator().manual_seed(3)
    values = (torch.randn(1000, dtype=dtype, generator=generator) * 40).exp2()  # over the whole range of floats
    values[::3] *= -1
    values[5] = torch.nan
    cut = cut_of(values, torch.tensor(count))
    ordered = values[values > 0].sort(descending=True).values
    kept = ordered[:count]
    assert float(cut.smallest) == (float(kept[-1]) if len(kept) else float("inf"))
    bits = values.where(values > 0, 0.0).view(torch.int32 if dtype == torch.float32 else torch.int64)
    searched = _by_digits(bits, torch.tensor(len(kept)), ALONE).view(dtype)  # as on a GPU
    assert float(searched) == float(kept[-1]) if len(kept) else searched.isnan()
    assert torch.equal(values[cut.kept(values) & ~values.isnan()].sort(descending=True).values, kept)


def test_the_moving_average_starts_unbiased():
    sae, smallest = made(threshold_rate=0.1), []
    for step in range(12):
        sae.encode(rows(seed=step))
        smallest.append(float(sae._smallest))
        sae.after_step()
        weights = [0.1 * 0.9 ** (step - number) for number in range(step + 1)]
        expected = sum(w * s for w, s in zip(weights, smallest, strict=True)) / sum(weights)
        assert float(sae.threshold) == pytest.approx(expected, rel=1e-6)
    assert float(made().threshold) == 0


@pytest.mark.parametrize("size", [32, F])
def test_outside_training_features_are_active_above_the_threshold(size):
    sae = made(5, size)
    sae.encode(rows())
    sae.after_step()
    sae.eval()
    z = sae.before(rows(seed=5))
    assert torch.equal(sae.encode(rows(seed=5)).dense(), z.where(z > sae.threshold, 0.0))
    one, other = sae.encode(rows(seed=5)).dense(), torch.cat([sae.encode(row[None]).dense() for row in rows(seed=5)])
    torch.testing.assert_close(one, other)  # each row for itself


def test_at_the_end_k_features_are_active_on_average():
    sae = BatchTopKSAE.build(BatchTopKSAE.Config(size=F, k=5), D, 0)
    x = torch.randn(999, D, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        sae.see_last(x, x)
        of_rows = Encoder(x, sae.encoder, sae.b_enc)
        few_at_a_time = float(threshold_for(of_rows, 5.0, elements=1000))
        assert float(sae.threshold) == pytest.approx(few_at_a_time, rel=1e-6)
    assert float((sae.before(x) > sae.threshold).sum()) == pytest.approx(5 * 999, abs=2)  # which round otherwise
    assert float(sae.eval().encode(x).l0().mean()) == pytest.approx(5, rel=1e-3)
    sae.b_enc.data -= 1e3
    with torch.no_grad():
        sae.see_last(rows(), rows())
    assert sae.threshold == 0


RIVALS = ["sae_lens/batchtopk", "dictionary_learning/batchtopk"]


def of_width_8(**settings):
    return BatchTopKSAE(8, 24, k=Annealed(4), unit_norm=False, initialisation=None, **settings)


@pytest.mark.parametrize("name", RIVALS)
def test_a_rivals_pass(name):
    stored = rival(name)
    bias = "encoder.bias" if "encoder.bias" in stored.under("start") else "b_enc"
    few = stored.under("start") | {bias: stored.tensors["few.b_enc"]}
    for p, prefix in ((stored.under("start"), ""), (few, "few.")):
        latents, out, _ = passed(of_width_8(), p, stored.tensors["x"])
        torch.testing.assert_close(latents, stored.tensors[f"{prefix}latents"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out, stored.tensors[f"{prefix}out"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", RIVALS)
def test_a_rivals_weights_and_threshold_after_20_steps(name):
    """SAELens's moving average has our weights but for the correction of its start."""
    stored, sae = rival(name), of_width_8()
    averages = []

    def after_step():
        sae.after_step()
        averages.append(float(sae.average))

    trained_as(stored, lambda p, x: (passed(sae, p, x)[1] - x).square().sum(-1).mean(), after_step)
    if name == "sae_lens/batchtopk":
        torch.testing.assert_close(
            torch.tensor(averages, dtype=torch.float64),
            stored.tensors["steps.topk_threshold"].double(),
            rtol=1e-4,
            atol=1e-5,
        )
        corrected = averages[-1] / (1 - 0.99**20)
        assert float(sae.threshold) == pytest.approx(corrected, rel=1e-5) and corrected > 5 * averages[-1]


def test_saved_it_is_a_jumprelu_dictionary(tmp_path):
    sae = made()
    with torch.no_grad():
        sae.see_last(rows(), rows())
    sae.save(tmp_path)
    cfg = endwise.dictionaries.read_cfg(tmp_path)
    assert cfg["architecture"] == "jumprelu" and "k" not in cfg
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    assert torch.equal(tensors["threshold"], sae.threshold.expand(F))
    torch.testing.assert_close(tensors["W_dec"].norm(dim=-1), torch.ones(F))
    again = endwise.SAE.load(tmp_path)
    assert isinstance(again, JumpReLUSAE)
    torch.testing.assert_close(again.encode(rows()).dense(), sae.eval().encode(rows()).dense().detach())
    torch.testing.assert_close(again(rows()), sae(rows()).detach())


@pytest.fixture(scope="module")
def model():
    return endwise.load_model("embedded")


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory):
    return Trained(tmp_path_factory.mktemp("batchtopk"), "batchtopk", model)


@pytest.mark.parametrize("kind", ["local", "e2e", pytest.param("e2e_ds", marks=pytest.mark.slow)])
def test_every_objective_trains_it(runs, kind):
    lines = [json.loads(line) for line in (runs[kind].folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all(line["l0"] == pytest.approx(6, abs=0.01) for line in lines)


@fitted_on_few()
def test_resumed_it_ends_in_the_same_bits(runs, model, tmp_path):
    check_that_resuming_ends_in_the_same_bits(runs["e2e"], model, tmp_path / "run")
    state = load_file(tmp_path / "run" / "checkpoints" / "step-000000008.safetensors")
    assert float(state["sae.weight"]) == pytest.approx(1 - 0.99**8) and state["sae.fitted"] > 0


@pytest.mark.parametrize("steps", [4, pytest.param(64, marks=pytest.mark.slow)])
def test_of_the_saved_one_k_features_are_active_on_held_out_text(model, tmp_path, steps):
    """However short the training was."""
    values = recipe(tmp_path / "run", "batchtopk", tokens=128 * steps, learning_rate=3e-3)
    run = endwise.train(values, model=model, display=False)
    assert heldout_l0(run.folder, model) == pytest.approx(6, rel=0.03)


@fitted_on_few()
def test_trained_on_from_what_was_saved(runs, model, tmp_path):
    config = {**recipe(tmp_path / "on", "batchtopk", tokens=256), "init_from": str(runs["local"].folder)}
    on = endwise.train(config, model=model, display=False)
    first, begun = (
        json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[0])["local_mse"]
        for run in (on, runs["local"])
    )
    assert first < 0.8 * begun
    sae = BatchTopKSAE.continuing(endwise.SAE.load(runs["local"].folder), RunConfig.build(config).dictionary)
    x = torch.randn(30, model.d_model)
    torch.testing.assert_close(sae.eval()(x), runs["local"].sae(x), rtol=1e-5, atol=1e-5)


@fitted_on_few()
def test_swept_by_k(model, tmp_path):
    base = {name: value for name, value in recipe("x", "batchtopk", tokens=256).items() if name not in ("out", "seed")}
    swept = endwise.sweep(
        {"recipe": base, "grids": [{"dictionary.k": [3, 8]}], "out": str(tmp_path / "sweep")}, display=False
    )
    assert [row["l0"] for row in swept.rows] == pytest.approx([3, 8], rel=0.1)


def test_planned_and_in_one_pass_a_step():
    assert plan(RunConfig.build(recipe("x", "batchtopk"))).d_sae == 256
    with pytest.raises(ConfigError, match=r"training\.accumulation is 2, but a batchtopk dictionary chooses"):
        RunConfig.build(recipe("x", "batchtopk", accumulation=2))
