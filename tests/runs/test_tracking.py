"""Trackers that ship get what the run folder holds, in a process of their own that never stops or slows the run."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from endwise import evaluate, train
from endwise.cli import app
from endwise.common.errors import ConfigError, TrainingStopped
from endwise.runs.folder import RunFolder
from endwise.runs.trackers import TRACKERS, Mirror
from endwise.runs.tracking.outside import FOLDER, Outside, sent_of
from endwise.runs.tracking.track import track
from own_training import Act, acting, raising, train_with
from small_gpt2 import recipe
from stand_in_tracker import installed
from warm import Warm

SETTINGS = {"log_every": 1, "checkpoint_every": 4, "evaluate_every": 5}
NAMES = ("wandb", "tensorboard", "trackio", "mlflow")


@pytest.fixture
def told(tmp_path, monkeypatch):
    """Calls that the stand-in for wandb received."""
    monkeypatch.syspath_prepend(str(installed(tmp_path / "packages")))
    monkeypatch.setenv("STAND_IN", str(tmp_path / "told.jsonl"))
    monkeypatch.setattr(Outside, "_late", set())

    def calls(name):
        lines = (tmp_path / "told.jsonl").read_text().splitlines() if (tmp_path / "told.jsonl").exists() else []
        return [record for record in map(json.loads, lines) if record["call"] == name]

    return calls


def tracked(out, *names, made=None, **training):
    config = recipe(out, **{**SETTINGS, **training}).model_copy(update={"trackers": names or ("wandb",)})
    if made is None:
        return config
    values = config.model_dump()
    values["model"]["name"], values["data"]["source"] = str(made / "model"), str(made / "train.npy")
    values["data"] |= {"heldout": str(made / "heldout.npy"), "epochs": 1000}
    return type(config).build(values)


def training(folder):
    return [sys.executable, "-m", "endwise", "train", str(folder / "recipe.yaml"), "--quiet"]


def steps(calls):
    return [call["step"] for call in calls]


def test_a_run_that_is_resumed_continues_in_the_same_tracked_run(model, corpora, tmp_path, told):
    config = tracked(tmp_path / "run")
    fails = acting(Act("finish_step", 10, raising(MemoryError("no more"))))
    with pytest.raises(TrainingStopped):
        train_with(fails, [config], model, corpora)
    assert [call["values"].keys() for call in told("summary")] == [{"failure"}]
    train(config, model=model, corpora=corpora, display=False, resume=True)
    first, second = told("init")
    assert first["id"] == second["id"] and first["resume"] == "allow" and first["name"] == "run"
    assert first["config"]["training.learning_rate"] == 1e-2 and first["project"] == "endwise"
    assert steps(told("log")) == list(range(1, 21))
    for call, line in zip(told("log"), RunFolder(config.out).metrics(), strict=True):
        assert call["values"]["train/loss"] == line["loss"]
        assert {f"heldout/{name}": value for name, value in line.get("heldout", {}).items()}.items() <= call[
            "values"
        ].items()
        assert call["values"]["timings/seconds"] > 0
    assert [call["exit_code"] for call in told("finish")] == [1, 0]


def test_an_evaluation_is_its_summary_and_files_go_along(made, tmp_path, told):
    config = tracked(tmp_path / "run", made=made, tokens=64)
    train(config, display=False)
    (tmp_path / "run" / "report.html").write_text("<p>a report</p>")
    (tmp_path / "run" / "curve.png").write_bytes(b"a figure")
    evaluate(tmp_path / "run")
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    (summary,) = told("summary")
    assert summary["values"]["evaluation/kl"] == evaluation["kl"]
    ends = [summary["values"][f"evaluation/intervals/kl/{end}"] for end in ("low", "high")]
    assert ends == evaluation["intervals"]["kl"]
    sent = [Path(call["file"]).name for call in told("save")]
    assert sent[:1] == ["config.yaml"] and {"evaluation.json", "report.html", "curve.png"} <= set(sent)
    assert len(set(sent)) == len(sent) and steps(told("log")) == [1, 2]


@pytest.mark.parametrize(
    ("where", "reached"), [("init", "init"), pytest.param("log", "log", marks=pytest.mark.slow), ("finish", "log")]
)
def test_one_that_hangs_is_ended_and_sent_what_it_lacks_later(
    model, corpora, tmp_path, told, monkeypatch, capfd, where, reached
):
    """Patience is short, since the run waits midway until the tracker's process is there."""
    monkeypatch.setenv("STAND_IN_HANGS", where)
    monkeypatch.setenv("ENDWISE_TRACKER_PATIENCE", "3")
    config = tracked(tmp_path / "run")
    train_with(acting(Act("finish_step", 10, lambda _: _wait(lambda: told(reached)))), [config], model, corpora)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "tracker" in line]
    assert "did not take everything within 3 s" in line and f"endwise track {config.out} --to wandb" in line
    assert len(told(where)) == 1 and RunFolder(config.out).latest_checkpoint() is not None
    monkeypatch.delenv("STAND_IN_HANGS")
    result = CliRunner().invoke(app, ["track", str(config.out)])
    assert result.exit_code == 0, result.output
    assert set(steps(told("log"))) == set(range(1, 21))
    assert sent_of(Path(config.out), "wandb")["step"] == 20


