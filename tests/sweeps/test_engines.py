"""Engines of sweeps: the same final runs on each, whatever happens to workers."""

import json
import os
import pickle
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import holding
import warm
from endwise.common.errors import ConfigError, Interrupted
from endwise.common.stopping import ask_to_stop, polite_stop
from endwise.sweeps import engines, sweep
from endwise.sweeps.remote import Lost, Refused, Remote, work
from endwise.sweeps.sweep_config import RayConfig, SlurmConfig
from endwise.sweeps.tasks import Outcome
from places import HELPERS
from small_gpt2 import recipe
from sweeps_of_small_gpt2 import LOCAL, PAIR, a_sweep, contents, disturbed

DEADLY = """
import os
import pickle
from transformers import PretrainedConfig

class DeadlyConfig(PretrainedConfig):
    model_type = "deadly"

    def __init__(self, **settings):
        if os.getpid() != {spared}:
            os._exit(17)
        super().__init__(**settings)
"""


def engine_of(sweep):
    return engines.engine_of(sweep, sweep.out)


@pytest.fixture(scope="module")
def expected(made, tmp_path_factory):
    """The sweep that others are compared with: carried out in this process, undisturbed."""
    out = tmp_path_factory.mktemp("expected") / "sweep"
    result = sweep(a_sweep(made, out, PAIR, LOCAL), display=False)
    assert len(result.runs) == 3 and not result.failures
    return contents(out)


@pytest.fixture(scope="module")
def two_workers():
    """A Ray of two CPUs, for the tests that do not start one themselves."""
    ray = pytest.importorskip("ray")
    settings = {"include_dashboard": False, "log_to_driver": False, "object_store_memory": 80 * 2**20}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HELPERS), prepend=os.pathsep)
        patch.setenv("RAY_worker_niceness", "0")  # Ray's own 15 lets them starve where all processors are busy
        ray.init(address="local", num_cpus=2, num_gpus=0, logging_level="ERROR", **settings)
    yield ray
    ray.shutdown()


@pytest.fixture
def waiting_workers(two_workers, monkeypatch):
    """The same, for sweeps that are disturbed."""
    monkeypatch.setattr("endwise.sweeps.on_ray.work", holding.work)
    return two_workers


def test_a_ray_sweep_whose_worker_is_killed_loses_nothing(made, tmp_path, expected, waiting_workers):
    config = a_sweep(made, tmp_path / "sweep", PAIR, LOCAL, engine="ray")
    with disturbed(config.out, "e2e") as pair:
        result = sweep(config, display=False)
    assert len(result.runs) == 3 and not result.failures
    pair.check_went_on()
    assert contents(config.out) == expected
    assert waiting_workers.is_initialized()  # a Ray that was there before the sweep is there after it


@pytest.mark.slow
def test_a_task_that_ends_every_worker_fails_and_the_others_finish(made, tmp_path, two_workers):
    deadly = tmp_path / "deadly"
    deadly.mkdir()
    (deadly / "config.json").write_text('{"model_type": "deadly", "auto_map": {"AutoConfig": "deadly.DeadlyConfig"}}')
    (deadly / "model.safetensors").touch()
    (deadly / "deadly.py").write_text(DEADLY.format(spared=os.getpid()))
    grid = {**LOCAL, "model.name": [str(deadly), str(made / "model")], "model.trust_remote_code": True}
    shorter = {"settings": {"training.tokens": 640}, "ray": {"retries": 0}}
    result = sweep(a_sweep(made, tmp_path / "sweep", grid, engine="ray", **shorter), display=False)
    assert [point.config.model.name for point in result.runs] == [str(made / "model")]
    ((point, told),) = result.failures.items()
    assert point.config.model.name == str(deadly)
    assert "Every worker that it was given to was lost" in told and "WorkerCrashedError" in told


def interrupt_while_it_waits(worker):
    """Ctrl-C of the sweep; the worker is held until it hears of it, which takes Ray longer than the run would."""
    os.kill(worker, signal.SIGSTOP)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(3)
    os.kill(worker, signal.SIGCONT)


@pytest.mark.slow
def test_a_stopped_ray_sweep_saves_and_continues_elsewhere(made, tmp_path, expected, waiting_workers, monkeypatch):
    monkeypatch.chdir(made)  # not where Ray was started
    config = a_sweep(Path(), tmp_path / "sweep", LOCAL, engine="ray")
    with (
        disturbed(config.out, "local", interrupt_while_it_waits) as run,
        pytest.raises(Interrupted, match="the same command resumes"),
    ):
        sweep(config, display=False)
    assert len(list(run.run.glob("checkpoints/*"))) == 1 and not (run.run / "evaluation.json").exists()
    sweep(config.model_copy(update={"engine": "in_process"}), display=False)
    run.check_went_on()
    found = [without_digest(run) for run in contents(config.out).values()]
    assert found == [without_digest(run) for name, run in expected.items() if name.startswith("local")]


