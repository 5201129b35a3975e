"""Sweeps: from a file to its points, from points to tasks, and from any end to the same table."""

import csv
import io
import json
import math
import shutil
import signal
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

import warm
from endwise import RunConfig, SweepConfig, sweep, train
from endwise.cli import app
from endwise.common.errors import ConfigError, Interrupted, SiteError
from endwise.config.recipes import find_sweep, sweep_names
from endwise.evaluation.evaluate import evaluate
from endwise.runs.folder import RunFolder, last_record
from endwise.sweeps.points import fingerprint, placed, points_of
from endwise.sweeps.survey import survey
from endwise.sweeps.sweep_config import read_sweep
from endwise.sweeps.tables import print_rows, write_table
from endwise.sweeps.tasks import ModelCache, Outcome, Worker, is_finished, tasks_of
from endwise.sweeps.watching import RunStatus, Watch, seconds_left
from endwise.training.setup import model_for
from endwise.training.train import train_together
from own_training import acting, stopping, train_with
from places import HELPERS
from small_gpt2 import SITE, recipe
from small_sweeps import COEFFICIENT, Stops, complete, here, never, small_sweep

pytestmark = pytest.mark.usefixtures("models_outlined_once", "loaded_once")
PINNED = {
    "site": "blocks.6.hook_resid_pre",
    "dictionary": {"ratio": 60},
    "objective": {"kind": "e2e_ds", "downstream_mse": 2.5, "sparsity": {"coefficient": 10}},
    "training": {"tokens": 409_600_000, "gradient_clip": 10, "learning_rate": 5e-4},
    "data": {"context": 1024},
}


def rows_of(table):
    with table.open(newline="") as lines:
        return list(csv.DictReader(lines))


def points(*grids, **changes):
    base = {
        "site": SITE,
        "dictionary": {"size": 40},
        "objective": {"kind": "local", "sparsity": {"coefficient": 0.3}},
        "training": {"tokens": 640, "batch": 4},
    }
    return points_of(SweepConfig.build({"recipe": base, "grids": grids, **changes}))


def test_a_grid_is_every_combination_in_its_order():
    made = points({"seed": [0, 1], COEFFICIENT: [1, 2, 4], "site": "blocks.2.hook_mlp_out"}, {"training.batch": 8})
    assert [(p.config.seed, p.config.objective.sparsity.coefficient) for p in made[:-1]] == [
        *product((0, 1), (1.0, 2.0, 4.0))
    ]
    assert {p.config.site for p in made[:-1]} == {"blocks.2.hook_mlp_out"}
    assert (made[-1].config.site, made[-1].config.training.batch, made[-1].config.training.tokens) == (SITE, 8, 640)
    assert len(points({})) == 1


def test_neighbours_of_a_log_range_have_one_ratio():
    found = [p.config.objective.sparsity.coefficient for p in points({COEFFICIENT: {"log_range": [0.5, 8, 5]}})]
    assert found == [0.5, 1, 2, 4, 8]
    falling = [p.config.training.learning_rate for p in points({"training.learning_rate": {"log_range": [1, 0.01, 3]}})]
    assert falling == [1, 0.1, 0.01]
    sizes = [p.config.dictionary.size for p in points({"dictionary.size": {"log_range": [10, 1000, 4]}})]
    assert sizes == [10, 46, 215, 1000]


def test_a_point_of_two_grids_is_one():
    made = points({"seed": [0, 1]}, {COEFFICIENT: [0.3, 0.5]}, {"training.batch": 4.0})
    assert len(made) == 3
    assert len({p.key for p in made}) == 3


def test_layers_in_one_file():
    """By `site`; or by `place`, where what is read and what is written go together."""
    sites = [f"blocks.{layer}.hook_resid_pre" for layer in range(3)]
    found = points({"site": sites, COEFFICIENT: [1, 2]})
    assert [(point.config.site, point.config.objective.coefficient) for point in found] == [
        (site, coefficient) for site in sites for coefficient in (1, 2)
    ]
    places = [f"blocks.{layer}.mlp_in -> blocks.{layer}.hook_mlp_out" for layer in range(3)]
    found = points({"place": [*places, SITE], COEFFICIENT: [1, 2]}, settings={"writes": "blocks.3.hook_resid_pre"})
    assert [point.config.place for point in found] == [place for place in (*places, SITE) for _ in range(2)]
    assert found[:2] == points({"site": "blocks.0.mlp_in", "writes": "blocks.0.hook_mlp_out", COEFFICIENT: [1, 2]})
    assert points({}, settings={"place": places[1]}) == points({"place": places[1]})


def test_sections_may_be_written_out():
    nested = points(
        {"training": {"learning_rate": [1e-3, 1e-2]}, "objective": {"sparsity": {"coefficient": 2}}},
        settings={"training": {"batch": 8}, "evaluation.tokens": 64},
    )
    dotted = points(
        {"training.learning_rate": [1e-3, 1e-2], COEFFICIENT: 2},
        settings={"training.batch": 8, "evaluation": {"tokens": 64}},
    )
    assert nested == dotted and len(nested) == 2
    assert {(p.config.training.tokens, p.config.training.batch) for p in nested} == {(640, 8)}  # what it leaves stays
    whole = points({"objective": [{"kind": "e2e"}, {"kind": "local", "sparsity": {"coefficient": 5}}]})
    assert [(p.config.objective.kind, p.config.objective.sparsity.coefficient) for p in whole] == [
        ("e2e", 0.3),
        ("local", 5),
    ]


