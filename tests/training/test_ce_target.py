"""A sparsity coefficient that is steered by the CE increase on held-out text of its own."""

import json
import math

import pytest
import torch

import endwise
from endwise.common.errors import ConfigError
from endwise.config.method import Knob, Method
from endwise.config.places import PlacesConfig
from endwise.config.run import EvaluationConfig, RunConfig
from endwise.dictionaries import ReluSAE
from endwise.evaluation.measure import measure
from endwise.tokens import corpora_for
from endwise.training import targets
from endwise.training.objectives import build_objective
from endwise.training.setup import corpora_of
from endwise.training.steering import Steering
from endwise.training.targets import SLICE, Slice, ce_increase, pace_of_measuring
from on_embedded import recipe

COUNTS = torch.tensor(True)


def by_ce(out, target=1.5, **sparsity):
    values = recipe(out, target_ce_increase=target, **sparsity)
    values["dictionary"] = {"size": 200}
    return values


@pytest.fixture(scope="module")
def model():
    return endwise.load_model("embedded")


@pytest.fixture(scope="module")
def heldout(model):
    config = RunConfig.build(by_ce("x"))
    return corpora_of([config], model).heldout


def test_the_increase_is_that_of_evaluations(model, heldout):
    """Measure one sequence more than a chunk of the tail holds."""
    place, sae = model.place("blocks.4.hook_resid_pre"), ReluSAE(model.d_model, 60, seed=3)
    count = 1024 // 32 + 1
    asked = EvaluationConfig(tokens=count * 32, skip=64, bootstrap=1)
    expected = measure(model, {"": (place, sae)}, heldout, asked, baselines=False)[""]["ce_increase"]
    found = float(ce_increase(model, place, sae, heldout, list(range(2, 2 + count))))
    assert found == pytest.approx(expected, rel=1e-5)


def test_its_text_is_none_that_evaluations_read(model, heldout):
    evaluation = EvaluationConfig(tokens=500, skip=20, during_training_tokens=90)
    own = Slice.of(heldout, evaluation)
    assert own.sequences.start == math.ceil(520 / 32) and len(own.sequences) == SLICE // 32
    assert own.some(len(own.sequences) - 1, 3) == [own.sequences[-1], own.sequences[0], own.sequences[1]]
    with pytest.raises(ConfigError, match="32,768 tokens of held-out text after the 9,000,000 of evaluations"):
        Slice.of(heldout, EvaluationConfig(tokens=9_000_000))


def test_training_asks_for_that_text(model, tmp_path):
    """Text that is long enough for the evaluations alone is too short."""
    text = tmp_path / "some.txt"
    text.write_text("\n\n".join(f"Line {number} of a text that is none too long." for number in range(3000)))
    values = by_ce(tmp_path / "run")
    values["data"] |= {"source": str(text), "cache": str(tmp_path)}
    with pytest.raises(endwise.EndwiseError, match=r"held-out tokens.*fewer than the [\d,]+ asked for"):
        endwise.train(values, model=model, display=False)
    data = RunConfig.build(values).data
    assert len(corpora_for(model, data, training_tokens=2048, evaluation_tokens=512).heldout) * 32 < SLICE + 544


def test_measuring_costs_a_tenth_of_a_step_at_most(model):
    """By products counted here, term by term, for a site in the middle."""
    sae, place = ReluSAE(model.d_model, 640, seed=0), model.place("blocks.3.hook_resid_pre")
    blocks = 12 * model.d_model**2 * model.n_layers
    vocabulary, encoder = model.readout.unembedding.weight.numel(), 640 * model.d_model
    once = 2 * (vocabulary + blocks) - blocks / 2 + encoder
    for kind, batch in (("local", 2), ("local", 64), ("e2e", 2), ("e2e", 64)):
        config = RunConfig.build(by_ce("x") | {"objective": {"kind": kind, "sparsity": {"coefficient": 1}}})
        objective = build_objective(config.objective, model, place.writes)
        step = batch * (blocks / 2 + encoder + (0 if kind == "local" else 3 * blocks / 2 + 3 * vocabulary))
        every, count = pace_of_measuring(model, place, sae, objective, batch)
        share = count * once / (every * step)
        assert share <= 0.1 * 1.03  # position embeddings are counted among the blocks
        assert share > 0.05, "more could be measured"
        assert every >= targets.EVERY and (count == 1 or every == targets.EVERY)


