"""Files that are damaged, or made to do harm: every reader refuses them in words, and none runs or follows them."""

import errno
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from bad_input import BAD_SAFETENSORS, DEEP, HOSTILE, LONG_NUMBER, ODD_JSON, ran, refused, write_place
from endwise import SAE, train
from endwise.common.errors import FormatError, RunFolderError, SiteError
from endwise.common.files import LARGEST_JSON, read_json, stays_inside
from endwise.config.run import ModelConfig
from endwise.evaluation.evaluate import FIRINGS_FILE, SUMS_FILE, read_firings, read_sums
from endwise.runs.checkpoints import Checkpoint, checksum, read_checkpoint, write_checkpoint
from endwise.runs.folder import RunFolder
from endwise.training.setup import default_folder
from small_gpt2 import recipe

pytestmark = pytest.mark.usefixtures("loaded_once")

repeated = settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = write_place(tmp_path_factory.mktemp("place"))
    train(folder / "recipe.yaml", display=False)
    return folder


@pytest.fixture
def model(place, tmp_path):
    return shutil.copytree(place / "model", tmp_path / "model")


@pytest.fixture
def run(place, tmp_path):
    return shutil.copytree(place / "run", tmp_path / "run")


def some(cases, odd):
    """All of them, those that are not among the odd ones in the slow tier."""
    return [pytest.param(case, id=name, marks=() if name in odd else pytest.mark.slow) for name, case in cases.items()]


ODD = (
    "empty",
    "a length of 2**63",
    "a deep header",
    "an unknown dtype",
    "a shape that overflows",
    "no tensors",
    "text",
)


@pytest.mark.parametrize("content", some(BAD_SAFETENSORS, ODD))
def test_safetensors_that_are_none(model, run, content):
    (model / "model.safetensors").write_bytes(content)
    assert str(model) in refused("sites", model, code=3)
    (run / "sae" / "sae_weights.safetensors").write_bytes(content)
    message = refused("evaluate", run, code=6)
    assert "sae_weights.safetensors" in message
    RunFolder(run).latest_checkpoint().write_bytes(content)
    message = refused("train", "--resume", run, code=6)
    assert "not a whole checkpoint" in message and "step-" in message
    (run / SUMS_FILE).write_bytes(content)
    if content != BAD_SAFETENSORS["no tensors"]:
        with pytest.raises(FormatError, match="Measure the run again"):
            read_sums(run)
    (run / FIRINGS_FILE).write_bytes(content)
    with pytest.raises(FormatError, match="Measure the run again"):
        read_firings(run)


JSON_BOMBS = {
    "deep": DEEP,
    "deep objects": '{"a":' * 100_000,
    "a long number": f'{{"d_in": {LONG_NUMBER}}}',
    "a list": "[]",
    "a number": "3",
    "nothing": "",
    "text": HOSTILE,
    "half an object": '{"d_in": 16',
    "not UTF-8": b"\xff\xfe{}".decode("latin-1"),
}


@pytest.mark.parametrize("text", some(JSON_BOMBS, ("deep", "a long number", "a list", "nothing", "not UTF-8")))
def test_json_that_is_none(model, run, tmp_path, text):
    content = text.encode("latin-1", "replace")
    for file, command, code in (
        (model / "config.json", ("sites", model), 3),
        (run / "sae" / "cfg.json", ("evaluate", run), 6),
        (run / "data.json", ("train", "--resume", run), 6),
    ):
        file.write_bytes(content)
        assert f"{file} cannot be read as JSON: " in refused(*command, code=code)
    (run / "evaluation.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"evaluation\.json"):
        RunFolder(run).evaluation()
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "dataset_dict.json").write_bytes(content)
    assert "dataset_dict.json" in refused("train", recipe_for(run, saved), code=4)


