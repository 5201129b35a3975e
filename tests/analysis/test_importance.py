"""Attribution, ablation and faithfulness against float64 passes of the whole model, feature by feature."""

import numpy as np
import pytest
import safetensors.numpy
import torch
from safetensors import safe_open
from transformers import GPT2LMHeadModel

from endwise import evaluate, train
from endwise.analysis.importance.ablation import AblationSums, choose
from endwise.analysis.importance.faithfulness import FaithfulnessSums, kept_counts
from endwise.analysis.importance.measure import measure_importance
from endwise.common.errors import ConfigError, DataError, FormatError, RunFolderError
from endwise.dictionaries import ReluSAE
from endwise.dictionaries.latents import DenseLatents, SparseLatents
from endwise.evaluation.evaluate import read_sums
from endwise.features.attribution import Attribution, contributions
from endwise.features.importance_table import IMPORTANCE_FILE, read_importance, read_measured
from endwise.features.spliced import SplicedBatch
from endwise.runs.folder import RunFolder
from own_training import OwnModel
from small_gpt2 import CONTEXT, SITE, WIDTH, data, recipe

SEQUENCES, HALF, FEATURES = 7, 4, 40


@pytest.fixture(scope="module")
def sae():
    sae = ReluSAE(WIDTH, FEATURES, seed=1).requires_grad_(False)
    sae.b_enc -= 0.3
    sae.b_enc[[3, 17]] = -1e3  # these never fire
    return sae


@pytest.fixture(scope="module")
def batch(corpora):
    batch = corpora.heldout.batch(range(SEQUENCES))
    batch.mask[:, 0] = False
    batch.mask[0, 5:] = False
    batch.mask[2, 3] = False
    return batch


class Slow:
    """Losses per sequence of a float64 copy of the model with given latents at the site, over full passes."""

    def __init__(self, model, sae, batch):
        self.gpt2 = GPT2LMHeadModel(model.model.config).double().eval().requires_grad_(False)
        self.gpt2.load_state_dict({name: value.double() for name, value in model.model.state_dict().items()})
        self.tokens, self.mask = batch.tokens, batch.mask
        self.D = sae.decoder.double() / sae.decoder.double().norm(dim=-1, keepdim=True)
        self.b = sae.b_dec.double()
        seen = []
        clean = self.run(lambda x: seen.append(x) or x)
        self.p = clean.log_softmax(-1)
        self.c = torch.relu(seen[0] @ sae.encoder.double().T + sae.b_enc.double())
        self.predicts = torch.zeros_like(self.mask)
        for b in range(len(self.mask)):
            for t in range(CONTEXT - 1):
                self.predicts[b, t] = self.mask[b, t] and self.mask[b, t + 1]

    def run(self, replace):
        def splice(block, arguments):
            return (replace(arguments[0]), *arguments[1:])

        handle = self.gpt2.transformer.h[1].register_forward_pre_hook(splice)
        logits = self.gpt2(self.tokens).logits
        handle.remove()
        return logits

    def losses(self, c):
        """CE and KL, `[batch]` each."""
        logits = self.run(lambda x: torch.where(self.mask[..., None], c @ self.D + self.b, x))
        q = logits.log_softmax(-1)
        following = torch.roll(self.tokens, -1, 1)[..., None]
        ce = (-q.gather(-1, following)[..., 0] * self.predicts).sum(1)
        kl = ((self.p.exp() * (self.p - q)).sum(-1) * self.mask).sum(1)
        return ce, kl

    def without(self, feature):
        c = self.c.clone()
        c[..., feature] = 0
        return self.losses(c)


@pytest.fixture(scope="module")
def slow(model, sae, batch):
    return Slow(model, sae, batch)


@pytest.fixture(scope="module")
def attributed(model, sae, batch):
    attribution = Attribution(sae, SEQUENCES, 6, kl=True)
    site = model.site(SITE)
    for rows in (slice(0, 3), slice(3, SEQUENCES)):
        clean = model.clean(batch.tokens[rows], record={site}, final=True)
        attribution.add(model, clean, site, batch.mask[rows])
    return attribution.result()


def close(ours, theirs, **tolerance):
    np.testing.assert_allclose(ours, np.asarray(theirs), **{"rtol": 1e-3, "atol": 1e-6, **tolerance})


