"""A checkpoint holds everything, notices any damage, and a run is resumed from it exactly."""

import json
import random
import shutil
import signal
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from endwise import RunConfig, load_corpora, train, train_together
from endwise.common.errors import ConfigError, FormatError, Interrupted, RunFolderError
from endwise.common.seeds import generator_states, restore_generators
from endwise.config.run import DataConfig
from endwise.runs.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from endwise.runs.folder import RunFolder
from own_training import acting, reading, stopping, train_with
from small_gpt2 import CONTEXT, VOCAB, recipe


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    """A streamed source: read as far as needed, held-out documents drawn by hash."""
    folder = tmp_path_factory.mktemp("streamed")
    rng = np.random.default_rng(0)
    rows = (json.dumps({"tokens": rng.integers(1, VOCAB, 2 * CONTEXT).tolist()}) for _ in range(400))
    (folder / "text.jsonl").write_text("\n".join(rows))
    settings = {"source": str(folder / "text.jsonl"), "context": CONTEXT, "streaming": True, "cache": folder / "cache"}
    return DataConfig(**settings, epochs=2)


def saved(folder):
    run = RunFolder(folder)
    return run, read_checkpoint(run.latest_checkpoint())


def assert_same_end(run, other):
    (ours, kept), (theirs, expected) = saved(run), saved(other)
    assert ours.metrics_file.read_text() == theirs.metrics_file.read_text()
    assert kept.state == expected.state
    for name, tensor in expected.tensors.items():
        # Python's own generator is drawn from by the type checker that tests run under.
        assert name.startswith("random.python") or torch.equal(kept.tensors[name], tensor), name


def interrupt_at(step, configs, model, corpora, **request):
    train_with(acting(stopping(step, signal.SIGTERM)), configs, model, corpora, **request)


CASES = {
    "plain": {},
    "accumulated": {"accumulation": 2, "microbatch": 1},
    "evaluated": {"evaluate_every": 4, "checkpoint_every": 5},
    "short of one batch at the end": {"tokens": 700},
}


@pytest.fixture(scope="module")
def case(request):
    return request.param


