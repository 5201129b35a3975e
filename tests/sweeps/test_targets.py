"""The search for a coefficient: against curves that are known, and one on real runs."""

import itertools
import math
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from endwise import sweep
from endwise.common.errors import ConfigError, Interrupted
from endwise.config.method import Knob
from endwise.runs.folder import RunFolder
from endwise.sweeps import SweepConfig
from endwise.sweeps.engines import InProcess
from endwise.sweeps.points import points_of
from endwise.sweeps.sweep_config import SearchConfig, Target
from endwise.sweeps.targets import SearchError, Trial, miss, next_value, slope_at
from endwise.sweeps.tasks import Worker
from endwise.training.train import train_together
from small_sweeps import COEFFICIENT, small_sweep

pytestmark = pytest.mark.usefixtures("models_outlined_once", "loaded_once")
L0, CE = Target(l0=40), Target(ce_increase=0.1)


def searched(curve, target, search, first):
    """The trials that a search makes, and where it ends."""
    trials = []
    while True:
        step = next_value(trials, Knob(first), target, search)
        if step.found:
            return trials, step.at
        assert len(trials) < search.trials, "one more than asked for"
        assert step.at > 0 and math.isfinite(step.at)
        trials.append(Trial(step.at, curve(step.at)))


def power(target, exponent, root):
    """A curve that meets the target at the root, and falls or rises as it should."""
    sign = -1 if target.metric == "l0" else 1
    return lambda coefficient: target.value * (coefficient / root) ** (sign * exponent)


targets = st.sampled_from([L0, CE, Target(l0=0.5), Target(ce_increase=3.0)])
exponents = st.floats(0.4, 2.5)
factors = st.floats(-4.0, 4.0).map(math.exp)


@given(targets, exponents, st.floats(-5, 5).map(math.exp), factors)
def test_a_power_law_is_met_from_fifty_times_off(target, exponent, root, factor):
    search = SearchConfig()
    curve = power(target, exponent, root)
    trials, found = searched(curve, target, search, root * factor)
    assert abs(curve(found) / target.value - 1) <= search.tolerance
    assert len(trials) <= search.trials
    assert trials[0].at == root * factor


@given(targets, exponents, factors, st.floats(-0.3, 0.3), st.floats(0.001, 0.1))
def test_a_bent_curve_is_met_between_two_of_its_trials(target, exponent, factor, bend, tolerance):
    """log metric over log λ with a slope that changes by a half over the range searched, kept from turning."""
    sign = -1 if target.metric == "l0" else 1

    def curve(coefficient):
        x = math.log(coefficient)
        return target.value * math.exp(sign * exponent * (x + bend * (math.sqrt(1 + x * x) - 1)))

    trials, found = searched(curve, target, SearchConfig(trials=12, tolerance=tolerance), factor)
    assert abs(curve(found) / target.value - 1) <= tolerance
    for earlier, later in itertools.pairwise(trials):
        assert abs(math.log(later.at / earlier.at)) <= math.log(8) + 1e-9 or crossed(trials, target)


def crossed(trials, target):
    return len({trial.value > target.value for trial in trials}) == 2


@given(targets, exponents, factors, st.integers(2, 9), st.lists(st.floats(-0.3, 0.3), min_size=9, max_size=9))
def test_whatever_the_curve_no_more_trials_are_made_than_asked_for(target, exponent, factor, most, noise):
    """It ends with a coefficient that lies among those tried, or within a step of them, or in words."""
    curve, made = power(target, exponent, 1.0), []

    def noisy(coefficient):
        made.append(coefficient)
        return curve(coefficient) * math.exp(noise[len(made) - 1])

    refused = ""
    try:
        trials, found = searched(noisy, target, SearchConfig(trials=most, tolerance=0.01), factor)
    except SearchError as error:
        refused = str(error)
    assert len(made) <= most
    if refused:
        assert all(f"{coefficient:.4g}" in refused for coefficient in made) and "search." in refused
    else:
        near = min(trials, key=lambda trial: miss(trial, target))
        assert found == near.at or min(made) < found < max(made)


@given(targets, exponents, factors, st.integers(7, 9), st.integers(0, 9), st.randoms())
def test_a_search_continues_from_the_trials_that_are_there(target, exponent, factor, most, length, random):
    """In whatever order they are read."""
    search = SearchConfig(trials=most, tolerance=1e-6)
    trials, found = searched(power(target, exponent, 1.0), target, search, factor)
    there = trials[:length]
    random.shuffle(there)
    step = next_value(there, Knob(factor), target, search)
    expected = trials[length].at if length < len(trials) else found
    assert step.at == pytest.approx(expected, rel=1e-12)
    assert step.found == (length >= len(trials))


