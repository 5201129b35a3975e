"""Recognition of what a run stands on: text, model, tokenizer, its SAE, the one it began with; else a line."""

import json
import os
import shutil
import time
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from endwise import LanguageModel, evaluate, load_model, train
from endwise.analysis.comparison.comparison import summarise
from endwise.analysis.directions.measure import measure_directions
from endwise.analysis.geometry.geometry import geometry
from endwise.analysis.importance.measure import measure_importance
from endwise.analysis.pareto.curves import pareto
from endwise.analysis.ratios import downstream_ratio, l0_ratio, ratio_of
from endwise.common import digests
from endwise.common.errors import ConfigError, EndwiseError, FormatError, RunFolderError, out_of_memory
from endwise.config.method import PRESET_METHODS
from endwise.config.run import DataConfig
from endwise.evaluation.provenance import _same_text, check_start, model_of
from endwise.evaluation.summary import RunSummary
from endwise.features.harvest import request as wish
from endwise.features.harvest.run import harvest
from endwise.runs.folder import RunFolder
from endwise.sweeps.tasks import evaluation_of
from endwise.tokens import Corpus
from endwise.tokens.corpus import SequenceLayout
from endwise.tokens.sources import open_source
from endwise.tokens.tokenising import documents_in
from made_runs import make_run
from small_gpt2 import CONTEXT, VOCAB, data, recipe, small_corpora, write_tokens
from word_tokenizer import word_tokenizer

pytestmark = pytest.mark.usefixtures("loaded_once")
SHORT = {"tokens": 64, "checkpoint_every": 1}
TOKENS = 8 * CONTEXT
"""Held-out ones."""


def one_recipe(folder: Path, out: Path, kind: str = "e2e", **training):
    """Recipe for the model and the tokens in `folder`, as a command line would have it."""
    config = recipe(out, kind, **SHORT | training)
    model = config.model.model_copy(update={"name": str(folder / "model")})
    evaluation = config.evaluation.model_copy(update={"tokens": TOKENS, "bootstrap": 20})
    return config.model_copy(update={"model": model, "data": data(folder), "evaluation": evaluation})


@pytest.fixture(scope="module")
def trained(made, tmp_path_factory):
    """A trained run and what it stands on; names in the recipe are relative."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(made, folder / "on")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(one_recipe(Path("on"), Path("run")), display=False)
    return folder


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    """A copy of it all, which a test may spoil."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def other_order(place: Path) -> None:
    for name in ("train", "heldout"):
        np.save(place / "on" / f"{name}.npy", np.load(place / "on" / f"{name}.npy")[::-1].copy())


def other_weights(place: Path) -> None:
    """One number of one weight, by one part in a million."""
    file = place / "on" / "model" / "model.safetensors"
    tensors = load_file(file)
    weight = tensors["transformer.h.2.mlp.c_fc.weight"]
    weight[0, 0] += 1e-6 * weight[0, 0].abs()
    save_file(tensors, file, metadata={"format": "pt"})


def other_config(place: Path) -> None:
    file = place / "on" / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "layer_norm_epsilon": 1e-3}))


def other_sae(place: Path) -> None:
    file = place / "run" / "sae" / "sae_weights.safetensors"
    tensors = load_file(file)
    tensors["b_dec"][0] += 1
    save_file(tensors, file)


READERS = {
    "evaluate": lambda run: evaluate(run),
    "importance": lambda run: measure_importance([run], ablate=2),
    "harvest": lambda run: harvest([run]),
    "harvest --train": lambda run: harvest([run], text="train", tokens=64),
    "directions": lambda run: measure_directions([run]),
    "resume": lambda run: train(RunFolder(run).config(), resume=True, display=False),
}
NOT_RESUMED = {name: read for name, read in READERS.items() if name != "resume"}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_run_whose_text_has_another_order_now_is_refused(place, read):
    other_order(place)
    told = r"run was started on other (training|held-out) text than on/\w+.npy.* holds now"
    with pytest.raises(RunFolderError, match=told):
        read(Path("run"))


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("change", [other_weights, pytest.param(other_config, marks=pytest.mark.slow)])
def test_a_run_whose_model_was_changed_is_refused(place, change, read):
    change(place)
    with pytest.raises(RunFolderError, match="run was started on other model weights than on/model has now"):
        read(Path("run"))