def test_the_next_run_does_not_wait_for_one_that_hung(model, corpora, tmp_path, told, monkeypatch, capfd):
    monkeypatch.setattr(Outside, "_late", {"wandb"})
    monkeypatch.setenv("STAND_IN_HANGS", "init")
    monkeypatch.setenv("ENDWISE_TRACKER_PATIENCE", "1000")
    train(tracked(tmp_path / "run"), model=model, corpora=corpora, display=False)
    assert capfd.readouterr().err.count("The tracker wandb did not take everything") == 1


def test_one_that_fails_is_told_of_with_its_last_words(model, corpora, tmp_path, told, monkeypatch, capfd):
    monkeypatch.setenv("STAND_IN_RAISES", "log")
    config = tracked(tmp_path / "run")
    train(config, model=model, corpora=corpora, display=False)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "tracker" in line]
    assert "OSError: the other end is gone" in line and "it has no line" in line
    result = CliRunner().invoke(app, ["track", str(config.out)])
    assert result.exit_code == 5 and "the other end is gone" in result.stderr


def test_of_a_run_that_is_killed_it_hears_too(made, tmp_path, told):
    config = tracked(tmp_path / "run", made=made, tokens=200_000)
    (tmp_path / "recipe.yaml").write_text(config.to_yaml())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    code = f"import sys, endwise.cli; sys.path[:0] = {sys.path!r}; endwise.cli.main()"
    (tmp_path / "stood_in.py").write_text(code)
    with Warm(tmp_path / "stood_in.py", *training(tmp_path)[3:], env=environment) as process:
        _wait(lambda: len(told("log")) > 2)
        process.send_signal(signal.SIGKILL)
    _wait(lambda: told("finish"))
    assert [call["values"] for call in told("summary")] == [{"failure": "the process was killed"}]
    assert [call["exit_code"] for call in told("finish")] == [1]


def _wait(there, seconds=120):
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_line_takes_no_time(tmp_path, told, monkeypatch):
    monkeypatch.setenv("STAND_IN_HANGS", "init")
    monkeypatch.setenv("ENDWISE_TRACKER_PATIENCE", "0")
    config = tracked(tmp_path / "run")
    RunFolder(config.out).path.mkdir()
    with Mirror.named(["wandb"]) as mirror:
        mirror.started(config, config.out, 0)
        for _ in range(1000):  # it hangs for longer than a test may take
            mirror.line("metrics", {"step": 1})


def test_what_cannot_be_done_is_one_line(model, corpora, tmp_path, monkeypatch):
    config = tracked(tmp_path / "run").model_copy(update={"trackers": ()})
    train(config, model=model, corpora=corpora, display=False)
    with pytest.raises(ConfigError, match=r"names no trackers. Name one with --to; there are .*wandb"):
        track(config.out)
    monkeypatch.setenv("ENDWISE_TRACKER_PATIENCE", "long")
    monkeypatch.setattr(TRACKERS["tensorboard"], "package", "json")
    with pytest.raises(ConfigError, match=r"ENDWISE_TRACKER_PATIENCE must be a number of seconds, given 'long'"):
        track(config.out, ["tensorboard"])
    monkeypatch.setattr(TRACKERS["tensorboard"], "package", "no_such_package")
    with pytest.raises(ConfigError, match=r'cannot be set up .*pip install "endwise\[tensorboard\]"'):
        track(config.out, ["tensorboard"])
    monkeypatch.setattr(TRACKERS["tensorboard"], "package", "json")
    monkeypatch.delenv("ENDWISE_TRACKER_PATIENCE")
    with RunFolder(config.out).claimed(), pytest.raises(Exception, match="Another process is training"):
        track(config.out, ["tensorboard"])


