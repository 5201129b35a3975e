"""Several processes train one run as one process does, and none of them waits for one that is gone."""

import json
import shutil

import pytest
import torch
import yaml

from endwise import RunConfig, train_together
from endwise.common.processes import ALONE, World
from endwise.runs.checkpoints import read_checkpoint
from endwise.runs.folder import RunFolder
from places import HELPERS
from small_gpt2 import data, recipe, small_corpora, small_model
from spread import TOLERANCE, assert_close, launch, spread
from together_apart import FAILING_STEP, KINDS, configs


def write_recipe(made, out, kind="e2e_ds", **training):
    settings = {
        "batch": 5,
        "accumulation": 5,
        "evaluate_every": 5,
        "checkpoint_every": 5,
        "tokens": 400,
        "log_every": 1,
    }
    values = recipe(out, kind, **(settings | training)).model_dump(mode="json")
    values["model"] |= {"name": str(made / "model"), "device": "cpu"}
    # Held-out batches of 3 sequences fall unevenly to the processes; position 0 does not count.
    values["evaluation"] |= {"batch": 3, "during_training_tokens": 104}
    values["data"] = data(made).model_dump() | {"mask_first_position": True}
    file = out.with_suffix(".yaml")
    file.write_text(RunConfig.build(values).to_yaml())
    return file


@pytest.fixture(scope="module")
def alone(made, tmp_path_factory):
    """Run of the recipe in one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    code, _, errors = launch(1, "train", write_recipe(made, folder), "--quiet")
    assert code == 0, errors
    return folder


def assert_same_curve(folder, alone):
    ours, theirs = RunFolder(folder).metrics(), RunFolder(alone).metrics()
    assert len(ours) == len(theirs) == 10
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other, f"step {other['step']}")  # alive counts, being integers, exactly
    assert any("heldout" in line for line in ours)
    kept, expected = (read_checkpoint(RunFolder(each).latest_checkpoint()) for each in (folder, alone))
    assert torch.equal(kept.tensors["last_fired"], expected.tensors["last_fired"])
    for name, tensor in expected.tensors.items():
        if name.startswith("sae."):
            torch.testing.assert_close(kept.tensors[name], tensor, rtol=TOLERANCE, atol=TOLERANCE)


def test_two_processes_give_the_curve_of_one(made, alone, tmp_path):
    code, out, errors = launch(2, "train", write_recipe(made, tmp_path / "run"), "--quiet")
    assert code == 0, errors
    assert out.count("Trained e2e_ds") == 1
    assert_same_curve(tmp_path / "run", alone)


def test_terms_over_all_tokens_of_a_step(made, tmp_path):
    """A penalty of features' means, an auxiliary term that is divided by a variance, and terms that are balanced."""
    dictionary = {"architecture": "jumprelu", "size": 40, "penalty": "tanh_quadratic", "threshold_init": 0.5}
    dictionary |= {"aux": 0.5, "aux_negative": True, "dead_window": 40}
    curves = []
    for processes in (1, 2):
        file = write_recipe(made, tmp_path / f"of{processes}", accumulation=1, tokens=240)
        values = yaml.safe_load(file.read_text())
        objective = values["objective"] | {"balance": "loss"}
        file.write_text(yaml.safe_dump(values | {"dictionary": dictionary, "objective": objective}))
        code, _, errors = launch(processes, "train", file, "--quiet")
        assert code == 0, errors
        curves.append(RunFolder(tmp_path / f"of{processes}").metrics())
    assert len(curves[0]) == 6 and any(line["dead_aux"] > 0 for line in curves[0])
    for one, other in zip(*curves, strict=True):
        assert_close(other, one, f"step {one['step']}")


