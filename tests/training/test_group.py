"""SAEs trained side by side: each ends as if alone, and one that fails leaves the others to it."""

import gc
import os
import shutil
import signal
import traceback
import weakref
from pathlib import Path

import pytest
import torch

from endwise import SAE, train, train_together
from endwise.common.errors import DataError, Interrupted, OutOfMemory, RunFolderError, TrainingStopped
from endwise.runs.checkpoints import read_checkpoint
from endwise.runs.folder import RunFolder
from endwise.tokens import BatchOrder
from endwise.training.making import new_trainee
from endwise.training.members import SomeFailed, TrialMember
from endwise.training.step import take_step
from own_training import Act, OwnModel, acting, stopping, train_with
from small_gpt2 import recipe

EARLIER, LATER = "blocks.0.hook_mlp_out", "blocks.2.hook_resid_post"
STEPS = 12


def three(folder, **training):
    """Three kinds at three sites, with settings of their own."""
    settings = (
        ("local", LATER, {"learning_rate": 3e-3, "gradient_clip": None}),
        ("e2e", EARLIER, {"microbatch": 3, "log_every": 4, "checkpoint_every": 6}),
        ("e2e_ds", "blocks.1.hook_resid_pre", {"warmup": 0.3, "evaluate_every": 8}),
    )
    return [
        recipe(folder / kind, kind, seed, tokens=STEPS * 32, **own, **training).model_copy(update={"site": site})
        for seed, (kind, site, own) in enumerate(settings)
    ]