def test_a_kind_is_trained_without_the_weights_it_does_without():
    settings = {"objective.downstream_mse": 2.0}
    kinds = {"objective.kind": ["local", "e2e", "e2e_ds"]}
    objectives = [p.config.objective for p in points(kinds, settings=settings)]
    assert [o.weights for o in objectives] == [
        {"kl": 0, "local_mse": 1, "downstream_mse": 0},
        {"kl": 1, "local_mse": 0, "downstream_mse": 0},
        {"kl": 0.5, "local_mse": 0, "downstream_mse": 2},
    ]
    of_one_grid = points(kinds | {"objective.downstream_mse": [1, 2]})
    assert [(p.config.objective.kind, p.config.objective.downstream_mse) for p in of_one_grid] == [
        ("local", None),
        ("e2e", None),
        ("e2e_ds", 1),
        ("e2e_ds", 2),
    ]
    (mixed,) = points({"objective.kind": "local", "objective.downstream_mse": 1})  # asked for in so many words
    assert mixed.config.objective.weights == {"kl": 0, "local_mse": 1, "downstream_mse": 1}
    (unchosen,) = points({}, settings=settings)
    assert unchosen.config.objective.downstream_mse == 2


BAD_SWEEPS = {
    "a key's section": ([{"kind": "e2e"}], {}, ["grid 1", "'kind'", "did you mean objective.kind"]),
    "a misspelt key": ([{"training.token": 1}], {}, ["'training.token'", "did you mean training.tokens"]),
    "a word of two": ([{"tokens": 1}], {}, ["did you mean training.tokens or evaluation.tokens"]),
    "a word like none": ([{"zzz": 1}], {}, ["'zzz'", "objective.kind"]),
    "a key of the second grid": ([{}, {"sed": 1}], {}, ["grid 2", "'sed'", "seed"]),
    "a key of the settings": ([{}], {"settings": {"objective.knd": "e2e"}}, ["settings", "objective.kind"]),
    "a key of the recipe": ([{}], {"recipe": PINNED | {"sede": 1}}, ["the recipe", "'sede'", "seed"]),
    "a key twice": ([{"seed": 1, "training": {"batch": 4}, "training.batch": 8}], {}, ["training.batch twice"]),
    "a folder in a grid": ([{"out": ["a", "b"]}], {}, ["grid 1", "out"]),
    "a folder in the settings": ([{}], {"settings": {"out": "a"}}, ["settings", "out"]),
    "no value": ([{"seed": []}], {}, ["seed is an empty list"]),
    "a bad value": ([{"seed": [0, -1]}], {}, ["grid 1 (seed=-1)", "seed", "-1"]),
    "a wrong kind": ([{"objective.kind": "e3e"}], {}, ["objective.kind", "e3e"]),
    "e2e_ds without β": ([{"objective.kind": "e2e_ds"}], {}, ["downstream_mse"]),
    "a range of one": ([{COEFFICIENT: {"log_range": [1, 2, 1]}}], {}, ["log_range takes", "[1, 2, 1]"]),
    "a range from 0": ([{COEFFICIENT: {"log_range": [0, 2, 3]}}], {}, ["above 0"]),
    "a range of two numbers": ([{COEFFICIENT: {"log_range": [1, 2]}}], {}, ["how many"]),
    "a range of words": ([{COEFFICIENT: {"log_range": "1-2"}}], {}, ["log_range takes"]),
    "a range and more": ([{COEFFICIENT: {"log_range": [1, 2, 3], "step": 1}}], {}, ["log_range takes"]),
    "a range without end": ([{COEFFICIENT: {"log_range": [1, math.inf, 3]}}], {}, ["log_range takes"]),
    "a range misspelt": ([{COEFFICIENT: {"logrange": [1, 2, 3]}}], {}, [COEFFICIENT, "log_range", "'logrange'"]),
    "a range of targets": ([{"target": {"log_range": [1, 2, 3]}}], {}, ["target"]),
    "a target's part": ([{"target.l0": 40}], {}, ["target takes {ce_increase: 0.1}"]),
    "a target's number": ([{"target": 0.1}], {}, ["target must read", "0.1"]),
    "two targets in one": ([{"target": {"l0": 40, "ce_increase": 1}}], {}, ["exactly one"]),
    "a target of another metric": ([{"target": {"kl": 40}}], {}, ["kl"]),
    "a target of 0": ([{"target": {"l0": 0}}], {}, ["l0", "greater than 0"]),
    "a target and a coefficient": ([{"target": {"l0": 40}, COEFFICIENT: [1, 2]}], {}, ["exclude each other"]),
    "a target from 0": ([{"target": {"l0": 40}}], {"settings": {COEFFICIENT: 0}}, ["start its search from"]),
    "a target in the settings": ([{}], {"settings": {"target": {"l0": 40}}}, ["belongs in a grid"]),
    "too many points": ([{"seed": [*range(400)], "data.seed": [*range(400)]}], {}, ["160,000"]),
    "an unknown recipe": ([{}], {"recipe": "embedded-layer3-e2"}, ["did you mean embedded-layer3-e2e"]),
    "a key of several places": ([{"joint": [True, False]}], {}, ["grid 1 (joint=True)", "joint: there is no such key"]),
    "a place of none": ([{"places.0.seed": 1}], {}, ["grid 1", "places.0.seed: the recipe has no places"]),
    "a place and a site": ([{"place": SITE, "site": SITE}], {}, ["place and site exclude each other"]),
    "no recipe's name": ([{}], {"recipe": ""}, ["recipe"]),
}


@pytest.mark.parametrize("name", BAD_SWEEPS)
def test_what_a_sweep_may_not_say(name):
    grids, changes, words = BAD_SWEEPS[name]
    with pytest.raises(ConfigError) as refused:
        points(*grids, **changes)
    for word in words:
        assert word in str(refused.value), refused.value


def test_what_the_file_itself_may_not_say():
    for values, word in (({}, "grids"), ({"grids": []}, "grids"), ({"grids": [{}], "togther": 3}, "together")):
        with pytest.raises(ConfigError, match=word):
            SweepConfig.build({"recipe": "embedded-layer3-e2e", **values})


