"""Patterns of planted features, whose trigger is known; and of any features against slow definitions."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from endwise import ReluSAE
from endwise.common.errors import ConfigError
from endwise.features.patterns.run import Making, patterns_of
from endwise.features.patterns.sampling import Half, sample
from endwise.features.patterns.scores import PredictedSums, exchanged
from endwise.features.patterns.settings import PatternSettings
from endwise.features.patterns.short_texts import ShortTexts, distinct
from endwise.features.patterns.substitution import Substitutes
from endwise.features.patterns.trie import Pattern, Tries, merged
from endwise.features.patterns.watching import Watched
from endwise.models.sites import Place
from endwise.tokens import Corpus
from remembering import CONTEXT, PLACE, VOCAB, planted, remembering, text
from small_gpt2 import SITE, small_corpora, small_model, write_tokens

PLANTED = {
    "token": (-1.0, {(0, 3): 2.0}),
    "bigram": (-1.5, {(1, 4): 1.0, (0, 5): 1.0}),
    "pair with a gap": (-1.5, {(2, 6): 1.0, (0, 7): 1.0}),
    "either of two": (-1.0, {(0, 8): 2.0, (0, 9): 2.0}),
    "after a token": (-0.5, {(1, 11): 1.0}),
    "far back": (-0.5, {(12, 10): 1.0}),
    "always": (1.0, {}),
    "never": (-1.0, {}),
}
WANTED = {
    "token": {(frozenset({3}),)},
    "bigram": {(frozenset({4}), frozenset({5}))},
    "pair with a gap": {(frozenset({6}), None, frozenset({7}))},
    "either of two": {(frozenset({8, 9}),)},
    "after a token": {(frozenset({11}), None)},
    "far back": set(),
    "always": {(None,)},
    "never": set(),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return text(tmp_path_factory.mktemp("text"), 600)


@pytest.fixture(scope="module")
def made(corpus, tmp_path_factory):
    record = {"tokens": corpus.tokens, "weights": "w"}
    making = Making(remembering(), PLACE, planted(*PLANTED.values()), corpus, PatternSettings(random=30), record)
    return making.made(tmp_path_factory.mktemp("run"), batch=16, block=3)


@pytest.mark.parametrize("name", PLANTED)
def test_the_pattern_of_a_planted_feature_is_its_trigger(made, name):
    feature = list(PLANTED).index(name)
    found = {each.labels for each in made.patterns.get(feature, ())}
    assert found == WANTED[name]


@pytest.mark.parametrize("name", [name for name, patterns in WANTED.items() if patterns])
def test_a_planted_trigger_predicts_its_feature(made, name):
    feature = list(PLANTED).index(name)
    assert made.values("f1")[feature] == pytest.approx(1, abs=1e-9)
    assert made.values("explained")[feature] == 1
    if name != "always":  # whose activation never varies, so that it correlates with nothing
        assert made.values("correlation")[feature] == pytest.approx(1, abs=1e-6)
    assert np.isnan(made.values("correlation")[list(PLANTED).index("always")])


def test_a_feature_that_reads_far_back_is_not_explained(made):
    feature = list(PLANTED).index("far back")
    values = {name: made.values(name)[feature] for name in ("f1", "recall", "correlation", "explained", "served")}
    assert values == {"f1": 0, "recall": 0, "correlation": 0, "explained": 0, "served": 0}
    assert made.values("sampled")[feature] == 16 and np.isnan(made.values("precision")[feature])


def test_a_feature_that_never_fires_is_not_scored(made):
    feature = list(PLANTED).index("never")
    assert made.values("firings")[feature] == 0
    assert np.isnan([made.values(name)[feature] for name in ("f1", "recall", "correlation", "explained")]).all()


def test_another_features_patterns_predict_little(made):
    local = [list(PLANTED).index(name) for name in ("token", "bigram", "pair with a gap", "either of two")]
    shuffled = made.values("f1.shuffled")[local]
    assert (shuffled < 0.2).all()  # what chance gives a feature of this density beside one that always fires
    assert np.abs(made.values("correlation.shuffled")[local]).max() < 0.1


def test_random_directions_are_predicted_worse_than_features_that_read_few_tokens(made):
    random = made.values("f1.random")
    assert 0 < len(random) <= 7  # as many as there are features whose density they could take over
    sparse = made.values("firings.random") < 1000
    assert np.nanmax(random[sparse]) < 0.5
    densities = set(made.values("firings").tolist())
    assert all(any(abs(fires - each) <= 1 for each in densities) for fires in made.values("firings.random"))


def whole(making):
    """The halves of a text, and a sample of the first."""
    first, second = making._halves(4)
    settings = making._fitting(first)
    watched = Watched.of(making.model, making.place, making.sae, settings.random, settings.seed)
    return first, second, settings, sample(watched, first, settings, lambda _: None)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Random features of a random GPT-2, of which all that patterns rest on can be done slowly."""
    corpus = small_corpora(write_tokens(tmp_path_factory.mktemp("tokens")), 512).heldout
    random = torch.Generator().manual_seed(0)
    sae = ReluSAE(16, 12)
    encoder = torch.randn(16, 12, generator=random)
    site = Place.parse(SITE).reads
    read = small_model().clean(corpus.batch(range(64)).tokens, record=[site]).activations[site].flatten(0, 1)
    bias = -(read @ encoder).quantile(0.85, 0)
    sae.fill({"W_enc": encoder, "b_enc": bias, "W_dec": encoder.T.contiguous(), "b_dec": torch.zeros(16)})
    settings = PatternSettings(random=4, substitutes=4, contexts=5, longest=3, least=2)
    record = {"tokens": corpus.tokens}
    return Making(small_model(), Place.parse(SITE), sae.requires_grad_(False).eval(), corpus, settings, record)