@pytest.fixture(scope="module")
def whole(model, corpora, tmp_path_factory, case):
    """A run that was not interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return train(recipe(out, "e2e_ds", **CASES[case]), model=model, corpora=corpora, display=False)


@pytest.mark.parametrize(
    ("case", "step"),
    [
        pytest.param(case, step, marks=() if step == 6 or (case, step) == ("plain", 0) else pytest.mark.slow)
        for case, step in product(CASES, (0, 6, 13))
    ],
    indirect=["case"],
)
def test_interrupted_and_resumed_it_ends_in_the_same_bits(model, corpora, tmp_path, case, step, whole):
    config = recipe(tmp_path / "cut", "e2e_ds", **CASES[case])
    with pytest.raises(Interrupted, match=f"saved at step {step + 1}"):
        interrupt_at(step, [config], model, corpora)
    torch.manual_seed(99)  # what the shared generators were at meanwhile is nothing to it
    random.seed(99)
    assert_same_end(train(config, model=model, corpora=corpora, display=False, resume=True).folder, whole.folder)


def test_on_streamed_text(model, streamed, tmp_path):
    def load():
        settings = {"model_context": CONTEXT, "vocab_size": VOCAB, "training_tokens": 1280, "evaluation_tokens": 256}
        return load_corpora(streamed, tokenizer=None, **settings)

    values = {**recipe(tmp_path / "whole").model_dump(), "data": streamed.model_dump()}
    whole = train(values, model=model, corpora=load(), display=False)
    with pytest.raises(Interrupted):
        interrupt_at(8, [RunConfig.build({**values, "out": tmp_path / "cut"})], model, load())
    resumed = train({**values, "out": tmp_path / "cut"}, model=model, corpora=load(), display=False, resume=True)
    assert_same_end(resumed.folder, whole.folder)


def test_several_in_one_pass(model, corpora, tmp_path):
    def configs(folder):
        return [
            recipe(folder / kind, kind, seed, accumulation=2) for seed, kind in enumerate(("local", "e2e", "e2e_ds"))
        ]

    whole = train_together(configs(tmp_path / "whole"), model=model, corpora=corpora, display=False)
    with pytest.raises(Interrupted, match="saved at step 10"):
        interrupt_at(9, configs(tmp_path / "cut"), model, corpora)
    resumed = train_together(configs(tmp_path / "cut"), model=model, corpora=corpora, display=False, resume=True)
    for run, expected in zip(resumed, whole, strict=True):
        assert_same_end(run.folder, expected.folder)


def test_it_holds_all_that_a_run_continues_from(model, corpora, tmp_path):
    run = train(recipe(tmp_path / "run", checkpoint_every=5), model=model, corpora=corpora, display=False)
    folder, checkpoint = saved(run.folder)
    parameters = {"encoder", "b_enc", "decoder", "b_dec"}
    assert {f"sae.{name}" for name in parameters} <= checkpoint.tensors.keys()
    moments = {f"optimizer.{name}.{key}" for name in parameters for key in ("step", "exp_avg", "exp_avg_sq")}
    assert moments <= checkpoint.tensors.keys()
    assert {"last_fired", "random.torch", "random.numpy", "random.python"} <= checkpoint.tensors.keys()
    assert checkpoint.state == {
        "architectures": ["standard"],
        "phase": "finished",
        "step": 20,
        "total_steps": 20,
        "tokens": 640,
        "seeds": {"initialisation": 0, "data": 0, "evaluation": 12345},
        "metrics_bytes": folder.metrics_file.stat().st_size,
        "line_due": None,
    }
    assert read_checkpoint(folder.checkpoint(15)).state["phase"] == "training"
    assert folder.saved_steps() == [15, 20]  # the latest two


@pytest.mark.parametrize("keep", [1, 3])
def test_the_latest_stay(model, corpora, tmp_path, keep):
    config = recipe(tmp_path / "run", "local", checkpoint_every=4, keep_checkpoints=keep)
    train(config, model=model, corpora=corpora, display=False)
    assert RunFolder(tmp_path / "run").saved_steps() == [4, 8, 12, 16, 20][-keep:]


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "whole.safetensors"
    tensors = {"sae.b": torch.arange(7.0), "step": torch.tensor(3), "flags": torch.tensor([True, False])}
    write_checkpoint(path, Checkpoint(tensors, {"step": 3}))
    return path


@given(share=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), cut=st.booleans())
def test_any_damage_is_noticed(whole_file, share, flip, cut):
    content = bytearray(whole_file.read_bytes())
    position = int(share * len(content))
    if cut:
        del content[position:]
    else:
        content[position] ^= flip
    damaged = whole_file.with_name("damaged.safetensors")
    damaged.write_bytes(content)
    try:
        read = read_checkpoint(damaged)
    except FormatError as error:
        refused = str(error)
    else:  # white space in the header, say: it means the same
        whole, refused = read_checkpoint(whole_file), None
        assert read.state == whole.state and read.tensors.keys() == whole.tensors.keys()
        assert all(torch.equal(read.tensors[name], tensor) for name, tensor in whole.tensors.items())
    assert refused is None or str(damaged) in refused


def damage(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def test_a_damaged_one_is_named_and_the_one_before_offered(model, corpora, tmp_path):
    config = recipe(tmp_path / "run", "local", checkpoint_every=6, keep_checkpoints=3)
    train(config, model=model, corpora=corpora, display=False)
    folder = RunFolder(tmp_path / "run")
    whole = folder.metrics_file.read_text()
    damage(folder.checkpoint(20))
    with pytest.raises(FormatError, match=r"step-000000020.*was altered.*step 18, is whole.*--from-step 18"):
        train(config, model=model, corpora=corpora, display=False, resume=True)
    damage(folder.checkpoint(18))
    with pytest.raises(FormatError, match=r"step-000000018.*step 12, is whole.*--from-step 12"):
        train(config, model=model, corpora=corpora, display=False, resume=True, from_step=18)
    damage(folder.checkpoint(12))
    with pytest.raises(FormatError, match=r"No other checkpoint is whole.*from the beginning.*--from-step 0"):
        train(config, model=model, corpora=corpora, display=False, resume=True)
    with pytest.raises(RunFolderError, match="no checkpoint of step 6; it has 12, 18, 20, and 0 is the beginning"):
        train(config, model=model, corpora=corpora, display=False, resume=True, from_step=6)
    train(config, model=model, corpora=corpora, display=False, resume=True, from_step=0)
    assert folder.metrics_file.read_text() == whole


def test_resuming_from_an_earlier_one(model, corpora, tmp_path):
    config = recipe(tmp_path / "run", "local", checkpoint_every=5, keep_checkpoints=9)
    train(config, model=model, corpora=corpora, display=False)
    folder = RunFolder(tmp_path / "run")
    before = folder.metrics_file.read_text(), folder.checkpoint(20).read_bytes()
    train(config, model=model, corpora=corpora, display=False, resume=True, from_step=10)
    assert folder.metrics_file.read_text() == before[0]
    assert (
        read_checkpoint(folder.checkpoint(20))
        .tensors["sae.decoder"]
        .equal(saved(folder.path)[1].tensors["sae.decoder"])
    )
    assert folder.saved_steps() == [5, 10, 15, 20]


def test_lines_that_were_lost_are_noticed(model, corpora, tmp_path):
    config = recipe(tmp_path / "run", "local")
    run = train(config, model=model, corpora=corpora, display=False)
    file = RunFolder(run.folder).metrics_file
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-2]))
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl is .* earlier lines are missing.*--from-step"):
        train(config, model=model, corpora=corpora, display=False, resume=True)


LOGGED = {"evaluate_every": 10, "log_every": 1}


@pytest.fixture(scope="module")
def logged(model, corpora, tmp_path_factory):
    config = recipe(tmp_path_factory.mktemp("logged") / "run", "local", **LOGGED)
    return train(config, model=model, corpora=corpora, display=False)


@pytest.mark.parametrize("step", [10, 20])
def test_a_line_that_an_error_kept_from_being_written_is_written_after_all(model, corpora, tmp_path, logged, step):
    config = recipe(tmp_path / "cut", "local", **LOGGED)
    file = RunFolder(config.out).metrics_file

    def fails(indices):
        if file.exists() and file.read_text() and RunFolder(config.out).metrics()[-1]["step"] == step - 1:
            raise ArithmeticError("no number for the evaluation")

    with pytest.raises(ArithmeticError):
        train(config, model=model, corpora=reading(corpora, fails, "heldout"), display=False)
    folder, checkpoint = saved(tmp_path / "cut")
    assert checkpoint.state["step"] == step and folder.metrics()[-1]["step"] == step - 1
    assert_same_end(train(config, model=model, corpora=corpora, display=False, resume=True).folder, logged.folder)


def test_a_group_that_was_killed_between_two_members_continues_from_what_all_have(model, corpora, tmp_path):
    def configs(folder):
        return [recipe(folder / kind, kind, checkpoint_every=5) for kind in ("local", "e2e")]

    whole = train_together(configs(tmp_path / "whole"), model=model, corpora=corpora, display=False)
    train_together(configs(tmp_path / "cut"), model=model, corpora=corpora, display=False)
    RunFolder(tmp_path / "cut" / "e2e").checkpoint(20).unlink()
    resumed = train_together(configs(tmp_path / "cut"), model=model, corpora=corpora, display=False, resume=True)
    for run, expected in zip(resumed, whole, strict=True):
        assert_same_end(run.folder, expected.folder)


def test_what_is_refused_changes_nothing(model, corpora, tmp_path):
    configs = [recipe(tmp_path / kind, kind, checkpoint_every=5, keep_checkpoints=9) for kind in ("local", "e2e")]
    train_together(configs, model=model, corpora=corpora, display=False)
    first, second = (RunFolder(config.out) for config in configs)
    second.checkpoint(10).unlink()
    before = first.saved_steps(), first.metrics_file.read_bytes()
    with pytest.raises(RunFolderError, match="no checkpoint of step 10"):
        train_together(configs, model=model, corpora=corpora, display=False, resume=True, from_step=10)
    assert (first.saved_steps(), first.metrics_file.read_bytes()) == before
    second.metrics_file.write_text("")
    with pytest.raises(RunFolderError, match="earlier lines are missing"):
        train(configs[1], model=model, corpora=corpora, display=False, resume=True, from_step=15)
    assert second.saved_steps() == [5, 15, 20]
    with pytest.raises(ConfigError, match="from_step needs resume"):
        train(configs[1], model=model, corpora=corpora, display=False, from_step=15)


def test_a_refused_start_touches_nothing_below_it(model, corpora, tmp_path):
    other = tmp_path / "runs" / "a" / "checkpoints" / ".step-1.7.partial"
    other.parent.mkdir(parents=True)
    other.write_text("being written")
    with pytest.raises(RunFolderError, match="not an empty folder"):
        train(recipe(tmp_path / "runs"), model=model, corpora=corpora, display=False)
    assert other.read_text() == "being written"


def test_time_continues_where_it_was(model, corpora, tmp_path):
    config = recipe(tmp_path / "run", "local", log_every=1)
    with pytest.raises(Interrupted):
        interrupt_at(9, [config], model, corpora)
    before = RunFolder(tmp_path / "run").seconds()
    train(config, model=model, corpora=corpora, display=False, resume=True)
    lines = [json.loads(line) for line in RunFolder(tmp_path / "run").timings_file.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)
    assert lines[10]["seconds"] > before > 0


def test_starting_or_resuming_is_one_command(model, corpora, tmp_path):
    config = recipe(tmp_path / "run", "local")
    with pytest.raises(Interrupted):
        interrupt_at(5, [config], model, corpora, resume="if_started")
    with pytest.raises(RunFolderError, match=r"holds a run already.*--resume"):
        train(config, model=model, corpora=corpora, display=False)
    run = train(config, model=model, corpora=corpora, display=False, resume="if_started")
    whole = train(recipe(tmp_path / "whole", "local"), model=model, corpora=corpora, display=False)
    assert_same_end(run.folder, whole.folder)
    values = config.model_dump()
    values["training"]["learning_rate"] = 1.0
    with pytest.raises(RunFolderError, match="another recipe"):
        train(RunConfig.build(values), model=model, corpora=corpora, display=False, resume="if_started")


def test_what_a_killed_process_left_half_done_is_no_obstacle(model, corpora, tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    for leftover in (folder / ".config.yaml.77.partial", folder / "checkpoints" / ".step-1.77.partial"):
        leftover.write_text("half of")
    shutil.rmtree(folder / "checkpoints")
    run = train(recipe(folder, "local"), model=model, corpora=corpora, display=False, resume="if_started")
    leftover = run.folder / "checkpoints" / ".step-1.77.partial"
    leftover.write_text("half of")
    train(recipe(folder, "local"), model=model, corpora=corpora, display=False, resume="if_started")
    assert not leftover.exists()


def test_the_shared_generators_come_back():
    random.gauss(0, 1)
    np.random.default_rng()
    states = generator_states()

    def draws():
        return random.random(), random.gauss(0, 1), np.random.normal(), np.random.rand(), torch.rand(3).tolist()  # noqa: NPY002

    first = draws()
    assert draws() != first
    restore_generators(states)
    assert draws() == first
