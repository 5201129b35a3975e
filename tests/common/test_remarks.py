"""Numbers that cannot be, or are not what was asked for: each is said, with its remedy, wherever it is shown."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from endwise import LanguageModel, train
from endwise.analysis.comparison.page import report_html
from endwise.analysis.comparison.printed import print_evaluations, print_summary
from endwise.analysis.sets import remark_list
from endwise.common.remarks import gathered, remarks_on
from endwise.evaluation.measure import measure
from endwise.evaluation.summary import remarks_of
from endwise.evaluation.text_check import facts_of_text, tried_on
from endwise.runs.folder import RunFolder
from made_curves import compare, three_kinds
from made_runs import evaluation
from small_gpt2 import SITE, VOCAB, recipe, small_corpora, small_model, write_tokens

SOUND = {
    "l0": 30.0,
    "alive": 400,
    "d_sae": 512,
    "tokens": 19_840,
    "asked_tokens": 20_000,
    "vocabulary": 512,
    "bos_left_out": None,
    "ce_spliced": 3.6,
    "explained_variance": {"per_token": -0.4},
    "baselines": {"clean": 3.2, "mean_ablated": 5.1, "zero_ablated": 6.0},
    "loss": {"first": 8.0, "last": 2.0},
}
FAULTS = {
    "ids of another tokenizer": ({"baselines": {"clean": 7.5}}, "above ln V = 6.238", "data.source"),
    "mean does better": (
        {"baselines": {"clean": 5.2, "mean_ablated": 5.1}},
        "5.100 with the site at its mean",
        "ids",
    ),
    "zero does better": ({"baselines": {"clean": 5.2, "zero_ablated": 4.9}}, "4.900 with the site at zero", "ids"),
    "no BOS": (
        {"bos_left_out": "<s>"},
        "begins every text with <s>",
        "data.prepend_bos=true and train again; if that raises its CE",
    ),
    "fewer tokens": ({"tokens": 15_050}, "15,050 held-out tokens of the 20,000 asked", "evaluation.tokens to 26,579"),
    "none alive": ({"alive": 0}, "No feature fires", "learning_rate"),
    "nothing active": ({"l0": 0.0}, "No feature fires", "sparsity.coefficient"),
    "all alive": ({"alive": 512}, "All 512 features fired", "dictionary.size"),
    "far below 0": ({"explained_variance": {"per_token": -3.5}}, "-3.5, far below 0", "learning_rate"),
    "worse than nothing": ({"ce_spliced": 5.4}, "above the 5.100", "learning_rate"),
    "diverged": ({"loss": {"first": 8.0, "last": 1e12}}, "ended at 1e+12, after starting at 8", "learning_rate"),
}


def test_nothing_is_said_of_sound_numbers_nor_of_what_is_not_known():
    assert remarks_on(SOUND) == []
    assert remarks_on({}) == [] and remarks_on({"baselines": {"clean": math.nan}, "loss": {}}) == []


@pytest.mark.parametrize("name", FAULTS)
def test_what_cannot_be_is_said_with_a_remedy(name):
    fault, said, remedy = FAULTS[name]
    changed = {key: {**SOUND[key], **value} if isinstance(value, dict) else value for key, value in fault.items()}
    (remark,) = remarks_on({**SOUND, **changed})
    assert said in remark and remedy in remark


def test_of_one_that_was_trained_elsewhere_what_its_file_states_counts_too():
    """Ask to check where it belongs, since nobody here trains it."""
    stated = {"stated_l0": 90.0, "remarks": ["It names another model."]}
    assert remarks_on({**SOUND, "adopted": {"stated_l0": 25.0, "remarks": []}}) == []
    own, l0, silent = remarks_on({**SOUND, "alive": 0, "adopted": stated})
    assert own == stated["remarks"][0] and "30.0 where 90 is stated" in l0
    assert "Check that it belongs to this model, place and text" in silent and "learning_rate" not in silent


def test_one_remark_on_several_runs_is_told_once():
    assert gathered({"a": ["x", "y"], "b": ["y"]}) == ["a: x", "a, b: y"]


def with_tokenizer(adds_bos):
    def tokenizer(text):
        return SimpleNamespace(input_ids=[0, 5] if adds_bos else [5])

    tokenizer.bos_token_id, tokenizer.bos_token = 0, "<s>"
    model = object.__new__(LanguageModel)
    vars(model).update(vars(small_model()) | {"tokenizer": tokenizer})
    return model


def test_a_bos_that_the_tokenizer_adds_and_the_text_lacks_is_noticed(tmp_path):
    corpus = small_corpora(write_tokens(tmp_path)).heldout
    assert facts_of_text(with_tokenizer(True), corpus) == {"vocabulary": VOCAB, "bos_left_out": "<s>"}
    assert facts_of_text(with_tokenizer(False), corpus)["bos_left_out"] is None
    assert facts_of_text(small_model(), corpus)["bos_left_out"] is None
    np.save(tmp_path / "heldout.npy", np.tile([0, 3, 4, 5, 6, 7, 8, 9], (64, 1)).astype(np.uint16))
    packed = small_corpora(tmp_path).heldout
    assert facts_of_text(with_tokenizer(True), packed)["bos_left_out"] is None


def test_what_is_tried_beforehand_is_the_clean_ce(tmp_path):
    model, corpus = small_model(), small_corpora(write_tokens(tmp_path)).heldout
    tokens = corpus.batch(range(len(corpus))).tokens
    with torch.no_grad():
        logits = model.model(tokens).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
    assert tried_on(model, corpus)["baselines"]["clean"] == pytest.approx(float(expected), rel=1e-5)


def test_a_training_that_diverges_says_so_at_its_end_and_in_its_evaluation(tmp_path):
    corpora = small_corpora(write_tokens(tmp_path))
    fine = train(recipe(tmp_path / "fine"), model=small_model(), corpora=corpora, display=False)
    assert not fine.diverged and not any("diverged" in remark for remark in fine.remarks)
    config = recipe(tmp_path / "run", "local", learning_rate=1e9, log_every=1)
    run = train(config, model=small_model(), corpora=corpora, display=False)
    losses = [line["loss"] for line in RunFolder(run.folder).metrics()]
    assert RunFolder(run.folder).course() == {"first": losses[0], "last": losses[-1]}
    assert run.diverged and any("Training diverged" in remark for remark in run.remarks)
    (found,) = measure(
        small_model(), {"run": (small_model().site(SITE), run.sae)}, corpora.heldout, config.evaluation
    ).values()
    whole = replace(found, facts={**found.facts, "loss": RunFolder(run.folder).course()})
    told = json.loads(json.dumps(whole.to_json()))
    assert any("Training diverged" in remark for remark in told["remarks"]) and told["vocabulary"] == VOCAB
    assert any("above ln V" in remark for remark in told["remarks"])  # random weights: far above


def test_remarks_are_in_the_terminals_tables_in_json_and_on_pages():
    remark = remarks_on({**SOUND, **FAULTS["diverged"][0]})[0]
    runs = three_kinds()
    summary = compare([replace(runs[0], remarks=(remark,)), *runs[1:]])
    file = io.StringIO()
    print_summary(summary, Console(file=file))
    assert remark in file.getvalue()
    assert summary.to_json()["runs"][0]["remarks"] == [remark] and summary.to_json()["runs"][1]["remarks"] == []
    assert "Training diverged" in report_html(summary) and "Training diverged" in remark_list(summary.runs)
    assert remark_list(runs) == "" and len(remarks_of(summary.runs)) == 1
    faulty = replace(evaluation(1), facts={"bos_left_out": "<s>"})
    file = io.StringIO()
    print_evaluations({Path("a"): recipe(Path("a"))}, {Path("a"): faulty}, Console(file=file))
    assert "below" in file.getvalue() and "data.prepend_bos=true" in file.getvalue()