def of_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / FOLDER / "tensorboard")).Reload()
    assert {"config.yaml/text_summary", "evaluation.json/text_summary"} <= set(read.Tags()["tensors"])
    (image,) = read.Images("curve.png")
    assert (image.width, image.height, image.encoded_image_string) == (7, 5, (folder / "curve.png").read_bytes())
    return [(event.step, event.value) for event in read.Scalars("train/loss")], read.Scalars("evaluation/kl")[-1].value


def wandb_records(file, header=7, block=32768):
    """The records of an offline file: LevelDB's log format, after a header."""
    content, place, parts = file.read_bytes(), header, b""
    while place + header < len(content):
        if block - place % block < header:  # padding
            place += block - place % block
        size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        parts += content[place + header : place + header + size]
        place += header + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def of_wandb(folder):
    from wandb.proto.wandb_internal_pb2 import Record

    history, summary = [], {}
    for data in (each for file in sorted(folder.rglob("*.wandb")) for each in wandb_records(file)):
        record = Record()
        record.ParseFromString(data)
        row = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
        if "train/loss" in row:
            history.append((int(row["_step"]), json.loads(row["train/loss"])))
        summary |= {"/".join(each.nested_key) or each.key: each.value_json for each in record.summary.update}
    return history, json.loads(summary["evaluation/kl"])


def of_mlflow(folder):
    from mlflow import MlflowClient

    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    run = client.get_run(sent_of(folder, "mlflow")["id"])
    assert run.info.status == "FINISHED" and run.data.params["training.batch"] == "4"
    assert {"config.yaml", "evaluation.json"} <= {each.path for each in client.list_artifacts(run.info.run_id)}
    history = client.get_metric_history(run.info.run_id, "train/loss")
    return [(metric.step, metric.value) for metric in history], run.data.metrics["evaluation/kl"]


def of_trackio(folder):
    from trackio import SQLiteStorage

    rows = SQLiteStorage.get_logs("endwise", sent_of(folder, "trackio")["id"])
    history = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    return history, next(row["evaluation/kl"] for row in rows if "evaluation/kl" in row)


READ_BACK = {"tensorboard": of_tensorboard, "wandb": of_wandb, "mlflow": of_mlflow, "trackio": of_trackio}


@pytest.mark.parametrize("name", NAMES)
def test_the_package_itself_keeps_it_offline(made, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip(name)  # trackio reads its variables as it is imported
    monkeypatch.setenv("ENDWISE_TRACKER_PATIENCE", "250")
    config = tracked(tmp_path / "run", name, made=made)
    with pytest.raises(KeyboardInterrupt):
        train_with(acting(Act("finish_step", 10, raising(KeyboardInterrupt()))), [config])
    once = sent_of(config.out, name)
    train(config, display=False, resume=True)
    Image.new("RGB", (7, 5)).save(config.out / "curve.png")
    evaluate(config.out)
    assert once["step"] == 10 and sent_of(config.out, name)["id"] == once["id"]
    history, kl = READ_BACK[name](config.out)
    expected = [(line["step"], pytest.approx(line["loss"])) for line in RunFolder(config.out).metrics()]
    assert sorted(history) == expected
    assert kl == pytest.approx(json.loads((config.out / "evaluation.json").read_text())["kl"])


def test_an_unreachable_server_keeps_nobody(made, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("ENDWISE_TRACKER_PATIENCE", "3")
    (tmp_path / "recipe.yaml").write_text(tracked(tmp_path / "run", made=made).to_yaml())
    done = subprocess.run(training(tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    trained = max(file.stat().st_mtime for file in (tmp_path / "run" / "checkpoints").iterdir())
    assert time.time() - trained < 60  # wandb itself gives up after 90 s
    assert re.search(
        r"The tracker wandb did not take everything within 3 s; it has no line.*endwise track", done.stderr
    )