def test_a_higher_increase_lowers_the_coefficient():
    steering = Steering(0.2, 100, 0, "cpu", by_ce=True)
    steering.after_step(10, torch.tensor(5.0), 1.0, COUNTS)  # it heard of nothing
    assert float(steering.factor()) == 1
    steering.observe(torch.tensor(0.3))
    steering.after_step(11, torch.tensor(5.0), 1.0, COUNTS)
    error = -math.log(1.5)
    assert float(steering.factor()) == pytest.approx(math.exp(error + 0.5 / 4 * error), rel=1e-6)
    steering.after_step(12, torch.tensor(5.0), 1.0, COUNTS)  # what it heard of is used once
    assert float(steering.factor()) == pytest.approx(math.exp(error + 0.5 / 4 * error), rel=1e-6)
    higher = Steering(0.2, 100, 0, "cpu", by_ce=True)
    higher.observe(torch.tensor(-0.01))  # better than the model: as far below the target as counts
    higher.after_step(11, torch.tensor(5.0), 1.0, COUNTS)
    assert float(higher.factor()) == pytest.approx(math.exp(2 + 0.5 / 4 * 2), rel=1e-6)


def test_a_run_is_steered_and_resumes_to_the_same_bits(model, tmp_path, monkeypatch):
    monkeypatch.setattr(targets, "EVERY", 2)
    monkeypatch.setattr(targets, "SETTLED_ON", 1024)
    values = by_ce(tmp_path / "run", coefficient=0.1)
    values["training"]["tokens"] = 12 * 4 * 32
    config = RunConfig.build(values)
    run = endwise.train(config, model=model, display=False)
    names = ("metrics.jsonl", "sae/sae_weights.safetensors")
    written = [(run.folder / name).read_bytes() for name in names]
    weights = [json.loads(line)["sparsity_coefficient"] for line in written[0].splitlines()]
    assert len(set(weights[1:])) > 3
    endwise.train(config, model=model, resume=True, from_step=10, display=False)
    assert [(run.folder / name).read_bytes() for name in names] == written


def test_it_is_met_by_thresholds_at_the_end(model, heldout):
    """Train on a copy of the input without its small values: the higher the bar, the more are missing."""
    place, sae = model.place("blocks.4.hook_resid_pre"), ReluSAE(model.d_model, 2 * model.d_model, initialisation=None)
    both = torch.cat([torch.eye(model.d_model), -torch.eye(model.d_model)])
    sae.fill(
        {"W_enc": both.T, "W_dec": both, "b_enc": torch.full((len(both),), -0.3), "b_dec": torch.zeros(len(both) // 2)}
    )
    chosen = Slice.of(heldout, EvaluationConfig(tokens=64, during_training_tokens=64)).some(0, 32)
    before = float(ce_increase(model, place, sae, heldout, chosen))
    with torch.no_grad():
        found = targets.settled(
            sae.requires_grad_(False),
            Steering(before * 1.1, 100, 0, "cpu", by_ce=True),
            lambda: float(ce_increase(model, place, sae, heldout, chosen)),
            1e-3,
        )
    assert found == pytest.approx(before)
    assert float(ce_increase(model, place, sae, heldout, chosen)) == pytest.approx(before * 1.1, rel=3e-3)


def test_it_is_a_knob_of_its_own():
    first, second = (RunConfig.build(by_ce("x", target)) for target in (0.1, 0.4))
    assert Knob.of(first) == Knob(0.1, "objective.sparsity.target_ce_increase", "target CE increase", sparser=True)
    assert Method.of(first).digest == Method.of(second).digest
    assert Method.of(first).digest != Method.of(RunConfig.build(recipe("x", target_l0=3))).digest


def test_a_joint_pass_has_no_increase_of_one_place():
    values = by_ce("x")
    values["places"] = [{"site": values.pop("site")}, {"site": "blocks.2.hook_resid_pre"}]
    with pytest.raises(ConfigError, match=r"target_ce_increase is given, and a joint pass.*joint: false"):
        PlacesConfig.build(values)
    assert not PlacesConfig.build(values | {"joint": False}).joint
