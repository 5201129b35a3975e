"""Sweeps of recipes for several places: from the file to the table and the curves, and on after an end."""

import csv
import shutil

import pytest

from endwise import SweepConfig, sweep, train_places
from endwise.analysis.geometry.geometry import geometry
from endwise.analysis.pareto.curves import pareto
from endwise.common.errors import ConfigError, Interrupted
from endwise.config.method import Knob, Method
from endwise.config.places import PlacesConfig
from endwise.evaluation.evaluate import evaluate
from endwise.runs.folder import RunFolder, parts_of, seconds_of
from endwise.sweeps.points import points_of
from endwise.sweeps.survey import survey
from endwise.sweeps.tables import print_rows
from endwise.sweeps.tasks import Worker, is_finished, tasks_of
from endwise.sweeps.watching import RunStatus
from small_sweeps import COEFFICIENT, Stops, here, never, small_recipe

pytestmark = pytest.mark.usefixtures("models_outlined_once", "loaded_once")
SITES = ["blocks.1.hook_resid_pre", "blocks.3.hook_resid_pre"]
OF_SECOND = f"places.1.{COEFFICIENT}"
GRIDS = ({COEFFICIENT: [0.3, 1.0], "joint": [True, False]}, {OF_SECOND: 2.0})


def small_sweep(made, out, *grids, kind="e2e", changes=None, **own):
    base = small_recipe(made, kind, checkpoint_every=4, tokens=320)
    del base["site"]
    base |= {"places": [{"site": site} for site in SITES], **(changes or {})}
    return SweepConfig.build({"recipe": base, "grids": grids, "out": out, **own})


def coefficients(config):
    return [recipe.objective.coefficient for recipe in config.recipes]


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    return sweep(small_sweep(made, tmp_path_factory.mktemp("whole"), *GRIDS), display=False)


def rows_of(swept):
    with swept.summary.open(newline="") as lines:
        return list(csv.DictReader(lines))


# From the file to its points


def test_a_key_is_for_all_places_or_for_one(made, tmp_path):
    points = points_of(small_sweep(made, tmp_path, *GRIDS))
    assert [(coefficients(point.config), point.config.joint) for point in points] == [
        ([0.3, 0.3], True), ([0.3, 0.3], False), ([1.0, 1.0], True), ([1.0, 1.0], False), ([0.3, 2.0], True),
    ]  # fmt: skip
    pairs = [[{"site": site}, {"site": "blocks.2.hook_resid_pre"}] for site in SITES]
    points = points_of(small_sweep(made, tmp_path, {"places": pairs, "dictionary.size": [8, 9]}))
    assert [[recipe.site for recipe in point.config.recipes] for point in points] == [
        [site, "blocks.2.hook_resid_pre"] for site in SITES for _ in range(2)
    ]
    assert [point.config.dictionary.size for point in points] == [8, 9, 8, 9]


def test_a_place_keeps_its_own_value_unless_all_have_one(made, tmp_path):
    own = [{"site": SITES[0], "objective": {"sparsity": {"coefficient": 5}}}, {"site": SITES[1]}]
    points = points_of(small_sweep(made, tmp_path, {COEFFICIENT: [1, 2]}, changes={"places": own}))
    assert [coefficients(point.config) for point in points] == [[5, 1], [5, 2]]
    own[1] = {**own[0], "site": SITES[1]}
    with pytest.raises(ConfigError, match=rf"^grid 1 .*{COEFFICIENT}: every place has a value of its own.*places\.0\."):
        points_of(small_sweep(made, tmp_path, {COEFFICIENT: [1, 2]}, changes={"places": own}))


@pytest.mark.parametrize(
    ("grid", "told"),
    [
        ({"site": SITES}, r"grid 1 \(site=.*\): the recipe has `places`.*places\.0\.site"),
        ({"place": SITES}, r"the recipe has `places`"),
        ({"places.2.seed": 1}, r"'places\.2\.seed': the list has the entries 0 to 1"),
        ({"places.1.sede": 1}, r"no key 'sede'; did you mean seed"),
        ({"places.1.training.tokens": 1}, r"places\.1\.training: there is no such key"),
        ({"places.1.site": "nowhere"}, r"nowhere"),
        ({"places.1.site": SITES[0]}, r"two places write one site"),
        ({"places.1.objective.kl": 5}, r"grid 1 \(places\.1\.objective\.kl=5\).*a joint pass has one loss"),
    ],
)
def test_what_a_grid_of_several_places_may_not_say(made, tmp_path, grid, told):
    with pytest.raises(Exception, match=rf"(?s){told}"):
        points_of(small_sweep(made, tmp_path, grid))


