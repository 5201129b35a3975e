"""Prefixes of a dictionary: decoded as the definition says, drawn as stated, and trained with every objective."""

import itertools
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import endwise
from endwise.common.errors import ConfigError
from endwise.common.processes import World
from endwise.config.run import RunConfig
from endwise.dictionaries import DenseLatents, MatryoshkaSAE, SparseLatents
from endwise.dictionaries.matryoshka import drawn_prefixes, lengths_of, prefixes_of
from endwise.dictionaries.selection import Annealed
from endwise.models.splicing import spliced
from endwise.training.planning.plan import plan
from endwise.training.trainee import Trainee
from own_training import train_with
from rivals import rival
from topk_family import KINDS, Trained, fitted_on_few, heldout_l0, passed, recipe, trained_as

pytestmark = pytest.mark.usefixtures("loaded_once")

D, F = 12, 320


def made(k=5, size=F, **settings):
    return MatryoshkaSAE.build(MatryoshkaSAE.Config(size=size, k=k, **settings), D, 0)


def rows(*shape, seed=1):
    return torch.randn(*(shape or (6, 20)), D, generator=torch.Generator().manual_seed(seed))


def of_prefix(sae, dense, length, x):
    """x̂ of the first features alone, in float64."""
    result = dense[..., :length].double() @ sae.W_dec[:length].double() + sae.b_dec.double()
    return result if sae.W_skip is None else result + x.double() @ sae.W_skip.double().T


def test_default_groups_are_shares_of_the_features():
    assert made().prefixes == (10, 30, 70, 150, 320)
    assert prefixes_of((1 / 32, 1 / 16, 1 / 8, 1 / 4), 24) == (1, 2, 5, 11, 24)
    assert prefixes_of((0.25, 0.25), 24) == (6, 12, 24)
    assert prefixes_of((0.001, 0.001), 24) == (1, 24)  # a group has a feature at least