def without_digest(run):
    """The SAE's file names the model, here by a relative path."""
    measured = json.loads(run["evaluation.json"])
    return run | {"evaluation.json": {key: value for key, value in measured.items() if key != "weights"}}


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"cpus": 3}, "asks for 3 CPUs and 0 GPUs on one machine .* have: 2 CPUs and 0 GPUs"),
        ({"gpus": 0.25}, "asks for 1 CPUs and 0.25 GPUs on one machine"),
    ],
)
def test_more_than_a_machine_has_is_refused(made, tmp_path, two_workers, asked, named):
    with pytest.raises(ConfigError, match=named):
        engine_of(a_sweep(made, tmp_path, LOCAL, engine="ray", ray=asked))


@pytest.mark.slow
def test_a_ray_of_its_own_is_given_back(made, tmp_path, two_workers):
    two_workers.shutdown()
    engine = engine_of(a_sweep(made, tmp_path, LOCAL, engine="ray"))
    assert two_workers.is_initialized()
    engine.close()
    assert not two_workers.is_initialized()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_no_ray_at_the_address(made, tmp_path, address):
    pytest.importorskip("ray").shutdown()  # one that is there would be used
    with pytest.raises(ConfigError, match=f"No Ray answers at ray.address '{address}'.*refused"):
        engine_of(a_sweep(made, tmp_path, LOCAL, engine="ray", ray={"address": address}))


def test_what_ray_is_asked_for():
    pytest.importorskip("ray")
    from endwise.sweeps.on_ray import options_of

    shared = options_of(RayConfig(cpus=2, gpus=0.25))
    assert (shared["num_cpus"], shared["num_gpus"]) == (2, 0.25)
    assert shared["max_calls"] == 1 and options_of(RayConfig())["max_calls"] == 0  # GPU memory dies with its process
    assert shared["max_retries"] == 0
    with pytest.raises(ConfigError, match=r"gpus above 1 must be a whole number; given 1\.5"):
        RayConfig.build({"gpus": 1.5})


@pytest.fixture
def warm_jobs(monkeypatch):
    """Jobs on this machine are forked from a process that has imported torch, and wait where a run is disturbed."""
    local = pytest.importorskip("submitit.local.local")

    def begun(executor):
        return shlex.join(warm.command(HELPERS / "holding.py", executor.folder))

    monkeypatch.setattr(local.LocalExecutor, "_submitit_command_str", property(begun))


def test_a_slurm_sweep_whose_jobs_are_killed_or_run_out_of_time_loses_nothing(made, tmp_path, expected, warm_jobs):
    local = {"cluster": "local", "cpus": torch.get_num_threads(), "gpus": 0}
    config = a_sweep(made, tmp_path / "sweep", PAIR, LOCAL, engine="slurm", slurm=local)
    with (
        disturbed(config.out, "e2e") as killed,
        disturbed(config.out, "local", lambda process: os.kill(process, signal.SIGUSR2)) as out_of_time,
    ):
        result = sweep(config, display=False)
    assert len(result.runs) == 3 and not result.failures
    for each in (killed, out_of_time):
        each.check_went_on()
    assert contents(config.out) == expected
    assert len(list((config.out / "slurm").glob("*_submitted.pkl"))) == 3  # one was submitted again, the other requeued
    assert sum("Requeued job" in log.read_text() for log in (config.out / "slurm").glob("*_log.out")) == 1