@pytest.mark.filterwarnings("ignore:objective.sparsity is left out")
def test_the_knob_of_several_places_is_one_factor(made, tmp_path):
    (point,) = points_of(small_sweep(made, tmp_path, {OF_SECOND: 0.9}))
    knob = Knob.of(point.config)
    assert knob.value == pytest.approx(0.6) and knob.tag == "0.6"
    assert coefficients(knob.set_in(point.config, 1.2)) == pytest.approx([0.6, 1.8])
    mixed = {"places.1.dictionary": {"size": 40, "architecture": "topk", "k": 4}}
    (point,) = points_of(small_sweep(made, tmp_path, mixed))
    changed = Knob.of(point.config).set_in(point.config, 0.5)
    assert [changed.places[0].objective.coefficient, changed.places[1].dictionary.k] == [0.5, 4]


def test_methods_of_several_places_are_told_apart(made, tmp_path):
    points = points_of(small_sweep(made, tmp_path, {"joint": [True, False]}, {"places.1.dictionary.size": 24}))
    joint, apart, other = (Method.of(point.config) for point in points)
    assert (joint.label, apart.label) == ("e2e, jointly", "e2e, each alone")
    assert joint.key == other.key and joint.digest == other.digest  # the size is the setting's, and not the method's
    (decayed,) = points_of(small_sweep(made, tmp_path, {"places.1.objective.sparsity.p": 0.5}))
    assert Method.of(decayed.config).content["places.1.p"] == 0.5


# To the table and the curves


def test_every_run_ends_as_it_does_alone(made, whole, tmp_path):
    assert not whole.failures and len(whole.runs) == 5
    for point, folder in list(whole.runs.items())[:2]:
        alone = train_places(point.config.model_copy(update={"out": tmp_path / folder.name}), display=False)
        evaluate(alone.folder)
        for part, own in zip(parts_of(folder), alone.folders.values(), strict=True):
            weights = "sae/sae_weights.safetensors"
            assert (part.path / weights).read_bytes() == (own / weights).read_bytes()
            assert part.evaluation_file.read_bytes() == RunFolder(own).evaluation_file.read_bytes()
        assert RunFolder(folder).evaluation() == RunFolder(alone.folder).evaluation()


def test_the_table_has_a_row_for_all_together_and_one_for_each_place(whole, capsys):
    rows = rows_of(whole)
    assert [row["site"] for row in rows[:3]] == [" + ".join(SITES), *SITES] and len(rows) == 15
    for number, (point, folder) in enumerate(whole.runs.items()):
        together, *alone = rows[3 * number : 3 * number + 3]
        assert whole.folder / together["run"] == folder
        assert float(together["l0"]) == RunFolder(folder).evaluation()["l0"]
        for row, part in zip(alone, parts_of(folder), strict=True):
            assert whole.folder / row["run"] == part.path
            assert float(row["ce_increase"]) == part.evaluation()["ce_increase"]
        assert [float(row["coefficient"]) for row in alone] == coefficients(point.config)
    assert [rows[12]["places.0." + COEFFICIENT], rows[12][OF_SECOND]] == ["0.3", "2"]
    assert [rows[0]["method"], rows[1]["method"]] == ["e2e, jointly", "e2e, jointly"]
    assert [rows[3]["method"], rows[4]["method"]] == ["e2e, each alone", "e2e"]
    print_rows(whole.rows)
    assert "2 places" in capsys.readouterr().out


def test_curves_are_of_all_together_and_of_each_place(whole):
    found = pareto([whole.folder])
    assert [one.setting.site for one in found] == [SITES[0], " + ".join(SITES), SITES[1]]
    for one, labels in zip(found, [["e2e", "e2e, jointly"], ["e2e, each alone", "e2e, jointly"]], strict=False):
        assert [method.label for method in one.methods] == labels and one.setting.further == ()
    (run,) = [folder for point, folder in whole.runs.items() if coefficients(point.config) == [0.3, 2.0]]
    named = pareto([run])
    assert [len(one.runs) for one in named] == [1, 1, 1] and named[1].runs[0].knob.value == pytest.approx(1.15)
    assert {one.setting.site for one in geometry([whole.folder])} == set(SITES)


