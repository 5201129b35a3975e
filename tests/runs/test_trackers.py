"""A tracker that is known here alone receives the lines that the run folder has, whatever happens."""

import json
from pathlib import Path
from typing import ClassVar

import pytest

from endwise import evaluate, train
from endwise.common.errors import ConfigError, TrainingStopped
from endwise.evaluation.evaluate import write_evaluation
from endwise.evaluation.measure import measure
from endwise.runs.folder import RunFolder
from endwise.runs.trackers import TRACKERS
from endwise.runs.tracking.track import track
from endwise.training.members import SomeFailed
from own_training import Act, acting, raising, train_with
from small_gpt2 import recipe

SETTINGS = {"log_every": 1, "checkpoint_every": 4, "evaluate_every": 5}


@TRACKERS.add("told")
class Told:
    """Keeps what it hears, by run folder; what is void it drops."""

    heard: ClassVar[dict[Path, list[tuple[str, dict]]]] = {}

    def started(self, config, folder, step):
        self.lines = self.heard.setdefault(folder, [])
        if step is not None:
            self.lines[:] = [each for each in self.lines if each[1].get("step", 0) <= step]
        self.lines.append(("started", {"at": step, "seed": config.seed}))

    def line(self, name, record):
        self.lines.append((name, json.loads(json.dumps(record))))

    def ended(self, status):
        self.lines.append(("ended", {"status": status}))


@TRACKERS.add("broken")
class Broken:
    calls: ClassVar[list[str]] = []

    def started(self, config, folder, step):
        self.calls.append("started")

    def line(self, name, record):
        self.calls.append(name)
        raise OSError("the other end is gone")

    def ended(self, status):
        self.calls.append(status)


@TRACKERS.add("unmade")
class Unmade(Told):
    def __init__(self):
        raise RuntimeError("there is no key")


def tracked(config, *names):
    return config.model_copy(update={"trackers": names})


def heard(folder, name):
    return [record for what, record in Told.heard[Path(folder)] if what == name]


def assert_mirrored(folder):
    run = RunFolder(Path(folder))
    for file in (run.metrics_file, run.timings_file):
        assert heard(folder, file.stem) == [json.loads(line) for line in file.read_text().splitlines()]
    saved = [record["step"] for record in heard(folder, "checkpoint")]
    assert sorted(set(saved))[-2:] == run.saved_steps()


def failing(step, error):
    return acting(Act("finish_step", step, raising(error)))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError("no more")])
def test_it_has_the_lines_of_the_folder_after_the_run_was_broken_off_too(model, corpora, tmp_path, error):
    config = tracked(recipe(tmp_path / "run", **SETTINGS), "told")
    with pytest.raises((KeyboardInterrupt, TrainingStopped)):
        train_with(failing(10, error), [config], model, corpora)
    status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
    assert Told.heard[config.out][-1] == ("ended", {"status": status})
    assert len(heard(config.out, "failure")) == (status == "failed")
    assert heard(config.out, "metrics")[-1]["step"] == 10
    train(config, model=model, corpora=corpora, display=False, resume=True)
    assert_mirrored(config.out)
    assert [record["at"] for record in heard(config.out, "started")] == [0, 8]
    assert Told.heard[config.out][-1] == ("ended", {"status": "finished"})


def test_it_may_join_on_resuming_and_hears_of_the_change(model, corpora, tmp_path):
    config = recipe(tmp_path / "run", **SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        train_with(failing(10, KeyboardInterrupt()), [config], model, corpora)
    train(tracked(config, "told"), model=model, corpora=corpora, display=False, resume=True)
    (change,) = heard(config.out, "changes")
    assert change["changes"] == {"trackers": [[], ["told"]]} and change["step"] == 8
    assert [record["step"] for record in heard(config.out, "metrics")] == [*range(9, 21)]


def test_it_hears_what_was_measured(made, tmp_path):
    config = tracked(recipe(tmp_path / "run", tokens=64), "told", "broken")
    values = config.model_dump()
    values["model"]["name"], values["data"]["source"] = str(made / "model"), str(made / "train.npy")
    values["data"]["heldout"] = str(made / "heldout.npy")
    train(values, display=False)
    evaluate(tmp_path / "run")
    (record,) = heard(tmp_path / "run", "evaluation")
    assert record == json.loads((tmp_path / "run" / "evaluation.json").read_text())


def test_a_run_that_is_there_is_sent_whole(model, corpora, tmp_path):
    config = recipe(tmp_path / "run", **SETTINGS)
    run = train(config, model=model, corpora=corpora, display=False)
    site = model.site(config.site)
    evaluation = measure(model, {"run": (site, run.sae)}, corpora.heldout, config.evaluation)["run"]
    write_evaluation(RunFolder(run.folder), config, evaluation)
    for metrics in (RunFolder(run.folder).metrics(), []):
        assert track(run.folder, ["told"]) == ["told"]
        assert heard(run.folder, "metrics") == metrics and len(heard(run.folder, "evaluation")) == 1
        assert Told.heard.pop(run.folder)[-1] == ("ended", {"status": "finished"})
        RunFolder(run.folder).metrics_file.unlink(missing_ok=True)


def test_one_that_fails_is_told_of_once_and_left_out(model, corpora, tmp_path, capsys):
    config = tracked(recipe(tmp_path / "run", **SETTINGS), "broken", "told")
    Broken.calls.clear()
    train(config, model=model, corpora=corpora, display=False)
    assert capsys.readouterr().err.count("The tracker broken failed") == 1
    assert Broken.calls == ["started", "metrics"]
    assert_mirrored(config.out)


def test_of_runs_in_one_pass_each_has_its_own(model, corpora, tmp_path):
    configs = [
        tracked(recipe(tmp_path / "a", "e2e", **SETTINGS, learning_rate=1e-3), "told"),
        tracked(recipe(tmp_path / "b", "local", **SETTINGS, learning_rate=1e-2), "told"),
    ]

    def fails(trainee):
        if trainee.config.learning_rate == 1e-3:
            raise RuntimeError("its own")

    with pytest.raises(SomeFailed):
        train_with(acting(Act("finish_step", 6, fails)), configs, model, corpora)
    assert Told.heard[configs[0].out][-1] == ("ended", {"status": "failed"})
    assert Told.heard[configs[1].out][-1] == ("ended", {"status": "finished"})
    assert "its own" in heard(configs[0].out, "failure")[0]["error"]
    assert_mirrored(configs[1].out)


@pytest.mark.parametrize(("name", "told"), [("tolt", "Did you mean told"), ("unmade", "there is no key")])
def test_one_that_is_not_there_is_refused_before_anything_is_loaded(tmp_path, name, told):
    with pytest.raises(ConfigError, match=told):
        train(tracked(recipe(tmp_path / "run"), name), display=False)
    assert not (tmp_path / "run").exists()


def test_one_that_is_not_there_does_not_keep_a_run_from_being_measured(model, corpora, tmp_path, capsys):
    config = recipe(tmp_path / "run", tokens=64)
    run = train(config, model=model, corpora=corpora, display=False)
    site = model.site(config.site)
    evaluation = measure(model, {"run": (site, run.sae)}, corpora.heldout, config.evaluation)["run"]
    write_evaluation(RunFolder(run.folder), tracked(config, "elsewhere"), evaluation)
    assert "'elsewhere'" in capsys.readouterr().err and RunFolder(run.folder).evaluation_file.exists()
