"""Faults of runs, really caused, each in a process of its own: no work is lost, and a message says so."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

import warm
from endwise import RunConfig, train
from endwise.runs.checkpoints import read_checkpoint
from endwise.runs.folder import RunFolder
from places import HELPERS
from small_gpt2 import data, recipe, small_corpora, small_model
from victim import FAULTY_STEP
from warm import Warm

PATIENCE = 120
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def write_recipe(made, file, out, kind="e2e", **training):
    values = recipe(out, kind, **training).model_dump(mode="json")
    values["model"] |= {"name": str(made / "model"), "device": "cpu"}
    values["data"] = data(made).model_dump() | {"epochs": 100}
    file.write_text(RunConfig.build(values).to_yaml())
    return file


def start(*arguments, fault="none", **options):
    return Warm(HELPERS / "victim.py", fault, *arguments, cwd=HELPERS, **PIPES, **options)


def end(process):
    out, errors = process.communicate(timeout=PATIENCE)
    assert "Traceback" not in errors, errors
    return process.returncode, out, errors


def expected_end(made, folder, kind="e2e", **training):
    """The same recipe's run, left alone in this process."""
    return train(recipe(folder, kind, **training), model=small_model(), corpora=small_corpora(made), display=False)


def assert_same_end(folder, whole):
    ours, theirs = RunFolder(folder), RunFolder(whole)
    assert ours.metrics_file.read_text() == theirs.metrics_file.read_text()
    kept, expected = (read_checkpoint(run.latest_checkpoint()) for run in (ours, theirs))
    assert kept.state == expected.state
    for name, tensor in expected.tensors.items():
        assert name.startswith("random.") or torch.equal(kept.tensors[name], tensor), name


def test_killed_before_any_change_of_a_file_it_ends_in_the_same_bits(made, tmp_path):
    done = warm.run(HELPERS / "killed_at_writes.py", tmp_path, made, cwd=HELPERS, timeout=280)
    assert done.returncode == 0 and "no digest to compare" not in done.stderr, done.stderr
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(kill["same"] for kill in kills), [kill["change"] for kill in kills if not kill["same"]]
    assert {kill["saved"] for kill in kills} == {0, 2, 3}
    for file in ("metrics.jsonl", "config.yaml", "sae_weights.safetensors", "step-000000002", "step-000000003"):
        assert any(file in kill["change"] for kill in kills), file


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_says_how_to_resume(made, tmp_path, number):
    file = write_recipe(made, tmp_path / "recipe.yaml", tmp_path / "a run", log_every=1)
    process = start("train", file, fault="waits_for_a_signal")
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(number)
    code, _, errors = end(process)
    assert code == 130
    (command,) = [line for line in errors.splitlines() if "--resume" in line]
    step = int(command.split("saved at step ")[1].split(".")[0])
    assert RunFolder(tmp_path / "a run").saved_steps()[-1] == step == FAULTY_STEP + 1
    arguments = shlex.split(command.split("Resume with: endwise ")[1])
    assert arguments == ["train", "--resume", str(tmp_path / "a run")]
    assert end(start(*arguments))[0] == 0
    assert_same_end(tmp_path / "a run", expected_end(made, tmp_path / "whole", log_every=1).folder)


def test_a_second_signal_leaves_at_once(made, tmp_path):
    file = write_recipe(made, tmp_path / "recipe.yaml", tmp_path / "run", checkpoint_every=2)
    process = start("train", file, fault="holds")
    assert process.stdout.readline() == "holding\n"
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None  # it waits for the end of the step
    process.send_signal(signal.SIGINT)
    code, _, errors = end(process)
    assert code == 130 and "stopped" in errors
    assert RunFolder(tmp_path / "run").saved_steps() == [2, 4]


def test_two_runs_in_one_folder(made, tmp_path):
    file = write_recipe(made, tmp_path / "recipe.yaml", tmp_path / "run", checkpoint_every=2)
    first = start("train", file, fault="holds")
    assert first.stdout.readline() == "holding\n"
    before = RunFolder(tmp_path / "run").metrics_file.read_text()
    for arguments in (["train", file], ["train", "--resume", tmp_path / "run"], ["train", file, "--or-resume"]):
        code, _, errors = end(start(*arguments))
        assert code == 5
        assert f"Another process is training in {tmp_path / 'run'}" in errors and "out=" in errors
    assert RunFolder(tmp_path / "run").metrics_file.read_text() == before
    first.kill()
    first.communicate()
    assert end(start("train", file, "--or-resume"))[0] == 0  # the lock died with its holder
    assert_same_end(tmp_path / "run", expected_end(made, tmp_path / "whole", checkpoint_every=2).folder)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 400 KiB; where a test may not mount one, it is left out."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no right to mount a small tmpfs here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk(made, tmp_path, small_disk):
    settings = {"checkpoint_every": 1, "keep_checkpoints": 1000}
    file = write_recipe(made, tmp_path / "recipe.yaml", small_disk / "run", **settings)
    code, _, errors = end(start("train", file))
    assert code == 5
    assert "Cannot write" in errors and "No space left" in errors and "Free space" in errors
    folder = RunFolder(small_disk / "run")
    steps = folder.saved_steps()
    assert 1 < len(steps) < 20
    for step in steps:
        assert read_checkpoint(folder.checkpoint(step)).state["step"] == step
    assert not list(folder.path.rglob("*.partial"))
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    assert end(start("train", "--resume", folder.path))[0] == 0
    assert_same_end(folder.path, expected_end(made, tmp_path / "whole", **settings).folder)