def test_a_setting_of_the_model_is_a_part_of_it(place):
    other_config(place)
    with pytest.raises(RunFolderError, match="run was started on other model weights than on/model has now"):
        evaluate(Path("run"))


@pytest.mark.parametrize("read", NOT_RESUMED.values(), ids=NOT_RESUMED)
def test_a_run_with_another_sae_than_it_trained_is_refused(place, read):
    other_sae(place)
    with pytest.raises(FormatError, match="does not hold the weights that training wrote there"):
        read(Path("run"))


@pytest.mark.parametrize(
    "names", [("evaluate", "harvest"), pytest.param(tuple(NOT_RESUMED), marks=pytest.mark.slow)], ids=["two", "all"]
)
def test_a_run_with_another_sae_than_it_trained_is_read_once_resume_has_written_it_again(place, names):
    other_sae(place)
    for name in ("resume", *names):
        READERS[name](Path("run"))


def test_what_is_unchanged_is_read_wherever_it_was_moved_and_says_nothing(place, capsys):
    shutil.move("run", "moved")
    for each in NOT_RESUMED.values():
        each(Path("moved"))
    assert capsys.readouterr().err == ""


def test_weights_given_in_memory_are_recognised_too(corpora, tmp_path, model):
    run = train(recipe(tmp_path / "run", **SHORT), model=model, corpora=corpora, display=False)
    evaluate(run.folder, model=model, corpora=corpora)
    torch.manual_seed(1)
    other = type(model.model)(model.model.config)
    with pytest.raises(RunFolderError, match="other model weights"):
        evaluate(run.folder, model=LanguageModel(other), corpora=corpora)


@pytest.mark.parametrize("same", [True, False])
def test_weights_given_in_memory_are_compared_with_those_that_their_name_gives_later(place, capsys, same):
    """As of a model that an adapter was merged into, which still has the name of the one without."""
    given = load_model(str(place / "on" / "model")).model  # no other test's
    if not same:
        with torch.no_grad():
            next(given.parameters()).mul_(1.001)
    config = one_recipe(Path("on"), Path("given"))
    train(config, model=LanguageModel(given, name="on/model"), display=False)
    for read in (evaluate, lambda run: train(RunFolder(run).config(), resume=True, display=False)):
        if same:
            read(Path("given"))
        else:
            with pytest.raises(RunFolderError, match="other model weights than on/model has now"):
                read(Path("given"))
    assert "no digest to compare" not in capsys.readouterr().err


def test_weights_that_were_changed_after_loading_are_recognised(place):
    loaded = load_model(str(place / "on" / "model"))  # no other test's
    with torch.no_grad():
        next(loaded.model.parameters()).mul_(1.001)
    with pytest.raises(RunFolderError, match="other model weights"):
        evaluate(Path("run"), model=loaded)


def test_corpora_that_are_given_may_be_others_which_is_said_and_kept(place, capsys):
    before = evaluate(Path("run"))[Path("run")].text
    write_tokens(place / "on", seed=7)
    given = small_corpora(place / "on")
    assert evaluate(Path("run"), corpora=given)[Path("run")].text == given.heldout.text_digest(range(8)) != before
    assert "run was started on other held-out text than" in capsys.readouterr().err
    assert RunSummary.read(Path("run")).text == given.heldout.text_digest(range(8))


def test_a_run_from_before_digests_opens_with_one_line_that_says_what_is_unknown(place, capsys):
    (place / "run" / "digests.json").unlink()
    shutil.copytree("run", "another")
    evaluate([Path("run"), Path("another")])
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert "2 runs (run, …): no digest to compare of model weights, SAE" in told[0]
    other_order(place)  # which `data.json` tells of such a run
    with pytest.raises(RunFolderError, match="other held-out text"):
        evaluate(Path("run"))