def test_attribution_is_minus_latent_times_gradient_of_the_whole_model(attributed, slow):
    for which, ours, absolute, error, counts in (
        (0, attributed.ce, attributed.ce_absolute, attributed.ce_se, slow.predicts),
        (1, attributed.kl, attributed.kl_absolute, attributed.kl_se, slow.mask),
    ):
        c = slow.c.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(slow.losses(c)[which].sum(), c)
        change = -(slow.c * gradient)  # 0 at masked positions, whose latents are not used
        close(ours, change.sum((0, 1)) / counts.sum())
        close(absolute, change.abs().sum((0, 1)) / counts.sum())
        sums, terms = change.sum(1).numpy(), counts.sum(1).double().numpy()
        residuals = sums - np.outer(terms, sums.sum(0) / terms.sum())
        close(error, np.sqrt(SEQUENCES / (SEQUENCES - 1) * (residuals**2).sum(0)) / terms.sum())


def test_the_second_order_adds_half_the_square_of_each_sequences_sum(attributed, slow):
    c = slow.c.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(slow.losses(c)[0].sum(), c)
    sums = -(slow.c * gradient).sum(1)
    close(attributed.ce_second, (sums + sums.square() / 2).sum(0) / slow.predicts.sum())
    close(attributed.second_blocks.sum(0) / attributed.predictions_blocks.sum(), attributed.ce_second, rtol=1e-9)
    for half, rows in ((0, slice(0, HALF)), (1, slice(HALF, SEQUENCES))):
        close(attributed.curvature_of_half(half), sums[rows].square().sum(0) / 2 / slow.predicts[rows].sum())


def test_the_square_is_in_expectation_the_curvature_of_the_loss(slow, attributed):
    """Over targets that the spliced pass itself would give: E a² = Σ over positions of Var(dz), the second derivative
    of KL(spliced ‖ spliced with less of the feature); with the text's targets a is a sequence's sum.
    """
    feature, step = int(np.argmax(attributed.ce_second)), 1e-3

    def log_q(scale):
        c = slow.c.clone()
        c[..., feature] *= scale
        return slow.run(lambda x: torch.where(slow.mask[..., None], c @ slow.D + slow.b, x)).log_softmax(-1)

    less, here, more = (log_q(scale) for scale in (1 - step, 1.0, 1 + step))
    q, slope = here.exp(), (less - more) / (2 * step)  # by the share that is taken away
    variance = (q * slope.square()).sum(-1) - (q * slope).sum(-1).square()
    curvature = sum((q * (here - other)).sum(-1) for other in (less, more)) / step**2
    close(variance.sum(1), curvature.sum(1))
    following = torch.roll(slow.tokens, -1, 1)[..., None]
    a = -((slope.gather(-1, following)[..., 0] - (q * slope).sum(-1)) * slow.predicts).sum(1)
    c = slow.c.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(slow.losses(c)[0].sum(), c)
    close(a, -(slow.c * gradient).sum(1)[:, feature])


def test_attribution_is_the_derivative_by_finite_differences(attributed, slow):
    step = 1e-4
    for feature in np.argsort(-np.abs(attributed.ce))[[0, 1, 2, 10, 20]]:
        shrunk, grown = slow.c.clone(), slow.c.clone()
        shrunk[..., feature] *= 1 - step
        grown[..., feature] *= 1 + step
        pairs = zip(slow.losses(shrunk), slow.losses(grown), strict=True)
        ce, kl = (float((less - more).sum()) / (2 * step) for less, more in pairs)
        close(attributed.ce[feature], ce / int(slow.predicts.sum()))
        close(attributed.kl[feature], kl / int(slow.mask.sum()))


def test_counts_are_of_tokens_that_count(attributed, slow):
    active = (slow.c > 0) & slow.mask[..., None]
    assert attributed.firings.tolist() == active.sum((0, 1)).tolist()
    assert attributed.tokens == int(slow.mask.sum()) and attributed.alive < FEATURES
    alive = attributed.firings > 0
    close(attributed.mean_active[alive], ((slow.c * active).sum((0, 1)) / active.sum((0, 1)))[alive])


def test_a_feature_that_never_fires_has_no_importance(attributed):
    for feature in (3, 17):
        assert attributed.firings[feature] == 0 and np.isnan(attributed.mean_active[feature])
        assert attributed.ce[feature] == attributed.ce_se[feature] == attributed.kl[feature] == 0
        assert attributed.ce_second[feature] == 0
        assert feature in attributed.ranking()[attributed.alive :]


