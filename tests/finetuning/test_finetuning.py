"""Tuning finished SAEs, made by the rivals' own trainers on the embedded model (tools/finetune_study.py small)."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import endwise
from endwise.cli import app
from endwise.common.errors import ConfigError, FormatError
from endwise.evaluation.inspecting import inspect
from endwise.finetuning import TuningSettings, finetune
from endwise.finetuning.result import Moved
from endwise.runs.folder import RunFolder
from endwise.training.sparsity import START
from places import FIXTURES

pytestmark = pytest.mark.usefixtures("loaded_once")

TRAINED = FIXTURES / "trained"
SITE = "blocks.3.hook_resid_pre"
FEW = TuningSettings(tokens=3200, measured_on=1024, context=64, overrides=("training.evaluate_every=200",))
LESS = replace(FEW, tokens=640, measured_on=512)
MADE = sorted(path.name for path in TRAINED.iterdir() if path.is_dir())
AT_ONCE = ("sae_lens_standard", "sparsify_topk")
"""SAEs of two packages, one with a penalty and one without."""


@pytest.fixture(scope="module")
def embedded():
    return endwise.load_model("embedded")


def test_all_rivals_are_there():
    assert len(MADE) == 7


@pytest.mark.parametrize(
    "made", [name if name in AT_ONCE else pytest.param(name, marks=pytest.mark.slow) for name in MADE]
)
def test_it_predicts_better_at_the_same_l0_and_comes_back_as_it_came(embedded, tmp_path, made):
    said = []
    tuned = finetune(TRAINED / made, model=embedded, settings=FEW, out=tmp_path / "run", site=SITE, say=said.append)
    assert tuned.text.ce_increase.high < 1 and tuned.text.ratio("kl").high < 1
    assert abs(tuned.text.l0 - 1) < 0.03
    came, back = inspect(TRAINED / made), inspect(tuned.given_back)
    assert back.format_name == came.format_name
    x = torch.randn(32, tuned.sae.d_in, generator=torch.Generator().manual_seed(0))
    for other in (back.sae, endwise.SAE.load(tuned.folder)):
        torch.testing.assert_close(other(x), tuned.sae(x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(came.sae(x), tuned.sae(x), rtol=1e-2)
    assert any(f"also be written as {came.format_name}" in line for line in said)
    assert set(tuned.others) == {"code"}
    record = json.loads((tuned.folder / "finetune.json").read_text())
    assert record["text"]["after"]["ce_increase"] == tuned.text.after["ce_increase"]
    assert "The course" in (tuned.folder / "finetune.html").read_text()
    assert endwise.evaluate(tuned.folder)[tuned.folder]["l0"] == pytest.approx(tuned.text.after["l0"], rel=1e-6)


def test_what_was_started_is_resumed_and_another_is_refused(embedded, tmp_path):
    path, out = TRAINED / "sae_lens_standard", tmp_path / "run"
    first = finetune(path, model=embedded, settings=LESS, out=out)
    line = RunFolder(out).metrics()[0]  # λ begins at the size at which the penalty weighs half of the local error
    assert line["sparsity_coefficient"] * line["sparsity"] == pytest.approx(START * line["local_mse"], rel=0.3)
    bits = (out / "sae" / "sae_weights.safetensors").read_bytes()
    folder = RunFolder(out)
    for checkpoint in folder.saved_steps()[-1:]:
        for file in (out / "checkpoints").glob(f"*{checkpoint:09d}*"):
            file.unlink()
    again = finetune(path, model=embedded, settings=LESS, out=out)
    assert (out / "sae" / "sae_weights.safetensors").read_bytes() == bits
    assert again.to_json() == first.to_json()
    with pytest.raises(ConfigError, match=r"holds another run \(training.batch|holds another run \(training.tokens"):
        finetune(path, model=embedded, settings=replace(LESS, tokens=4096), out=out)


@pytest.mark.filterwarnings("ignore:.*center_writing_weights")
def test_what_cannot_be_given_back_is_said_before_training(embedded, tmp_path):
    """A format that is only read: the reference's own."""
    sae, name = endwise.SAE.load(TRAINED / "sae_lens_standard"), SITE.replace(".", "-")
    norms = sae.W_dec.norm(dim=1)  # which the reference takes out
    state = {
        "encoder.0.weight": (sae.W_enc * norms).T,
        "encoder.0.bias": sae.b_enc * norms,
        "decoder.weight": sae.W_dec.T,
        "decoder.bias": sae.b_dec,
    }
    torch.save({f"{name}.{part}": tensor.contiguous() for part, tensor in state.items()}, tmp_path / "sae.pt")
    said = []
    settings = replace(LESS, tokens=640)
    tuned = finetune(
        tmp_path / "sae.pt", model=embedded, settings=settings, out=tmp_path / "run", site=SITE, say=said.append
    )
    assert tuned.given_back is None and "can be read but not written" in tuned.refused
    place = next(number for number, line in enumerate(said) if "SAELens's layout only" in line)
    assert place < next(number for number, line in enumerate(said) if line.startswith("Tuning at"))


def test_an_sae_that_explains_nothing_is_refused_before_training(embedded, tmp_path):
    random = endwise.ReluSAE(embedded.width(embedded.site(SITE)), 24, seed=0)
    random.save(tmp_path / "sae", {"hook_name": SITE})
    with pytest.raises(FormatError, match="less than the mean does"):
        finetune(tmp_path / "sae", model=embedded, settings=FEW, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_command_prints_before_and_after(tmp_path):
    shutil.copytree(TRAINED / "sparsify_topk", tmp_path / "sae")
    options = ["--tokens", "640", "--measure-on", "512", "--context", "64", "--site", SITE, "--quiet"]
    changes = ["training.learning_rate=1e-3", "training.evaluate_every=200", "objective.downstream_mse=0.1"]
    result = CliRunner().invoke(
        app, ["finetune", str(tmp_path / "sae"), *changes, *options, "--out", str(tmp_path / "o")]
    )
    assert result.exit_code == 0, result.output
    for words in ("CE increase", "L0", "explained variance", "later sites", "on code", "The tuned SAE", "The report"):
        assert words in result.output
    config = RunFolder(tmp_path / "o").config()
    assert config.training.learning_rate == 1e-3 and config.objective.downstream_mse == 0.1


def test_moved_is_the_cosine_with_the_start():
    before = endwise.ReluSAE(4, 3, seed=0)
    after = endwise.ReluSAE(4, 3, seed=0)
    with torch.no_grad():
        after.decoder[1] = -before.decoder[1]
        after.encoder[2] *= 5
    fired = torch.tensor([True, True, False]).numpy()
    moved = Moved.of(before, after, fired)
    assert moved.decoder.tolist() == pytest.approx([1, -1, 1]) and moved.encoder.tolist() == pytest.approx([1, 1, 1])
    assert moved.quantiles(moved.decoder)[0.5] == pytest.approx(0.0, abs=1e-6)
