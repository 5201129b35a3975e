"""A sparsity coefficient that is steered towards a number of active features."""

import itertools
import json
import math
import re

import pytest
import torch

import endwise
from endwise.common.errors import ConfigError
from endwise.config.dictionary import ARCHITECTURES
from endwise.config.method import Knob, Method
from endwise.config.places import PlacesConfig
from endwise.config.run import RunConfig
from endwise.dictionaries import at_inference
from endwise.dictionaries.normed import normed
from endwise.training.steering import BOUND, MOST_LEFT, Steering, settled
from on_embedded import recipe

COUNTS = torch.tensor(True)


def steered(target, steps, answer, *, start=1.0, pace=lambda share: 1.0, noise=0.0):
    """L0 of every step of a dictionary that has `answer(λ)` features at rest, and gets there in about 20 steps."""
    steering, l0, found = Steering(target, steps, 0, "cpu"), 700.0, []
    drawn = torch.Generator().manual_seed(0)
    for step in range(steps):
        share = step / steps
        rest = answer(start * float(steering.factor()))
        l0 *= (rest / l0) ** (0.05 * pace(share))
        found.append(l0)
        seen = l0 * math.exp(noise * float(torch.randn((), generator=drawn)))
        steering.after_step(step, torch.tensor(seen), pace(share), COUNTS)
    return found