def test_a_site_is_named_as_sites_are(tmp_path):
    with pytest.raises(SiteError, match=r"grid 1 \(site=\.\./\.\./x\).*blocks\.<layer>"):
        points({"site": ["blocks.0.hook_mlp_out", "../../x"]})


def test_a_recipes_own_folder_is_not_looked_at():
    assert points({}, recipe=PINNED | {"out": "runs/mine"}) == points({}, recipe=PINNED)


# Fingerprints: a run is found again by them, so that a change of how they are made loses every sweep that is there.


def test_the_fingerprint_of_one_recipe_is_pinned():
    assert fingerprint(RunConfig.build(PINNED)) == "b2d4f521bd"
    assert placed(RunConfig.build(PINNED), Path("a folder")).out == Path(
        "a folder/e2e_ds-10-blocks.6.hook_resid_pre-seed0-b2d4f521bd"
    )


@pytest.mark.parametrize(
    "written",
    [
        dict(reversed(PINNED.items())),
        PINNED | {"training": dict(reversed(PINNED["training"].items()))},
        PINNED | {"seed": 0, "model": {"name": "embedded"}, "data": {"context": 1024, "packing": "stream"}},
        PINNED | {"training": PINNED["training"] | {"batch": 16, "gradient_clip": 10.0}, "dictionary": {"ratio": 60.0}},
        PINNED | {"out": "somewhere/else"},
        RunConfig.build(PINNED).model_dump(),
        json.loads(RunConfig.build(PINNED).model_dump_json()),
        yaml.safe_load(RunConfig.build(PINNED).to_yaml()),
    ],
)
def test_how_a_recipe_is_written_leaves_its_fingerprint(written):
    assert fingerprint(RunConfig.build(written)) == fingerprint(RunConfig.build(PINNED))


def test_every_field_of_what_is_computed_counts():
    changes = {
        "seed": [1, 2],
        "init_from": ["a", "b"],
        "dictionary.size": [40, 41],
        "objective.kl": [0, 1],
        "data.seed": [0, 1],
        "training.warmup": [0.1, 0.2],
        "training.precision": ["exact", "mixed"],
        "evaluation.tokens": [100, 101],
        "model.revision": ["a", "b"],
        "objective.downstream_sites": [["blocks.3.hook_resid_pre"], ["blocks.2.hook_resid_pre"]],
    }
    made = points(*({key: values} for key, values in changes.items()))
    distinct = {fingerprint(p.config) for p in made}
    assert len(distinct) == len(made) == 2 * len(changes) - 2  # the recipe itself is there three times


# Files, names and changes from the command line.


@pytest.mark.parametrize("name", sweep_names())
def test_sweeps_that_ship_are_found_by_name(name, tmp_path, monkeypatch):
    assert points_of(read_sweep(name))
    assert read_sweep(name).out == Path("runs") / name
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(find_sweep(name).read_text())
    assert points_of(read_sweep("mine.yaml")) == points_of(read_sweep(name))
    assert read_sweep("mine.yaml").out == Path("runs/mine")
    with pytest.raises(ConfigError, match=f"There is no sweep '{name}s'.*did you mean {name}"):
        read_sweep(f"{name}s")


def test_changes_are_the_sweeps_or_the_recipes():
    changed = read_sweep(
        "embedded-kinds", ["out=elsewhere", "together=3", "search.trials=4", "training.tokens=4096", "settings.seed=5"]
    )
    assert (changed.out, changed.together, changed.search.trials) == (Path("elsewhere"), 3, 4)
    assert changed.settings == {"training.tokens": 4096, "seed": 5}
    made = points_of(changed)
    assert {(p.config.training.tokens, p.config.training.batch, p.config.seed) for p in made} == {(4096, 2, 5)}
    for override, words in (
        ("training.learning_rate=1", r"training\.learning_rate is set by grid 1"),
        ("training.learning_rat=1", "did you mean training.learning_rate"),
        ("togeher=1", "has no key"),
        ("together", "section.key=value"),
        ("target={l0: 40}", "belongs in a grid"),
    ):
        with pytest.raises(ConfigError, match=words):
            points_of(read_sweep("embedded-kinds", [override]))


# Tasks.


def test_a_task_shares_model_site_kind_data_and_length():
    made = points(
        {"seed": [0, 1, 2], COEFFICIENT: [1, 2], "dictionary.size": [40, 80], "training.learning_rate": [0.1, 0.2]},
        {"site": "blocks.0.hook_mlp_out"},
        {"objective.kind": "e2e"},
        {"training.tokens": 1280},
        {"training.batch": 8},
        {"data.seed": 1},
        {"model.name": "other"},
        {"evaluation.tokens": 64},
        {"init_from": "somewhere"},
    )
    configs = [placed(p.config, Path("runs")) for p in made]
    tasks = tasks_of(configs, together=100)
    assert [len(task) for task in tasks] == [25, 1, 1, 1, 1, 1, 1, 1]
    assert [config for task in tasks for config in task] == [*configs[:24], configs[-1], *configs[24:-1]]
    assert [len(task) for task in tasks_of(configs[:24], together=7)] == [7, 7, 7, 3]


def assert_same_run(ours, theirs):
    ours, theirs = RunFolder(Path(ours)), RunFolder(Path(theirs))
    for name in ("metrics.jsonl", "evaluation.json", "evaluation_sums.safetensors", "data.json"):
        assert (ours.path / name).read_bytes() == (theirs.path / name).read_bytes(), name
    for name in ("sae_weights.safetensors", "cfg.json"):
        assert (ours.sae / name).read_bytes() == (theirs.sae / name).read_bytes(), name


GRIDS = (
    {"objective.kind": ["local", "e2e"], "seed": [0, 1]},
    {"site": "blocks.0.hook_mlp_out", COEFFICIENT: 0.1},
    {"dictionary.size": 24},
)
OFTEN = {"tokens": 320, "checkpoint_every": 4, "keep_checkpoints": 9, "evaluate_every": 5, "log_every": 3}
"""Ten steps."""
SHORT = {"tokens": 64}


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    """A sweep left alone, eight at a time."""
    out = tmp_path_factory.mktemp("whole")
    return sweep(small_sweep(made, out, *GRIDS, training=OFTEN), display=False)