def test_numbers_of_other_weights_than_the_sae_has_now_are_refused(place):
    evaluate(Path("run"))
    RunSummary.read(Path("run"))
    config = RunFolder(Path("run")).config()
    training = config.training.model_copy(update={"learning_rate": 1e-3})
    (place / "run" / "config.yaml").write_text(config.model_copy(update={"training": training}).to_yaml())
    train(RunFolder(Path("run")).config(), resume=True, from_step=0, display=False)
    with pytest.raises(RunFolderError, match="measured with other weights than its SAE has now"):
        pareto(["run"])


def test_the_sae_that_a_run_began_with_is_recognised_when_it_begins_again(place):
    started = one_recipe(Path("on"), Path("second")).model_copy(update={"init_from": Path("run")})
    train(started, display=False)
    train(one_recipe(Path("on"), Path("again"), learning_rate=1e-3), display=False)
    shutil.rmtree("run")
    shutil.copytree("again", "run")
    with pytest.raises(RunFolderError, match="other SAE that it started from than run holds now"):
        train(started, resume=True, from_step=0, display=False)
    train(started, resume=True, display=False)  # its own checkpoint has all that it needs


def test_an_altered_sae_is_not_begun_with(place):
    other_sae(place)
    config = one_recipe(Path("on"), Path("second")).model_copy(update={"init_from": Path("run")})
    with pytest.raises(FormatError, match="does not hold the weights"):
        train(config, display=False)


def test_importance_and_harvest_are_not_taken_from_another_text(place):
    measure_importance([Path("run")], ablate=2)
    harvest([Path("run")])
    write_tokens(place / "on", seed=7)
    run = train(one_recipe(Path("on"), Path("second")), display=False).folder
    shutil.copy("run/importance.safetensors", run)
    shutil.copytree("run/harvest", run / "harvest")
    shutil.copytree("run/sae", run / "sae", dirs_exist_ok=True)  # so that the text alone tells them apart
    own, old = RunFolder(run), RunFolder(Path("run"))
    own.digests_file.write_text(json.dumps(own.digests() | {"sae": old.digests()["sae"]}))
    fingerprint = own.fingerprint("heldout")
    assert fingerprint != old.fingerprint("heldout")
    assert measure_importance([run], ablate=2)[run].settings["heldout"] == fingerprint
    found = harvest([run])[run]
    assert found is not None and found.about["corpus"]["fingerprint"] == fingerprint


def test_a_text_of_ones_own_that_was_changed_is_harvested_again(place):
    own = place / "own.npy"
    np.save(own, np.load(place / "on" / "heldout.npy"))
    first = harvest([Path("run")], text=own)[Path("run")]
    np.save(own, np.load(own)[::-1].copy())
    second = harvest([Path("run")], text=own)[Path("run")]
    assert first is not None and second is not None
    assert first.about["corpus"]["fingerprint"] != second.about["corpus"]["fingerprint"]


def test_what_was_measured_of_streamed_text_is_not_measured_again(place):
    config = one_recipe(Path("on"), Path("streamed"))
    streamed = config.data.model_copy(update={"streaming": True})
    train(config.model_copy(update={"data": streamed}), display=False)
    for tokens in (32, 128):  # less and more than the recipe's
        first = measure_importance([Path("streamed")], ablate=2, tokens=tokens)[Path("streamed")]
        found = harvest([Path("streamed")], tokens=tokens)[Path("streamed")]
        written = [Path("streamed", name).stat().st_mtime_ns for name in KEPT]
        again = measure_importance([Path("streamed")], ablate=2, tokens=tokens)[Path("streamed")]
        harvest([Path("streamed")], tokens=tokens)
        assert found is not None and again.settings["heldout"] == first.settings["heldout"]
        assert [Path("streamed", name).stat().st_mtime_ns for name in KEPT] == written
        assert found.about["settings"]["importance"] == "measured"