def test_masked_positions_do_not_count(model, sae, batch):
    site = model.site(SITE)
    latents = sae.encode(model.clean(batch.tokens, record={site}).activations[site])
    gradients = torch.ones(SEQUENCES, CONTEXT, WIDTH)  # nowhere 0
    found = contributions(latents, sae.W_dec, [gradients], batch.mask)
    kept = latents.dense() * batch.mask[..., None]
    for sequence, each in enumerate(found):
        close(each.signed[0], -(kept[sequence] * sae.W_dec.sum(1)).sum(0), rtol=1e-4)
        assert each.firings.tolist() == (kept[sequence] > 0).sum(0).tolist()


def test_sparse_latents_give_what_dense_ones_give(model, sae, batch):
    site = model.site(SITE)
    activation = model.clean(batch.tokens, record={site}).activations[site]
    sparse = type(sae)(WIDTH, FEATURES, seed=1).requires_grad_(False)
    sparse.sparse_below = 1.0
    latents = sparse.encode(activation)
    assert isinstance(latents, SparseLatents)
    dense = DenseLatents(latents.dense())
    gradients = [torch.randn_like(activation), torch.randn_like(activation)]
    pairs = [contributions(each, sae.W_dec, gradients, batch.mask) for each in (latents, dense)]
    for one, other in zip(*pairs, strict=True):
        assert torch.equal(one.firings, other.firings)
        close(one.active, other.active)
        for name in ("signed", "absolute"):
            close(torch.stack(getattr(one, name)), torch.stack(getattr(other, name)), atol=1e-5)
    some = torch.rand(FEATURES) > 0.5
    assert torch.equal(latents.only(some).dense(), dense.only(some).dense())
    torch.testing.assert_close(sparse.decode(latents.only(some)), sparse.decode(dense.only(some)))
    assert torch.equal(latents.of(5), dense.of(5))


@pytest.fixture(scope="module")
def spliced(model, sae, batch):
    """The second half, as `measure_importance` cuts it."""
    site = model.site(SITE)
    clean = model.clean(batch.tokens[HALF:], record={site}, final=True)
    return SplicedBatch.of(model, sae, clean, site, batch.mask[HALF:])


def test_ablation_is_the_whole_model_without_the_feature(model, sae, spliced, attributed, slow):
    sample = choose(attributed, 100, seed=0)
    assert sorted(sample.features) == np.flatnonzero(attributed.firings).tolist()
    sums = AblationSums(sae, sample)
    sums.add(model, spliced)
    found = sums.result(attributed)
    whole, terms = slow.losses(slow.c), (slow.predicts[HALF:].sum(1), slow.mask[HALF:].sum(1))
    rises = [[a - b for a, b in zip(slow.without(f), whole, strict=True)] for f in found.features]
    for which, (ours, error) in enumerate(((found.ce, found.ce_se), (found.kl, found.kl_se))):
        expected = torch.stack([rise[which][HALF:] for rise in rises]).numpy()
        counts = terms[which].double().numpy()
        close(ours, expected.sum(1) / counts.sum(), atol=2e-6)
        residuals = expected - np.outer(expected.sum(1) / counts.sum(), counts)
        close(error, np.sqrt(3 / 2 * (residuals**2).sum(1)) / counts.sum(), atol=2e-6)
    second = attributed.ce_of_half(1) + attributed.squares_blocks[3:].sum(0) / 2 / int(terms[0].sum())
    close(found.second_ce, second[found.features])
    close(found.estimated_ce, attributed.ce_of_half(1)[found.features])
    fires = ((slow.c > 0) & slow.mask[..., None])[HALF:].any(1)
    assert found.sequences.tolist() == fires.sum(0)[found.features].tolist()
    assert min(found.sequences) < SEQUENCES - HALF  # some were skipped


def test_ablated_features_are_told_apart_in_a_pass_of_several_batches(model, sae, batch, attributed):
    site, sample = model.site(SITE), choose(attributed, 6, seed=0)
    results = []
    for size in (1, SEQUENCES - HALF):
        sums = AblationSums(sae, sample)
        for start in range(HALF, SEQUENCES, size):
            rows = slice(start, start + size)
            clean = model.clean(batch.tokens[rows], record={site}, final=True)
            sums.add(model, SplicedBatch.of(model, sae, clean, site, batch.mask[rows]))
        results.append(sums.result(attributed))
    close(results[0].ce, results[1].ce)
    close(results[0].kl_se, results[1].kl_se)
    assert results[0].sequences.tolist() == results[1].sequences.tolist()