def test_contexts_are_firings_drawn_from_the_first_half(small):
    first, _, settings, found = whole(small)
    batch = small.corpus.batch(first.sequences)
    watched = found.watched
    values = watched.values(watched.read(batch.tokens, batch.mask)[0].flatten(0, 1)).view(*batch.tokens.shape, -1)
    assert (found.firings[:12] > 0).all()
    assert (found.firings == (values > 0).sum((0, 1)).numpy()).all()
    assert (np.bincount(found.features, minlength=16) == np.minimum(found.firings, settings.contexts)).all()
    for feature, activation, window in zip(found.features, found.activations, found.windows, strict=True):
        at = (values[:, :, feature] - float(activation)).abs() < 1e-5
        ends = [
            tuple([-1] * max(0, 2 - p) + batch.tokens[row, max(0, p - 2) : p + 1].tolist()) for row, p in at.nonzero()
        ]
        assert tuple(window.tolist()) in ends
    assert (found.unigrams == np.bincount(batch.tokens[batch.mask].numpy(), minlength=31)).all()


def naive_activation(making, watched, tokens, feature):
    read = making.model.clean(torch.tensor([list(tokens)]), record=[making.place.reads]).activations[making.place.reads]
    return float(watched.values(read[0, -1:])[0, feature])


def naive_suffixes(making, found, settings, feature):
    """Collect the activations of each suffix's contexts: one context, one length at a time."""
    sums = {}
    for at in np.flatnonzero(found.features == feature):
        window = [token for token in found.windows[at].tolist() if token >= 0]
        for length in range(1, len(window) + 1):
            value = naive_activation(making, found.watched, window[-length:], feature)
            if value >= settings.kept * found.activations[at]:
                sums.setdefault(tuple(window[-length:]), []).append(float(found.activations[at]))
                break
    return sums


def naive_pattern(serves, suffix, substitutes, settings):
    """The labels of one suffix: one token, one substitute at a time."""
    places = range(len(suffix))
    drawn = [substitutes.drawn[len(suffix) - 1 - place].tolist() for place in places]
    wild, kept = [False] * len(suffix), [set() for _ in suffix]
    for place in places:
        for trial in range(settings.substitutes):
            tried = [drawn[p][trial] if wild[p] else suffix[p] for p in places]
            tried[place] = drawn[place][trial]
            if serves(tried):
                kept[place].add(tried[place])
        wild[place] = len(kept[place]) / settings.substitutes >= settings.any_token
    filled = [drawn[p][0] if wild[p] else suffix[p] for p in places]
    for place in (place for place in places if not wild[place]):
        near = substitutes.nearest[suffix[place]].tolist()
        kept[place] |= {each for each in near if serves([*filled[:place], each, *filled[place + 1 :]])}
    return tuple(None if w else frozenset({t, *k}) for w, t, k in zip(wild, suffix, kept, strict=True))