def test_together_or_one_by_one_every_run_ends_as_alone(made, whole, tmp_path, model, corpora):
    single = sweep(small_sweep(made, tmp_path / "one by one", *GRIDS, training=OFTEN, together=1), display=False)
    assert not single.failures and len(single.runs) == 6
    for point, folder in whole.runs.items():
        assert_same_run(folder, single.runs[point])
    for name in ("summary.csv", "summary.parquet"):
        assert (whole.folder / name).read_bytes() == (single.folder / name).read_bytes()
    config = complete(made, tmp_path / "alone", {"seed": 1}, **OFTEN)
    train(config, display=False)
    (folder,) = (whole.runs[p] for p in whole.runs if p.config == config.model_copy(update={"out": None}))
    assert RunFolder(config.out).metrics_file.read_text() == RunFolder(folder).metrics_file.read_text()


def test_what_is_finished_is_skipped_and_a_second_file_adds_to_it(made, whole, tmp_path):
    before = (whole.folder / "summary.csv").read_bytes()
    trained = []
    idle = here(train=never, measure=never)
    again = sweep(small_sweep(made, whole.folder, *GRIDS, training=OFTEN), display=False, engine=idle)
    assert again.runs == whole.runs and (whole.folder / "summary.csv").read_bytes() == before
    noting = here(train=lambda configs, **options: trained.extend(configs) or train_together(configs, **options))
    grid = {"seed": [0, 1, 2, 3]}
    more = sweep(small_sweep(made, whole.folder, grid, training=OFTEN), display=False, engine=noting)
    assert [config.seed for config in trained] == [2, 3]
    assert len(more.runs) == 4 and len(list((whole.folder / "runs").iterdir())) == 8
    assert [row["seed"] for row in rows_of(whole.folder / "summary.csv")] == ["0", "1", "2", "3"]
    sweep(small_sweep(made, whole.folder, *GRIDS, training=OFTEN), display=False)
    assert (whole.folder / "summary.csv").read_bytes() == before


def test_the_folder_may_be_moved_and_have_any_name(made, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    moved = Path("a 'folder' of mine, 50 %")
    Path("runs").symlink_to(whole.folder / "runs")
    moved.mkdir()
    Path("runs").rename(moved / "runs")
    again = sweep(small_sweep(made, moved, *GRIDS, training=OFTEN), display=False, engine=here(train=never))
    assert again.summary.read_bytes() == whole.summary.read_bytes()
    assert all(folder.parts[0] == str(moved) for folder in again.folders)


# What an earlier end left.


@pytest.fixture(scope="module")
def two_left_alone(made, tmp_path_factory):
    config = small_sweep(made, tmp_path_factory.mktemp("two"), {"seed": [0, 1]}, training=OFTEN)
    return sweep(config, display=False)


@pytest.fixture
def two(made, two_left_alone, tmp_path):
    """A finished sweep of two runs to do harm to, where they lie, and its table."""
    out = tmp_path / "two"
    shutil.copytree(two_left_alone.folder, out)
    folders = [out / folder.relative_to(two_left_alone.folder) for folder in two_left_alone.folders]
    config = small_sweep(made, out, {"seed": [0, 1]}, training=OFTEN)
    return config, *folders, (out / "summary.csv").read_bytes()


def test_a_trained_run_without_a_whole_evaluation_is_measured_only(two):
    config, _, second, table = two
    file = RunFolder(second).evaluation_file
    for left in (b"", b'{"l0": 1', b"{}", b'{"l0": "many", "ce_increase": 1, "alive": 2}', None):
        file.unlink()
        if left is not None:
            file.write_bytes(left)
        assert [each.state for each in survey(config)] == ["finished", "to be measured"]
    measured = []
    noting = here(train=never, measure=lambda runs, **options: measured.extend(runs) or evaluate(runs, **options))
    file.write_bytes(b"damaged")
    assert sweep(config, display=False, engine=noting).summary.read_bytes() == table
    assert measured == [second]


def test_what_was_measured_before_the_end_does_not_count(made, two, tmp_path):
    """As `endwise evaluate` does it on a run that was interrupted."""
    config, first, _, table = two
    cut_off = config.model_copy(update={"out": tmp_path / "cut off"})
    with pytest.raises(Interrupted):
        sweep(cut_off, display=False, engine=stopped_at(5))
    for each in survey(cut_off):
        RunFolder(each.folder).evaluation_file.write_bytes(RunFolder(first).evaluation_file.read_bytes())
    assert sweep(cut_off, display=False).summary.read_bytes() == table


@pytest.mark.parametrize("files", [pytest.param([], marks=pytest.mark.slow), ["sae_weights.safetensors"]])
def test_an_sae_that_was_half_written_is_none(two, files):
    """A process that is killed as it saves for the first time leaves the folder, then the weights, then all."""
    config, _, second, table = two
    folder = RunFolder(second)
    for file in (*folder.sae.iterdir(), *folder.checkpoints.iterdir(), folder.evaluation_file):
        if file.name not in files:
            file.unlink()
    folder.metrics_file.write_text("")
    assert [each.state for each in survey(config)] == ["finished", "to be started"]
    assert sweep(config, display=False).summary.read_bytes() == table


@pytest.mark.parametrize("kept", [({4}, {4, 8}), pytest.param(({8}, {4}), marks=pytest.mark.slow), (set(), {4})])
def test_runs_at_different_steps_are_taken_up_each_from_its_own(two, two_left_alone, kept):
    """As a process leaves them that is killed between two saves, or with none in common."""
    config, *folders, table = two
    for folder, steps in zip(map(RunFolder, folders), kept, strict=True):
        for step in set(folder.saved_steps()) - steps:
            folder.checkpoint(step).unlink()
        pretend_unfinished(folder)
    swept = sweep(config, display=False)
    assert swept.summary.read_bytes() == table
    for ours, theirs in zip(swept.folders, two_left_alone.folders, strict=True):
        assert_same_run(ours, theirs)


def pretend_unfinished(folder):
    cfg = json.loads((folder.sae / "cfg.json").read_text())
    cfg["metadata"]["endwise"]["step"] = 4
    (folder.sae / "cfg.json").write_text(json.dumps(cfg))


def stopped_at(step):
    """An engine that Ctrl-C stops in the midst of a step."""
    return here(train=partial(train_with, acting(stopping(step))))


def test_ctrl_c_in_training_and_in_measuring_and_the_same_command_again(two, tmp_path):
    config, _, _, table = two
    config = config.model_copy(update={"out": tmp_path / "stopped"})
    with pytest.raises(Interrupted, match=r"Stopped as asked.*stopped; the same command resumes"):
        sweep(config, display=False, engine=stopped_at(6))
    assert [each.state for each in survey(config)] == ["saved at step 7", "saved at step 7"]

    def stopped(*arguments, **options):
        raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="the same command resumes"):
        sweep(config, display=False, engine=here(measure=stopped))
    assert [each.state for each in survey(config)] == ["to be measured", "to be measured"]
    assert not (config.out / "summary.csv").exists()
    assert sweep(config, display=False).summary.read_bytes() == table


