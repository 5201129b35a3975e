"""Lengths and directions of reconstructions against their definitions, token by token."""

import math

import numpy as np
import pytest
import torch

from endwise.analysis.norms import BINS, Norms, norms
from endwise.dictionaries import ReluSAE
from endwise.errors import FormatError
from small_gpt2 import CONTEXT, SITE, WIDTH

SEQUENCES = 5


@pytest.fixture(scope="module")
def sae():
    sae = ReluSAE(WIDTH, 40, seed=1).requires_grad_(False)
    sae.b_enc -= 0.3
    return sae


@pytest.fixture(scope="module")
def measured(model, corpora, sae):
    return norms(model, sae, model.site(SITE), corpora.heldout, tokens=SEQUENCES * CONTEXT, batch=2, resamples=50)


@pytest.fixture(scope="module")
def by_token(model, corpora, sae):
    """(sequence, position, ‖a‖, ‖â‖, cosine) of every token that counts."""
    rows = []
    for sequence in range(SEQUENCES):
        batch = corpora.heldout.batch([sequence])
        a = model.clean(batch.tokens, record={model.site(SITE)}).activations[model.site(SITE)][0]
        for position in range(CONTEXT):
            if batch.mask[0, position]:
                before = a[position].double()
                after = sae(a[position][None])[0].double()
                lengths = before.square().sum().sqrt().item(), after.square().sum().sqrt().item()
                rows.append((sequence, position, *lengths, torch.dot(before, after).item() / math.prod(lengths)))
    return rows


def test_means_are_those_of_tokens_with_position_0_apart(measured, by_token):
    later = [row for row in by_token if row[1] > 0]
    first = [row for row in by_token if row[1] == 0]
    assert measured.ratio.estimate == pytest.approx(np.mean([b / a for _, _, a, b, _ in later]), rel=1e-5)
    assert measured.ratio_at_0.estimate == pytest.approx(np.mean([b / a for _, _, a, b, _ in first]), rel=1e-5)
    assert measured.cosine.estimate == pytest.approx(np.mean([cosine for *_, cosine in later]), rel=1e-5)
    assert measured.ratio.low <= measured.ratio.estimate <= measured.ratio.high
    assert measured.tokens == len(by_token)


def test_the_histogram_counts_each_token_once(measured, by_token):
    later = [row for row in by_token if row[1] > 0]
    expected = [0] * BINS
    for *_, cosine in later:
        expected[min(BINS - 1, int((cosine + 1) / 2 * BINS))] += 1
    assert list(measured.histogram) == expected


def test_the_sample_is_of_tokens_as_they_are(measured, by_token):
    known = {position: [] for position in range(CONTEXT)}
    for _, position, a, b, _ in by_token:
        known[position].append((a, b))
    for position, a, b in measured.sample:
        assert any((a, b) == pytest.approx(pair, rel=1e-5) for pair in known[position])


def test_norms_come_back_from_their_file(measured, tmp_path):
    measured.write(tmp_path / "norms.json")
    assert Norms.read(tmp_path / "norms.json") == measured
    (tmp_path / "norms.json").write_text("{}")
    with pytest.raises(FormatError, match="holds no norms"):
        Norms.read(tmp_path / "norms.json")
