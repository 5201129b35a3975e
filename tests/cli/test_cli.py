"""The command line as a user meets it: every command from a shell, and one plain line for every mistake."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

import warm
from bad_input import write_place
from endwise.cli import app

pytestmark = pytest.mark.usefixtures("loaded_once")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, tokens and a recipe on the disk."""
    return write_place(tmp_path_factory.mktemp("place"))


def run(*arguments, **environment):
    """A process of its own: exit code, standard output, standard error."""
    done = subprocess.run(
        [sys.executable, "-m", "endwise", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    return done.returncode, done.stdout, done.stderr


def run_warm(*arguments, **environment):
    """The same in a process that need not import torch first."""
    done = warm.run("-m", "endwise", *arguments, env={**os.environ, **environment})
    return done.returncode, done.stdout, done.stderr


def refuse(*arguments):
    """The message of a command that must fail plainly: standard error, one paragraph, no traceback."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code not in (0, 1), result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    message = result.stderr.strip()
    assert message.startswith("endwise: "), message
    return result.exit_code, message


def test_train_then_evaluate_then_sites(place, tmp_path):
    out = tmp_path / "run"
    code, said, _ = run("train", place / "recipe.yaml", f"out={out}", "objective.sparsity.coefficient=0.5")
    assert code == 0
    assert f"endwise evaluate {out}" in said
    assert yaml.safe_load((out / "config.yaml").read_text())["objective"]["sparsity"]["coefficient"] == 0.5
    code, said, _ = run_warm("evaluate", out, "--csv", tmp_path / "all.csv", COLUMNS="200")
    assert code == 0
    assert "CE increase" in said and "256 held-out tokens" in said
    evaluation = json.loads((out / "evaluation.json").read_text())
    for table in (out / "evaluation.csv", tmp_path / "all.csv"):
        (row,) = csv.DictReader(table.read_text().splitlines())
        assert float(row["ce_increase"]) == evaluation["ce_increase"]
    code, said, _ = run_warm("sites", place / "model")
    lines = [line.split() for line in said.splitlines()]
    assert lines[:2] == [["blocks.0.hook_resid_pre", "16"], ["blocks.0.attn.hook_z", "16"]]
    assert len(lines) == 28


def test_an_unfinished_run_is_evaluated_with_a_remark(place, tmp_path):
    from endwise import train
    from endwise.common.errors import TrainingStopped
    from endwise.config.run import RunConfig
    from own_training import Act, acting, train_with

    config = RunConfig.read(place / "recipe.yaml")
    finished, cut = (config.model_copy(update={"out": tmp_path / name}) for name in ("finished", "cut off"))
    train(finished, display=False)

    poisoned = Act("finish_step", 7, lambda trainee: trainee.sae.b_dec.grad.fill_(float("nan")))
    with pytest.raises(TrainingStopped):
        train_with(acting(poisoned), [cut])
    said = CliRunner().invoke(app, ["evaluate", str(finished.out), str(cut.out)]).stdout
    (remark,) = [line for line in said.splitlines() if "not finished" in line]
    assert remark == (
        f"{cut.out} is not finished: its numbers are those of step 7 of 20. "
        f"Resume with: endwise train --resume '{cut.out}'"
    )


def test_resuming_a_finished_run_changes_nothing(place, tmp_path):
    """And says what there is to remark on once, at the beginning, not at its end again."""
    out = tmp_path / "run"
    code, _, first = run_warm("train", place / "recipe.yaml", f"out={out}")
    assert code == 0
    before = (out / "metrics.jsonl").read_text(), (out / "sae" / "sae_weights.safetensors").read_bytes()
    code, said, again = run_warm("train", "--resume", out)
    assert code == 0, said
    for told in (first, again):
        assert [line for line in told.splitlines() if line.startswith("! The model's own CE")] == told.splitlines()[:1]
    assert ((out / "metrics.jsonl").read_text(), (out / "sae" / "sae_weights.safetensors").read_bytes()) == before


def test_help_is_quick_because_torch_stays_out():
    code = (
        "import sys, endwise, endwise.cli; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    code, said, _ = run("--help")
    assert code == 0 and "..." not in said.partition("Commands:")[2]  # every command's sentence is whole
    for command in ("quickstart", "train", "evaluate", "sites"):
        assert command in said
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


@pytest.mark.parametrize(
    ("overrides", "code", "words"),
    [
        (["objectve.kind=e2e"], 2, ["objectve", "did you mean 'objective'"]),
        (["site=blocks.1.hook_resid_prs"], 3, ["blocks.1.hook_resid_prs", "hook_resid_pre"]),
        (["site=blocks.9.hook_resid_pre"], 3, ["blocks.9.hook_resid_pre", "blocks.0 to blocks.3"]),
        (["objective.sparsity.coefficient=-1"], 2, ["objective.sparsity.coefficient", "-1"]),
        (["objective.sparsity.coefficient=many"], 2, ["objective.sparsity.coefficient", "many"]),
        (["training.tokens=1000000"], 4, ["1,000,000", "data.epochs"]),
        (["training.tokens=31"], 2, ["training.tokens", "31"]),
        (["data.context=9"], 4, ["data.context", "9", "8"]),
        (["data.source=/nowhere/at/all.txt"], 4, ["/nowhere/at/all.txt"]),
        (["data.source=nobody/nothing", "model.name=/nowhere/at/all"], 4, ["'nobody/nothing'"]),
        (["model.name=/nowhere/at/all"], 3, ["/nowhere/at/all"]),
        (["model.device=cuda:77"], 2, ["cuda:77"]),
        (["model.dtype=float8"], 2, ["model.dtype", "float8"]),
        (["objective.kind=e2e_ds"], 2, ["downstream_mse"]),
        (["training.batch"], 2, ["section.key=value", "training.batch"]),
        (["seed=[1"], 2, ["seed=[1"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_wrong_recipe_is_one_line_before_any_work(place, tmp_path, overrides, code, words):
    out = tmp_path / "run"
    found, message = refuse("train", place / "recipe.yaml", f"out={out}", *overrides)
    assert found == code, message
    for word in words:
        assert word in message, message
    assert not out.exists()


def test_wrong_files_and_folders(place, tmp_path):
    assert refuse("train", "gpt2-small-layer6-e3e")[1].endswith("did you mean gpt2-small-layer6-e2e?")
    assert refuse("train")[0] == 2
    assert refuse("train", place)[1].endswith("is a folder, and a recipe is a file. Correct the path.")
    assert refuse("train", place / "recipe.yaml", "--resume", place)[0] == 2
    assert refuse("train", "--resume", tmp_path)[0] == 2
    assert refuse("evaluate", tmp_path / "nothing")[0] == 2
    assert refuse("sites", tmp_path / "nothing")[0] == 3
    (tmp_path / "bad.yaml").write_text("site: [")
    assert "not valid YAML" in refuse("train", tmp_path / "bad.yaml")[1]
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert refuse("train", tmp_path / "binary.yaml")[0] == 2
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("mine")
    code, message = refuse("train", place / "recipe.yaml", f"out={taken}")
    assert code == 5 and "not an empty folder" in message
    assert refuse("quickstart", "--out", taken)[0] == 5
    assert [path.name for path in taken.iterdir()] == ["thesis.txt"]
    (tmp_path / "file").write_text("")
    assert refuse("train", place / "recipe.yaml", f"out={tmp_path / 'file' / 'run'}")[0] == 5


def test_an_empty_corpus_and_foreign_tokens(place, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    assert refuse("train", place / "recipe.yaml", f"data.source={tmp_path / 'empty.txt'}", "data.heldout=null")[0] == 4
    np.save(tmp_path / "foreign.npy", np.arange(4096, dtype=np.uint16))
    code, message = refuse("train", place / "recipe.yaml", f"data.source={tmp_path / 'foreign.npy'}")
    assert code == 4 and "vocabulary of 31" in message


def test_a_full_disk_is_one_line_and_leaves_whole_files(place, tmp_path):
    """The largest file a process may write is limited, which fails as a full disk does: in the middle of a write."""
    out = tmp_path / "run"
    assert CliRunner().invoke(app, ["train", str(place / "recipe.yaml"), f"out={tmp_path / 'before'}"]).exit_code == 0

    code = "import resource, endwise.cli; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); endwise.cli.main()"
    (tmp_path / "small_files_only.py").write_text(code)  # the tokenised text is there already, from the run before
    done = warm.run(tmp_path / "small_files_only.py", "train", place / "recipe.yaml", f"out={out}")
    assert done.returncode == 5, done.stderr
    assert "Traceback" not in done.stderr
    assert "Cannot write" in done.stderr and "ulimit -f" in done.stderr
    assert not list(out.rglob("*.partial"))
    assert not list(out.rglob("*.safetensors"))
    assert len((out / "metrics.jsonl").read_text().splitlines()) >= 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder(place, tmp_path):
    tmp_path.chmod(0o500)
    assert refuse("train", place / "recipe.yaml", f"out={tmp_path / 'run'}")[0] == 5


def test_every_public_name_is_what_it_says_even_after_its_module_is_imported(tmp_path):
    code = """
import importlib, pkgutil, types
import endwise
for module in pkgutil.walk_packages(endwise.__path__, "endwise."):
    if module.name != "endwise.__main__":
        importlib.import_module(module.name)
assert endwise.__all__ == sorted(endwise.__all__)
for name in endwise.__all__:
    value = getattr(endwise, name)
    assert not isinstance(value, types.ModuleType), name
    assert value.__name__ == name, name
"""
    (tmp_path / "code.py").write_text(code)
    done = warm.run(tmp_path / "code.py")
    assert done.returncode == 0, done.stderr


def test_a_warning_is_one_line_without_code():
    code, _, told = run_warm("plan", "embedded-layer3-jumprelu", "dictionary.architecture=topk", "dictionary.k=16")
    assert code == 0
    warned = [line for line in told.splitlines() if line.startswith("warning: ")]
    assert any("left out" in line for line in warned), told
    assert "UserWarning" not in told and "read_recipe" not in told