def naive_patterns(making, found, substitutes, settings, feature):
    patterns = []
    for suffix, activations in naive_suffixes(making, found, settings, feature).items():
        mean = float(np.mean(activations))

        def serves(tried, least=settings.kept * mean):
            return naive_activation(making, found.watched, tried, feature) >= least

        patterns.append(Pattern(feature, naive_pattern(serves, suffix, substitutes, settings), mean, len(activations)))
    return merged(patterns)


def told(patterns):
    return {(each.feature, each.labels): (pytest.approx(each.activation), each.contexts) for each in patterns}


def test_patterns_are_those_of_the_slow_definition(small):
    first, _, settings, found = whole(small)
    substitutes = Substitutes.of(small.model, found.unigrams, settings)
    fast = patterns_of(
        range(found.watched.count), found, ShortTexts(found.watched, first.before), substitutes, settings
    )
    slow = [p for f in range(found.watched.count) for p in naive_patterns(small, found, substitutes, settings, f)]
    assert first.before == () and len(slow) > 20
    assert {len(each.labels) for each in slow} == {1, 2, 3} and any(None in each.labels for each in slow)
    assert told(fast) == told(slow)


def test_substitutes_occur_and_the_nearest_are_nearest(small):
    _, _, settings, found = whole(small)
    substitutes = Substitutes.of(small.model, found.unigrams, settings)
    assert all(len(set(row)) == len(row) and found.unigrams[row].all() for row in substitutes.drawn.tolist())
    vectors = small.model.model.get_input_embeddings().weight
    unit = torch.nn.functional.normalize(vectors, dim=1)
    for token in np.flatnonzero(found.unigrams)[:5].tolist():
        others = [other for other in np.flatnonzero(found.unigrams).tolist() if other != token]
        nearest = sorted(others, key=lambda other: -float(unit[token] @ unit[other]))[: settings.substitutes]
        assert substitutes.nearest[token].tolist() == nearest


def naive_matches(patterns, tokens, first):
    """Every pattern at every token, from the definition of the most specific."""
    best = {}
    for row, sequence in enumerate(tokens.tolist()):
        for position in range(len(sequence)):
            for each in patterns:
                begin = position + 1 - len(each.labels)
                text_there = sequence[begin : position + 1]
                if begin < first or any(
                    label is not None and token not in label
                    for label, token in zip(each.labels, text_there, strict=True)
                ):
                    continue
                rank = (sum(label is not None for label in each.labels), len(each.labels), each.activation)
                key = (row * len(sequence) + position, each.feature)
                best[key] = max(best.get(key, rank), rank)
    return {key: activation for key, (_, _, activation) in best.items()}


@pytest.mark.parametrize("first", [0, 1])
def test_tries_match_as_every_pattern_at_every_token(first):
    rng = np.random.default_rng(0)
    patterns = []
    for _ in range(200):
        labels = [
            None if rng.random() < 0.3 else frozenset(rng.choice(6, rng.integers(1, 4), replace=False).tolist())
            for _ in range(rng.integers(1, 5))
        ]
        patterns.append(Pattern(int(rng.integers(5)), tuple(labels), float(rng.random()), 1))
    tokens = rng.integers(0, 6, (4, 12))
    matches = Tries(patterns, 6).matches(tokens, first)
    found = dict(
        zip(zip(matches.rows.tolist(), matches.features.tolist(), strict=True), matches.activations, strict=True)
    )
    slow = naive_matches(merged(patterns), tokens, first)
    assert found == slow and len(slow) > 100


def test_no_pattern_matches_nothing():
    assert len(Tries([], 6).matches(np.zeros((2, 3), dtype=np.int64)).rows) == 0


