"""SAEs as they were in the course of a training, saved beside the last one."""

import pytest
import torch

import endwise
from endwise import SAE
from endwise.config.run import RunConfig, TrainingConfig
from endwise.formats import metadata_at
from endwise.runs.checkpoints import read_checkpoint
from endwise.runs.folder import RunFolder
from on_embedded import recipe


def saving(out, save_at):
    values = recipe(out)
    values["objective"]["kind"] = "local"
    values["training"]["save_at"] = save_at
    return RunConfig.build(values)


def files_in(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def model():
    return endwise.load_model("embedded")


def test_they_are_those_of_the_steps_and_resuming_leaves_them(model, tmp_path):
    """Steps of 128 tokens, 16 of them; a checkpoint after every fifth."""
    run = endwise.train(saving(tmp_path / "run", "log"), model=model, display=False)
    saes = {int(path.name.removeprefix("step-")): path for path in (run.folder / "saes").iterdir()}
    assert sorted(saes) == [1, 2, 4, 8, 16]
    assert files_in(saes[16]) == files_in(run.folder / "sae")
    for step, path in saes.items():
        assert metadata_at(path)["endwise"]["step"] == step
    assert not torch.equal(SAE.load(saes[4]).W_enc, SAE.load(saes[8]).W_enc)
    written = files_in(run.folder / "saes")
    (saes[16] / "cfg.json").unlink()
    endwise.train(saving(run.folder, "log"), model=model, resume=True, from_step=5, display=False)
    assert files_in(run.folder / "saes") == written


def test_the_step_is_that_which_reaches_the_tokens(model, tmp_path):
    run = endwise.train(saving(tmp_path / "run", [640, 130, 10**9]), model=model, display=False)
    assert sorted(path.name for path in (run.folder / "saes").iterdir()) == ["step-000000002", "step-000000005"]
    kept = read_checkpoint(RunFolder(run.folder).checkpoint(5)).tensors
    sae = SAE.load(run.folder / "saes" / "step-000000005")
    torch.testing.assert_close(sae.W_enc, kept["sae.encoder"].T, rtol=0, atol=0)
    torch.testing.assert_close(sae.b_enc.data, kept["sae.b_enc"], rtol=0, atol=0)


def test_log_doubles():
    training = TrainingConfig(tokens=100, save_at="log")
    assert [step for step in range(1, 40) if training.saves_after(step, 7)] == [1, 2, 4, 8, 16, 32]
    assert not any(TrainingConfig(tokens=100).saves_after(step, 7) for step in range(1, 40))