def assert_same(run, other):
    assert run.config.model_copy(update={"out": None}) == other.config.model_copy(update={"out": None})
    for ours, theirs in zip(run.sae.parameters(), other.sae.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    ours, theirs = RunFolder(run.folder), RunFolder(other.folder)
    assert ours.metrics_file.read_text() == theirs.metrics_file.read_text()
    kept, expected = (read_checkpoint(folder.latest_checkpoint()) for folder in (ours, theirs))
    assert kept.state == expected.state and kept.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        # The generators that all code shares start from the first member's seed, and nothing here draws from them.
        assert name.startswith("random.") or torch.equal(kept.tensors[name], tensor), name
    assert torch.equal(SAE.load(run.folder).W_dec, SAE.load(other.folder).W_dec)


@pytest.fixture(scope="module")
def alone(model, corpora, tmp_path_factory):
    configs = three(tmp_path_factory.mktemp("alone"))
    return [train(config, model=model, corpora=corpora, display=False) for config in configs]


@pytest.fixture(scope="module")
def in_two_passes(model, corpora, tmp_path_factory):
    configs = three(tmp_path_factory.mktemp("in_two_passes"), accumulation=2)
    return [train(config, model=model, corpora=corpora, display=False) for config in configs]


def at(method, kind, step, do):
    """Something done before a method of one kind's trainee, at one step."""
    site = next(config.site for config in three(Path("unused")) if config.objective.kind == kind)
    return Act(method, step, do, site)


def out_of_memory(_trainee):
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB.")


def poison(trainee):
    trainee.sae.b_dec.grad.fill_(float("nan"))


def ctrl_c(kind, step):
    return at("finish_step", kind, step, lambda _: os.kill(os.getpid(), signal.SIGINT))


def together(model, corpora, folder, failed, *acts, **training):
    """Trains the three; the one that fails, and the error."""
    with pytest.raises(SomeFailed) as stopped:
        train_with(acting(*acts), three(folder, **training), model, corpora)
    (failure,) = stopped.value.failures
    assert failure.folder == folder / failed
    return failure, stopped.value


def assert_others_finished(error, alone, failed):
    """All but the failed one ended as they do alone, their last evaluation included."""
    survivors = [run for run in alone if run.config.objective.kind != failed]
    for run, expected in zip(error.finished, survivors, strict=True):
        assert_same(run, expected)
        last = RunFolder(run.folder).metrics()[-1]
        assert last["step"] == STEPS and "heldout" in last


def test_kinds_and_sites_together_equal_each_alone(model, corpora, alone, tmp_path):
    runs = train_together(three(tmp_path), model=model, corpora=corpora, display=False)
    for run, expected in zip(runs, alone, strict=True):
        assert_same(run, expected)


def test_accumulated_passes_together_equal_each_alone(model, corpora, in_two_passes, tmp_path):
    runs = train_together(three(tmp_path, accumulation=2), model=model, corpora=corpora, display=False)
    for run, expected in zip(runs, in_two_passes, strict=True):
        assert_same(run, expected)


@pytest.mark.parametrize("failing", [0, pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_number_that_is_not_finite_ends_one_of_three(model, corpora, alone, tmp_path, failing):
    kind = ("local", "e2e", "e2e_ds")[failing]
    failure, error = together(model, corpora, tmp_path, kind, at("finish_step", kind, 4, poison))
    assert isinstance(failure.error, TrainingStopped) and failure.step == 4
    for part in (
        "1 of 3 SAEs trained together failed",
        str(failure.folder),
        "step 5",
        "gradient_norm",
        "last good state is saved",
    ):
        assert part in str(error)
    assert_others_finished(error, alone, kind)
    checkpoint = read_checkpoint(failure.checkpoint)
    assert checkpoint.state["step"] == 4 and checkpoint.state["tokens"] == 4 * 32
    config = three(tmp_path / "first steps")[failing]
    trainee = new_trainee(config, model, STEPS)
    order = BatchOrder(corpora.train, 4, 0, 1)
    for step in range(4):
        take_step(model, [trainee], corpora.train.batch(order[step]))
    for name, tensor in trainee.checkpoint().tensors.items():
        assert name.startswith("random.") or torch.equal(checkpoint.tensors[name], tensor), name


@pytest.mark.parametrize("step", [0, pytest.param(2, marks=pytest.mark.slow), STEPS - 1])
def test_at_the_first_step_between_reports_and_at_the_last(model, corpora, alone, tmp_path, step):
    infinite = at("finish_step", "local", step, lambda trainee: trainee.sae.b_enc.grad.fill_(float("inf")))
    failure, error = together(model, corpora, tmp_path, "local", infinite)
    assert read_checkpoint(failure.checkpoint).state["step"] == failure.step == step
    assert_others_finished(error, alone, "local")


def make_unwritable(folder):
    """Even for root: a file stands where the folder was."""
    shutil.rmtree(folder)
    folder.write_text("")


def test_a_folder_turned_unwritable_ends_its_own_run_only(model, corpora, alone, tmp_path):
    turned = at("finish_step", "e2e", 5, lambda _: make_unwritable(tmp_path / "e2e"))
    failure, error = together(model, corpora, tmp_path, "e2e", turned)
    assert failure.checkpoint is None
    assert f"Cannot write {tmp_path / 'e2e' / 'metrics.jsonl'}" in str(error)
    assert f"Its state could not be saved in {tmp_path / 'e2e'}" in str(error)
    assert_others_finished(error, alone, "e2e")


def test_a_folder_that_cannot_take_the_finished_sae(model, corpora, alone, tmp_path):
    in_its_place = at("finish_step", "local", STEPS - 1, lambda _: (tmp_path / "local" / "sae").write_text("a file"))
    failure, error = together(model, corpora, tmp_path, "local", in_its_place)
    assert isinstance(failure.error, RunFolderError) and "Cannot write" in str(error)
    assert_others_finished(error, alone, "local")


@pytest.mark.parametrize(
    ("method", "accumulation"),
    [("accumulate", 1), ("accumulate", 2), ("finish_step", 1), pytest.param("finish_step", 2, marks=pytest.mark.slow)],
)
def test_running_out_of_memory_ends_ones_own_run_only(
    model, corpora, alone, in_two_passes, tmp_path, method, accumulation
):
    full = at(method, "e2e", 7, out_of_memory)
    _, error = together(model, corpora, tmp_path, "e2e", full, accumulation=accumulation)
    (failure,) = error.failures
    # An optimiser may have been half-way through the weights, so that only the checkpoint of step 6 is trusted.
    assert read_checkpoint(failure.checkpoint).state["step"] == (7 if method == "accumulate" else 6)
    assert "Out of memory (CUDA out of memory. Tried to allocate" in str(error)
    assert error.__cause__ is failure.error
    assert_others_finished(error, alone if accumulation == 1 else in_two_passes, "e2e")


def test_the_memory_of_one_that_failed_is_free_while_the_others_continue(model, corpora, tmp_path):
    held, freed = [], []

    def fail(trainee):
        held.append(weakref.ref(trainee.sae))
        out_of_memory(trainee)

    def look(_trainee):
        gc.collect()
        freed.append(held[0]() is None)

    acts = at("accumulate", "e2e", 7, fail), at("begin_step", "local", 10, look)
    failure, _ = together(model, corpora, tmp_path, "e2e", *acts)
    assert freed == [True]
    assert "in out_of_memory" in "".join(
        traceback.format_exception(failure.error)
    )  # where it happened is still reported


def test_an_sae_that_cannot_be_measured_ends_its_own_run_only(model, corpora, alone, tmp_path):
    """Its weights are finite after the last step, and their products with held-out text are not."""
    huge = at("finish_step", "e2e", STEPS - 1, lambda trainee: trainee.sae.b_dec.data.fill_(3e38))
    failure, error = together(model, corpora, tmp_path, "e2e", huge)
    assert isinstance(failure.error, DataError) and "NaN or infinite" in str(failure.error)
    assert read_checkpoint(failure.checkpoint).state["step"] == STEPS
    assert_others_finished(error, alone, "e2e")


def test_when_all_have_failed_it_stops_at_once(model, corpora, tmp_path):
    steps, ends = [], (("local", 2), ("e2e", 4), ("e2e_ds", 4))
    failing = acting(*(at("accumulate", kind, step, out_of_memory) for kind, step in ends))
    counted = OwnModel(model, lambda clean, tokens, **asked: steps.append(tokens) or clean(tokens, **asked))
    with pytest.raises(SomeFailed, match=r"3 of 3 SAEs trained together failed.*None finished") as stopped:
        train_with(failing, three(tmp_path), counted, corpora)
    assert stopped.value.finished == [] and len(stopped.value.failures) == 3
    assert len(steps) == 1 + 5  # the first is of the text, which is tried beforehand
    assert [failure.step for failure in stopped.value.failures] == [2, 4, 4]


def test_an_error_in_what_all_share_stops_and_saves_all(model, corpora, tmp_path):
    calls = []

    def fails(clean, tokens, **asked):
        calls.append(tokens)
        if len(calls) == 1 + 6:  # the first is of the text, which is tried beforehand
            raise MemoryError("no memory for the clean pass")
        return clean(tokens, **asked)

    with pytest.raises(OutOfMemory, match=r"no memory for the clean pass.*training\.microbatch.*e2e_ds"):
        train_together(three(tmp_path), model=OwnModel(model, fails), corpora=corpora, display=False)
    for config in three(tmp_path):
        assert read_checkpoint(RunFolder(config.out).latest_checkpoint()).state["step"] == 5


def test_ctrl_c_saves_all_that_are_left_and_they_resume(model, corpora, alone, tmp_path):
    stopped = acting(at("accumulate", "local", 3, out_of_memory), ctrl_c("e2e_ds", 9))
    with pytest.raises(Interrupted, match=r"saved at step 10.*--resume.*Failed before: .*Out of memory"):
        train_with(stopped, three(tmp_path), model, corpora)
    left = three(tmp_path)[1:]
    for config in left:
        assert read_checkpoint(RunFolder(config.out).latest_checkpoint()).state["step"] == 10
    runs = train_together(left, model=model, corpora=corpora, display=False, resume=True)
    for run, expected in zip(runs, alone[1:], strict=True):
        assert_same(run, expected)


def test_ctrl_c_between_reports_does_not_save_past_a_number_that_is_not_finite(model, corpora, tmp_path):
    stopped = acting(at("finish_step", "local", 6, poison), ctrl_c("e2e_ds", 7))  # reports are due at 6 and 9
    with pytest.raises(Interrupted, match="step 7 the term gradient_norm was not finite"):
        train_with(stopped, three(tmp_path), model, corpora)
    steps = [read_checkpoint(RunFolder(c.out).latest_checkpoint()).state["step"] for c in three(tmp_path)]
    assert steps == [6, 8, 8]


def test_a_failure_is_told_at_once(model, corpora, tmp_path, capfd):
    told = []
    acts = (
        at("accumulate", "local", 3, out_of_memory),
        at("begin_step", "e2e", 4, lambda _: told.append(capfd.readouterr().err)),
    )
    with pytest.raises(SomeFailed):
        train_with(acting(*acts), three(tmp_path), model, corpora, display=True)
    (line,) = [line for line in told[0].splitlines() if not line.startswith("!")]  # remarks on the random model
    assert line.startswith(f"failed: {tmp_path / 'local'}: Out of memory (CUDA out of memory.")


def test_of_trials_nothing_is_kept_and_nothing_advised(model, corpora, tmp_path, capfd):
    trials = {"model": model, "corpora": corpora, "display": True, "member": TrialMember}
    with pytest.raises(SomeFailed) as failed:
        train_with(acting(at("accumulate", "local", 3, out_of_memory)), three(tmp_path), **trials)
    assert len(failed.value.finished) == 2 and "--resume" not in str(failed.value.failures[0].error)
    with pytest.raises(Interrupted, match=r"^Stopped as asked\. Nothing is kept") as stopped:
        train_with(acting(stopping(3)), three(tmp_path / "stopped"), **trials)
    assert str(tmp_path) not in f"{stopped.value}{capfd.readouterr().err}"
    assert not [*tmp_path.glob("**/*.safetensors"), *tmp_path.glob("**/checkpoints/*")]


def test_time_is_shared_by_those_who_spent_it(model, corpora, tmp_path, monkeypatch):
    clock = [0.0]

    def a_second(_trainee):
        clock[0] += 1.0

    monkeypatch.setattr("endwise.training.display.time.monotonic", lambda: clock[0])
    acts = [at("begin_step", "e2e", step, a_second) for step in range(STEPS)]
    _, error = together(model, corpora, tmp_path, "local", *acts, at("accumulate", "local", 7, out_of_memory))
    assert [run.seconds for run in error.finished] == pytest.approx([8 / 3 + 4 / 2] * 2)