def test_scores_are_their_definitions(small):
    first, second, settings, found = whole(small)
    substitutes = Substitutes.of(small.model, found.unigrams, settings)
    watched = found.watched
    made = patterns_of(range(watched.count), found, ShortTexts(watched, first.before), substitutes, settings)
    of = exchanged(np.arange(12), watched.count, 0)
    own, others = small._predict(watched, made, second, of, lambda _: None)
    batch = small.corpus.batch(second.sequences)
    y = watched.values(watched.read(batch.tokens, batch.mask)[0].flatten(0, 1)).double().numpy()
    y = np.where(batch.mask.flatten().numpy()[:, None], y, 0)
    x = np.zeros_like(y)
    for (row, feature), activation in naive_matches(made, batch.tokens, 0).items():
        x[row, feature] = activation if batch.mask.flatten()[row] else 0
    assert sorted(of.tolist()) == list(range(watched.count)) and (of[:12] != np.arange(12)).all()
    for result, predicted in ((own, x), (others, x[:, of])):
        both = ((y > 0) & (predicted > 0)).sum(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            np.testing.assert_allclose(result.precision, both / (predicted > 0).sum(0))
            np.testing.assert_allclose(result.recall, both / (y > 0).sum(0))
            harmonic = 2 / (1 / result.precision + 1 / result.recall)
            np.testing.assert_allclose(result.f1[both > 0], harmonic[both > 0])
        assert (result.f1[(both == 0) & ((y > 0).sum(0) > 0)] == 0).all()
        for feature in range(watched.count):
            if y[:, feature].std() and predicted[:, feature].std():
                expected = np.corrcoef(y[:, feature], predicted[:, feature])[0, 1]
                assert result.correlation[feature] == pytest.approx(expected, abs=1e-9)


def test_distinct_rows():
    rows = np.random.default_rng(0).integers(0, 3, (60, 3))
    first, which = distinct(rows)
    assert (rows[first][which] == rows).all() and len(first) == len(np.unique(rows, axis=0))
    assert [len(each) for each in distinct(rows[:0])] == [0, 0]


def test_sums_are_the_same_however_the_text_is_divided(small):
    first, _, settings, found = whole(small)
    other = sample(
        Watched.of(small.model, small.place, small.sae, settings.random, settings.seed),
        Half(small.corpus, first.sequences, 7),
        settings,
        lambda _: None,
    )
    order = [np.lexsort((*each.windows.T, each.activations, each.features)) for each in (found, other)]
    assert (found.windows[order[0]] == other.windows[order[1]]).all()
    assert (found.firings == other.firings).all()
    assert PredictedSums(3).result().f1.shape == (3,)


@pytest.mark.parametrize(
    ("setting", "value"), [("kept", 0.0), ("kept", 1.5), ("contexts", 0), ("longest", 0), ("random", -1), ("seed", -1)]
)
def test_settings_out_of_range_are_refused(setting, value):
    with pytest.raises(ConfigError, match=f"{setting} must be .* given {value:g}"):
        PatternSettings(**{setting: value})


def test_one_sequence_cannot_be_halved(corpus, tmp_path):
    making = Making(remembering(), PLACE, planted(PLANTED["token"]), corpus, PatternSettings(), {"tokens": CONTEXT})
    with pytest.raises(ConfigError, match=f"raise tokens from {CONTEXT} to {2 * CONTEXT}"):
        making.made(tmp_path, 4)


def test_a_bos_is_no_token_of_a_pattern(tmp_path):
    stream = text(tmp_path)
    corpus = Corpus(stream.documents, replace(stream.layout, bos=0), limit=100)
    making = Making(
        remembering(),
        PLACE,
        planted((-0.5, {(0, 3): 1.0, (1, 0): -1.0})),
        corpus,
        PatternSettings(random=0),
        {"tokens": 3200},
    )
    made = making.made(tmp_path, 16)
    # behind a BOS, as the shortest text is read, token 3 alone does not make it fire; nor does it where a text begins
    assert {each.labels for each in made.patterns[0]} == {(None, frozenset({3}))}
    assert VOCAB > 3 and made.values("f1")[0] == pytest.approx(1)


def test_a_model_in_half_precision_will_do(small, tmp_path):
    making = replace(small, model=small.model.in_bfloat16())
    made = making.made(tmp_path, 8)
    exact = small.made(tmp_path / "exact", 8)
    close = np.abs(made.values("firings") - exact.values("firings")) <= 0.1 * exact.values("firings")
    assert close.all() and np.nanmean(made.values("f1")) == pytest.approx(np.nanmean(exact.values("f1")), abs=0.1)