def test_a_sample_is_half_by_rank_half_at_random(attributed):
    sample = choose(attributed, 12, seed=0)
    ranked = attributed.ranking()[: attributed.alive].tolist()
    places = [ranked.index(feature) for feature in sample.features]
    assert len(set(places)) == 12 and sample.by_rank == 6
    assert places[0] == 0 and places[5] == attributed.alive - 1 and places[:6] == sorted(places[:6])
    assert choose(attributed, 12, seed=0).features.tolist() == sample.features.tolist()
    assert choose(attributed, 12, seed=1).features[6:].tolist() != sample.features[6:].tolist()
    assert len(choose(attributed, 0, seed=0).features) == 0


def test_features_are_ranked_on_the_first_half_alone(attributed, slow):
    c = slow.c.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(slow.losses(c)[0].sum(), c)
    change = -(slow.c * gradient).sum(1)
    alive = attributed.firings > 0
    for first_order, value in ((True, lambda rows: rows.sum(0).abs()), (False, lambda r: (r + r.square() / 2).sum(0))):
        orders = [
            [f for f in torch.argsort(-value(rows), stable=True).tolist() if alive[f]]
            for rows in (change[:HALF], change[HALF:])
        ]
        assert attributed.ranking(first_order=first_order)[: attributed.alive].tolist() == orders[0] != orders[1]
    close(attributed.ce_of_half(0), change[:HALF].sum(0) / slow.predicts[:HALF].sum())
    close(attributed.ce_of_half(1), change[HALF:].sum(0) / slow.predicts[HALF:].sum())


def test_faithfulness_is_the_whole_model_with_the_first_features_only(model, sae, spliced, attributed, slow):
    sums = FaithfulnessSums(sae, attributed, seed=0)
    sums.add(model, spliced)
    nothing = np.zeros(SEQUENCES - HALF)
    found = sums.result(nothing, nothing, nothing)
    for first_order, curve in ((False, found.ce), (True, found.first_order_ce)):
        ranking = attributed.ranking(first_order=first_order)
        for n, ce in zip(found.kept[:-1], curve, strict=False):
            c = torch.zeros_like(slow.c)
            c[..., ranking[:n]] = slow.c[..., ranking[:n]]
            close(ce, slow.losses(c)[0][HALF:], rtol=1e-4)
        close(curve[-1], slow.losses(slow.c)[0][HALF:], rtol=1e-4)
    assert np.array_equal(found.ce[[0, -1]], found.random_ce[[0, -1]])
    assert not np.array_equal(found.ce, found.random_ce)


def test_further_counts_are_measured_as_those_of_the_curve(model, sae, spliced, attributed, slow):
    sums = FaithfulnessSums(sae, attributed, seed=0)
    sums.add(model, spliced)
    sums.between = [5, 11]
    sums.add_between(model, spliced.clean, spliced.site, spliced.mask)
    nothing = np.zeros(SEQUENCES - HALF)
    found = sums.result(nothing, nothing, nothing)
    ranking = attributed.ranking()
    for n, ce in zip(*found.by_importance, strict=True):
        c = torch.zeros_like(slow.c)
        c[..., ranking[:n]] = slow.c[..., ranking[:n]]
        close(ce, slow.losses(c)[0][HALF:], rtol=1e-4)
    assert found.by_importance[0].tolist() == sorted([*found.kept, 5, 11])


@pytest.mark.parametrize("falls", [3.0, 5.0, 9.0, 100.0])
def test_counts_draw_together_about_where_90_percent_is_carried(sae, attributed, falls):
    def ce(n):
        return np.array([np.exp(-n / falls)])

    sums = FaithfulnessSums(sae, attributed, seed=0)
    sums._sums = [np.tile(np.array([ce(n) for n in sums.kept]), (3, 1, 1))]
    while sums.narrow(1.0):
        assert not set(sums.between) & {*sums.kept, *sums._between}
        sums._between |= {n: [ce(n)] for n in sums.between}
    nothing = np.zeros(1)
    counts, curve = sums.result(nothing, nothing, nothing).by_importance
    every = np.arange(attributed.alive + 1)
    reached = np.argmax(1 - np.exp(-every / falls) >= 0.9 * (1 - np.exp(-attributed.alive / falls)))
    place = counts.tolist().index(counts[1 - curve[:, 0] >= 0.9 * (1 - curve[-1, 0])][0])
    assert counts[place - 1] < reached <= counts[place] <= max(1.06 * counts[place - 1], counts[place - 1] + 1)
    assert len(counts) - len(sums.kept) <= 6
    assert not sums.narrow(-1.0)  # nothing is carried