def test_killed_in_the_middle_the_same_command_ends_in_the_same_bytes(made, whole, tmp_path):
    config = small_sweep(made, tmp_path / "killed", *GRIDS, training=OFTEN)
    file = tmp_path / "killed.yaml"
    file.write_text(config.to_yaml())
    command = ["sweep", str(file)]
    killed = warm.run(HELPERS / "victim.py", "is_killed", *command, cwd=HELPERS)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    steps = [RunFolder(each.folder).saved_steps() for each in survey(config)]
    assert [4] in steps and [] in steps and not (config.out / "summary.csv").exists()
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0, again.output
    for folder in whole.folders:
        assert_same_run(config.out / folder.relative_to(whole.folder), folder)
    assert (config.out / "summary.csv").read_bytes() == whole.summary.read_bytes()
    assert (config.out / "summary.parquet").read_bytes() == (whole.folder / "summary.parquet").read_bytes()


# What fails.


def test_one_that_fails_leaves_the_others_to_their_end(made, whole, tmp_path):
    config = small_sweep(
        made,
        tmp_path,
        {"seed": [0, 1]},
        {"init_from": str(tmp_path / "nothing")},
        {"training.learning_rate": 1e30},
        {"site": "blocks.9.hook_resid_pre"},
        {"objective.kind": "e2e", "seed": [0, 1]},
        training=OFTEN,
    )
    swept = sweep(config, display=False)
    reasons = {
        p.config.site if p.config.site != SITE else str(p.config.init_from): why for p, why in swept.failures.items()
    }
    assert len(swept.failures) == 3 and len(swept.runs) == 4
    assert "blocks.0 to blocks.3" in reasons["blocks.9.hook_resid_pre"]
    assert reasons[str(tmp_path / "nothing")].startswith("init_from: ")
    assert "not finite" in reasons["None"] and "last good state is saved" in reasons["None"]
    for point, folder in swept.runs.items():
        assert_same_run(folder, whole.runs[point])
    rows = rows_of(swept.summary)
    assert [row["status"] for row in rows] == ["finished", "finished", "failed", "failed", "failed", *["finished"] * 2]
    for row in rows:
        assert (row["status"] == "failed") == bool(row["error"]) == (not row["l0"])
        assert (tmp_path / row["run"]).exists() == (row["status"] == "finished" or "not finite" in row["error"])
    assert [row["init_from"] for row in rows].count(str(tmp_path / "nothing")) == 1
    assert {row["training.learning_rate"] for row in rows} == {"0.01", "1e+30"}
    assert len(rows_of(tmp_path / "timings.csv")) == 4


def test_a_fault_is_told_before_anything_is_trained(made, tmp_path, capfd):
    idle = here(train=never, loaded=ModelCache(never))
    bad = (
        {"site": "blocks.9.hook_resid_pre"},
        {"objective.kind": "e2e_ds", "objective.downstream_mse": 1, "objective.downstream_sites": [[SITE]]},
    )
    swept = sweep(small_sweep(made, tmp_path, *bad), display=True, engine=idle)
    told = capfd.readouterr().err
    assert len(swept.failures) == 2
    assert told.count("failed: ") == 2 and "blocks.0 to blocks.3" in told and "must come after" in told


def test_what_all_share_is_tried_once(made, tmp_path):
    attempts = []
    noting = here(loaded=ModelCache(lambda config: attempts.append(config) or model_for(config)))
    config = small_sweep(made, tmp_path, {"seed": [*range(5)], "model.name": "/no/model"})
    swept = sweep(config, display=False, engine=noting)
    assert len(swept.failures) == 5 and len(attempts) == 1
    assert all("/no/model" in why for why in swept.failures.values())


def test_the_fault_of_one_is_found_in_halves(made, tmp_path):
    """Fail all where one fails before the first step; the others then still train side by side."""
    groups = []
    noting = here(train=lambda configs, **options: groups.append(len(configs)) or train_together(configs, **options))
    grids = ({"seed": [0, 1, 2]}, {"init_from": "nowhere"}, {"seed": 4})
    swept = sweep(small_sweep(made, tmp_path, *grids, training=SHORT), display=False, engine=noting)
    assert groups == [5, 2, 3, 1, 2, 1, 1]
    assert len(swept.runs) == 4 and len(swept.failures) == 1


