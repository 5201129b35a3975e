"""The n-gram baseline against a slow one that follows the formulas with dictionaries, and as a distribution."""

import importlib
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest

from places import TOOLS

ORDERS = range(1, 6)


@pytest.fixture(scope="module")
def kneser_ney():
    """`tools/` is no package and not installed; its scripts import each other by bare name, as here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOOLS / "embedded_model")
        yield importlib.import_module("kneser_ney")
        sys.modules.pop("kneser_ney")


class SlowKneserNey:
    """Counts in dictionaries of tuples, and the recursion as it is printed."""

    def __init__(self, tokens, order, vocab):
        self.order, self.vocab = order, vocab
        self.counts = {order: Counter(tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1))}
        for k in range(1, order):
            before = defaultdict(set)
            for i in range(1, len(tokens) - k + 1):
                before[tuple(tokens[i : i + k])].add(tokens[i - 1])
            self.counts[k] = {gram: len(preceding) for gram, preceding in before.items()}
        self.fell_back = {k: self.estimate(k) is None for k in self.counts}

    def estimate(self, k):
        n1, n2, n3, n4 = (sum(count == times for count in self.counts[k].values()) for times in (1, 2, 3, 4))
        if 0 in (n1, n2, n3, n4):
            return None
        y = n1 / (n1 + 2 * n2)
        estimated = 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3
        return None if min(estimated) < 0 else estimated

    def discount(self, k, count):
        return 0 if count == 0 else (self.estimate(k) or (0.5, 1.0, 1.5))[min(count, 3) - 1]

    def probability(self, token, context):
        context = tuple(context)[-(self.order - 1) :] if self.order > 1 else ()
        return self.recursion(token, context)

    def recursion(self, token, context):
        k = len(context) + 1
        lower = self.recursion(token, context[1:]) if context else 1 / self.vocab
        followers = {v: self.counts[k].get((*context, v), 0) for v in range(self.vocab)}
        total = sum(followers.values())
        if total == 0:
            return lower
        count = followers[token]
        kept = max(count - self.discount(k, count), 0) / total
        freed = sum(self.discount(k, other) for other in followers.values()) / total
        return kept + freed * lower


def corpus(vocab, length, seed=0):
    """Skewed ids of which the last never occurs, so that counts of every size and unseen tokens come up."""
    shares = 1 / np.arange(1, vocab) ** 1.2
    return np.random.default_rng(seed).choice(vocab - 1, size=length, p=shares / shares.sum()).astype(np.uint16)


CORPORA = {"tiny": (7, 60), "repetitive": (3, 90), "sparse": (40, 600)}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", CORPORA)
def test_probabilities_equal_the_slow_definition(kneser_ney, name, order):
    vocab, length = CORPORA[name]
    train, heldout = corpus(vocab, length).tolist(), corpus(vocab, 80, seed=1).tolist()
    heldout[40] = vocab - 1
    slow = SlowKneserNey(train, order, vocab)
    fast = kneser_ney.KneserNey(np.array(train, dtype=np.uint16), order, vocab)
    expected = [slow.probability(token, heldout[:i]) for i, token in enumerate(heldout)]
    np.testing.assert_allclose(fast.stream(np.array(heldout, dtype=np.uint16)), expected, rtol=1e-10, atol=0)
    for i in (0, 1, 3, 41, 79):
        after = [slow.probability(token, heldout[:i]) for token in range(vocab)]
        np.testing.assert_allclose(fast.distribution(np.array(heldout[:i])), after, rtol=1e-10, atol=0)


def test_the_corpora_above_reach_estimated_and_fallback_discounts():
    slow = [SlowKneserNey(corpus(*sizes).tolist(), order, sizes[0]) for sizes in CORPORA.values() for order in ORDERS]
    assert {fell_back for model in slow for fell_back in model.fell_back.values()} == {True, False}


def test_a_discount_that_would_be_negative_falls_back(kneser_ney):
    # n = (1, 1, 9, 1): D(2) = 2 − 3 · 1/3 · 9 < 0, though no count of counts is zero.
    counts = np.array([1, 2, *[3] * 9, 4])
    assert kneser_ney.discounts(counts) == (0.5, 1.0, 1.5)
    # n = (8, 4, 2, 1): Y = 1/2, so D = 1 − 1/2, 2 − 3/4, 3 − 1.
    assert kneser_ney.discounts(np.repeat([1, 2, 3, 4], [8, 4, 2, 1])) == pytest.approx((0.5, 1.25, 2.0))


@pytest.mark.parametrize("order", ORDERS)
def test_distributions_sum_to_one_after_seen_and_unseen_contexts(kneser_ney, order):
    vocab = 300
    tokens = corpus(vocab, 20_000)
    model = kneser_ney.KneserNey(tokens, order, vocab)
    seen = [tokens[i : i + length] for i in (0, 17, 9_000) for length in range(7)]
    random = np.random.default_rng(2)
    unseen = [random.integers(0, vocab, length) for length in range(1, 7)] + [np.full(4, vocab - 1)]
    for context in seen + unseen:
        distribution = model.distribution(context)
        assert distribution.sum() == pytest.approx(1.0, abs=1e-12)
        assert distribution.min() > 0


def test_stream_and_distribution_agree_at_the_real_key_width(kneser_ney):
    """Vocabulary 4,096 at order 5 fills 60 of a key's 64 bits."""
    tokens = corpus(4096, 30_000)
    model = kneser_ney.KneserNey(tokens, 5, 4096)
    probability = model.stream(tokens[:200])
    for i in (0, 3, 4, 5, 199):
        assert model.distribution(tokens[:i])[tokens[i]] == pytest.approx(probability[i], rel=1e-12)


@pytest.mark.parametrize(
    ("tokens", "order", "vocab", "message"),
    [([0, 1], 3, 4, "hold no n-gram"), ([0, 4], 1, 4, "vocabulary has 4"), ([0, 1], 6, 4096, "need 1 to 5")],
)
def test_what_it_refuses(kneser_ney, tokens, order, vocab, message):
    with pytest.raises(ValueError, match=message):
        kneser_ney.KneserNey(np.array(tokens), order, vocab)