@pytest.mark.parametrize(
    ("target", "values", "word"),
    [(L0, (80.0, 60.0, 62.0), "fall"), (CE, (0.02, 0.05, 0.04), "rise"), (L0, (10.0, 20.0), "fall")],
)
def test_a_curve_that_turns_is_refused(target, values, word):
    trials = [Trial(2.0**k, value) for k, value in enumerate(values)]
    with pytest.raises(SearchError, match=f"{target.metric} should {word} as the coefficient grows") as refused:
        next_value(trials, Knob(1.0), target, SearchConfig())
    for trial in trials:
        assert f"{trial.value:.4g} at {trial.at:.4g}" in str(refused.value)
    assert "search.tokens" in str(refused.value)


def test_a_little_noise_is_no_turn():
    trials = [Trial(1.0, 60.0), Trial(2.0, 60.0 * 1.019), Trial(4.0, 50.0)]
    assert not next_value(trials, Knob(1.0), L0, SearchConfig()).found


def test_steps_by_hand():
    search = SearchConfig(trials=6, tolerance=0.01)
    assert next_value([], Knob(3.0), L0, search).at == 3.0
    # L0 is twice too high: as if it fell by one power, twice the coefficient.
    assert next_value([Trial(3.0, 80.0)], Knob(3.0), L0, search).at == pytest.approx(6.0)
    # It fell by a half for four times the coefficient: to halve it once more takes four times as much.
    curve = [Trial(1.0, 160.0), Trial(4.0, 80.0)]
    assert next_value(curve, Knob(1.0), L0, search).at == pytest.approx(16.0)
    # Between two, the root of the line through both, and no nearer to either than a tenth.
    between = [Trial(1.0, 80.0), Trial(16.0, 20.0)]
    assert next_value(between, Knob(1.0), L0, search).at == pytest.approx(4.0)
    steep = [Trial(1.0, 40.5), Trial(math.e, 1e-9)]
    assert next_value(steep, Knob(1.0), L0, search).at == pytest.approx(math.exp(0.1))
    # A slope that is known from shorter runs.
    assert next_value([Trial(1.0, 80.0)], Knob(1.0), L0, search, slope=-0.5).at == pytest.approx(4.0)
    assert slope_at(curve, L0) == pytest.approx(-0.5)
    assert slope_at(curve[:1], L0) is None
    # Far off, or going nowhere, a step is bounded; a CE increase below 0 counts as a small one.
    for trials in ([Trial(1.0, 1e9)], [Trial(1.0, 80.0), Trial(2.0, 80.0)]):
        step = next_value(trials, Knob(1.0), L0, search).at
        assert 1 < step <= 16
    assert next_value([Trial(1.0, -0.3)], Knob(1.0), CE, search).at == pytest.approx(8.0)
    # A run may be repeated, as where a coefficient is rounded to one tried before.
    assert next_value([Trial(1.0, 80.0), Trial(1.0, 80.0)], Knob(1.0), L0, search).at == pytest.approx(2.0)


def test_the_last_trial_leads_to_the_root_or_to_a_refusal():
    search = SearchConfig(trials=2, tolerance=0.01)
    between = next_value([Trial(1.0, 80.0), Trial(16.0, 20.0)], Knob(1.0), L0, search)
    assert between.found and between.at == pytest.approx(4.0)
    with pytest.raises(SearchError, match=r"2 trials do not reach l0=40: l0 80 at 1, l0 60 at 2\. .*search\.trials"):
        next_value([Trial(2.0, 60.0), Trial(1.0, 80.0)], Knob(1.0), L0, search)


def test_what_is_within_the_tolerance_is_found_at_once():
    step = next_value([Trial(3.0, 41.0)], Knob(3.0), L0, SearchConfig())
    assert step.found and step.at == 3.0


@pytest.mark.parametrize(
    "given", [{"tokens": 0}, {"tokens": 1.1}, {"trials": 1}, {"tolerance": 0}, {"corrections": -1}]
)
def test_a_search_is_bounded(given):
    (key,) = given
    with pytest.raises(ConfigError, match=key):
        SearchConfig.build(given)


def test_points_with_equal_targets_are_one():
    recipe = {
        "site": "blocks.1.hook_resid_pre",
        "dictionary": {"size": 40},
        "objective": {"kind": "local", "sparsity": {"coefficient": 0.3}},
        "training": {"tokens": 640},
    }
    grids = ({"target": [{"l0": 40}, {"l0": 40.0}, {"ce_increase": 0.1}], "seed": [0, 1]}, {"target": None})
    made = points_of(SweepConfig.build({"recipe": recipe, "grids": grids}))
    assert [(str(p.target or "none"), p.config.seed) for p in made] == [
        ("l0=40", 0),
        ("l0=40", 1),
        ("ce_increase=0.1", 0),
        ("ce_increase=0.1", 1),
        ("none", 0),
    ]