KEPT = ("importance.safetensors", "harvest/harvest.json")


def test_a_change_behind_a_link_in_a_text_of_ones_own_is_noticed(place):
    (place / "own").mkdir()
    (place / "elsewhere").mkdir()
    (place / "own" / "linked").symlink_to(place / "elsewhere")
    text = place / "elsewhere" / "a.npy"
    np.save(text, np.load(place / "on" / "heldout.npy"))
    first = harvest([Path("run")], text=place / "own")[Path("run")]
    np.save(text, np.load(text)[::-1].copy())
    second = harvest([Path("run")], text=place / "own")[Path("run")]
    assert first is not None and second is not None
    assert first.about["corpus"]["fingerprint"] != second.about["corpus"]["fingerprint"]


def test_the_commit_of_a_data_set_of_ones_own_is_a_part_of_what_was_harvested(place, monkeypatch):
    Hub(monkeypatch).commit = "a" * 40
    recipes = DataConfig(source="org/set", revision="b" * 40)
    assert wish._content(Path("org/set"), DataConfig()) == "a" * 40
    assert wish._content(Path("org/set"), recipes) == "b" * 40
    assert wish._content(Path("embedded"), recipes) is None


def test_that_a_run_began_with_another_sae_is_said_where_its_cost_is_counted(place, capsys):
    started = one_recipe(Path("on"), Path("second")).model_copy(update={"init_from": Path("run")})
    train(started, display=False)
    check_start(started)
    assert "other SAE" not in capsys.readouterr().err
    train(one_recipe(Path("on"), Path("again"), learning_rate=1e-3), display=False)
    shutil.rmtree("run")
    shutil.copytree("again", "run")
    check_start(started)
    assert "second was started on other SAE that it started from than run holds now." in capsys.readouterr().err
    shutil.rmtree("run/sae")  # a run may be kept without it
    check_start(started)


def test_a_sweep_does_not_take_the_numbers_of_other_weights(place):
    evaluate(Path("run"))
    config = RunFolder(Path("run")).config()
    assert evaluation_of(config) is not None
    other_sae(place)
    assert evaluation_of(config) is None


def measured_on(run: RunSummary, text: str | None) -> RunSummary:
    return replace(run, text=text)


PAIRS = {
    "L0": lambda a, b: l0_ratio(a, b, 10, 0),
    "downstream": lambda a, b: downstream_ratio(a, b, 10, 0),
}


@pytest.mark.parametrize("of", PAIRS.values(), ids=PAIRS)
def test_runs_measured_on_other_text_are_not_paired(of):
    one, other = make_run("e2e", 1, 0.1, 30), make_run("local", 1, 0.1, 60)
    assert of(measured_on(one, "a"), measured_on(other, "a")).estimate is not None
    assert of(measured_on(one, None), measured_on(other, "a")).estimate is not None  # which an older version measured
    found = of(measured_on(one, "b"), measured_on(other, "a"))
    assert (found.estimate, found.interval) == (None, None)
    assert found.reason == "the runs were measured on different held-out text"


def curves(text: str) -> list[RunSummary]:
    runs = []
    for kind, factor in (("local", 2), ("e2e", 1)):
        runs += [make_run(kind, c, 0.05 * c, factor * 40 / c) for c in (1, 2, 4)]
    return [measured_on(run, "a" if run.kind == "local" else text) for run in runs]


def test_curves_measured_on_other_text_are_not_compared():
    assert ratio_of(curves("a"), PRESET_METHODS["e2e"], "l0", "ce_increase", 10, 0).estimate == pytest.approx(0.5)
    found = ratio_of(curves("b"), PRESET_METHODS["e2e"], "l0", "ce_increase", 10, 0)
    assert (found.estimate, found.interval) == (None, None) and "different held-out text" in str(found.reason)
    summary = summarise(curves("b"), clean_ce=1.0)
    assert all(each.estimate is None for group in summary.ratios.values() for each in group.values())
    assert all(each.estimate is None for each in summary.downstream.values())


