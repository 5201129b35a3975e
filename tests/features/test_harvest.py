"""A harvest against slow definitions, feature by feature; shards, resuming, and what it says of bad input."""

import hashlib
import shutil
from copy import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from endwise import Corpora, Corpus, RunConfig, harvest, read_harvest, read_importance, train
from endwise.analysis.importance.measure import measure_importance
from endwise.cli import app
from endwise.common.errors import ConfigError, DataError, FormatError, Interrupted, RunFolderError
from endwise.common.stopping import ask_to_stop
from endwise.dictionaries import ReluSAE
from endwise.dictionaries.latents import DenseLatents, SparseLatents
from endwise.features.attribution import Attribution
from endwise.features.harvest.co_firing import TokenSample, co_firing
from endwise.features.harvest.firings import Firings
from endwise.features.harvest.gathering import BINS, Gathered, Kept, bin_edges, bins_of
from endwise.features.harvest.neuronpedia import export
from endwise.features.harvest.parts import Parts
from endwise.features.harvest.results import TOP
from endwise.features.harvest.slots import EMPTY, Candidates, Slots
from endwise.features.harvest.sums import FixedPointSums, drawn
from endwise.features.harvest.top_tokens import written
from endwise.runs.folder import RunFolder
from endwise.tokens.corpus import SequenceLayout
from endwise.tokens.tokenising import documents_in
from small_gpt2 import CONTEXT, EVALUATED, SITE, VOCAB, data, recipe
from spread import spread

D_SAE, SEQUENCES = 40, 30
KEPT = Kept(top=4, groups=3, per_group=2, before=3, after=2, tokens=5, co_firing=4)


@pytest.fixture(scope="module")
def run(tmp_path_factory, token_files, model, corpora):
    """A trained run; sequences that repeat, so that activations tie."""
    config = recipe(tmp_path_factory.mktemp("runs") / "run").model_copy(update={"data": data(token_files)})
    return train(config, model=model, corpora=corpora, display=False).folder