@pytest.mark.parametrize("folder", ["/proc/endwise", "/dev/null/endwise"])
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(tmp_path, folder):
    file = tmp_path / "recipe.yaml"
    values = recipe(Path(folder)).model_dump(mode="json") | {"model": {"name": "no/such-model"}}
    file.write_text(RunConfig.build(values).to_yaml())
    code, _, errors = end(start("train", file))
    assert code == 5
    assert f"Cannot write {folder}" in errors and "choose another folder" in errors and "no/such-model" not in errors


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_folder_without_the_right_to_write(made, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    file = write_recipe(made, tmp_path / "recipe.yaml", tmp_path / "locked" / "run")
    code, _, errors = end(start("train", file))
    assert code == 5 and "Permission denied" in errors


def test_a_loss_that_is_not_finite(made, tmp_path):
    settings = {"learning_rate": 1e30, "gradient_clip": None, "log_every": 1, "checkpoint_every": 1}
    file = write_recipe(made, tmp_path / "recipe.yaml", tmp_path / "run", "local", **settings)
    code, _, errors = end(start("train", file))
    assert code == 7
    for part in ("not finite", "training.learning_rate", f"saved in {tmp_path / 'run'}"):
        assert part in errors
    checkpoint = read_checkpoint(RunFolder(tmp_path / "run").latest_checkpoint())
    assert all(torch.isfinite(t).all() for name, t in checkpoint.tensors.items() if name.startswith("sae."))


ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(
    ("device", "fault", "told"),
    [
        ("cpu", "asks_for_too_much", "can't allocate memory"),
        pytest.param("cuda", "asks_the_gpu_for_too_much", "CUDA out of memory", marks=ON_GPU),
    ],
)
def test_out_of_memory(made, tmp_path, device, fault, told):
    file = write_recipe(made, tmp_path / "recipe.yaml", tmp_path / "run", checkpoint_every=2)
    code, _, errors = end(start("train", file, f"model.device={device}", fault=fault))
    assert code == 7
    for part in ("Out of memory", told, "training.microbatch", "saved in"):
        assert part in errors
    assert read_checkpoint(RunFolder(tmp_path / "run").latest_checkpoint()).state["step"] == 5
    assert end(start("train", "--resume", tmp_path / "run"))[0] == 0
    if device == "cpu":
        assert_same_end(tmp_path / "run", expected_end(made, tmp_path / "whole", checkpoint_every=2).folder)


def test_text_that_vanishes_while_it_is_read(made, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for name, words in (("a", 60_000), ("b", 5_000), ("heldout", 2_000)):
        folder = tmp_path if name == "heldout" else text
        rows = (json.dumps({"text": f"{name} {number} once upon a time"}) for number in range(words))
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    away = tmp_path / "b.jsonl"
    program = [HELPERS / "tokenise.py", text, tmp_path / "heldout.jsonl"]
    process = Warm(*program, tmp_path / "cache", 1, cwd=HELPERS, **PIPES)
    cache = tmp_path / "cache" / "tokens"
    wait_for(cache, process, lambda: {*cache.glob("[!.]*/info.json")} and {*cache.glob(".*.partial/tokens.npy")})
    shutil.move(text / "b.jsonl", away)
    code, _, errors = end(process)
    assert code == 4
    assert "Trying again in 0.1 s" in errors and "What was tokenised is kept" in errors
    (info,) = cache.glob(".*.partial/info.json")
    assert json.loads(info.read_text())["consumed"] == 60_000
    shutil.move(away, text / "b.jsonl")
    again = Warm(*program, tmp_path / "cache", 0, cwd=HELPERS, **PIPES)
    code, out, errors = end(again)
    assert code == 0, errors
    fresh = Warm(*program, tmp_path / "other cache", 0, cwd=HELPERS, **PIPES)
    code, expected, _ = end(fresh)
    assert code == 0
    went_on, from_scratch = json.loads(out), json.loads(expected)
    assert went_on.pop("texts") == 5_000 and from_scratch.pop("texts") == 67_000
    assert went_on == from_scratch


def test_text_that_comes_back_is_resumed(made, tmp_path):
    from endwise.tokens.sources import Document, SourceLost, TextSource
    from endwise.tokens.tokenising import lasting

    openings = []

    def read():
        openings.append(None)
        for number in range(10):
            if number == 3 * len(openings) and len(openings) < 3:
                raise SourceLost("The network is down.")
            yield Document(str(number))

    with pytest.MonkeyPatch.context() as patch:
        waited = []
        patch.setattr(time, "sleep", waited.append)
        given = [document.content for document in lasting(TextSource("source", [], read), Console(quiet=True))]
    assert given == list(map(str, range(10)))
    assert len(openings) == 3 and waited == [1.0, 1.0]


def wait_for(path, process, there=None):
    deadline = time.monotonic() + PATIENCE
    while not (there() if there else path.exists()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()