def test_counts_of_kept_features():
    assert [kept_counts(n).tolist() for n in (0, 1, 2, 8, 9)] == [
        [0],
        [0, 1],
        [0, 1, 2],
        [0, 1, 2, 4, 8],
        [0, 1, 2, 4, 8, 9],
    ]


@pytest.fixture(scope="module")
def run(model, corpora, token_files, tmp_path_factory):
    config = recipe(tmp_path_factory.mktemp("run") / "run")
    folder = train(config.model_copy(update={"data": data(token_files)}), model=model, corpora=corpora, display=False)
    return folder.folder


def test_measured_runs_agree_with_their_evaluation_and_are_not_measured_again(model, corpora, run):
    def again(model=model, **changes):
        return measure_importance([run], model=model, corpora=corpora, ablate=4, **changes)[run]

    assert read_importance(run) is None
    measured = again()
    evaluate([run], model=model, corpora=corpora)
    sums, half = read_sums(run), 16  # of 32 sequences
    curve = measured.faithfulness
    close(curve.ce[-1], sums["ce_spliced"][half:])
    close(curve.clean, sums["ce_clean"][half:])
    assert curve.predictions.tolist() == sums["predictions"][half:].tolist()
    assert measured.importance.tokens == sums["tokens"].sum() and not measured.importance.has_kl
    kept = read_measured(run)
    assert kept.settings == measured.settings | {"tokens_that_count": measured.importance.tokens}
    for part in ("importance", "ablations", "faithfulness"):
        for name, value in vars(getattr(kept, part)).items():
            assert np.array_equal(value, getattr(getattr(measured, part), name), equal_nan=True), name
    tensors = safetensors.numpy.load_file(run / IMPORTANCE_FILE)
    older = {name: values for name, values in tensors.items() if "between" not in name}
    assert len(older) == len(tensors) - 2
    with safe_open(run / IMPORTANCE_FILE, framework="numpy") as opened:
        metadata = opened.metadata()
    safetensors.numpy.save_file(older, run / IMPORTANCE_FILE, metadata)  # as version 0.1 wrote it
    assert len(read_measured(run).faithfulness.between_kept) == 0
    safetensors.numpy.save_file(tensors, run / IMPORTANCE_FILE, metadata)
    passes = []
    counted = OwnModel(model, lambda clean, tokens, **asked: passes.append(1) or clean(tokens, **asked))
    again(model=counted)
    assert not passes
    assert again(model=counted, kl=True).importance.has_kl and passes
    passes.clear()
    assert again(model=counted).importance.has_kl and not passes  # what has more will do
    assert again(model=counted, tokens=128).importance.tokens == 128 and passes
    (run / IMPORTANCE_FILE).write_bytes(b"broken")
    with pytest.raises(FormatError, match="--again"):
        again(model=counted)
    assert again(model=counted, again=True).importance.tokens == 256


def test_an_sae_that_was_trained_on_is_measured_again(model, corpora, run):
    weights = run / "sae" / "sae_weights.safetensors"
    before = measure_importance([run], model=model, corpora=corpora, ablate=0, tokens=32)[run]
    sae = ReluSAE.load(run)
    sae.b_dec += 1
    kept = weights.read_bytes()
    sae.save(run / "sae")
    RunFolder(run).note_weights(whole=True)
    after = measure_importance([run], model=model, corpora=corpora, ablate=0, tokens=32)[run]
    weights.write_bytes(kept)
    RunFolder(run).note_weights(whole=True)
    assert not np.array_equal(before.importance.ce, after.importance.ce)


def test_what_cannot_be_measured_is_refused(model, corpora, run, tmp_path):
    def measure(**more):
        return measure_importance([run], model=model, corpora=corpora, **more)

    with pytest.raises(ConfigError, match="two halves"):
        measure(tokens=CONTEXT)
    with pytest.raises(DataError, match="fewer than"):
        measure(tokens=100_000)
    with pytest.raises(ConfigError, match="0 or more"):
        measure(ablate=-1)
    with pytest.raises(RunFolderError, match="is an empty folder, and a run folder is needed here"):
        measure_importance([tmp_path])