def recipe_for(run, source):
    """The run's recipe, for another source."""
    values = yaml.safe_load((run / "config.yaml").read_text())
    values["data"] = {"source": str(source), "context": 8}
    values["out"] = str(run.parent / "another run")
    path = run.parent / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_json_too_large_to_be_ours_is_not_read_whole(tmp_path):
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(LARGEST_JSON * 100)
    with pytest.raises(FormatError, match="more than"):
        read_json(tmp_path / "large.json")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"d_in": "16"}, "d_in must be a whole number above 0, not '16'"),
        ({"d_in": True}, "d_in must be a whole number above 0, not True"),
        ({"d_in": -16}, "d_in must be a whole number above 0, not -16"),
        ({"d_in": 16.0}, "d_in must be a whole number above 0, not 16.0"),
        ({"d_sae": None}, "d_sae must be a whole number above 0, not None"),
        ({"d_sae": 10**30}, "must have the shape"),
        ({"d_sae": [[HOSTILE]]}, "d_sae must be a whole number"),
        ({"architecture": None}, "architecture None is not one of"),
        ({"architecture": ["standard"] * 1000}, "is not one of"),
        ({"normalize_activations": {}}, "normalize_activations"),
        ({"apply_b_dec_to_input": "no"}, "apply_b_dec_to_input must be true or false"),
        ({"metadata": [HOSTILE]}, "metadata must be an object"),
    ],
    ids=str,
)
def test_an_saes_configuration_of_wrong_types(run, changed, says):
    file = run / "sae" / "cfg.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    message = refused("evaluate", run, code=6)
    assert says in message and len(message) < 1000


@repeated
@given(metadata=st.dictionaries(st.sampled_from(["endwise", "context_size", "x"]), ODD_JSON | st.just({"step": "x"})))
def test_whatever_an_saes_metadata_hold_it_can_be_used(place, metadata):
    from endwise.evaluation.finished import unfinished

    file = place / "run" / "sae" / "cfg.json"
    original = file.read_bytes()
    try:
        file.write_text(json.dumps(json.loads(original) | {"metadata": metadata}))
        SAE.load(place / "run")
        assert unfinished(place / "run", RunFolder(place / "run").config()) is None
    finally:
        file.write_bytes(original)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("W_enc", torch.full((16, 40), float("nan")), "finite"),
        ("b_dec", torch.full((16,), float("inf")), "finite"),
        ("W_dec", torch.ones(40, 16, dtype=torch.int64), "int64"),
        ("W_dec", torch.ones(40, 16, dtype=torch.bool), "bool"),
        ("b_enc", torch.ones(41), "shape"),
    ],
)
def test_weights_that_are_no_saes(run, name, value, says):
    file = run / "sae" / "sae_weights.safetensors"
    file.write_bytes(save(load_file(file) | {name: value}))
    message = refused("evaluate", run, code=6)
    assert name in message and says in message


def test_weights_that_overflow_in_use(run):
    file = run / "sae" / "sae_weights.safetensors"
    file.write_bytes(save({key: tensor * 1e38 for key, tensor in load_file(file).items()}))
    RunFolder(run).note_weights(whole=True)
    message = refused("evaluate", run, code=4)
    assert "NaN or infinite" in message and str(run) in message
    assert not (run / "evaluation.json").exists()


def test_an_sae_of_another_width(run):
    tensors = {"W_enc": torch.ones(8, 4), "b_enc": torch.ones(4), "W_dec": torch.ones(4, 8), "b_dec": torch.ones(8)}
    (run / "sae" / "sae_weights.safetensors").write_bytes(save(tensors))
    file = run / "sae" / "cfg.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"d_in": 8, "d_sae": 4}))
    message = refused("evaluate", run, code=6)
    assert "d_in 8" in message and "width 16" in message


@pytest.mark.parametrize("content", ["[1]", "{}", '{"train": 3}', '{"train": {"fingerprint": []}}', '{"train": []}'])
def test_a_runs_description_of_its_data(run, content):
    (run / "data.json").write_text(content)
    message = refused("train", "--resume", run)
    assert "data.json" in message or "was started on other training text" in message


@repeated
@given(lines=st.lists(st.binary(max_size=20) | ODD_JSON.map(lambda v: json.dumps({"step": v}).encode()), max_size=4))
def test_whatever_lines_a_runs_timings_hold_it_can_be_resumed(place, lines):
    (place / "run" / "timings.jsonl").write_bytes(b"\n".join([*lines, DEEP.encode()]))
    assert ran("train", "--resume", place / "run").exit_code == 0