def second_run(place: Path, change) -> None:
    """Another kind's, of one recipe but for what it stands on."""
    change(place)
    train(one_recipe(Path("on"), Path("second"), "local"), display=False)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other_order, "held-out text"),
        (other_weights, "model weights"),
        pytest.param(other_config, "model weights", marks=pytest.mark.slow),
    ],
)
def test_pareto_keeps_apart_runs_of_unequal_text_or_weights(place, change, named):
    evaluate(Path("run"))
    second_run(place, change)
    evaluate(Path("second"))
    found = pareto(["run", "second"])
    assert [len(each.runs) for each in found] == [1, 1]
    assert all(named in str(each.setting) for each in found)


def test_dictionaries_measured_on_unequal_text_are_no_pair(place):
    evaluate(Path("run"))
    second_run(place, other_order)
    evaluate(Path("second"))
    with pytest.raises(ConfigError, match="different held-out text"):
        geometry([], pairs=[("run", "second")])


def test_pareto_says_which_runs_an_older_version_measured(place, capsys):
    evaluate(Path("run"))
    file = place / "run" / "evaluation.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k not in ("text", "weights")}))
    train(one_recipe(Path("on"), Path("second"), "local"), display=False)
    evaluate(Path("second"))
    found = pareto(["run", "second"])
    assert [len(each.runs) for each in found] == [2]
    assert "run: measured by an older version" in capsys.readouterr().err


def test_a_relative_path_is_said_to_be_one_where_it_leads_nowhere(trained, place, monkeypatch):
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    with pytest.raises(EndwiseError) as raised:
        evaluate(Path("../run"))
    told = str(raised.value)
    assert "model.name (on/model), data.source (on/train.npy)" in told.replace(" and ", ", ")
    assert f"looked for in {place / 'elsewhere'}" in told and f"started in {trained}" in told


def test_a_relative_path_that_leads_to_other_text_is_said_to_be_one(place, monkeypatch):
    shutil.copytree(place / "on", place / "elsewhere" / "on")
    write_tokens(place / "elsewhere" / "on", seed=7)
    monkeypatch.chdir(place / "elsewhere")
    with pytest.raises(RunFolderError, match=r"other held-out text.*data\.source \(on/train\.npy\).*started in"):
        evaluate(Path("../run"))


def test_what_memory_can_be_saved_by_in_a_run_that_was_started_can_be_done(place):
    told = str(out_of_memory(MemoryError(), "endwise train --resume run training.microbatch=1"))
    assert "Resume this one with `endwise train --resume run training.microbatch=1`" in told
    whole = train(one_recipe(Path("on"), Path("whole")), display=False)
    config = RunFolder(Path("run")).config()
    training = config.training.model_copy(update={"microbatch": 1, "accumulation": 2})
    RunFolder(Path("run")).config_file.write_text(config.model_copy(update={"training": training}).to_yaml())
    resumed = train(RunFolder(Path("run")).config(), resume=True, from_step=1, display=False)
    for name, weight in whole.sae.state_dict().items():
        torch.testing.assert_close(resumed.sae.state_dict()[name], weight, rtol=1e-3, atol=1e-4)


class Hub:
    """A data set on the hub that moves on."""

    def __init__(self, monkeypatch) -> None:
        self.commit: str | None = "1" * 40
        monkeypatch.setattr(HfApi, "dataset_info", self.dataset_info)

    def dataset_info(self, name, *, revision=None, timeout=None):
        if self.commit is None:
            raise ConnectionError("no hub")
        return type("Info", (), {"sha": self.commit})