def test_a_damaged_checkpoint_is_told_with_its_remedy(two):
    config, first, second, table = two
    folder = RunFolder(second)
    pretend_unfinished(folder)
    damaged = folder.latest_checkpoint()
    damaged.write_bytes(damaged.read_bytes()[:-9])
    swept = sweep(config, display=False)
    (why,) = swept.failures.values()
    assert swept.folders == [first]
    command = why.split("resume from there with: endwise ")[1].split()
    assert command == ["train", "--resume", str(second), "--from-step", "8"]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert sweep(config, display=False).summary.read_bytes() == table


@pytest.mark.parametrize("doing", ["training", "measuring"])
def test_what_another_process_has_in_hand_is_waited_for_behind_the_others(made, whole, tmp_path, monkeypatch, doing):
    """Alone, or side by side with one that is free."""
    config = small_sweep(made, tmp_path, {"seed": [0, 1, 2]}, training=OFTEN, together=2)
    first = survey(config)[0].folder
    if doing == "measuring":
        train(points_of(config)[0].config.model_copy(update={"out": first}), display=False)
    engine, looks = here(), []
    with ExitStack() as other:
        other.enter_context(RunFolder(first).claimed())

        def look(seconds):
            looks.append([RunFolder(each.folder).measured() is not None for each in survey(config)])
            if len(looks) == 2:
                other.close()

        monkeypatch.setattr("endwise.sweeps.engines.time", SimpleNamespace(sleep=look))
        swept = sweep(config, display=False, engine=engine)
    assert looks == [[False, True, True]] * 2
    assert len(swept.runs) == 3 and not swept.failures


def test_a_folder_that_holds_something_else(made, whole, tmp_path):
    config = small_sweep(made, tmp_path, {"seed": [0, 1, 2]}, training=OFTEN)
    foreign, other, _ = (each.folder for each in survey(config))
    foreign.mkdir(parents=True)
    (foreign / "thesis.txt").write_text("mine")
    RunFolder(other).create(recipe(other, "e2e"))
    swept = sweep(config, display=False)
    assert [str(why)[:60] for why in swept.failures.values()] == [
        f"{foreign} exists and is not an empty folder"[:60],
        f"{other} holds the run of another recipe"[:60],
    ]
    assert [p.config.seed for p in swept.runs] == [2]
    assert (foreign / "thesis.txt").read_text() == "mine"


def test_a_run_that_ends_without_an_sae_is_not_begun_for_ever(made, tmp_path):
    def nothing(*arguments, **options):
        pass

    swept = sweep(small_sweep(made, tmp_path, {}), display=False, engine=here(train=nothing, measure=nothing))
    assert "its SAE is not there" in next(iter(swept.failures.values()))


def test_an_unforeseen_error_is_told_by_its_name(made, tmp_path):
    def fails(*arguments, **options):
        raise ArithmeticError("no number\nfor it")

    config = small_sweep(made, tmp_path, {"seed": [0, 1]}, training=SHORT)
    swept = sweep(config, display=False, engine=here(measure=fails))
    assert list(swept.failures.values()) == ["ArithmeticError: no number for it"] * 2