# On real runs: half a second each, whose curve is smooth enough to be searched.

GRID = {"target": [{"l0": 12}, {"l0": 13}]}
SEARCH = {"tokens": 0.5, "tolerance": 0.03, "corrections": 4}


@pytest.fixture(scope="module")
def similar(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("similar")
    return sweep(small_sweep(made, out, GRID, {COEFFICIENT: 0.2}, search=SEARCH), display=False)


def folders(swept, name):
    return {folder.name for folder in (swept.folder / name).iterdir()}


def test_runs_end_at_their_target(similar):
    assert not similar.failures
    for point, folder in similar.runs.items():
        config, evaluation = RunFolder(folder).config(), RunFolder(folder).evaluation()
        assert config.training.tokens == 640 and folder.parent.name == "runs"
        if point.target is not None:
            assert evaluation["l0"] == pytest.approx(point.target.value, rel=0.03)
            assert config.model_copy(update={"objective": point.config.objective, "out": None}) == point.config
    first, second, plain = similar.rows
    assert [row["target"] for row in similar.rows] == ["l0=12", "l0=13", None]
    assert first["coefficient"] > second["coefficient"] and plain["coefficient"] == 0.2
    for row, target in ((first, 12), (second, 13)):
        assert row["target_miss"] == pytest.approx(row["l0"] / target - 1)
    assert plain["target_miss"] is None
    assert not similar.missing(0.03)
    assert similar.missing(1e-9) == [row for row in (first, second) if row["target_miss"]]  # one may be met exactly


def test_trials_are_short_and_their_number_bounded(similar):
    trials = [RunFolder(folder).config() for folder in (similar.folder / "trials").iterdir()]
    assert {config.training.tokens for config in trials} == {320}
    tried = [config.objective.sparsity.coefficient for config in trials]
    assert 0.3 in tried and len(tried) == len(set(tried)) <= 2 * 6 - 1  # the first is that of both
    full = len(folders(similar, "runs"))
    assert full <= 1 + 2 * 5


def test_broken_off_anywhere_the_search_takes_the_same_way(made, similar, tmp_path):
    """Stopped before each of its passes in turn, it makes the same runs as when left alone."""
    config = small_sweep(made, tmp_path, GRID, {COEFFICIENT: 0.2}, search=SEARCH)
    stops = 0

    def one_pass_only(*arguments, **options):
        nonlocal passes
        passes += 1
        if passes > 1:
            raise KeyboardInterrupt
        return train_together(*arguments, **options)

    while True:
        passes = 0
        try:
            again = sweep(config, display=False, engine=InProcess(Worker(train=one_pass_only)))
            break
        except Interrupted:
            stops += 1
    assert stops >= 3
    assert again.summary.read_bytes() == similar.summary.read_bytes()
    for name in ("runs", "trials"):
        assert folders(again, name) == folders(similar, name)


def test_a_ce_increase_is_met_with_trials_of_full_length(made, tmp_path):
    search = {"tokens": 1, "tolerance": 0.05}
    config = small_sweep(made, tmp_path, {"target": {"ce_increase": 0.35}}, search=search, settings={COEFFICIENT: 0.6})
    (row,) = sweep(config, display=False).rows
    assert row["ce_increase"] == pytest.approx(0.35, rel=0.05)
    assert not (tmp_path / "trials").exists()


def test_a_target_out_of_reach_is_told_with_what_was_tried(made, tmp_path, similar):
    config = small_sweep(
        made, tmp_path, {"target": {"l0": 0.01}}, {COEFFICIENT: 0.2}, search={"tokens": 0.5, "trials": 2}
    )
    shutil.copytree(similar.folder / "runs", tmp_path / "runs")
    shutil.copytree(similar.folder / "trials", tmp_path / "trials")
    swept = sweep(config, display=False)
    (why,) = swept.failures.values()
    trials = map(RunFolder, (tmp_path / "trials").iterdir())
    found = {trial.config().objective.sparsity.coefficient: trial.evaluation()["l0"] for trial in trials}
    assert f"2 trials do not reach l0=0.01: l0 {found[0.3]:.4g} at 0.3, l0 {found[2.4]:.4g} at 2.4" in why
    assert len(swept.runs) == 1
    assert [row["status"] for row in swept.rows] == ["failed", "finished"]
    assert swept.rows[0]["coefficient"] is None


def test_a_trial_that_fails_is_told_as_one(made, tmp_path):
    config = small_sweep(made, tmp_path, {"target": {"l0": 12}}, training={"tokens": 64}, search={"tokens": 0.1})
    (why,) = sweep(config, display=False).failures.values()
    assert why.startswith(f"A trial of 6 tokens (search.tokens) in {tmp_path / 'trials'}")
    assert "one step alone takes 32" in why
