"""Benchmark suites of others run on our runs in an interpreter of their own, a stand-in's program among them."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from endwise import evaluate, train
from endwise.cli import app
from endwise.common.errors import ConfigError
from endwise.common.files import read_json
from endwise.config.base import Config
from endwise.suites.base import SUITES, Suite
from endwise.suites.bench import Benching, as_batches
from small_sweeps import complete
from warm import Warm

PROGRAM = """
import json, os, sys, time
from pathlib import Path
job = json.loads(Path(sys.argv[1]).read_text())
assert sys.argv[1:] == ["job.json"] and "PYTHONPATH" not in os.environ and "endwise" not in sys.modules
tried = Path("results/tried")
tried.parent.mkdir(exist_ok=True)
tried.write_text(tried.read_text() + "x" if tried.exists() else "x")
Path("cache").mkdir(exist_ok=True)
print("reached the middle", flush=True)
if job["settings"]["ends"] == "in an error":
    sys.exit("its data set is gone")
if job["settings"]["ends"] == "never":
    time.sleep(1000)
if job["settings"]["ends"] == "with numbers":
    Path("done.json").write_text(json.dumps({"l0": 3.5, "tries": len(tried.read_text())}))
"""


class StandInSettings(Config):
    ends: str = "with numbers"


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A suite whose package is one that this interpreter has."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)

    class StandIn(Suite[StandInSettings]):
        name, package, module, takes_heldout = "stand-in", "pytest", "pytest", True
        Settings = StandInSettings

        def data_sets(self):
            return [] if self.local else ["someone/texts"]

        def ours(self, evaluation):
            return {"l0": evaluation["l0"]}

    StandIn.program = program
    SUITES.names()
    monkeypatch.setitem(SUITES._things, "stand-in", StandIn)
    return StandIn


@pytest.fixture(scope="module")
def trained(made, tmp_path_factory):
    run = tmp_path_factory.mktemp("bench") / "run"
    train(complete(made, run, {}), display=False)
    evaluate(run)
    return run


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def ran(*arguments):
    return CliRunner().invoke(app, ["bench", *(str(each) for each in arguments)], env={"COLUMNS": "120"})


def test_its_numbers_lie_beside_the_run_with_ours(stand_in, run, made):
    result = ran(run, "--suite", "stand-in", "--data", "run")
    assert result.exit_code == 0, result.output
    assert result.output.startswith("stand-in asks the Hugging Face hub for nothing\n")
    measured = read_json(run / "evaluation.json")
    assert re.search(rf"l0 +3\.5 +{measured['l0']:.5g} ", result.output) and re.search("tries +1 ", result.output)
    found = read_json(run / "bench/stand-in.json")
    assert found["numbers"] == {"l0": 3.5, "tries": 1} and found["endwise"] == {"l0": measured["l0"]}
    assert found["versions"]["pytest"] == pytest.__version__ and found["weights"] == measured["weights"]
    job = read_json(run / "bench/stand-in/job.json")
    assert job["sae"] == str(run / "sae") and job["site"] == measured["site"] and job["model"] == str(made / "model")
    tokens = pq.read_table(run / "bench/stand-in" / job["heldout"])["tokens"].to_pylist()
    assert len(tokens) == measured["sequences"] and len(tokens) * len(tokens[0]) == measured["tokens"]
    assert job["settings"]["batch"] * job["settings"]["variance_batches"] == len(tokens)
    assert not (run / "bench/stand-in/cache").exists()
    assert "reached the middle" in (run / "bench/stand-in.log").read_text()


def test_what_it_asks_for_is_said_before_it_starts(stand_in, run, tmp_path):
    result = ran(run, "--suite", "stand-in", "--model", "someone/model", "--dry-run")
    asked = "stand-in asks the Hugging Face hub for the data set someone/texts, the model someone/model\n"
    assert (result.exit_code, result.output) == (0, asked) and not (run / "bench").exists()
    assert Benching(run, "stand-in", data=str(tmp_path)).asks() == []
    probing = Benching(run, "saebench-sparse-probing").asks()
    assert "the data set fancyzhx/ag_news" in probing and "the data set LabHC/bias_in_bios" in probing
    assert len(probing) == len(set(probing)) == 5
    assert Benching(run, "saebench-core").asks() == ["the data set Skylion007/openwebtext"]
    assert Benching(run, "saebench-core", data="run").asks() == Benching(run, "sae-probes").asks() == []


@pytest.mark.parametrize(("ends", "words"), [("in an error", "its data set is gone"), ("early", "reached the middle")])
def test_a_suite_that_fails_is_one_line_that_names_its_log(stand_in, run, ends, words):
    result = ran(run, f"ends={ends}", "--suite", "stand-in")
    line = result.stderr.strip().splitlines()[-1]
    assert result.exit_code == 11 and line.startswith("endwise: stand-in failed") and words in line
    assert str(run / "bench/stand-in.log") in line and not (run / "bench/stand-in.json").exists()


def test_what_it_did_is_kept_unless_something_changed(stand_in, run):
    assert ran(run, "--suite", "stand-in", "ends=early").exit_code == 11
    assert ran(run, "--suite", "stand-in", "ends=early").exit_code == 11
    assert (run / "bench/stand-in/results/tried").read_text() == "xx"
    assert ran(run, "--suite", "stand-in").exit_code == 0
    assert read_json(run / "bench/stand-in.json")["numbers"]["tries"] == 1, "other settings start again"
    assert ran(run, "--suite", "stand-in").exit_code == 0
    assert read_json(run / "bench/stand-in.json")["numbers"]["tries"] == 2


def test_stopped_it_ends_with_its_program(stand_in, run, tmp_path):
    (tmp_path / "start.py").write_text(
        "from pathlib import Path\n"
        "from endwise.cli import main\nfrom endwise.config.base import Config\n"
        "from endwise.suites.base import SUITES, Suite\n"
        "class StandInSettings(Config):\n    ends: str\n"
        "class StandIn(Suite[StandInSettings]):\n"
        "    name, package, module, Settings = 'stand-in', 'pytest', 'pytest', StandInSettings\n"
        f"    program = Path({str(stand_in.program)!r})\n"
        "    def data_sets(self): return []\n"
        "SUITES.add('stand-in')(StandIn); main()"
    )
    command = [tmp_path / "start.py", "bench", run, "ends=never", "--suite", "stand-in"]
    with Warm(*command, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        log = run / "bench/stand-in.log"
        while process.poll() is None and not (log.exists() and "middle" in log.read_text()):
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        line = process.stderr.read().strip().splitlines()[-1]
    assert process.returncode == 130 and line.startswith("endwise: stand-in was stopped") and str(log) in line


def test_an_environment_without_it_is_refused_with_the_command_that_makes_one(run, tmp_path):
    result = ran(run, "--suite", "sae-probes")
    assert result.exit_code == 2 and "ENV/bin/pip install sae-probes" in result.stderr
    assert f"{sys.executable} has no package sae-probes" in result.stderr and not (run / "bench/sae-probes").exists()
    result = ran(run, "--suite", "sae-probes", "--python", tmp_path / "none/python")
    assert result.exit_code == 2 and "cannot be checked for sae-probes" in result.stderr


@pytest.mark.parametrize(
    ("suite", "given", "words"),
    [
        ("sae-bench", {}, "no 'sae-bench' among the suites: .* Did you mean saebench-core"),
        ("saebench-core", {"overrides": ["contxt=3"]}, "did you mean 'context'"),
        ("saebench-core", {"data": "nowhere"}, "there is no folder 'nowhere'"),
        ("saebench-sparse-probing", {"data": "run"}, "needs texts with labels"),
        ("saebench-sparse-probing", {"data": "."}, "train.jsonl and test.jsonl"),
        ("sae-probes", {"data": "."}, "sae-probes takes no --data"),
    ],
)
def test_what_a_suite_cannot_take_is_refused(run, tmp_path, monkeypatch, suite, given, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=words):
        Benching(run, suite, **given)


def test_local_texts_with_labels_are_what_is_probed(run, tmp_path):
    for name, files in {"moods": ("train", "test"), "half": ("train",)}.items():
        (tmp_path / "texts" / name).mkdir(parents=True)
        for file in files:
            (tmp_path / "texts" / name / f"{file}.jsonl").write_text(json.dumps({"text": "a", "label": 1}) + "\n")
    benching = Benching(run, "saebench-sparse-probing", data=str(tmp_path / "texts"))
    assert benching.suite.settings.data_sets == ("moods",) and benching.asks() == []


@pytest.mark.parametrize("sequences", [1, 7, 16, 17, 160, 250])
def test_every_sequence_is_measured_once(sequences):
    import torch

    found = as_batches(torch.zeros(sequences, 8, dtype=torch.long))
    assert found["batch"] * found["reconstruction_batches"] == sequences and found["batch"] <= 16
    assert found["context"] == 8


def test_numbers_of_core_that_evaluate_has_too(run):
    measured = read_json(run / "evaluation.json")
    ours = Benching(run, "saebench-core").suite.ours(measured)
    bounds = measured["baselines"]
    recovered = (bounds["zero_ablated"] - measured["ce_spliced"]) / (bounds["zero_ablated"] - bounds["clean"])
    assert ours["ce_loss_score"] == pytest.approx(recovered) and ours["l0"] == measured["l0"]
    assert ours["kl_div_with_sae"] == measured["kl"] and 0 < ours["frac_alive"] <= 1