def test_a_sweep_is_one_process(made, tmp_path, monkeypatch):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="torchrun"):
        sweep(small_sweep(made, tmp_path / "out", {}), display=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:training.precision=mixed on a processor")
def test_mixed_precision_is_measured_as_evaluate_does(made, tmp_path):
    """On a CPU training and measuring use one model, so that it is loaded once."""
    loads = []
    worker = Worker(loaded=ModelCache(lambda config: loads.append(config) or model_for(config)))
    config = placed(complete(made, tmp_path, {"training.precision": "mixed"}, **SHORT), tmp_path)
    assert worker.carry_out((config,)) == [Outcome(config.out)]
    assert len(loads) == 1 and is_finished(config)


# The tables.


def test_the_summary_holds_what_the_runs_measured(whole):
    table = pq.read_table(whole.folder / "summary.parquet").to_pylist()
    assert len(table) == len(whole.runs) == 6
    for row, (point, folder) in zip(table, whole.runs.items(), strict=True):
        evaluation = RunFolder(folder).evaluation()
        assert whole.folder / row["run"] == folder
        assert row["status"] == "finished" and row["error"] is None and row["target"] is None
        assert (row["kind"], row["site"]) == (point.config.objective.kind, point.config.site)
        assert (row["seed"], row["coefficient"]) == (point.config.seed, point.config.objective.sparsity.coefficient)
        assert row["dictionary.size"] == row["d_sae"] == point.config.dictionary.size
        for name in ("l0", "kl", "ce_increase", "alive"):
            assert row[name] == evaluation[name]
        assert [row["l0.low"], row["l0.high"]] == evaluation["intervals"]["l0"]
        assert row["explained_variance.per_token"] == evaluation["explained_variance"]["per_token"]
    timings = rows_of(whole.folder / "timings.csv")
    assert [row["run"] for row in timings] == [row["run"] for row in table]
    assert all(float(row["seconds"]) > 0 for row in timings)


def test_keys_in_which_points_differ_are_columns(made, tmp_path):
    grids = ({"objective.kind": "e2e_ds", "objective.downstream_mse": [1, 2]}, {"training.warmup": 0.5})
    sites = {"objective.kind": "e2e_ds", "objective.downstream_sites": [["blocks.3.hook_resid_pre"]]}
    swept = sweep(
        small_sweep(made, tmp_path, *grids, sites, settings={"objective.downstream_mse": 3, "training.tokens": 64}),
        display=False,
    )
    rows = rows_of(swept.summary)
    assert [row["objective.downstream_mse"] for row in rows] == ["1", "2", "3", "3"]
    assert [row["training.warmup"] for row in rows] == ["0.05", "0.05", "0.5", "0.05"]
    assert [row["objective.downstream_sites"] for row in rows] == ["", "", "", '["blocks.3.hook_resid_pre"]']
    assert "training.batch" not in rows[0] and "data.seed" not in rows[0]


def test_a_table_of_rows_that_hold_different_things(tmp_path):
    rows = [
        {"run": "a", "error": 'it "said",\nno'},
        {"run": "b", "l0": 1.5, "n": 3},
        {"run": "c", "l0": 2, "never": None},
    ]
    write_table(rows, tmp_path / "table")
    assert rows_of(tmp_path / "table.csv") == [
        {"run": "a", "error": 'it "said",\nno', "l0": "", "n": "", "never": ""},
        {"run": "b", "error": "", "l0": "1.5", "n": "3", "never": ""},
        {"run": "c", "error": "", "l0": "2", "n": "", "never": ""},
    ]
    assert [row["l0"] for row in pq.read_table(tmp_path / "table.parquet").to_pylist()] == [None, 1.5, 2.0]


def test_the_table_on_a_terminal(whole):
    console = Console(record=True, width=80, force_terminal=True, file=io.StringIO())
    print_rows(whole.rows, console)
    text = console.export_text()
    for folder in whole.folders:
        assert folder.name.rpartition("-")[2] in text
    assert "e2e" in text and SITE.split(".")[-1] not in text.splitlines()[0]
    console = Console(record=True, width=40, file=io.StringIO())
    print_rows(whole.rows, console)
    assert "CE increase [95 %]" in console.export_text()  # a file is as wide as need be


# What is seen meanwhile.


def standing(config, state="training", tokens=0, seconds=0.0, before=0.0):
    return RunStatus(config, state, tokens, seconds, None, None, before)


def test_the_time_that_is_left():
    config = recipe(Path("unused"), "local", tokens=1000)
    assert seconds_left([standing(config)], 10.0) is None
    assert seconds_left([], 10.0) is None
    half = standing(config, tokens=500, seconds=5.0)
    assert seconds_left([half], 5.0) == pytest.approx(5.0)
    assert seconds_left([half], 10.0) == pytest.approx(10.0)  # as much time again between the steps
    # Two of a pass spend the same five seconds; two others wait for theirs.
    assert seconds_left([half, half, standing(config), standing(config)], 5.0) == pytest.approx(15.0)
    done = standing(config, "finished", tokens=1000, seconds=10.0)
    assert seconds_left([done, standing(config, "failed", tokens=300, seconds=3.0)], 13.0) == 0
    # Before this sweep it had run for 100 s at the same speed: nothing of that tells how many run side by side now.
    resumed = standing(config, tokens=500, seconds=105.0, before=100.0)
    assert seconds_left([resumed], 5.0) == pytest.approx(500 * (105 / 500))
    # A kind that costs more, known and unknown, and what is to come.
    slow = recipe(Path("unused"), "e2e", tokens=1000)
    both = [done, standing(slow, tokens=100, seconds=10.0)]
    assert seconds_left(both, 20.0) == pytest.approx(90.0)
    assert seconds_left(both, 20.0, [slow]) == pytest.approx(190.0)
    other = recipe(Path("unused"), "e2e_ds", tokens=110)
    assert seconds_left([*both, standing(other)], 20.0) == pytest.approx(90.0 + 110 * 20 / 1100)


def test_a_file_of_lines_is_read_from_its_end(tmp_path):
    file = tmp_path / "lines"
    assert last_record(file) is None
    for content, expected in (
        (b"", None),
        (b'{"step": 1', None),
        (b'{"step": 1}\n{"st', {"step": 1}),
        (b'{"step": 1}\n{"step": 2}\n', {"step": 2}),
        (b'{"step": 1}\n\xff\n', None),
        (b"[1]\n", None),
        (b'{"a": "' + b"x" * 9000 + b'"}\n' + b'{"b": "' + b"y" * 9000 + b'"}\n', {"b": "y" * 9000}),
    ):
        file.write_bytes(content)
        assert last_record(file) == expected


def test_a_run_is_watched_by_its_folder(made, tmp_path):
    config = complete(made, tmp_path / "run", {})
    run = RunStatus.at_start(config)
    assert (run.state, run.tokens, run.left) == ("waiting", 0, 640)
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()

    def wrote(step, seconds, **more):
        folder.append(folder.metrics_file, {"step": step, "tokens": 32 * step, "l0": 7.0, **more})
        folder.append(folder.timings_file, {"step": step, "seconds": seconds})
        run.look()

    wrote(5, 1.0)
    assert (run.state, run.tokens, run.left, run.spent, run.l0, run.ce_increase) == (
        "training",
        160,
        480,
        1.0,
        7.0,
        None,
    )
    wrote(10, 2.0, heldout={"ce_increase": 0.5})
    assert (run.left, run.ce_increase) == (320, 0.5)
    taken_up = RunStatus.at_start(config)
    assert (taken_up.state, taken_up.tokens, taken_up.spent) == ("waiting", 320, 0.0)
    wrote(20, 4.0)
    assert (run.state, run.left, run.ce_increase) == ("measuring", 0, 0.5)
    taken_up.look()
    assert (taken_up.state, taken_up.spent) == ("measuring", 2.0)
    folder.metrics_file.write_text('{"step": "x", "tokens": null, "heldout": 3}\n')
    run.look()
    assert run.tokens == 640
    folder.evaluation_file.write_text('{"l0": 5, "ce_increase": 0.25}')
    run.end(Outcome(folder.path))
    assert (run.state, run.l0, run.ce_increase, run.left) == ("finished", 5, 0.25, 0)


@pytest.fixture
def watched(made, tmp_path):
    """A console of 80 columns, and a watch over four runs, of which one is finished and one has failed."""

    def make(**options):
        console = Console(record=True, width=80, file=io.StringIO(), **options)
        watch = Watch(True, console)
        configs = [placed(complete(made, tmp_path, {"seed": seed}), tmp_path) for seed in range(3)]
        configs.append(placed(complete(made, tmp_path, {"training.warmup": 0.5}), tmp_path))
        folder = RunFolder(configs[0].out)
        folder.path.mkdir(parents=True)
        watch.expect(configs, configs[:1])
        folder.append(folder.metrics_file, {"step": 20, "tokens": 640, "l0": 7.0})
        folder.append(folder.timings_file, {"step": 20, "seconds": 3.0})
        folder.evaluation_file.write_text('{"l0": 5.25, "ce_increase": 0.25}')
        return console, watch, configs

    return make


def test_on_a_terminal_a_table_of_all_runs(watched):
    console, watch, configs = watched(force_terminal=True)
    with watch:
        watch.ended(Outcome(configs[0].out))
        watch.ended(Outcome(configs[1].out, "no \x1b[31mroom[/red] left"))
    text = console.export_text()
    assert f"failed: {configs[1].out}: no \\x1b[31mroom[/red] left" in text
    table = [line.split() for line in text.splitlines()]
    heading = [line for line in table if "runs" in line][-1]
    assert heading[:8] == ["1", "of", "5", "runs", "finished,", "1", "failed", "·"]
    rows = [line for line in table if line[:1] == ["local"]]
    end = configs[0].out.name.rpartition("-")[2]
    assert rows[-4:] == [
        ["local", "0.3", "seed", "1", "failed", "0", "%", "–", "–"],
        ["local", "0.3", "seed", "2", "waiting", "0", "%", "–", "–"],
        ["local", "0.3", "seed", "0", f"…{configs[3].out.name.rpartition('-')[2]}", "waiting", "0", "%", "–", "–"],
        ["local", "0.3", "seed", "0", f"…{end}", "finished", "100", "%", "5.2", "+0.250"],
    ]


def test_off_a_terminal_a_line_now_and_then(watched, monkeypatch):
    console, watch, configs = watched(force_terminal=False)
    with watch:
        watch.ended(Outcome(configs[0].out))
        watch._shown_at -= watch._log.every
        watch._show()
        watch._show()
    (line,) = console.export_text().splitlines()
    assert line.startswith("1 of 5 runs finished · about ") and line.endswith(" left")


def test_quiet_is_quiet(made, tmp_path, capfd):
    swept = sweep(small_sweep(made, tmp_path, {}, {"site": "blocks.9.hook_resid_pre"}, training=SHORT), display=False)
    assert len(swept.failures) == 1
    told = capfd.readouterr()
    assert "blocks.9" not in told.err and not told.out


# The command.


def test_the_command_from_a_dry_run_to_the_table(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = small_sweep(
        made, tmp_path, {"seed": [0, 1]}, {"site": "blocks.9.hook_resid_pre"}, training={"tokens": 320}
    )
    Path("mine.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json", include={"recipe", "grids"})))
    command = ["sweep", "mine.yaml", "training.batch=2", "together=1"]

    def dry():
        result = CliRunner().invoke(app, [*command, "--dry-run"])
        assert result.exit_code == 0, result.output
        return result.stdout.splitlines()

    lines = dry()
    assert [line.split(": ")[0] for line in lines[:-1]] == ["pass 1", "pass 2", "–"]
    assert [line.endswith("to be started") for line in lines[:-1]] == [True, True, False]
    assert "failed: " in lines[2] and "blocks.0 to blocks.3" in lines[2]
    assert lines[-1] == "0 of 3 runs finished. Next passes: 2."
    assert not Path("runs").exists()
    result = CliRunner().invoke(app, [*command, "--quiet"])
    assert result.exit_code == 7, result.output
    assert "2 of 3 runs finished. The table of all: runs/mine/summary.csv" in result.stdout
    folders = sorted(Path("runs/mine/runs").iterdir())
    assert [RunFolder(folder).config().training.batch for folder in folders] == [2, 2]
    assert all(folder.name.rpartition("-")[2] in result.stdout for folder in folders)
    (told,) = [line for line in result.stderr.splitlines() if line.startswith("failed: ")]
    assert "local 0.3 blocks.9.hook_resid_pre seed 0 in runs/mine/runs/local-0.3-blocks.9" in told
    assert dry()[-1] == "2 of 3 runs finished. Next passes: 0."
    assert read_sweep("runs/mine/sweep.yaml") == read_sweep("mine.yaml", command[2:])


