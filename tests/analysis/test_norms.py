"""Lengths and directions of reconstructions against their definitions, token by token."""

import math

import numpy as np
import pytest
import torch

from endwise.analysis.directions.norms import BINS, Norms, norms
from endwise.analysis.directions.text_at_site import WHERE, TextAtSite
from endwise.common.errors import ConfigError, FormatError
from endwise.dictionaries import ReluSAE
from endwise.tokens import Corpus
from endwise.tokens.corpus import SequenceLayout
from endwise.tokens.tokenising import documents_in
from small_gpt2 import CONTEXT, SITE, VOCAB, WIDTH

SEQUENCES = 5
SEPARATOR = 0


@pytest.fixture(scope="module")
def sae():
    sae = ReluSAE(WIDTH, 40, seed=1).requires_grad_(False)
    sae.b_enc -= 0.3
    return sae


@pytest.fixture(scope="module")
def corpus():
    """Short documents, so that many begin in the middle of a sequence, one of them at position 0."""
    random = np.random.default_rng(0)
    documents = [[*random.integers(1, VOCAB, length), SEPARATOR] for length in (3, 2, 7, 4, 1, 9, 5, 30)]
    return Corpus(
        documents_in(np.concatenate(documents).astype(np.uint16), SEPARATOR), SequenceLayout(CONTEXT, separator=0)
    )


@pytest.fixture(scope="module")
def measured(model, corpus, sae):
    return norms(model, sae, model.site(SITE), corpus, tokens=SEQUENCES * CONTEXT, batch=2, resamples=50)


@pytest.fixture(scope="module")
def by_token(model, corpus, sae):
    """(group, ‖a‖, ‖â‖, cosine) of every token that counts; a document starts after a separator."""
    rows = []
    for sequence in range(SEQUENCES):
        batch = corpus.batch([sequence])
        a = model.clean(batch.tokens, record={model.site(SITE)}).activations[model.site(SITE)][0]
        for position in range(CONTEXT):
            before = a[position].double()
            after = sae(a[position][None])[0].double()
            lengths = before.square().sum().sqrt().item(), after.square().sum().sqrt().item()
            begins = position > 0 and batch.tokens[0, position - 1] == SEPARATOR
            group = "position_0" if position == 0 else "starts" if begins else "others"
            rows.append((group, *lengths, torch.dot(before, after).item() / math.prod(lengths)))
    assert {row[0] for row in rows} == set(WHERE)
    return rows


def test_means_are_those_of_tokens_with_position_0_and_document_starts_apart(measured, by_token):
    for name, group in {"ratio": "others", "ratio_at_0": "position_0", "ratio_at_starts": "starts"}.items():
        interval = getattr(measured, name)
        assert interval.estimate == pytest.approx(np.mean([b / a for g, a, b, _ in by_token if g == group]), rel=1e-5)
        assert interval.low <= interval.estimate <= interval.high
    cosines = [cosine for group, *_, cosine in by_token if group == "others"]
    assert measured.cosine.estimate == pytest.approx(np.mean(cosines), rel=1e-5)
    assert measured.tokens == len(by_token)
    assert measured.to_row()["ratio_at_starts"] == measured.ratio_at_starts.estimate


def test_the_histogram_counts_each_token_once(measured, by_token):
    expected = [0] * BINS
    for group, *_, cosine in by_token:
        if group == "others":
            expected[min(BINS - 1, int((cosine + 1) / 2 * BINS))] += 1
    assert list(measured.histogram) == expected


def test_the_sample_is_of_tokens_as_they_are(measured, by_token):
    for group in WHERE:
        expected = [(a, b) for g, a, b, _ in by_token if g == group]
        np.testing.assert_allclose(measured.sample[group], expected, rtol=1e-5)


def test_norms_come_back_from_their_file(measured, tmp_path):
    measured.write(tmp_path / "norms.json")
    assert Norms.read(tmp_path / "norms.json") == measured
    (tmp_path / "norms.json").write_text("{}")
    with pytest.raises(FormatError, match="is not a valid file of norms"):
        Norms.read(tmp_path / "norms.json")


def test_text_without_document_starts_has_no_ratio_there(model, corpora, sae):
    found = norms(model, sae, model.site(SITE), corpora.heldout, tokens=2 * CONTEXT, resamples=20)
    assert found.ratio_at_starts is None and found.sample["starts"] == ()
    assert Norms.of_json(found.to_json()) == found


def test_less_than_a_sequence_is_refused(model, corpora):
    with pytest.raises(ConfigError, match=rf"{CONTEXT - 1} held-out tokens .* has {CONTEXT}"):
        TextAtSite.first(model, model.site(SITE), corpora.heldout, CONTEXT - 1)