SBATCH = """#!/bin/sh
cd {folder}
if [ -e refusal ]; then cat refusal >&2; exit 1; fi
number=$(($(ls | grep -c script) + 1))
cp "$1" script-$number
if [ ! -e lost-$number ]; then echo $number >> queue; fi
echo "Submitted batch job $number"
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """The commands of a SLURM whose jobs do nothing, in a folder that tells what they were given."""
    submitit = pytest.importorskip("submitit")
    folder = tmp_path / "cluster"
    folder.mkdir()
    (folder / "queue").touch()
    told = 'echo "$@" >> {folder}/cancelled; : > {folder}/queue'
    scripts = {"sbatch": SBATCH, "squeue": "#!/bin/sh\ncat {folder}/queue\n", "scancel": f"#!/bin/sh\n{told}\n"}
    for name, script in {**scripts, "srun": "#!/bin/sh\n"}.items():
        (folder / name).write_text(script.format(folder=folder))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    yield folder
    submitit.SlurmJob.watcher.clear()


def on_cluster(tmp_path, **settings):
    from endwise.sweeps.on_slurm import OnSlurm

    class Hasty(OnSlurm):
        look_seconds = queue_seconds = lag_seconds = 0.01

        def _shows_finished(self, config):
            return True

    return Hasty(SlurmConfig(**settings), tmp_path / "slurm")


def finish(tmp_path, number, task):
    """Write the files that submitit leaves of a finished job."""
    result = ("success", [Outcome(config.out) for config in task])
    (tmp_path / "slurm").mkdir(exist_ok=True)
    (tmp_path / "slurm" / f"{number}_0_result.pkl").write_bytes(pickle.dumps(result))


def test_what_slurm_is_asked_for(tmp_path, tasks, cluster):
    options = {"account": "mine", "exclusive": True, "requeue": False}
    on_cluster(tmp_path, partition="fast", minutes=90, gpus=0, options=options)._submit(tasks("a")[0])
    lines = (cluster / "script-1").read_text().splitlines()
    asked = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    assert {"partition=fast", "time=90", "cpus-per-task=4", "mem=32GB", "signal=USR2@120", "account=mine"} <= asked
    assert "exclusive" in asked and not any(option.startswith(("gpus", "requeue")) for option in asked)
    on_cluster(tmp_path, gpus=2)._submit(tasks("b")[0])
    assert {"#SBATCH --gpus-per-node=2", "#SBATCH --requeue"} <= set((cluster / "script-2").read_text().splitlines())
    with pytest.raises(ConfigError, match=r"save_seconds \(120\) must be shorter than the time limit, minutes \(2\)"):
        SlurmConfig.build({"minutes": 2})


def test_a_job_that_vanishes_is_submitted_again(tmp_path, tasks, cluster):
    (cluster / "lost-1").touch()
    (task,) = tasks("a")
    engine = on_cluster(tmp_path)
    finish(tmp_path, 2, task)
    assert ends_of(engine, [task]) == {"a": None}
    assert sorted(cluster.glob("script-*")) == [cluster / "script-1", cluster / "script-2"]
    assert (cluster / "cancelled").read_text() == "1\n"  # should SLURM queue it again, two would train in one folder
    engine = on_cluster(tmp_path, retries=0)
    (cluster / "lost-3").touch()
    assert "job 3 ended without a result; its output is in" in ends_of(engine, [task])["a"]


def test_jobs_that_a_lost_sweep_left_in_the_queue(tmp_path, tasks, cluster):
    mine, other = tasks("a", "b")
    lost = on_cluster(tmp_path)
    lost._submit(mine)
    again = on_cluster(tmp_path)
    finish(tmp_path, 1, mine)
    assert ends_of(again, [mine]) == {"a": None}
    assert not (cluster / "script-2").exists() and not (cluster / "cancelled").exists()
    lost._submit(mine)
    another = on_cluster(tmp_path)
    finish(tmp_path, 3, other)
    assert ends_of(another, [other]) == {"b": None}
    assert (cluster / "cancelled").read_text().splitlines() == ["--state=PENDING 2", "--signal=TERM 2"]


def test_what_slurm_does_not_take(tmp_path, tasks, cluster, monkeypatch):
    (cluster / "refusal").write_text("sbatch: error: invalid partition specified: fats")
    with pytest.raises(ConfigError, match=r"invalid partition specified: fats.*Correct the sweep's `slurm` section"):
        ends_of(on_cluster(tmp_path, partition="fats"), tasks("a"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"srun.*slurm\.cluster=local"):
        on_cluster(tmp_path)


@pytest.mark.parametrize(("engine", "missing"), [("ray", "ray"), ("slurm", "submitit")])
def test_an_engine_that_is_not_installed(made, tmp_path, monkeypatch, engine, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, f"endwise.sweeps.on_{engine}", raising=False)
    with pytest.raises(ConfigError, match=rf"engine: {engine} needs .*pip install 'endwise\[{engine}\]'"):
        engine_of(a_sweep(made, tmp_path, LOCAL, engine=engine))


class Scripted(Remote):
    """Workers that do what they are asked to: each attempt at a task takes the next of its ends."""

    visible_seconds = 0.0
    hidden = ()
    """Runs that nothing shows to be finished."""

    def __init__(self, ends, retries=1, at_once=None, room=None):
        super().__init__(retries, at_once)
        self.ends, self.room = {key: list(value) for key, value in ends.items()}, room
        self.submitted, self.most, self.stopped, self.killed = [], 0, [], []

    def _submit(self, task):
        if self.room is not None and len(self._given) >= self.room:
            raise Refused("the queue is full")
        names = tuple(config.out.name for config in task)
        self.submitted.append(names)
        self.most = max(self.most, len(self._given) + 1)
        return (len(self.submitted), names)

    def _ended(self, jobs):
        return jobs[:1]

    def _result(self, job, task):
        end = self.ends[job[1]].pop(0)
        if isinstance(end, BaseException):
            raise end
        return end and [Outcome(config.out, None if end == "done" else end) for config in task]

    def _ask_to_stop(self, jobs):
        self.stopped += jobs

    def _kill(self, jobs):
        self.killed += jobs

    def _shows_finished(self, config):
        return config.out.name not in self.hidden


@pytest.fixture
def tasks(tmp_path):
    """Tasks by their names; a task of the runs a and b is `ab`."""
    return lambda *names: [tuple(recipe(tmp_path / run) for run in name) for name in names]


def ends_of(engine, tasks):
    return {outcome.folder.name: outcome.error for outcomes in engine.carry_out(tasks) for outcome in outcomes}


def test_a_lost_task_is_given_out_again_as_often_as_said(tasks):
    preempted = None  # as often as it may be, it is no loss
    often = [preempted, Lost("power"), preempted, Lost("power"), preempted, "done"]
    ends = {("a",): often, ("b",): [Lost("power")] * 3}
    engine = Scripted({**ends, ("c",): ["done"]}, retries=2)
    found = ends_of(engine, tasks("a", "b", "c"))
    assert found["a"] is None and found["c"] is None
    assert found["b"] == "Every worker that it was given to was lost, the last one with: power"
    assert engine.submitted.count(("a",)) == 6 and engine.submitted.count(("b",)) == 3


def test_of_a_group_that_ends_every_worker_only_the_guilty_run_fails(tasks):
    ends = {("a", "b", "c"): [Lost("memory")] * 2, ("a",): ["done"], ("b",): [Lost("memory")], ("c",): ["done"]}
    found = ends_of(Scripted(ends), tasks("abc"))
    assert [name for name, error in found.items() if error is not None] == ["b"] and set(found) == set("abc")


def test_no_more_jobs_than_allowed_or_taken(tasks):
    ends = {(name,): ["done"] for name in "abcde"}
    for engine in (Scripted(ends, at_once=2), Scripted(ends, room=2)):
        assert ends_of(engine, tasks(*"abcde")) == dict.fromkeys("abcde")
        assert engine.most == 2 and engine.submitted == [(name,) for name in "abcde"]
    with pytest.raises(Refused, match="full"):
        ends_of(Scripted(ends, room=0), tasks("a"))


def test_a_run_that_is_finished_where_it_cannot_be_seen(tasks):
    engine = Scripted({("a", "b"): ["done"]})
    engine.hidden = ("a",)
    found = ends_of(engine, tasks("ab"))
    assert found["b"] is None and "a disk that this machine and all workers share" in found["a"]


def test_what_is_still_carried_out_is_stopped_when_a_sweep_ends_early(tasks):
    engine = Scripted({("a",): ["done"], ("b",): ["done"]})
    next(engine.carry_out(tasks("a", "b")))
    engine.close()
    assert engine.stopped == [(2, ("b",))] and not engine.killed


def test_a_second_ctrl_c_waits_for_nothing(tasks):
    engine = Scripted({("a",): [Lost("?")]})
    engine._ended = lambda jobs: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)] and []
    with pytest.raises(KeyboardInterrupt):
        ends_of(engine, tasks("a"))
    assert engine.killed == [(1, ("a",))]
    engine.close()
    assert not engine.stopped


def test_asking_to_stop_reaches_what_trains_off_the_main_thread():
    asked, heard = threading.Event(), []

    def train():
        with polite_stop() as stop_asked:
            asked.set()
            while not stop_asked():
                time.sleep(0.001)
            heard.append(True)

    assert not ask_to_stop()
    thread = threading.Thread(target=train)
    thread.start()
    asked.wait()
    assert ask_to_stop()
    thread.join()
    assert heard and not ask_to_stop()


def test_a_worker_where_the_sweep_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    (outcome,) = work((recipe(Path("runs/one")),), tmp_path / "gone", threads)
    assert "does not have the directory that the sweep was started in" in outcome.error and "runs/one" in outcome.error
    elsewhere = recipe(tmp_path / "one").model_copy(update={"site": "nowhere"})
    (outcome,) = work((elsewhere,), tmp_path / "gone", threads)
    assert "gone" not in outcome.error and outcome.folder == tmp_path / "one"
