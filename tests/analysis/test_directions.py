"""Principal directions, their reconstruction and ablation against slow definitions; what is kept; what is said."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from endwise import evaluate, train_together
from endwise.analysis.correlations import partial_spearman, resampled_points, spearman
from endwise.analysis.directions import measure as stored
from endwise.analysis.directions.measure import RunDirections, chosen, measure_directions
from endwise.analysis.directions.norms import Norms
from endwise.analysis.directions.principal import AlongDirections, Estimates, principal
from endwise.analysis.directions.reconstruction import downstream
from endwise.analysis.directions.resample_ablation import other_tokens, resample_ablation
from endwise.analysis.directions.study import contrast, directions, follows, norm_claim
from endwise.analysis.directions.text_at_site import TextAtSite
from endwise.cli import app
from endwise.common.errors import DataError, RunFolderError
from endwise.common.statistics import Interval
from endwise.config.method import PRESET_METHODS
from endwise.dictionaries import ReluSAE
from endwise.evaluation.summary import RunSummary
from endwise.models.language_model import LanguageModel
from endwise.tokens import Corpus
from endwise.tokens.corpus import SequenceLayout
from endwise.tokens.tokenising import documents_in
from made_runs import make_run
from own_training import OwnModel, raising
from small_gpt2 import CONTEXT, SITE, VOCAB, WIDTH, recipe

SEQUENCES, SEPARATOR = 5, 0


@pytest.fixture(scope="module")
def text(model):
    """Short documents, some of which begin in the middle of a sequence."""
    random = np.random.default_rng(0)
    documents = [[*random.integers(1, VOCAB, length), SEPARATOR] for length in (3, 2, 7, 4, 1, 9, 5, 30)]
    packed = SequenceLayout(CONTEXT, separator=SEPARATOR)
    corpus = Corpus(documents_in(np.concatenate(documents).astype(np.uint16), SEPARATOR), packed)
    return TextAtSite.first(model, model.site(SITE), corpus, SEQUENCES * CONTEXT, batch=2)


@pytest.fixture(scope="module")
def whole(text):
    """Tokens, activations and which of them count: not position 0, not what follows a separator; float64."""
    batch = text.corpus.batch(range(SEQUENCES))
    activation = text.model.clean(batch.tokens, record={text.site}).activations[text.site].double()
    counted = torch.ones(SEQUENCES, CONTEXT, dtype=torch.bool)
    counted[:, 0] = False
    counted[:, 1:] &= batch.tokens[:, :-1] != SEPARATOR
    assert 0 < int((~counted[:, 1:]).sum()) < counted[:, 1:].sum()
    return batch.tokens, activation, counted


@pytest.fixture(scope="module")
def found(text):
    return principal(text)


@pytest.mark.parametrize("with_starts", [False, True])
def test_directions_are_the_eigenvectors_of_the_covariance(text, whole, with_starts):
    _, activation, counted = whole
    found = principal(text, with_starts=with_starts)
    kept = (activation.flatten(0, 1) if with_starts else activation[counted]).numpy()
    centred = kept - kept.mean(0)
    variance = np.linalg.svd(centred, compute_uv=False) ** 2 / len(kept)
    assert found.tokens == len(kept)
    np.testing.assert_allclose(found.mean.numpy(), kept.mean(0), rtol=1e-9)
    np.testing.assert_allclose(found.variance.numpy(), variance, rtol=1e-6, atol=1e-9 * variance[0])
    v = found.directions.numpy()
    np.testing.assert_allclose(v @ v.T, np.eye(WIDTH), atol=1e-9)
    np.testing.assert_allclose(
        np.cov(centred.T, bias=True) @ v.T, v.T * found.variance.numpy(), atol=1e-6 * variance[0]
    )
    assert (v[np.arange(WIDTH), np.abs(v).argmax(1)] > 0).all()


def test_one_token_gives_no_directions(text):
    bos_only = replace(text, corpus=Corpus(text.corpus.documents, SequenceLayout(2, separator=SEPARATOR)), sequences=1)
    with pytest.raises(DataError, match="at least two tokens"):
        principal(bos_only)


def test_reconstruction_along_each_direction_equals_its_definition(text, whole, found):
    sae = ReluSAE(WIDTH, 40, seed=1).requires_grad_(False)
    _, activation, counted = whole
    collector = AlongDirections(found)
    for batch in text.batches():
        collector.add(batch, found.along(batch.activation), sae(batch.activation.float()))
    of = collector.reconstructed(resamples=50, seed=3)
    a, b = activation[counted].numpy(), sae(activation.float()).double()[counted].numpy()
    mean = a.mean(0)
    for index, v in enumerate(found.directions.numpy()):
        x, y = [float(row @ v) for row in a - mean], [float(row @ v) for row in b - mean]
        assert of.correlation.estimate[index] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-6)
        expected = 1 - sum((p - q) ** 2 for p, q in zip(x, y, strict=True)) / sum(p * p for p in x)
        assert of.explained_variance.estimate[index] == pytest.approx(expected, rel=1e-5)
    for each in (of.correlation, of.explained_variance):
        assert (each.low <= each.estimate).all() and (each.estimate <= each.high).all()


def test_a_copy_is_whole_a_constant_nothing_and_an_empty_direction_undefined(text, found):
    copied, constant = AlongDirections(found), AlongDirections(found)
    flat = replace(found, directions=found.directions.clone())
    flat.directions[-1] = 0  # nothing is ever written along it
    empty = AlongDirections(flat)
    for batch in text.batches():
        copied.add(batch, found.along(batch.activation), batch.activation)
        constant.add(batch, found.along(batch.activation), found.mean.float().expand_as(batch.activation) + 1)
        empty.add(batch, flat.along(batch.activation), batch.activation)
    perfect, nothing = copied.reconstructed(20, 0), constant.reconstructed(20, 0)
    np.testing.assert_allclose(perfect.correlation.estimate, 1, atol=1e-9)
    np.testing.assert_allclose(perfect.explained_variance.estimate, 1, atol=1e-9)
    np.testing.assert_allclose(nothing.correlation.estimate, 0, atol=1e-9)
    assert (nothing.explained_variance.estimate < 0).all()
    undefined = empty.reconstructed(20, 0)
    assert np.isnan(undefined.correlation.estimate[-1]) and np.isnan(undefined.explained_variance.high[-1])


def test_resample_ablation_equals_full_passes_with_whole_logits(text, whole, found):
    tokens, activation, counted = whole
    order = other_tokens(int(counted.sum()), seed=5)
    assert sorted(order) == list(range(int(counted.sum())))
    sums, count = resample_ablation(text, found, [0, 3], seed=5)
    assert count.tolist() == counted.sum(1).tolist() and sums.shape == (SEQUENCES, 2)
    gpt2 = text.model.model
    clean = gpt2(tokens).logits.double().log_softmax(-1)
    for column, index in enumerate((0, 3)):
        v = found.directions[index]
        components = activation[counted] @ v
        changed = activation.clone()
        for place, other, token in zip(counted.nonzero().tolist(), order, range(len(order)), strict=True):
            changed[tuple(place)] += (components[other] - components[token]) * v
        handle = gpt2.transformer.h[1].register_forward_pre_hook(
            lambda _block, arguments, changed=changed: (changed.float(), *arguments[1:])
        )
        ablated = gpt2(tokens).logits.double().log_softmax(-1)
        handle.remove()
        kl = (clean.exp() * (clean - ablated)).sum(-1) * counted
        np.testing.assert_allclose(sums[:, column], kl.sum(1).numpy(), rtol=2e-4, atol=1e-6)
    assert sums.min() >= 0 and sums.max() > 1e-3


def test_every_token_for_itself_changes_nothing(text, whole, found):
    same = np.arange(int(whole[2].sum()))
    assert np.abs(resample_ablation(text, found, range(WIDTH), same)[0]).max() == 0


def test_which_directions_are_ablated():
    assert chosen(16, None) == list(range(16)) and chosen(16, 8) == list(range(16))
    assert chosen(1000, 3) == [0, 1, 2, 3, 501, 999]
    assert len(chosen(1000, None)) == 128 and chosen(1000, None)[-1] == 999


# Run folders


@pytest.fixture(scope="module")
def folder(model, corpora, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    configs = [recipe(folder / kind, kind) for kind in ("local", "e2e", "e2e_ds")]
    runs = train_together(configs, model=model, corpora=corpora, display=False)
    evaluate([run.folder for run in runs], model=model, corpora=corpora)
    return folder


@pytest.fixture(scope="module")
def compared(model, corpora, folder):
    (one,) = directions(folder, model=model, corpora=corpora)
    return one


def test_what_was_measured_is_read_again(model, corpora, folder, compared):
    never = OwnModel(model, raising(AssertionError("nothing is to be measured")))
    (again,) = directions(sorted(folder.glob("*/")), model=never, corpora=corpora)
    for path, kept in again.measured.items():
        before = compared.measured[path]
        assert kept.norms == before.norms and kept.tokens == before.tokens and kept.settings == before.settings
        for name in ("kl", "correlation", "explained_variance"):
            np.testing.assert_array_equal(getattr(kept, name).estimate, getattr(before, name).estimate)
    assert again.follows == compared.follows and again.claims == compared.claims


def test_another_sae_takes_the_ablation_from_its_neighbour(model, corpora, folder, compared):
    file = folder / "e2e" / stored.FILE
    content = file.read_bytes()

    class NoReplay(LanguageModel):
        tried = False

        def replay(self, *given, **asked):
            assert not self.tried, "nothing is to be ablated"
            return super().replay(*given, **asked)

    no_replay = NoReplay(model.model)
    no_replay.tried = True
    try:
        file.write_bytes(content[:200])  # damaged, so measured again
        measured = measure_directions([folder / "local", folder / "e2e"], model=no_replay, corpora=corpora)
        again, before = measured[folder / "e2e"], compared.measured[str(folder / "e2e")]
        np.testing.assert_array_equal(again.kl.estimate, before.kl.estimate)
        np.testing.assert_allclose(again.correlation.estimate, before.correlation.estimate)
        with pytest.raises(AssertionError, match="ablated"):  # other tokens are another text
            measure_directions([folder / "local", folder / "e2e"], tokens=128, model=no_replay, corpora=corpora)
    finally:
        file.write_bytes(content)


def test_a_run_without_an_sae_is_refused(folder, tmp_path):
    (tmp_path / "config.yaml").write_text((folder / "local" / "config.yaml").read_text())
    with pytest.raises(RunFolderError, match="no trained SAE yet"):
        measure_directions([tmp_path])


def test_the_command_writes_tables_figures_and_a_page(folder, compared, tmp_path, undrawn):
    """Run on equal CE increases, which these runs, trained for a moment, hardly have."""
    original, folder = folder, shutil.copytree(folder, tmp_path / "runs")
    for file in folder.glob("*/evaluation.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"ce_increase": 0.5}))
    done = CliRunner().invoke(app, ["directions", str(folder), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "later MSE" in done.output and "reconstructions are shorter" in " ".join(done.output.split())
    out = tmp_path / "out"
    rows = {path.stem: list(csv.DictReader(path.read_text().splitlines())) for path in out.glob("*.csv")}
    assert set(rows) == {"norms", "directions", "downstream", "use", "contrasts", "claims"}
    assert len(rows["directions"]) == 3 * WIDTH == pq.read_table(out / "directions.parquet").num_rows
    assert len(rows["norms"]) == 3 and len(rows["claims"]) == 6 and len(rows["contrasts"]) == 3
    assert {row["verdict"] for row in rows["claims"]} == {"not testable here"}  # of one seed
    assert {row["seeds"] for row in rows["contrasts"]} == {"1"}
    local = RunSummary.read(folder / "local")
    of = compared.measured[str(original / "local")]
    third = next(row for row in rows["directions"] if (row["kind"], row["direction"]) == ("local", "2"))
    assert float(third["kl"]) == of.kl.estimate[2] and float(third["correlation.high"]) == of.correlation.high[2]
    later = [row for row in rows["downstream"] if row["kind"] == "local"]
    assert [float(row["cosine"]) for row in later] == list(local.downstream_cosine.values())
    assert float(later[0]["mse.low"]) == local.intervals[f"downstream_mse.{later[0]['later_site']}"][0]
    names = ("norms", "cosines", "directions", "use", "downstream", "downstream-all", "explained-variance")
    assert {path.stem for path in out.glob("*.pdf")} == {f"{name}-1" for name in names}
    html = (out / "directions.html").read_text()
    assert html.index("reconstructions are shorter") < html.index("norms-1")
    for name in names:
        assert f'id="{name}-1"' in html


def test_an_evaluation_from_before_the_cosine_was_measured_still_reads(folder, tmp_path):
    measured = RunSummary.read(folder / "local")
    old = json.loads((folder / "local" / "evaluation.json").read_text())
    del old["downstream_cosine"]
    for file in (folder / "local").glob("*.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "evaluation.json").write_text(json.dumps(old))
    run = RunSummary.read(tmp_path)
    assert run.downstream_cosine == {} and run.downstream_mse == measured.downstream_mse
    assert [len(downstream({run.site: [each]}).panels) for each in (run, measured)] == [1, 2]


# What follows from known numbers


def slow_spearman(x, y):
    def ranks(values):
        return [(sum(v < w for v in values) + sum(v <= w for v in values) + 1) / 2 for w in values]

    return np.corrcoef(ranks(x), ranks(y))[0, 1]


def test_rank_correlations_are_those_of_the_points_repeated():
    random = np.random.default_rng(0)
    x, y, z = random.integers(0, 6, (3, 15)).astype(float)  # many ties
    weights = resampled_points(15, 20, seed=1)
    ours, partial = spearman(x, y, weights), partial_spearman(x, y, z, weights)
    for row, (one, given) in zip(weights.astype(int), zip(ours, partial, strict=True), strict=True):
        a, b, c = (np.repeat(each, row) for each in (x, y, z))
        ab, ac, bc = slow_spearman(a, b), slow_spearman(a, c), slow_spearman(b, c)
        assert one == pytest.approx(ab)
        assert given == pytest.approx((ab - ac * bc) / np.sqrt((1 - ac**2) * (1 - bc**2)))
    assert np.isnan(spearman(np.ones(5), np.arange(5.0))).all()
    with pytest.raises(DataError, match="at least 4 points; given 3"):
        resampled_points(3, 10, 0)


def made(correlation, kl, variance):
    def known(values):
        return Estimates(values, values - 0.01, values + 0.01)

    one = Interval(0.9, 0.9, 0.9)
    norms = Norms(one, None, None, one, (1,) * 40, {"others": (), "position_0": (), "starts": ()}, 100)
    same = known(np.asarray(correlation))
    return RunDirections({}, norms, np.asarray(variance), known(np.asarray(kl)), same, same, 100)


def test_dropping_what_is_not_used_shows_and_dropping_anything_does_not():
    random = np.random.default_rng(0)
    variance = np.sort(random.exponential(size=60))[::-1]
    kl = variance * random.lognormal(0, 1, 60)  # what has more variance matters more, but not only
    kl[7] = np.nan  # not ablated
    use = np.nan_to_num(kl, nan=0.5)
    by_use = made(1 - np.exp(-use), kl, variance)
    by_variance = made(1 - np.exp(-variance), kl, variance)
    by_chance = made(random.uniform(size=60), kl, variance)
    assert follows(by_use).rank.estimate == pytest.approx(1) and follows(by_use).directions == 59
    assert follows(by_variance).rank.low > 0.5
    assert follows(by_chance).rank.low < 0 < follows(by_chance).rank.high
    against = contrasted([(by_use, by_variance)])
    assert against.rank.low > 0 and against.dropped.high < 0
    expected = slow_spearman(
        (by_variance.correlation.estimate - by_use.correlation.estimate)[np.isfinite(kl)], kl[np.isfinite(kl)]
    )
    assert against.dropped.estimate == pytest.approx(expected)
    assert against.dropped_given_variance.high < 0
    none = contrasted([(by_variance, by_variance)])
    assert (none.rank.low, none.rank.estimate, none.rank.high) == (0, 0, 0)


def contrasted(pairs):
    """Make the measurements of an e2e and a local run for each seed."""
    runs = [tuple(make_run(kind, 1, 0.2, 30, seed=seed) for kind in ("e2e", "local")) for seed in range(len(pairs))]
    measured = {
        run.folder: of for two, both in zip(runs, pairs, strict=True) for run, of in zip(two, both, strict=True)
    }
    return contrast(PRESET_METHODS["e2e"], PRESET_METHODS["local"], runs, measured)


def test_kinds_are_contrasted_seed_by_seed_over_directions_and_seeds():
    random = np.random.default_rng(1)
    variance = np.sort(random.exponential(size=60))[::-1]
    kl = variance * random.lognormal(0, 1, 60)

    def pair(noise):
        e2e = made(1 - np.exp(-kl) + noise * random.normal(0, 0.1, 60), kl, variance)
        return e2e, made(1 - np.exp(-variance), kl, variance)

    pairs = [pair(noise) for noise in (0.5, 1.0, 2.0)]
    found, each = contrasted(pairs), [contrasted([one]) for one in pairs]
    assert found.dropped.seeds == 3 and found.dropped.testable and not each[0].dropped.testable
    z = [np.arctanh(one.dropped.estimate) for one in each]
    assert found.dropped.estimate == pytest.approx(np.tanh(np.mean(z)))
    assert found.rank.estimate == pytest.approx(np.mean([one.rank.estimate for one in each]))
    seeds_alone = 4.3027 * np.std(z, ddof=1) / np.sqrt(3)
    half = (np.arctanh(found.dropped.high) - np.arctanh(found.dropped.low)) / 2
    widest = max((np.arctanh(one.dropped.high) - np.arctanh(one.dropped.low)) / 2 for one in each)
    assert half > 0.5 * seeds_alone and half < seeds_alone + widest


def test_lengths_show_only_in_the_papers_order_and_at_a_similar_ce_increase():
    def judged(ratios, increases=(0.2, 0.21, 0.22), seeds=(0, 1, 2), jitter=0.0):
        one, norms, choices = Interval(0.9, 0.9, 0.9), {}, []
        for seed in seeds:
            pairs = zip(ratios, increases, strict=True)
            choices.append([make_run(kind, 1, increase, 30, seed=seed) for kind, increase in pairs])
            for run, r in zip(choices[-1], ratios.values(), strict=True):
                r += jitter * seed * (run.kind == "e2e_ds")
                norms[run.folder] = Norms(Interval(r - 0.01, r + 0.01, r), None, None, one, (), {}, 9)
        return norm_claim({"here": choices}, norms)

    def verdict(*args, **more):
        return judged(*args, **more).verdict

    ordered = {"local": 0.9, "e2e": 0.3, "e2e_ds": 0.6}
    assert verdict(ordered) == "shown"
    assert verdict({**ordered, "e2e_ds": 0.9}) == "not shown"
    assert verdict({**ordered, "local": 1.0}) == "not shown"
    assert verdict(ordered, jitter=0.2) == "not shown"  # seeds differ widely
    assert verdict(ordered, (0.2, 0.4, 0.22)) == "not testable here"
    assert verdict({"local": 0.9}, (0.2,)) == "not testable here"
    for seeds, told in (((0,), "held-out text alone, one seed"), ((0, 1), "two seeds (initialisation)")):
        claim = judged(ordered, seeds=seeds)
        assert claim.verdict == "not testable here" and told in claim.ours and "e2e 0.300 [0.290, 0.310]" in claim.ours