def test_the_command_is_stopped_and_says_how_to_resume(made, tmp_path):
    config = small_sweep(made, tmp_path / "out", {"seed": [0, 1]})
    (tmp_path / "mine.yaml").write_text(config.to_yaml())
    Stops.pressed = False
    result = CliRunner().invoke(app, ["sweep", str(tmp_path / "mine.yaml"), "trackers=[stops]"])
    assert result.exit_code == 130
    assert "Traceback" not in result.output and "the same command resumes" in result.stderr
    result = CliRunner().invoke(app, ["sweep", str(tmp_path / "mine.yaml"), "--quiet"])
    assert result.exit_code == 0 and "2 of 2 runs finished" in result.stdout


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (None, 2, "There is no sweep"),
        ("grids: [{}]", 2, "recipe: this key is required"),
        ("recipe: embedded-layer3-e2e\ngrids: [{sede: 1}]", 2, "did you mean seed"),
        ("recipe: embedded-layer3-e2e\ngrids: [{site: here}]", 3, "grid 1 (site=here)"),
        ("recipe: embedded-layer3-e2e\ngrids: [{}]\nout: FILE/x", 5, "Cannot write"),
        ("grids: [", 2, "not valid YAML"),
    ],
)
def test_a_sweep_that_is_wrong_is_one_plain_message(tmp_path, content, code, words):
    file = tmp_path / "mine.yaml"
    (tmp_path / "FILE").write_text("")
    if content is not None:
        file.write_text(content.replace("FILE", str(tmp_path / "FILE")))
    result = CliRunner().invoke(app, ["sweep", str(file)])
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("endwise: ") and words in result.stderr