def test_a_stop_stops_all_and_another_number_of_processes_continues(made, alone, tmp_path):
    file = write_recipe(made, tmp_path / "run")
    code, _, errors = launch(2, "train", file, "--quiet", fault="is_told_to_stop")
    assert code != 0 and "saved at step 6" in errors
    assert RunFolder(tmp_path / "run").saved_steps()[-1] == 6
    code, _, errors = launch(3, "train", "--resume", tmp_path / "run", "--quiet", fault="is_told_to_stop")
    assert code == 0, errors  # the fault is at a step that has been taken
    assert_same_curve(tmp_path / "run", alone)


@pytest.mark.parametrize("fault", ["dies_as_second_process", "raises_as_second_process"])
def test_when_one_dies_the_others_end_with_an_error(made, alone, tmp_path, fault):
    file = write_recipe(made, tmp_path / "run")
    code, _, errors = launch(2, "train", file, "--quiet", fault=fault, ENDWISE_TIMEOUT="60")
    assert code != 0
    assert "endwise (process 0): Another process of this run is gone" in errors and "Start all of them again" in errors
    assert ("ArithmeticError: only here" in errors) == (fault == "raises_as_second_process")
    saved = read_checkpoint(RunFolder(tmp_path / "run").latest_checkpoint())
    assert saved.state["step"] == 5
    code, _, errors = launch(1, "train", file, "--or-resume", "--quiet")
    assert code == 0, errors
    assert_same_curve(tmp_path / "run", alone)


@pytest.fixture(scope="module")
def three_alone(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    return train_together(configs(folder), model=small_model(), corpora=small_corpora(made), display=False)


@pytest.mark.parametrize("method", ["accumulate", "finish_step"])
def test_one_of_several_saes_fails_in_one_process_only(made, three_alone, tmp_path, method):
    done = spread(2, HELPERS / "together_apart.py", tmp_path / "two", made, method, ENDWISE_TIMEOUT="60")
    assert "rank 0: 1 of 3 SAEs trained together failed" in done.stderr, done.stderr
    assert "failed in another process, which says why" in done.stderr and "only here" in done.stderr
    for run, kind in zip(three_alone, KINDS, strict=True):
        ours, theirs = RunFolder(tmp_path / "two" / kind).metrics(), RunFolder(run.folder).metrics()
        assert len(ours) == (FAILING_STEP if kind == "e2e" else len(theirs))
        for one, other in zip(ours, theirs, strict=kind != "e2e"):
            assert_close(one, other, f"{kind} {other['step']}")


def test_what_one_process_refuses_ends_all(made, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    code, _, errors = launch(2, "train", write_recipe(made, tmp_path / "run"), "--quiet")
    assert code != 0
    assert "endwise (process 0):" in errors and "is not an empty folder" in errors
    assert "another process failed at claiming the run folders" in errors
    code, _, errors = launch(2, "train", write_recipe(made, tmp_path / "other", batch=1, accumulation=1), "--quiet")
    assert code != 0 and "training.batch is 1, fewer sequences than the 2 processes" in errors
    assert not (tmp_path / "other").exists()


def test_evaluation_over_processes(made, alone, tmp_path):
    for processes, folder in ((1, tmp_path / "one"), (2, tmp_path / "two")):
        shutil.copytree(alone, folder)
        code, out, errors = launch(processes, "evaluate", folder)
        assert code == 0, errors
        assert out.count("CE increase") <= 1
    one, two = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two"))
    assert_close(two, one)


def test_shares_laid_end_to_end_are_the_whole():
    items = list(range(17))
    for size in (1, 2, 5, 17):
        shares = [World(rank, size).share(items) for rank in range(size)]
        assert [item for share in shares for item in share] == items
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_alone_nothing_is_asked_of_anyone():
    total = torch.ones(3)
    ALONE.add([total])
    assert total.tolist() == [1, 1, 1]
    assert ALONE.any([True, False]) == [True, False]
    assert ALONE.gather("x") == ["x"] and ALONE.from_first("y") == "y"
    with pytest.raises(KeyError), ALONE.together("work"):
        raise KeyError