@pytest.mark.parametrize("settings", [{}, {"decoder_norm": "free"}, {"skip": True}, {"groups": (0.5, 0.1)}], ids=str)
@pytest.mark.parametrize(("size", "kind"), [(F, SparseLatents), (64, DenseLatents)])
def test_nested_reconstructions_are_those_of_the_prefixes(size, kind, settings):
    sae, x = made(5, size, **settings), rows()
    if sae.W_skip is not None:
        torch.nn.init.normal_(sae.W_skip)
    latents = sae.encode(x)
    assert isinstance(latents, kind)
    nested = sae.nested(latents, x)
    assert len(nested) == len(sae.prefixes)
    for length, each in zip(sae.prefixes, nested, strict=True):
        torch.testing.assert_close(each.double(), of_prefix(sae, latents.dense(), length, x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(nested[-1], sae.reconstruct(latents, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("unit", ["unit", "free"])
def test_gradients_of_the_mean_over_prefixes(unit):
    """Against one dense decoding for each prefix, in float64."""
    sae, x = made(5, F, decoder_norm=unit).double(), rows().double()
    latents = sae.encode(x)
    losses = torch.stack([(each - x).square().mean() for each in sae.nested(latents, x)])
    found = torch.autograd.grad(losses.mean(), list(sae.parameters()))
    dense = sae.encode(x).dense()
    losses = torch.stack([(of_prefix(sae, dense, length, x) - x).square().mean() for length in sae.prefixes])
    expected = torch.autograd.grad(losses.mean(), list(sae.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("size", "kind"), [(F, SparseLatents), (64, DenseLatents)])
def test_each_sequence_is_spliced_from_its_own_prefix(size, kind):
    sae, x = made(5, size), rows(30, 7)
    latents = sae.encode(x)
    assert isinstance(latents, kind)
    lengths = sae.lengths(30)
    assert set(lengths.tolist()) == set(sae.prefixes)
    spliced = sae.spliced(latents, x)
    for number, length in enumerate(lengths.tolist()):
        expected = of_prefix(sae, latents.dense()[number], length, x[number])
        torch.testing.assert_close(spliced[number].double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(sae.lengths(30), lengths)
    sae.begin_step(0.5)
    assert not torch.equal(sae.lengths(30), lengths)


@pytest.mark.parametrize(("sequences", "count"), [(16, 5), (7, 5), (5, 5), (3, 5), (1, 5), (4, 1)])
def test_prefixes_are_drawn_as_stated(sequences, count):
    """The whole dictionary is in every step, and each sequence has each prefix with the stated probability."""
    prefixes = tuple(range(10, 10 + count))
    draws = 4000
    stream = np.random.default_rng(3)
    drawn = np.array([lengths_of(prefixes, sequences, stream) for _ in range(draws)])
    assert (drawn == prefixes[-1]).any(1).all()
    whole = max(1 / count, 1 / sequences)
    shares = [(1 - whole) / max(1, count - 1)] * (count - 1) + [whole]
    for prefix, share in zip(prefixes, shares, strict=True):
        error = 5 * (share * (1 - share) / draws) ** 0.5 + 1e-9
        assert np.abs((drawn == prefix).mean(0) - share).max() <= error


def test_the_expected_spliced_loss_is_the_mean_over_prefixes():
    """In float64, for a loss that is no linear function of the reconstruction."""
    sae, x = made(5).double(), rows(8, 4).double()
    weight = torch.randn(D, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def loss(reconstruction):
        return (reconstruction @ weight).logsumexp(-1).sum()

    with torch.no_grad():
        latents = sae.encode(x)
        mean = torch.stack([loss(each) for each in sae.nested(latents, x)]).mean()
        losses = []
        for step in range(1000):
            sae.begin_step(step / 1000)
            losses.append(loss(sae.spliced(latents, x)))
    losses = torch.stack(losses)
    error = losses.std() / len(losses) ** 0.5
    assert abs(losses.mean() - mean) < 4 * error and error < 0.01 * (losses.max() - losses.min())


def test_every_assignment_of_an_exact_draw_averages_to_the_mean():
    """Draw each prefix once for as many sequences as prefixes: all orders together have the mean exactly."""
    sae, x = made(5, groups=(0.25, 0.25)).double(), rows(1, 4).double()
    latents = sae.encode(x)
    per_prefix = torch.stack([each.square().sum() for each in sae.nested(latents, x)])
    three = x.expand(3, -1, -1)
    orders, total = list(itertools.permutations(sae.prefixes)), 0.0
    for order in orders:
        sae.lengths = lambda _, order=order: torch.tensor(order)
        total += float(sae.spliced(sae.encode(three), three).square().sum().detach()) / 3
    spread = sae.encode(three)
    assert torch.equal(spread.dense()[0], latents.dense()[0])
    assert total / len(orders) == pytest.approx(float(per_prefix.mean().detach()), rel=1e-12)
    sae.begin_step(0.3)
    assert sorted(MatryoshkaSAE.lengths(sae, 3).tolist()) == list(sae.prefixes)


def test_random_prefixes_follow_the_stated_distribution():
    draws = np.concatenate([drawn_prefixes(10, 10**6, np.random.default_rng(n))[:-1] for n in range(500)])
    least = 10**6 / 32
    for length in (4e4, 1e5, 5e5):
        share = (length**-0.5 - 1e-3) / (least**-0.5 - 1e-3)
        assert (draws > length).mean() == pytest.approx(share, abs=0.03)
    assert draws.min() >= int(least) and draws.max() < 10**6


def test_random_prefixes_change_by_the_step_alone():
    one, other = made(random_prefixes=4), made(random_prefixes=4)
    for sae in (one, other):
        sae.begin_step(0.25)
    assert one.prefixes == other.prefixes and one.prefixes[-1] == F and 1 < len(one.prefixes) <= 4
    before = one.prefixes
    one.begin_step(0.5)
    assert one.prefixes != before


def test_a_step_draws_the_same_in_any_number_of_processes():
    whole = made().lengths(10).tolist()
    parts = []
    for rank in range(3):
        sae, own = made(), slice(10 * rank // 3, 10 * (rank + 1) // 3)
        sae.world = World(rank, 3)
        object.__setattr__(sae.world, "total", lambda number: 10)
        parts += sae.lengths(own.stop - own.start).tolist()
    assert parts == whole


@pytest.mark.parametrize("name", ["sae_lens/matryoshka", "dictionary_learning/matryoshka"])
def test_a_rivals_pass_and_weights_after_20_steps(name):
    """SAELens adds the prefixes' errors up; dictionary_learning divides their mean by their number once more."""
    stored = rival(name)
    sae = MatryoshkaSAE(8, 24, k=Annealed(4), groups=(0.25, 0.25), unit_norm=False, initialisation=None)
    assert sae.prefixes == (6, 12, 24)
    latents, out, nested = passed(sae, stored.under("start"), stored.tensors["x"])
    torch.testing.assert_close(latents, stored.tensors["latents"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, stored.tensors["out"], rtol=1e-5, atol=1e-5)
    scale = 3 if name.startswith("sae_lens") else 1 / 3
    if scale == 3:
        for each, width in zip(nested, (6, 12), strict=False):
            error = (each - stored.tensors["x"]).square().sum(-1).mean()
            torch.testing.assert_close(error, stored.tensors[f"loss.inner_mse_loss_{width}"], rtol=1e-4, atol=1e-5)

    def loss(p, x):
        errors = [(each - x).square().sum(-1).mean() for each in passed(sae, p, x)[2]]
        return scale * torch.stack(errors).mean()

    trained_as(stored, loss)


@pytest.fixture(scope="module")
def model():
    return endwise.load_model("embedded")


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory):
    return Trained(tmp_path_factory.mktemp("matryoshka"), "matryoshka_batchtopk", model)


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_each_prefix_is_measured_on_held_out_text(runs, model):
    """By hand, on the same tokens; the sums are in the run's folder."""
    folder = runs["local"].folder
    found = endwise.evaluate(folder, model=model)[folder]
    lengths = (8, 24, 56, 120)
    assert {name for name in found.metrics if name.startswith("prefix_l0.")} == {f"prefix_l0.{n}" for n in lengths}
    config, sae = RunConfig.build(recipe("x", "batchtopk")), endwise.SAE.load(folder)
    corpora = endwise.corpora_for(model, config.data, training_tokens=1024, evaluation_tokens=512)
    batch, site = corpora.heldout.batch(range(16)), model.site(config.site)
    clean = model.clean(batch.tokens, [site], final=True)
    with torch.no_grad():
        before = model.model(batch.tokens).logits.double()
    for length in lengths:
        latents = sae.encode(clean.activations[site]).only(torch.arange(256) < length)
        assert found[f"prefix_l0.{length}"] == pytest.approx(float(latents.l0()[batch.mask].mean()), rel=1e-6)
        with spliced(
            model, {config.site: lambda x, length=length: sae.decode(sae.encode(x).only(torch.arange(256) < length))}
        ):
            logits = model.model(batch.tokens).logits.double()
        ce = [
            torch.nn.functional.cross_entropy(each[:, :-1].flatten(0, 1), batch.tokens[:, 1:].flatten())
            for each in (logits, before)
        ]
        assert found[f"prefix_ce_increase.{length}"] == pytest.approx(float(ce[0] - ce[1]), rel=1e-4)
        x = clean.activations[site][batch.mask].double()
        error = (sae.decode(latents)[batch.mask].double() - x).square().sum(-1)
        share = (error / (x - x.mean(0)).square().sum(-1)).mean()
        assert found[f"prefix_explained_variance.{length}"] == pytest.approx(1 - float(share), abs=1e-5)
    told = json.loads((folder / "evaluation.json").read_text())
    assert told["prefix_l0"].keys() == {str(length) for length in lengths}


@pytest.mark.parametrize(  # others here are of end-to-end runs
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind == "e2e" else ()) for kind in KINDS]
)
def test_every_objective_trains_it(runs, kind):
    lines = lines_of(runs[kind].folder)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all(line["l0"] == pytest.approx(6, abs=0.01) for line in lines)


@fitted_on_few()
def test_one_tail_serves_all_prefixes(model, tmp_path):
    """The spliced pass is entered once a step, with what each sequence's prefix makes of it."""
    seen = []

    class Counted(Trainee):
        def encode(self, *given):
            encoded = super().encode(*given)
            assert list(encoded.nested) == [encoded.reconstruction]  # no term at the site reads the prefixes'
            return encoded

        def _pulls(self, *given):
            seen.append(given)
            return super()._pulls(*given)

    config = RunConfig.build(recipe(tmp_path / "run", "matryoshka_batchtopk", "e2e", tokens=512))
    train_with(Counted, [config], model)
    assert len(seen) == 4


@pytest.mark.parametrize("kind", [pytest.param("local", marks=pytest.mark.slow), "e2e"])
@fitted_on_few()
def test_resumed_it_ends_in_the_same_bits(model, tmp_path, kind):
    config = recipe(tmp_path / "run", "matryoshka_batchtopk", kind, dictionary={"random_prefixes": 4})
    endwise.train(config, model=model, display=False)
    kept = {name: (tmp_path / "run" / name).read_bytes() for name in ("sae/sae_weights.safetensors", "metrics.jsonl")}
    endwise.train(config, model=model, resume=True, from_step=4, display=False)
    for name, content in kept.items():
        assert (tmp_path / "run" / name).read_bytes() == content


def test_early_features_reconstruct_more_alone(model, tmp_path):
    """Than those of a dictionary that was not asked to; the held-out L0 of the saved one is k."""
    found = {}
    for architecture in ("matryoshka_batchtopk", "batchtopk"):
        values = recipe(tmp_path / architecture, architecture, tokens=4096, learning_rate=3e-3)
        if architecture == "batchtopk":  # whose own test says so
            with fitted_on_few():
                run = endwise.train(values, model=model, display=False)
        else:
            run = endwise.train(values, model=model, display=False)
            assert heldout_l0(run.folder, model) == pytest.approx(6, rel=0.03)
        config = RunConfig.build(values)
        corpora = endwise.corpora_for(model, config.data, training_tokens=1024, evaluation_tokens=1024)
        batch = corpora.heldout.batch(range(16))
        x = model.clean(batch.tokens, [model.site(config.site)]).activations[model.site(config.site)][batch.mask]
        early = run.sae.encode(x).only(torch.arange(256) < 56)
        found[architecture] = float((run.sae.decode(early) - x).square().mean().detach())
    assert found["matryoshka_batchtopk"] < 0.9 * found["batchtopk"]


@fitted_on_few()
def test_saved_opened_planned_and_swept(runs, model, tmp_path):
    folder = runs["local"].folder
    sae = endwise.SAE.load(folder)
    assert sae.architecture == "jumprelu"
    x = torch.randn(20, model.d_model)
    torch.testing.assert_close(sae(x), runs["local"].sae(x), rtol=1e-5, atol=1e-5)
    assert load_file(folder / "sae" / "sae_weights.safetensors")["threshold"].unique().numel() == 1
    assert plan(RunConfig.build(recipe("x", "matryoshka_batchtopk", "e2e"))).d_sae == 256
    values = recipe("x", "matryoshka_batchtopk")
    base = {name: value for name, value in values.items() if name not in ("out", "seed")}
    base["training"]["tokens"] = 256
    swept = endwise.sweep(
        {"recipe": base, "grids": [{"dictionary.k": [3, 8]}], "out": str(tmp_path / "sweep")}, display=False
    )
    assert [row["l0"] for row in swept.rows] == pytest.approx([3, 8], rel=0.1)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"groups": [0.5, 0.5]}, r"groups are 1 of the features in all; leave some for the last group"),
        ({"groups": [0.5, 0.0]}, r"dictionary\.groups\.1: .*greater than 0"),
        ({"random_prefixes": 0}, r"dictionary\.random_prefixes: .*greater than or equal to 2"),
    ],
)
def test_groups_that_cannot_be_are_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        RunConfig.build(recipe("x", "matryoshka_batchtopk", dictionary=settings))
