"""Documents of one sequence that are kept apart are to the model what each is alone, in every pass and measurement."""

import json

import numpy as np
import pytest
import torch

from endwise import Corpora, Corpus, LanguageModel, Site, evaluate, train
from endwise.common.errors import DataError, ModelError
from endwise.config.run import DataConfig
from endwise.features.harvest.run import harvest
from endwise.models.documents import positions
from endwise.models.sites import Part
from endwise.tokens import load_corpora
from endwise.tokens.corpus import SequenceLayout
from endwise.tokens.tokenising import documents_in
from small_gpt2 import CONTEXT, VOCAB, recipe, small_model, write_tokens
from tiny_models import CONTEXT as LENGTH
from tiny_models import build, relative, tiny, tokens

END = 0
FAMILIES = ["gpt2", "gpt_neo", "pythia", "llama_grouped_tied", "mistral_sliding", "gemma2", "gemma3", "olmo2", "gptj"]
FAMILIES += ["mixtral"]
JOINTS = [(4, 9), (1, 2), (15,)]


def packed():
    """Rows with separators after the joints, of documents of one token too."""
    rows = tokens(len(JOINTS)).clamp_min(1)
    for row, joints in zip(rows, JOINTS, strict=True):
        row[[joint - 1 for joint in joints]] = END
    return rows


def documents(rows):
    for number, joints in enumerate(JOINTS):
        for begin, end in zip((0, *joints), (*joints, LENGTH), strict=True):
            yield number, slice(begin, end)


def test_positions_begin_again_behind_every_separator():
    rows = torch.tensor([[7, END, 7, 7, END, END, 7], [END, 7, 7, 7, 7, 7, END]])
    assert positions(rows, END).tolist() == [[0, 1, 0, 1, 2, 0, 0], [0, 0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_document_is_what_it_is_alone(family):
    model, rows = LanguageModel(build(family), name=family), packed()
    alone, site = tiny(family), Site(1, Part.RESID_POST)
    joined = model.logits(rows)
    model.attend_within(END)
    apart, clean = model.logits(rows), model.clean(rows, [site], final=True)
    twice = model.replay(clean, {site: lambda value: 2 * value}, [Site(2, Part.RESID_POST)])
    for number, part in documents(rows):
        own = rows[number : number + 1, part]
        expected = alone.logits(own)[0]
        assert relative(apart[number, part], expected) < 1e-5
        of_own = alone.clean(own, [site], final=True)
        assert relative(clean.activations[site][number, part], of_own.activations[site][0]) < 1e-5
        changed = alone.replay(of_own, {site: lambda value: 2 * value}, [Site(2, Part.RESID_POST)])
        assert relative(twice.final[number, part], changed.final[0]) < 1e-5
        later = Site(2, Part.RESID_POST)
        assert relative(twice.activations[later][number, part], changed.activations[later][0]) < 1e-5
    assert relative(apart, joined) > 0.01
    assert relative(model.in_bfloat16().logits(rows), apart) < relative(joined, apart) / 2
    model.attend_within(None)
    assert torch.equal(model.logits(rows), joined)


@pytest.mark.parametrize(("family", "why"), [("mamba", "other predictions"), ("bloom", "other predictions")])
def test_a_model_that_cannot_is_refused_and_left_as_it_was(family, why):
    from transformers import BloomConfig, MambaConfig

    configs = {
        "mamba": MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, vocab_size=48, bos_token_id=0),
        "bloom": BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=48),
    }
    model, rows = LanguageModel(build(configs[family]), name="mine"), packed()
    before = model.logits(rows)
    with pytest.raises(
        ModelError, match=rf"mine cannot keep documents of one sequence apart .*{why}.*packing=document"
    ):
        model.attend_within(END)
    assert torch.equal(model.logits(rows), before)


def corpora(apart, folder):
    layout = SequenceLayout(CONTEXT, separator=END, apart=apart)
    sides = []
    for seed, count in ((1, 4096), (2, 256)):
        ids = np.random.default_rng(seed).integers(1, VOCAB, count).astype(np.uint16)
        ids[2::5] = END
        sides.append(Corpus(documents_in(ids, END), layout))
    return Corpora(*sides)


def test_training_measuring_and_harvest_keep_them_apart(tmp_path):
    model, found = LanguageModel(small_model().model, None), {}
    for apart in (False, True):
        text, config = corpora(apart, tmp_path), recipe(tmp_path / str(apart))
        run = train(config, model=model, corpora=text, display=False)
        evaluation = evaluate(run.folder, model=model, corpora=text)[run.folder]
        gathered = harvest([run.folder], model=model, corpora=text, importance=False, display=False)[run.folder]
        assert gathered.firings.tolist() == evaluation.firings.tolist()
        found[apart] = evaluation, text_of(run.folder), text
    assert found[True][1] != found[False][1]
    assert abs(found[True][0]["ce_clean"] - found[False][0]["ce_clean"]) > 1e-3
    evaluation, _, text = found[True]
    model.attend_within(None)
    batch = text.heldout.batch(range(len(text.heldout)))
    losses = []
    for row in batch.tokens:
        ends = [*(index + 1 for index in range(CONTEXT - 1) if row[index] == END), CONTEXT]
        logits = torch.cat(
            [model.logits(row[None, begin:end])[0] for begin, end in zip([0, *ends], ends, strict=False)]
        )
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], row[1:]))
    assert evaluation["ce_clean"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)


def text_of(folder):
    return json.loads((folder / "evaluation.json").read_text())["text"]


def test_without_a_separator_there_is_nothing_to_stop_at(tmp_path):
    write_tokens(tmp_path)
    data = DataConfig(
        source=str(tmp_path / "train.npy"), heldout=str(tmp_path / "heldout.npy"), document_attention=True
    )
    with pytest.raises(DataError, match=r"document_attention is set, but the tokenizer has no EOS.*data\.separator"):
        load_corpora(
            data, tokenizer=None, model_context=CONTEXT, vocab_size=VOCAB, training_tokens=64, evaluation_tokens=64
        )