def test_a_data_set_on_the_hub_is_kept_by_its_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("ENDWISE_CACHE", str(tmp_path))
    hub = Hub(monkeypatch)
    first = open_source("someone/texts", None, None, "train", True)
    hub.commit = "2" * 40
    second = open_source("someone/texts", None, None, "train", True)
    assert first.identity != second.identity and (first.commit, second.commit) == ("1" * 40, "2" * 40)
    hub.commit = None  # as last reported
    assert open_source("someone/texts", None, None, "train", True).identity == second.identity
    assert open_source("someone/others", None, None, "train", True).commit is None
    assert open_source("someone/texts", None, None, "train", True, "1" * 40).identity == first.identity


def test_digests_of_more_text_hold_those_of_less():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, 2000).astype(np.uint16)
    documents, layout = documents_in(tokens, 0), SequenceLayout(CONTEXT, separator=0)
    few = documents.where(np.arange(len(documents)) < 21)
    less, more = Corpus(few, layout).digests(), Corpus(documents, layout)
    assert list(less) == ["1", "2", "4", "8", "16", "21"]
    assert less["21"] == more.digest_of_first(21) and less["16"] == more.digests()["16"]
    assert less["21"] != Corpus(few, replace(layout, mask_first_position=True)).digests()["21"]
    for packing in ("stream", "document"):
        packed = replace(layout, packing=packing)
        firsts = (Corpus(documents.where(np.arange(len(documents)) < n), packed) for n in range(1, len(documents)))
        used = next(n for n, first in enumerate(firsts, 1) if len(first) >= 5)
        assert list(Corpus(documents, packed, limit=5).digests())[-1] == str(used)


def test_text_that_is_read_as_far_as_needed_may_be_longer_or_shorter_now(tmp_path):
    rng = np.random.default_rng(1)
    tokens, layout = rng.integers(0, VOCAB, 2000).astype(np.uint16), SequenceLayout(CONTEXT, separator=0)
    documents = documents_in(tokens, 0)

    def first(count: int) -> Corpus:
        return Corpus(documents.where(np.arange(len(documents)) < count), layout)

    folder = RunFolder(tmp_path)
    folder.digests_file.write_text(json.dumps({"heldout": first(21).digests()}))
    assert all(_same_text(folder, "heldout", first(count), True) for count in (21, 40, 17))
    assert [_same_text(folder, "heldout", first(count), False) for count in (21, 40, 17)] == [True, False, False]
    tokens[: len(tokens) // 40] = tokens[: len(tokens) // 40][::-1].copy()
    documents = documents_in(tokens, 0)
    assert not any(_same_text(folder, "heldout", first(count), True) for count in (21, 40, 17))


def test_another_tokenizer_is_recognised_and_the_same_one_saved_again_is_none(model, corpora, tmp_path):
    words = ["the", "quick", "fox"]
    own, resaved = LanguageModel(model.model, word_tokenizer(words)), word_tokenizer(words)
    resaved.save_pretrained(tmp_path / "saved")
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")
    run = train(recipe(tmp_path / "run", **SHORT), model=own, corpora=corpora, display=False).folder
    config = RunFolder(run).config()
    model_of({run: config}, LanguageModel(model.model, again))
    for other in (word_tokenizer(words[::-1]), word_tokenizer(words, lower=True)):
        with pytest.raises(RunFolderError, match="started on other tokenizer"):
            model_of({run: config}, LanguageModel(model.model, other))


def test_the_digest_of_a_large_file_is_kept_and_made_again_when_it_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("ENDWISE_CACHE", str(tmp_path / "cache"))
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 2 * digests.SETTLED_NS)
    file = tmp_path / "weights"
    for content in (b"one", b"two"):
        with file.open("wb") as written:
            written.write(content)
            written.truncate(digests.LARGE)
        os.utime(file, ns=(0, 0))  # whoever restores the times changes another one
        assert digests.of_file(file) == sha256(file.read_bytes()).hexdigest()
        (kept,) = (tmp_path / "cache" / "digests").iterdir()
        kept.write_text(json.dumps(json.loads(kept.read_text()) | {"sha256": "as it is kept"}))
        assert digests.of_file(file) == "as it is kept"