# On after an end


@pytest.mark.parametrize("joint", [True, False])
def test_ctrl_c_and_the_same_command_again(made, whole, tmp_path, joint):
    grid, Stops.pressed = {COEFFICIENT: [0.3, 1.0]}, False
    config = small_sweep(made, tmp_path / "stopped", grid, changes={"joint": joint})
    stopped = small_sweep(made, tmp_path / "stopped", grid, changes={"joint": joint, "trackers": ["stops"]})
    with pytest.raises(Interrupted, match="Stopped as asked"):
        sweep(stopped, display=False)
    assert [each.passes for each in survey(config)] == [1, 2]
    again = sweep(config, display=False)
    assert not again.failures
    for point, folder in again.runs.items():
        (theirs,) = [path for other, path in whole.runs.items() if other.config == point.config]
        for part, other in zip(parts_of(folder), parts_of(theirs), strict=True):
            assert part.evaluation_file.read_bytes() == other.evaluation_file.read_bytes()
        assert RunFolder(folder).evaluation() == RunFolder(theirs).evaluation()
    assert sweep(config, display=False, engine=here(train=never, measure=never)).runs == again.runs


def test_what_was_measured_with_other_weights_is_measured_again(made, whole, tmp_path):
    shutil.copytree(whole.folder, tmp_path, dirs_exist_ok=True)
    config = small_sweep(made, tmp_path, {"joint": [True, False]})
    for folder in sweep(config, display=False, engine=here(train=never, measure=never)).folders:
        run = RunFolder(folder)
        assert seconds_of(folder) > 0
        file = run.evaluation_file
        file.write_text(file.read_text().replace(RunFolder(parts_of(folder)[1].path).weights_digest(), "0" * 64))
    assert [each.state for each in survey(config)] == ["to be measured", "to be measured"]
    assert not sweep(config, display=False, engine=here(train=never)).failures


def test_a_target_is_for_all_together(made, tmp_path):
    search = {"tokens": 1, "trials": 8, "tolerance": 0.2}
    grid = {"target": {"l0": 24}, "objective.kind": "local"}
    places = [{"site": SITES[0], "objective": {"sparsity": {"coefficient": 0.6}}}, {"site": SITES[1]}]
    swept = sweep(
        small_sweep(made, tmp_path, grid, search=search, changes={"places": places, "joint": False}), display=False
    )
    assert not swept.failures, swept.failures
    (folder,) = swept.folders
    assert RunFolder(folder).evaluation()["l0"] == pytest.approx(24, rel=0.2)
    one, other = coefficients(RunFolder(folder).recipe())
    assert one == pytest.approx(2 * other)


def test_the_fault_of_one_place_is_the_runs(made, tmp_path):
    config = small_sweep(made, tmp_path, {"joint": [True, False], "places.1.site": "blocks.9.hook_resid_pre"}, {})
    swept = sweep(config, display=False)
    assert len(swept.failures) == 2 and len(swept.runs) == 1
    assert all("blocks.9" in why for why in swept.failures.values())


def test_a_place_that_fails_while_it_trains_ends_its_run_alone(made, tmp_path):
    grid = {"joint": False, "training.learning_rate": [1e-2, 1e30]}
    swept = sweep(small_sweep(made, tmp_path, grid, kind="local"), display=False)
    assert len(swept.runs) == 1 and len(swept.failures) == 1
    (why,) = swept.failures.values()
    assert all(f"{site}: " in why for site in SITES) and "finite" in why


def test_runs_of_several_places_have_a_pass_each(made, tmp_path):
    points = points_of(small_sweep(made, tmp_path, {COEFFICIENT: [0.3, 1.0]}))
    configs = [point.config.model_copy(update={"out": tmp_path / str(n)}) for n, point in enumerate(points)]
    assert tasks_of(configs, 8) == [(config,) for config in configs]
    assert not any(is_finished(config) for config in configs)
    (outcome,) = Worker().carry_out((configs[0],))
    assert outcome.error is None and is_finished(configs[0]) and isinstance(configs[0], PlacesConfig)
    status = RunStatus.at_start(configs[0])
    assert status.tokens == 320 and status.l0 == pytest.approx(RunFolder(configs[0].out).metrics()[-1]["l0"])