def documents(layout, lengths, seed=0):
    """A corpus of documents of these lengths, each ended by 0; some texts come twice."""
    rng = np.random.default_rng(seed)
    texts = [rng.integers(1, VOCAB, length) for length in lengths]
    texts += texts[: len(texts) // 2]
    ids = np.concatenate([np.append(text, 0) for text in texts]).astype(np.uint16)
    return Corpus(documents_in(ids, 0), layout)


LAYOUTS = {
    "stream": SequenceLayout(CONTEXT, separator=0),
    "bos": SequenceLayout(CONTEXT, bos=0, separator=0),
    "document": SequenceLayout(CONTEXT, packing="document", separator=0),
    "document_bos": SequenceLayout(CONTEXT, packing="document", bos=0, separator=0),
    "first_masked": SequenceLayout(CONTEXT, separator=0, mask_first_position=True),
}


def of_layouts(*names):
    """The corpus in these layouts, for what depends on it little; in the slow tier in all."""
    layouts = [pytest.param(name, marks=() if name in names else pytest.mark.slow) for name in LAYOUTS]
    return pytest.mark.parametrize("corpus", layouts, indirect=True)


@pytest.fixture(scope="module", params=LAYOUTS)
def corpus(request):
    return documents(LAYOUTS[request.param], [5, 11, 3, 8, 23, 2, 9, 30, 7, 7, 13, 4, 16, 20] * 2)


class Oracle:
    """Latents of all sequences in one pass, and every quantity from them, feature by feature."""

    def __init__(self, model, run, corpus, batch=EVALUATED):
        config = RunFolder.open(run).config()
        self.sae = ReluSAE.load(run)
        site = model.site(config.site)
        self.sequences = len(corpus)
        self.text = corpus.batch(range(self.sequences))
        latents = []
        for start in range(0, self.sequences, batch):  # as harvested: which values tie depends on the last bit
            tokens = self.text.tokens[start : start + batch]
            latents.append(self.sae.encode(model.clean(tokens, record={site}).activations[site]).dense())
        self.c = (torch.cat(latents) * self.text.mask[..., None]).numpy()
        self.mask = self.text.mask.numpy()

    def firings(self, feature):
        """(activation, sequence, position), the greatest first, then in the order of the text."""
        found = [(float(v), s, p) for (s, p), v in np.ndenumerate(self.c[..., feature]) if v]
        return sorted(found, key=lambda firing: (-firing[0], firing[1], firing[2]))

    def top(self, feature, count):
        best = {}
        for firing in self.firings(feature):
            best.setdefault(firing[1], firing)
        return list(best.values())[:count]

    def sample(self, feature, count):
        found = self.firings(feature)
        draws = [number(feature, s, p) for _, s, p in found]
        chosen = sorted(range(len(found)), key=lambda i: -draws[i])[:count]
        return [found[i] for i in sorted(chosen)]

    def window(self, feature, sequence, position, kept):
        last = int(np.flatnonzero(self.mask[sequence])[-1])
        where = range(max(0, position - kept.before), min(last, position + kept.after) + 1)
        tokens = [int(self.text.tokens[sequence, p]) for p in where]
        return where[0], tokens, [float(self.c[sequence, p, feature]) for p in where]


def number(stream, sequence, position):
    """SplitMix64's mixing in Python's whole numbers."""
    size = 1 << 64
    z = ((sequence << 24 | position) + (stream + 1) * 0x9E3779B97F4A7C15) % size
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % size
    z = (z ^ z >> 27) * 0x94D049BB133111EB % size
    z ^= z >> 31
    return z - size if z >= size // 2 else z


def harvested(run, model, corpus, **changes):
    heldout = Corpora(train=documents(SequenceLayout(CONTEXT, separator=0), [9] * 20, seed=9), heldout=corpus)
    settings = {"tokens": corpus.tokens, "kept": KEPT, "model": model, "corpora": heldout, "again": True} | changes
    (found,) = harvest([run], **settings).values()
    return found


@pytest.fixture(scope="module")
def whole(run, model, corpus):
    """Harvest, and the digests of its files."""
    return harvested(run, model, corpus), digest(run)


@pytest.fixture(scope="module")
def pair(run, model, corpus, whole):
    """Harvest, and the oracle of the same text."""
    return whole[0], Oracle(model, run, corpus)


def test_contexts_are_the_oracles(pair):
    found, oracle = pair
    got = dict(found.all_contexts())
    assert set(got) == {f for f in range(D_SAE) if oracle.firings(f)} and len(got) > 10
    ties = 0
    for feature, contexts in got.items():
        expected = [(TOP, rank, *firing) for rank, firing in enumerate(oracle.top(feature, KEPT.top))]
        sample = oracle.sample(feature, KEPT.groups * KEPT.per_group)
        for group in range(KEPT.groups):
            n = len(sample)
            of_group = [firing for i, firing in enumerate(sample) if (n - 1 - i) * KEPT.groups // n == group]
            expected += [(group, rank, *firing) for rank, firing in enumerate(of_group)]
        rows = [(c.group, c.rank, c.activation, c.sequence, c.position) for c in contexts]
        assert rows == expected
        ties += len({row[2] for row in expected}) < len({row[2:] for row in expected})
        for c in contexts:
            assert (c.start, list(c.tokens), list(c.activations)) == oracle.window(
                feature, c.sequence, c.position, KEPT
            )
            assert c.activations[c.peak] == c.activation > 0
    if corpus_repeats(oracle):
        assert ties


def corpus_repeats(oracle):
    rows = {tuple(row) for row in oracle.text.tokens.tolist()}
    return len(rows) < oracle.sequences


def test_features_are_the_oracles(pair):
    found, oracle = pair
    values = oracle.c.reshape(-1, D_SAE)
    fired = values > 0
    firings = fired.sum(0)
    np.testing.assert_array_equal(found.firings, firings)
    np.testing.assert_allclose(found.column("density"), firings / oracle.mask.sum(), rtol=1e-12)
    assert found.about["tokens"] == oracle.mask.sum()
    for feature in range(D_SAE):
        row = found.features.slice(feature, 1).to_pylist()[0]
        active = values[fired[:, feature], feature]
        if not len(active):
            assert row["mean_active"] is row["max_active"] is None and row["histogram"] == row["co_firing"] == []
            continue
        assert row["mean_active"] == pytest.approx(active.astype(np.float64).mean(), rel=1e-6)
        assert row["max_active"] == active.max()
        counts, _ = np.histogram(active, np.array(row["histogram_edges"], np.float64))
        assert row["histogram"] == counts.tolist() and counts[0] and counts[-1] and counts.sum() == firings[feature]
        together = (fired[:, [feature]] & fired).sum(0)
        jaccard = together / (firings[feature] + firings - together).clip(1)
        partners = [f for f in range(D_SAE) if f != feature and together[f] >= 2]
        partners = sorted(partners, key=lambda f: (-jaccard[f], f))[: KEPT.co_firing]
        assert row["co_firing"] == partners
        np.testing.assert_allclose(row["co_firing_jaccard"], jaccard[partners], rtol=1e-6)


@of_layouts("stream")
def test_boosted_and_suppressed_tokens(pair, model):
    found, oracle = pair
    logits = oracle.sae.W_dec.double() @ model.readout.unembedding.weight.double().T
    order = logits.argsort(dim=1, descending=True)
    for feature in range(D_SAE):
        row = found.features.slice(feature, 1).to_pylist()[0]
        assert row["boosted"] == order[feature, :5].tolist()
        assert row["suppressed"] == order[feature].flip(0)[:5].tolist()
        np.testing.assert_allclose(row["boosted_logits"], logits[feature, row["boosted"]], rtol=1e-4)
        np.testing.assert_allclose(row["suppressed_logits"], logits[feature, row["suppressed"]], rtol=1e-4)
    assert found.vocabulary == [str(token) for token in range(VOCAB)]


def test_importance_is_the_attributions(pair, model):
    found, oracle = pair
    attribution = Attribution(oracle.sae, oracle.sequences, 2)
    site = model.site(SITE)
    for start in range(0, oracle.sequences, 4):
        rows = slice(start, start + 4)
        clean = model.clean(oracle.text.tokens[rows], record={site})
        attribution.add(model, clean, site, oracle.text.mask[rows])
    expected = attribution.result()
    assert np.abs(expected.ce).max() > 1e-3
    np.testing.assert_allclose(found.column("ce"), expected.ce, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found.column("ce_second"), expected.ce_second, rtol=1e-6, atol=1e-9)


def test_of_a_long_text_every_second_batch_is_attributed(run, model, tmp_path, monkeypatch):
    monkeypatch.setattr("endwise.features.harvest.run.LONG_TEXT", 16)
    corpus = documents(SequenceLayout(CONTEXT, separator=0), [7] * 14)
    whole = harvested(run, model, corpus)
    one = shutil.copytree(run, tmp_path / "run")
    config = RunFolder(one).config()
    one_by_one = config.evaluation.model_copy(update={"batch": 1})
    RunFolder(one).config_file.write_text(config.model_copy(update={"evaluation": one_by_one}).to_yaml())
    found = harvested(one, model, corpus)
    oracle = Oracle(model, run, corpus, batch=1)
    chosen = [*range(0, oracle.sequences, 2)]
    attribution = Attribution(oracle.sae, len(chosen), 2)
    site = model.site(SITE)
    for start in chosen:
        rows = slice(start, start + 1)
        clean = model.clean(oracle.text.tokens[rows], record={site})
        attribution.add(model, clean, site, oracle.text.mask[rows])
    expected, fired = attribution.result(), oracle.c[chosen].any((0, 1))
    elsewhere = oracle.c.any((0, 1)) & ~fired
    ce = found.column("ce_second")
    np.testing.assert_allclose(ce[~elsewhere], expected.ce_second[~elsewhere], rtol=1e-6, atol=1e-9)
    assert np.isnan(ce[elsewhere]).all()
    assert found.about["attributed_predictions"] == expected.predictions_blocks.sum() < found.about["predictions"]
    assert whole.about["attributed_predictions"] == whole.about["predictions"]
    assert found.features.drop(["ce", "ce_second"]).equals(whole.features.drop(["ce", "ce_second"]))


def digest(run):
    folder = run / "harvest"
    assert {file.name for file in folder.iterdir()} == {
        "harvest.json",
        "features.parquet",
        "contexts.parquet",
        "vocabulary.parquet",
    }
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


@of_layouts("stream", "document_bos")
def test_shards_in_any_order_join_to_the_same_files(run, model, corpus, whole):
    for shard in (2, 0, 1):
        found = harvested(run, model, corpus, shards=3, shard=shard)
        assert (found is None) == (shard != 1)
    assert digest(run) == whole[1]


def watched(model, before=lambda: None):
    """The model, with something done before each clean pass, and a list of the passes."""
    other, passes = copy(model), []

    def clean(*arguments, **options):
        before()
        passes.append(arguments)
        return model.clean(*arguments, **options)

    other.clean = clean
    return other, passes


def no_pass():
    raise AssertionError("no pass should be made")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("batches", [1, 3])
def test_a_killed_harvest_continues_and_ends_in_the_same_files(run, model, corpora, batches):
    corpus = corpora.heldout
    harvested(run, model, corpus)
    whole = digest(run)

    def dies():
        if len(read) == batches:
            raise Killed

    dying, read = watched(model, dies)
    with pytest.raises(Killed):
        harvested(run, dying, corpus, save_seconds=0.0)
    living, rest = watched(model)
    harvested(run, living, corpus)
    read += rest
    assert len(read) == -(-len(corpus) // EVALUATED)  # none was read twice
    assert digest(run) == whole


def test_ctrl_c_saves_what_was_gathered(run, model, corpora):
    harvested(run, model, corpora.heldout)
    whole = digest(run)
    stopping, read = watched(model, lambda: ask_to_stop() if len(read) == 1 else None)
    with pytest.raises(Interrupted, match="endwise harvest"):
        harvested(run, stopping, corpora.heldout)
    assert len(read) == 2
    harvested(run, stopping, corpora.heldout)
    assert len(read) == -(-len(corpora.heldout) // EVALUATED) and digest(run) == whole


def test_what_was_gathered_with_other_settings_is_not_resumed(run, model, corpora):
    harvested(run, model, corpora.heldout, shards=2, shard=0, save_seconds=0.0)
    other = {"kept": replace(KEPT, top=2), "save_seconds": 0.0}
    assert harvested(run, model, corpora.heldout, shards=2, shard=1, **other) is None
    assert harvested(run, model, corpora.heldout, shards=2, shard=0, **other) is not None
    assert max(c.rank for _, each in read_harvest(run).all_contexts() for c in each if c.group == TOP) == 1


def test_a_damaged_part_is_gathered_again(run, model, corpora):
    harvested(run, model, corpora.heldout)
    whole = digest(run)
    (run / "harvest" / "parts").mkdir()
    (run / "harvest" / "parts" / "0-of-1.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0nonsense")
    harvested(run, model, corpora.heldout)
    assert digest(run) == whole


def test_equal_settings_are_read_not_harvested_again(run, model, corpora):
    first = harvested(run, model, corpora.heldout)
    again = harvested(run, watched(model, no_pass)[0], corpora.heldout, again=False)
    assert again.about == first.about and again.features.equals(first.features)


def test_measured_importance_is_read(tmp_path, token_files, model, corpora):
    config = recipe(tmp_path / "run").model_copy(update={"data": data(token_files)})
    run = train(config, model=model, corpora=corpora, display=False).folder
    found = harvested(run, model, corpora.heldout, importance=False)
    assert np.isnan(found.column("ce_second")).all() and found.about["settings"]["importance"] == "none"
    measure_importance([run], tokens=128, ablate=0, model=model, corpora=corpora)
    found = harvested(run, model, corpora.heldout, again=False)
    np.testing.assert_array_equal(found.column("ce_second"), read_importance(run).ce_second)
    assert found.about["settings"]["importance"] == "measured"


def test_runs_of_one_model_share_the_clean_pass(tmp_path, token_files, model, corpora):
    runs = []
    for seed in (0, 1):
        config = recipe(tmp_path / str(seed), seed=seed).model_copy(update={"data": data(token_files)})
        runs.append(train(config, model=model, corpora=corpora, display=False).folder)
    alone = []
    for run in runs:
        harvested(run, model, corpora.heldout)
        alone.append(digest(run))
    counted, passes = watched(model)
    harvest(runs, tokens=corpora.heldout.tokens, kept=KEPT, model=counted, corpora=corpora, again=True)
    assert len(passes) == -(-len(corpora.heldout) // EVALUATED)
    assert [digest(run) for run in runs] == alone


def test_other_texts(run, model, corpora, tmp_path):
    found = harvested(run, model, corpora.heldout, text="train", corpora=corpora, tokens=10 * CONTEXT)
    assert found.about["corpus"]["source"] == corpora.train.name and found.about["tokens"] == 10 * CONTEXT
    own = np.random.default_rng(5).integers(1, VOCAB, 100).astype(np.uint16)
    np.save(tmp_path / "own.npy", own)
    found = harvested(run, model, corpora.heldout, text=tmp_path / "own.npy", corpora=None, tokens=None)
    assert found.about["tokens"] == 100 // CONTEXT * CONTEXT
    context = next(iter(found.all_contexts()))[1][0]
    start = context.sequence * CONTEXT + context.start
    assert context.tokens == tuple(own[start : start + len(context.tokens)].tolist())


def test_two_who_come_last_at_once_join_once(run, model, corpora, monkeypatch):
    """The second finds the parts gone: the first has joined its own with them."""
    heldout = corpora.heldout
    harvested(run, model, heldout, shards=2, shard=0)
    acquire, passed = FileLock.acquire, []

    def overtaken(self, *arguments, **named):
        if self.lock_file.endswith(".harvest.lock") and not passed:
            passed.append(True)
            assert harvested(run, model, heldout, shards=2, shard=0) is not None
        return acquire(self, *arguments, **named)

    monkeypatch.setattr(FileLock, "acquire", overtaken)
    assert harvested(run, model, heldout, shards=2, shard=1) is None
    assert read_harvest(run) is not None


# From the command line.


@pytest.fixture(scope="module")
def shell_run(made, tmp_path_factory):
    """A run whose recipe names its model, for processes of their own."""
    values = recipe(tmp_path_factory.mktemp("shell") / "run").model_dump(mode="json")
    values["model"] |= {"name": str(made / "model"), "device": "cpu"}
    values["data"] = data(made).model_dump() | {"mask_first_position": True}
    return train(RunConfig.build(values), display=False).folder


def test_command_and_torchrun_write_the_same_files(shell_run):
    options = ["--tokens", "200", "--top", "3", "--quantiles", "2", "--again", "--quiet"]
    result = CliRunner().invoke(app, ["harvest", str(shell_run), *options])
    assert result.exit_code == 0 and "features fired on 175 tokens" in result.output
    alone = digest(shell_run)
    done = spread(2, "-m", "endwise", "harvest", shell_run, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("features fired on 175 tokens") == 1
    assert digest(shell_run) == alone


def test_both_texts_at_once_are_refused(shell_run):
    result = CliRunner().invoke(app, ["harvest", str(shell_run), "--train", "--corpus", "x.txt"])
    assert result.exit_code == 2 and "not both" in result.output


# The parts.


def cells(draw_values):
    return st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(0, 3), draw_values), max_size=60)


@given(cells(st.sampled_from([0.5, 1.0, 1.5, 2.0])), st.integers(1, 7), st.integers(1, 4))
def test_top_contexts_are_the_best_of_each_sequence_whatever_the_batches(given_cells, batch, top):
    """Against sorting everything; few values, so that many tie; dense and sparse; cut into batches and two shards."""
    values = np.zeros((6, 4, 5), np.float32)
    for feature, sequence, position, value in given_cells:
        values[sequence, position, feature] = value
    sae, kept = ReluSAE(3, 5), Kept(top=top, groups=2, per_group=2, before=1, after=1)
    shards = [Gathered(sae, kept, 1.0, attribute=False) for _ in range(2)]
    for start in range(0, 6, batch):
        rows = torch.arange(start, min(6, start + batch))
        latents = DenseLatents(torch.from_numpy(values)[rows])
        firings = Firings.of(latents, torch.ones(len(rows), 4, dtype=torch.bool), rows, 5)
        for add in ("_add_counts", "_add_top", "_add_sample"):
            getattr(shards[start // batch % 2], add)(firings)
    shards[1].merge(shards[0])
    whole = shards[1]
    np.testing.assert_array_equal(whole.histogram.sum(1).numpy(), (values > 0).sum((0, 1)))
    for feature in range(5):
        expected = sorted((-values[s, :, feature].max(), s, int(values[s, :, feature].argmax())) for s in range(6))
        expected = [(s, p, -v) for v, s, p in expected if v < 0][:top]
        assert held(whole.top, feature) == sorted(expected)
        fired = [(s, p, float(values[s, p, feature])) for s in range(6) for p in range(4) if values[s, p, feature]]
        drawn_first = sorted(fired, key=lambda each: -number(feature, each[0], each[1]))[:4]
        assert held(whole.sample, feature) == sorted(drawn_first)


def held(slots, feature):
    there = slots.keys[feature] > EMPTY
    parts = (slots.sequences, slots.positions, slots.activations)
    return sorted(zip(*(part[feature][there].tolist() for part in parts), strict=True))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-50, 50)), unique=True, max_size=80), st.integers(1, 9))
def test_slots_keep_the_greatest_keys_and_their_windows(pairs, chunk):
    slots = Slots(4, 3, 2, torch.device("cpu"))
    for start in range(0, len(pairs), chunk):
        features, keys = (torch.tensor(part) for part in zip(*pairs[start : start + chunk], strict=True))
        window = torch.stack([keys, -keys], 1).float()
        slots.offer(Candidates(features, keys, keys.abs(), keys.abs(), keys.float(), lambda some, w=window: w[some]))
    for feature in range(4):
        expected = sorted((key for f, key in pairs if f == feature), reverse=True)[:3]
        there = slots.keys[feature] > EMPTY
        assert sorted(slots.keys[feature][there].tolist(), reverse=True) == expected
        assert slots.least[feature] == slots.keys[feature].min()
        windows = slots.windows[feature][there]
        assert windows.tolist() == [[key, -key] for key in slots.keys[feature][there].float().tolist()]


def test_dense_and_sparse_latents_give_the_same_firings():
    generator = torch.Generator().manual_seed(0)
    sae = ReluSAE(6, 50, seed=3).requires_grad_(False)
    sae.b_enc -= 1.0
    x = torch.randn(3, 7, 6, generator=generator)
    mask = torch.rand(3, 7, generator=generator) < 0.8
    sae.sparse_below = 1.0
    sparse = sae.encode(x)
    assert isinstance(sparse, SparseLatents)
    numbers = torch.tensor([4, 9, 2])
    a, b = (Firings.of(latents, mask, numbers, 50) for latents in (sparse, DenseLatents(sparse.dense())))
    assert len(a.rows) > 20
    for name in ("rows", "features", "values", "sequences", "positions"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    dense = sparse.dense() * mask[..., None]
    for i, window in enumerate(a.windows(torch.arange(len(a.rows)), 2, 3)):
        s, p = int(a.rows[i]) // 7, int(a.rows[i]) % 7
        expected = [float(dense[s, q, a.features[i]]) if 0 <= q < 7 else 0.0 for q in range(p - 2, p + 4)]
        assert window.tolist() == expected


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_latents_that_are_no_activations_are_refused(bad):
    latents = DenseLatents(torch.tensor([[[0.0, bad]]]))
    with pytest.raises(DataError, match="diverged"):
        Firings.of(latents, torch.ones(1, 1, dtype=torch.bool), torch.tensor([0]), 2)


def test_draws_are_the_documented_mixing_and_differ():
    sequences, positions = torch.arange(2000) // 50, torch.arange(2000) % 50
    for stream in (-2, 0, 45_000):
        found = drawn(stream, sequences, positions)
        expected = [number(stream, s, p) for s, p in zip(sequences.tolist(), positions.tolist(), strict=True)]
        assert found.tolist() == expected and len(set(expected)) == 2000
        assert abs(found.double().mean()) < 2**63 / 2000**0.5 * 3 / 3**0.5  # three standard errors of a uniform draw


@given(st.lists(st.lists(st.floats(-1000, 1000, width=32), max_size=5), max_size=6), st.randoms())
def test_fixed_point_sums_depend_on_no_order(batches, random):
    def total(groups):
        sums = FixedPointSums(2, torch.device("cpu"))
        for values in groups:
            sums.add(torch.zeros(len(values), dtype=torch.int64), torch.tensor(values))
        return sums

    shuffled = random.sample(batches, len(batches))
    halves = total(shuffled[: len(shuffled) // 2])
    halves.merge(total(shuffled[len(shuffled) // 2 :]))
    whole = total(batches)
    assert torch.equal(whole.total(), halves.total())
    expected = sum(value for values in batches for value in values)
    assert whole.total()[0] == pytest.approx(expected, abs=len(batches) * 5 * 2**-33 + 1e-9)
    assert whole.total()[1] == 0


@given(st.floats(2**-126, 2.0**127, width=32))
def test_a_value_is_in_its_bin(value):
    edges, place = bin_edges().tolist(), int(bins_of(torch.tensor([value])))
    assert edges[place] <= value and (value < edges[place + 1] or place == BINS - 1)
    assert edges == sorted(edges)


def test_a_share_of_tokens_is_drawn_for_co_firing():
    mask = torch.ones(100, 10, dtype=torch.bool)
    firings = Firings.of(DenseLatents(torch.ones(100, 10, 3)), mask, torch.arange(100), 3)
    sample = TokenSample(0.25)
    sample.add(firings)
    tokens = sample.tensors()["tokens"]
    chosen = [s * 10 + p for s in range(100) for p in range(10) if number(-2, s, p) + 2**63 < 2**62]
    assert sorted(set(tokens.tolist())) == chosen and len(tokens) == 3 * len(chosen)
    assert 200 < len(chosen) < 300
    found = co_firing(sample, 3, 5)
    assert [each.tolist() for each in found.features] == [[1, 2], [0, 2], [0, 1]]
    assert all((each == 1).all() for each in found.jaccard)


# Bad input.


def test_bad_requests_are_refused_before_any_pass(run, model, corpora):
    model, _ = watched(model, no_pass)
    with pytest.raises(ConfigError, match="shard 3 of 3"):
        harvest([run], shards=3, shard=3)
    with pytest.raises(ConfigError, match=r"top must be a whole number.*-1"):
        Kept(top=-1)
    with pytest.raises(ConfigError, match="at least one sequence of 8 tokens; 7"):
        harvested(run, model, corpora.heldout, tokens=7)
    with pytest.raises(DataError, match="Lower tokens"):
        harvested(run, model, corpora.heldout, tokens=10**6)
    with pytest.raises(RunFolderError, match=r"is a part of the run .* Give that"):
        harvest([run / "sae"])


def test_a_run_that_is_being_harvested_is_left_alone(run, model, corpora):
    parts = Parts(run, {}, 1)
    with parts.claimed(0), pytest.raises(RunFolderError, match="Another process"):
        harvested(run, model, corpora.heldout)


def with_all(run, place, name, value):
    """A copy of the run in whose SAE all numbers of a tensor are one."""
    shutil.copytree(run, place, ignore=shutil.ignore_patterns("harvest"))
    sae = ReluSAE.load(run)
    getattr(sae, name).fill_(value)
    sae.save(place / "sae")
    RunFolder(place).note_weights(whole=True)
    return place


def test_a_diverged_sae_is_named(run, model, corpora, tmp_path):
    diverged = with_all(run, tmp_path / "run", "W_enc", 3e38)
    with pytest.raises(DataError, match=f"{diverged} cannot be harvested: A latent is NaN, infinite or negative"):
        harvested(diverged, model, corpora.heldout)


def test_a_harvest_that_is_none_is_refused(run, model, corpora):
    found = harvested(run, model, corpora.heldout)
    (found.folder / "contexts.parquet").write_bytes(b"no table")
    with pytest.raises(FormatError, match="--again"):
        list(read_harvest(run).all_contexts())
    harvested(run, model, corpora.heldout)


def test_an_sae_that_never_fires(run, model, corpora, tmp_path):
    found = harvested(with_all(run, tmp_path / "run", "b_enc", -1e6), model, corpora.heldout)
    assert not found.firings.any() and dict(found.all_contexts()) == {} and found.contexts(3) == []
    assert np.isnan(found.column("max_active")).all() and not found.column("ce").any()
    (exported,) = export(tmp_path / "run", tmp_path / "out", model_id="small")
    assert (exported.features, exported.activations) == (D_SAE, 0)


class Tokenizer:
    """Tokenizer whose pieces begin with ▁ where a word does, as in SentencePiece; it decodes without that space."""

    pieces = ("▁the", "s", " a", "\x1b")

    def convert_ids_to_tokens(self, token):
        return self.pieces[token]

    def decode(self, tokens, clean_up_tokenization_spaces):
        assert not clean_up_tokenization_spaces
        return self.pieces[tokens[0]].removeprefix("▁")


def test_tokens_are_written_as_they_stand_in_text(model):
    assert written(model, 7) == "7"
    model = copy(model)
    model.tokenizer = Tokenizer()
    assert [written(model, token) for token in range(4)] == [" the", "s", " a", "\x1b"]