@pytest.mark.parametrize(
    ("steps", "power", "start"),
    [
        *itertools.product([390], [0.5, 1.2], [0.01, 10.0]),
        (1500, 1.2, 0.01),
        *(pytest.param(1500, *each, marks=pytest.mark.slow) for each in ((0.5, 0.01), (0.5, 10.0), (1.2, 10.0))),
    ],
)
def test_it_ends_at_the_target_wherever_it_starts(start, power, steps):
    found = steered(20.0, steps, lambda weight: 30 * weight**-power, start=start, noise=0.05)
    assert sum(found[-steps // 10 :]) / len(found[-steps // 10 :]) == pytest.approx(20, rel=0.02)


def test_it_holds_where_the_rate_falls_to_zero():
    found = steered(20.0, 390, lambda weight: 30 * weight**-0.8, pace=lambda share: 1 - share, noise=0.05)
    assert found[-1] == pytest.approx(20, rel=0.03)


def test_it_does_not_wind_up_while_l0_falls_as_fast_as_it_can():
    """Adam's steps are no longer however large λ is, and what L0 has lost in excess it regains slowly."""
    steering, l0, found = Steering(30.0, 300, 0, "cpu"), 2300.0, []
    for step in range(300):
        rest = 30 * float(steering.factor()) ** -0.5
        l0 *= math.exp(max(-0.08, min(0.01, 0.1 * math.log(rest / l0))))
        found.append(l0)
        steering.after_step(step, torch.tensor(l0), 1.0, COUNTS)
    assert min(found) > 30 / 1.5 and found[-1] == pytest.approx(30, rel=0.05)


def test_one_step_by_its_definition():
    steering = Steering(10.0, 100, 0, "cpu")
    for step in range(5):  # the first of all are not followed
        steering.after_step(step, torch.tensor(500.0), 1.0, COUNTS)
        assert float(steering.factor()) == 1
    steering.after_step(5, torch.tensor(12.0), 1.0, COUNTS)
    error = math.log(1.2)
    total = 0.5 / 10 * error
    assert float(steering.factor()) == pytest.approx(math.exp(error + total), rel=1e-6)
    steering.after_step(6, torch.tensor(1e9), 0.25, COUNTS)  # cut off at e⁸ times the target, and what is added at e²
    change = 8 - error
    error += change / 10
    total += 4 * 0.5 / 10 * min(2, error + 3 * error * change)
    assert float(steering.factor()) == pytest.approx(math.exp(error + total), rel=1e-6)
    for seen in (11.0, 3.0, 25.0, 9.0):  # soon nothing is cut off
        steering.after_step(7, torch.tensor(seen), 1.0, COUNTS)
        change = math.log(seen / 10) - error
        error += change / 10
        total += 0.5 / 10 * max(-2, min(2, error + 3 * min(1, abs(error)) * change))
        assert float(steering.factor()) == pytest.approx(math.exp(error + total), rel=1e-6)


def test_a_step_that_is_not_taken_and_one_without_features_leave_it_finite():
    steering = Steering(10.0, 100, 20, "cpu")
    steering.after_step(19, torch.tensor(50.0), 1.0, COUNTS)
    assert steering.state.isnan().all()  # λ still rises
    steering.after_step(20, torch.tensor(float("nan")), 1.0, COUNTS)
    steering.after_step(20, torch.tensor(50.0), 1.0, torch.tensor(False))
    assert float(steering.factor()) == 1
    for step in range(20, 1000):
        steering.after_step(step, torch.tensor(0.0), 1.0, COUNTS)
    assert float(steering.factor()) == pytest.approx(1 / BOUND)


def short(out, steps):
    values = recipe(out, target_l0=12.0)
    values["training"]["tokens"] = steps * 4 * 32
    return values


def test_a_steered_run_logs_its_coefficient_and_resumes_to_the_same_bits(tmp_path):
    model = endwise.load_model("embedded")
    config = RunConfig.build(short(tmp_path / "run", steps=12))
    run = endwise.train(config, model=model, display=False)
    written = [(run.folder / name).read_bytes() for name in ("metrics.jsonl", "sae/sae_weights.safetensors")]
    lines = [json.loads(line) for line in written[0].splitlines()]
    weights = [line["sparsity_coefficient"] for line in lines]
    assert weights[:2] == [pytest.approx(0.3)] * 2 and len(set(weights)) > len(lines) // 2
    for line in lines:
        expected = line["kl"] + line["sparsity_coefficient"] * line["sparsity"]
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
    for step in (5, 10):
        endwise.train(config, model=model, resume=True, from_step=step, display=False)
        files = [(run.folder / name).read_bytes() for name in ("metrics.jsonl", "sae/sae_weights.safetensors")]
        assert files == written


def test_a_target_is_the_knob_and_the_start_of_no_account():
    first, second = (
        RunConfig.build(recipe("x", target_l0=target, coefficient=start)) for target, start in ((8, 0.3), (16, 2.0))
    )
    assert Knob.of(first).columns == {"coefficient": None, "knob": "target L0", "knob.value": 8.0}
    assert not Knob.of(first).sparser
    assert Method.of(first).digest == Method.of(second).digest != Method.of(RunConfig.build(recipe("x"))).digest
    assert Knob.of(Knob.of(first).set_in(first, 24.0)).value == 24


def test_without_a_coefficient_it_starts_low():
    values = recipe("x")
    values["objective"]["sparsity"] = {"target_l0": 20}
    assert RunConfig.build(values).objective.coefficient == 0.1


@pytest.mark.parametrize(
    ("dictionary", "sparsity", "message"),
    [
        ({"architecture": "topk", "k": 8}, {}, r"target_l0 is 12 and dictionary\.k is 8.*give one"),
        ({"architecture": "batchtopk", "k": 8}, {}, r"target_l0 is 12 and dictionary\.k is 8"),
        (
            {"architecture": "jumprelu", "penalty": "quadratic", "target_l0": 9},
            {},
            r"target_l0 is 12 and dictionary\.target_l0 is 9",
        ),
        ({}, {"coefficient": 0}, "coefficient is 0, and steering towards target_l0"),
        ({}, {"target_ce_increase": 0.2}, "target_l0 and target_ce_increase are both given"),
        (
            {"architecture": "jumprelu", "penalty": "quadratic", "target_l0": 9},
            {"target_l0": None, "target_ce_increase": 0.2},
            r"target_ce_increase is 0\.2 and dictionary\.target_l0 is 9",
        ),
        ({}, {"target_l0": 0}, "greater than 0"),
    ],
)
def test_what_sets_the_number_already_refuses_it(dictionary, sparsity, message):
    values = recipe("x")
    values["dictionary"] = {"size": 200, **dictionary}
    values["objective"]["sparsity"] = {"target_l0": 12.0, **sparsity}
    with pytest.raises(ConfigError, match=message):
        RunConfig.build(values)


def random_sae(architecture, **settings):
    """A dictionary with random weights, and what it reads: about a fifth of its features are active."""
    config = RunConfig.build(recipe("x") | {"dictionary": {"architecture": architecture, "size": 60, **settings}})
    sae = normed(ARCHITECTURES[architecture].build(config.dictionary, 12, seed=0), config.dictionary)
    x = 1 + torch.randn(3000, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.see_first(x, x)
        sae.raise_bar(0.8)
    return sae.requires_grad_(False), x


def l0_of(sae, x):
    with at_inference([sae]):
        return float(sae.encode(x).l0().mean())


def settle(sae, x, target):
    return settled(sae, Steering(target, 100, 0, "cpu"), lambda: float(sae.encode(x).l0().mean()), 1e-3)


@pytest.mark.parametrize("ratio", [0.83, 1.2])
@pytest.mark.parametrize(
    ("architecture", "settings"),
    [("standard", {}), ("gated", {}), ("jumprelu", {"threshold_init": 0.5}), ("standard", {"normalize": "layer_norm"})],
)
def test_what_is_left_of_an_error_is_made_up_for_by_one_amount_for_all(architecture, settings, ratio):
    sae, x = random_sae(architecture, **settings)
    before, bars = l0_of(sae, x), {name: each.clone() for name, each in sae.named_parameters()}
    assert settle(sae, x, before * ratio) == pytest.approx(before, rel=1e-6)
    assert l0_of(sae, x) == pytest.approx(before * ratio, rel=2.1e-3)
    moved = [each - bars[name] for name, each in sae.named_parameters() if not torch.equal(each, bars[name])]
    assert len(moved) == 1 and moved[0].ndim == 1
    assert moved[0].std() < 1e-5 < abs(moved[0].mean())


def test_what_is_too_far_off_stays_as_it_is_trained():
    sae, x = random_sae("standard")
    bars, before = sae.b_enc.clone(), l0_of(sae, x)
    for target in (before * 1.01 * MOST_LEFT, before / 1.01 / MOST_LEFT, before):
        settle(sae, x, target)
        assert torch.equal(sae.b_enc, bars)


@pytest.mark.slow
def test_each_of_several_places_ends_at_its_target(tmp_path, capsys):
    values = recipe(tmp_path / "run") | {"joint": False}
    values["places"] = [{"site": values.pop("site")}, {"site": "blocks.2.hook_resid_pre"}]
    values["dictionary"] = {"size": 200}
    values["training"] |= {"tokens": 12800, "learning_rate": 3e-3}
    values["evaluation"] |= {"tokens": 4096, "during_training_tokens": 4096}
    values["objective"] = {"kind": "local", "sparsity": {"target_l0": 40, "coefficient": 0.3}}
    run = endwise.train_places(PlacesConfig.build(values), model=endwise.load_model("embedded"))
    last = [json.loads((path / "metrics.jsonl").read_text().splitlines()[-1]) for path in run.folders.values()]
    assert [line["heldout"]["l0"] for line in last] == [pytest.approx(40, rel=0.03)] * 2
    assert max(abs(line["l0"] / 40 - 1) for line in last) > 0.05, "nothing was left to make up for"
    assert "L0 ended" not in capsys.readouterr().err


def test_a_target_that_is_missed_is_told_of(tmp_path, capsys):
    endwise.train(short(tmp_path / "run", steps=4), model=endwise.load_model("embedded"))
    assert re.search(
        r"blocks\.4\.hook_resid_pre: L0 ended at [\d.]+, and .*target_l0 is 12\. Raise", capsys.readouterr().err
    )