@pytest.mark.parametrize(
    ("tensors", "state", "says"),
    [
        ({"sae.encoder": torch.ones(39, 16)}, {}, r"sae.encoder must be [40, 16] torch.float32, not [39, 16]"),
        ({"sae.encoder": torch.ones(40, 16).double()}, {}, "not [40, 16] torch.float64"),
        ({"last_fired": None}, {}, "last_fired must be [40] torch.int64, not missing"),
        ({"last_fired": torch.ones(40)}, {}, "last_fired must be [40] torch.int64"),
        ({"optimizer.encoder.exp_avg": torch.ones(3)}, {}, "optimizer.encoder.exp_avg must be [40, 16]"),
        ({"optimizer.encoder.step": torch.ones(3)}, {}, "optimizer.encoder.step must be []"),
        ({}, {"step": -1}, "step must be a whole number from 0 to 20, not -1"),
        ({}, {"step": 10**12}, "step must be a whole number from 0 to 20, not 1000000000000"),
        ({}, {"step": "3"}, "step must be a whole number from 0 to 20, not '3'"),
        ({}, {"tokens": None}, "tokens must be a whole number"),
        ({}, {"tokens": 10**30}, "tokens must be a whole number"),
    ],
    ids=str,
)
def test_a_whole_checkpoint_of_another_run(run, tensors, state, says):
    file = RunFolder(run).latest_checkpoint()
    whole = read_checkpoint(file)
    changed = {name: tensor for name, tensor in {**whole.tensors, **tensors}.items() if tensor is not None}
    write_checkpoint(file, Checkpoint(changed, whole.state | state))
    message = refused("train", "--resume", run, code=6)
    assert says in message and "Remove it to resume from the one before" in message


@pytest.mark.parametrize(
    "state", ["[1]", "3", "{}", DEEP, "text", '{"step": ' + LONG_NUMBER + "}"], ids=lambda s: s[:9]
)
def test_a_checkpoint_whose_counters_are_none(run, state):
    file = RunFolder(run).latest_checkpoint()
    tensors = read_checkpoint(file).tensors
    file.write_bytes(save(tensors, metadata={"endwise": state, "sha256": checksum(tensors, state)}))
    assert "checkpoint" in refused("train", "--resume", run, code=6)


def test_a_file_that_may_not_be_read_is_told_without_a_traceback(run, monkeypatch):
    def fails(*_, **__):
        raise OSError(errno.EIO, "Input/output error", str(run / "\x1b[2J"))

    monkeypatch.setattr("endwise.evaluation.evaluate.evaluate", fails)
    result = ran("evaluate", run)
    assert result.exit_code == 1 and "\\x1b[2J: Input/output error. Check that path" in result.stderr


@pytest.mark.parametrize("csv", ["/", ".", "..", "x" * 300, "/dev/null/x.csv"])
def test_a_table_that_cannot_be_written(run, csv):
    assert "Cannot write" in refused("evaluate", run, "--csv", csv, "--tokens", 64, code=5)


@pytest.mark.parametrize("name", ["a.safetensors", "a/b.arrow", "...", "..a", "a..b", "\u202ea"])
def test_names_that_stay_inside(name):
    assert stays_inside(name)


@given(before=st.text("ab./", max_size=4), after=st.text("ab./", max_size=4), slash=st.sampled_from("/\\"))
def test_names_that_lead_out(before, after, slash):
    assert not stays_inside(f"{before}{slash}..{slash}{after}" if before.strip("/.") else f"..{slash}{after}")
    assert not stays_inside(f"{slash}{after}") and not stays_inside("C:" + after) and not stays_inside("")


@pytest.mark.parametrize("model", ["../../x", "/", "..", "a/b", HOSTILE, "x" * 4000, ".", "C:\\x"])
def test_a_runs_own_folder_lies_in_runs_whatever_the_model_is_called(tmp_path, model):
    config = recipe(tmp_path).model_copy(update={"model": ModelConfig(name=model), "out": None})
    folder = default_folder(config)
    assert folder.parent == Path("runs") and len(folder.name) < 200
    assert re.fullmatch(r"[A-Za-z0-9._-]+", folder.name)
    for site in ("../../x", "blocks.0.hook_resid_pre/../..", "/etc"):
        with pytest.raises(SiteError):
            default_folder(config.model_copy(update={"site": site}))


def test_metrics_that_cannot_be_read(run):
    (run / "metrics.jsonl").write_text('{"step": 1}\n' + DEEP)
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl"):
        RunFolder(run).metrics()
