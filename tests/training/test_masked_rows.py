"""A row outside the mask changes no sum and no gradient, whatever it holds: 0 times NaN or infinity would."""

import numpy as np
import pytest
import torch

from endwise.analysis.directions.norms import NormCollector
from endwise.analysis.directions.principal import AlongDirections, Principal
from endwise.analysis.directions.text_at_site import SiteBatch
from endwise.config.objective import ObjectiveConfig
from endwise.config.run import EvaluationConfig
from endwise.dictionaries import DenseLatents, ReluSAE, SparseLatents
from endwise.evaluation.measure import measure
from endwise.features.attribution import contributions
from endwise.features.harvest.firings import Firings
from endwise.kernels import registered
from endwise.models.language_model import Clean, Spliced
from endwise.models.readout import Readout
from endwise.models.sites import Site
from endwise.training.objectives import KL, DownstreamMSE, LocalMSE, Sparsity, build_objective
from endwise.training.trainee import Trainee
from own_training import OwnCorpus, OwnModel
from small_gpt2 import CONTEXT, WIDTH, recipe

BAD = [float("nan"), float("inf"), pytest.param(-float("inf"), marks=pytest.mark.slow), 1e30]
BATCH, POS, D, F, VOCAB = 3, 5, 4, 9, 7
LAST = "blocks.3.hook_resid_post"
"""After it nothing mixes positions, so that what a masked one holds stays there."""


@pytest.fixture(params=BAD, ids=str)
def bad(request):
    return request.param


@pytest.fixture
def mask():
    mask = torch.rand(BATCH, POS, generator=torch.Generator().manual_seed(3)) < 0.6
    mask[0, :2] = True
    return mask


def spoilt(x, mask, bad):
    return x.masked_fill(~mask[..., None], bad)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("term", ["kl", "downstream_mse", "local_mse", "ce", *(f"sparsity {p}" for p in (0.5, 1, 2))])
def test_losses_and_their_gradients(term, softcap, bad, mask):
    readout, site = Readout(torch.randn(VOCAB, D), torch.randn(VOCAB), softcap=softcap), Site.parse(LAST)
    tokens, clean, start = torch.randint(VOCAB, (BATCH, POS)), torch.randn(BATCH, POS, D), torch.randn(BATCH, POS, D)

    def total(value, truth):
        passes = Clean(tokens, {site: truth}, truth), Spliced({site: value}, value)
        if term == "kl":
            return KL(1.0).total(readout, *passes, mask)
        if term == "downstream_mse":
            return DownstreamMSE(1.0, (site,)).total(readout, *passes, mask)
        if term == "local_mse":
            return LocalMSE(1.0).total(truth, value, DenseLatents(value), mask)
        if term == "ce":
            return readout.cross_entropy(value, tokens, mask).sum()
        return Sparsity(1.0, float(term.split()[1])).total(truth, truth, DenseLatents(value), mask)

    found = []
    for filled in (0.0, bad):
        leaf = spoilt(start, mask, filled).requires_grad_()
        loss = total(leaf, spoilt(clean, mask, filled))
        loss.backward()
        found.append((loss.detach(), leaf.grad))
    (expected, gradient), (loss, ours) = found
    assert torch.equal(loss, expected) and loss.isfinite() and loss > 0
    assert torch.equal(ours, gradient) and not ours[~mask].any() and ours[mask].any()


def test_every_metric_of_predictions(bad, mask):
    readout, tokens = Readout(torch.randn(VOCAB, D)), torch.randint(VOCAB, (BATCH, POS))
    clean, spliced = torch.randn(2, BATCH, POS, D)
    (expected,), (ours,) = (
        readout.compare(spoilt(clean, mask, filled), [spoilt(spliced, mask, filled)], tokens, mask)
        for filled in (0.0, bad)
    )
    for name, values in vars(expected).items():
        assert torch.equal(getattr(ours, name), values), name


@pytest.mark.parametrize("share", [1.0, 0.0], ids=["sparse", "dense"])
def test_what_is_read_of_latents(share, bad, mask):
    sae = ReluSAE(D, F, seed=1).requires_grad_(False)
    sae.sparse_below = share
    x, gradients = torch.randn(BATCH, POS, D), [torch.randn(BATCH, POS, D)]
    plain, ours = (sae.encode(spoilt(x, mask, filled)) for filled in (0.0, bad))
    assert isinstance(ours, SparseLatents if share else DenseLatents)
    assert torch.equal(ours.firings(mask), plain.firings(mask)) and torch.equal(ours.fired(mask), plain.fired(mask))
    for p in (0.5, 1.0, 2.0):
        torch.testing.assert_close(ours.penalty(p, mask), plain.penalty(p).where(mask, 0.0))
    for one, other in zip(*(contributions(each, sae.W_dec, gradients, mask) for each in (ours, plain)), strict=True):
        torch.testing.assert_close(vars(one), vars(other))
    numbers = torch.arange(BATCH)
    kept, expected = (Firings.of(latents, mask, numbers, F) for latents in (ours, plain))
    assert torch.equal(kept.rows, expected.rows) and torch.equal(kept.features, expected.features)
    torch.testing.assert_close(kept.values, expected.values)
    assert torch.equal(ours.only(torch.zeros(F, dtype=torch.bool)).dense(), torch.zeros(BATCH, POS, F))


def test_lengths_and_directions_of_reconstructions(bad, mask):
    x, y = torch.randn(2, BATCH, POS, D)
    directions = Principal(torch.zeros(D).double(), torch.ones(D).double(), torch.eye(D).double(), BATCH * POS)
    found = []
    for filled in (1.0, bad):
        a, b = spoilt(x, mask, filled), spoilt(y, mask, filled)
        batch = SiteBatch(Clean(mask.long(), {}, None), a, mask, torch.zeros_like(mask))
        along, lengths = AlongDirections(directions, with_starts=True), NormCollector()
        along.add(batch, directions.along(a), b)
        lengths.add(batch, b)
        found.append((along.reconstructed(20, 0), lengths.norms(20, 0)))
    (expected, norms), (ours, own) = found
    for name in ("correlation", "explained_variance"):
        np.testing.assert_array_equal(getattr(ours, name).estimate, getattr(expected, name).estimate)
    assert own == norms and np.isfinite(own.ratio.estimate)


class Poisoned(OwnModel):
    """Fills masked rows of everything that the clean pass records."""

    def __init__(self, like, mask):
        super().__init__(like, self.spoil)
        self.mask, self.bad = mask, 0.0

    def spoil(self, clean, tokens, **asked):
        found = clean(tokens, **asked)
        filled = {site: spoilt(value, self.mask[: len(value)], self.bad) for site, value in found.activations.items()}
        return Clean(tokens, filled, None if found.final is None else spoilt(found.final, self.mask, self.bad))


@pytest.mark.parametrize("share", [1.0, 0.0], ids=["sparse", "dense"])
@pytest.mark.parametrize(("kind", "p"), [("local", 1.0), ("local", 2.0), ("e2e", 1.0), ("e2e", 0.5)])
def test_gradients_of_every_weight(model, kind, p, share, bad, tmp_path):
    mask = torch.ones(2, CONTEXT, dtype=torch.bool)
    mask[0, 0], mask[1, 5:] = False, False
    tokens, site = torch.randint(1, 31, (2, CONTEXT)), model.site(LAST)
    poisoned = Poisoned(model, mask)
    config = recipe(tmp_path).training
    objective = build_objective(
        ObjectiveConfig.build({"kind": kind, "sparsity": {"coefficient": 0.3, "p": p}}), model, site
    )
    found = []
    for poisoned.bad in (0.0, bad):
        sae = ReluSAE(WIDTH, 40, seed=1)
        sae.sparse_below = share
        trainee = Trainee(sae, site, objective, config, total_steps=9)
        trainee.begin_step()
        trainee.accumulate(model, poisoned.clean(tokens, record={site}, final=True), mask, mask.sum())
        found.append({name: parameter.grad.clone() for name, parameter in sae.named_parameters()})
        trainee.finish_step(mask.sum(), tokens.numel())
        found[-1] |= {name: torch.tensor(value) for name, value in trainee.report().items()}
    expected, ours = found
    for name, value in expected.items():
        assert value.isfinite().all() and torch.equal(ours[name], value), name


def test_an_evaluation(model, corpora, bad):
    mask = torch.ones(4, CONTEXT, dtype=torch.bool)
    mask[:, 0], mask[2, 4:] = False, False

    def with_mask(batch, rows):
        batch = batch(rows)
        batch.mask.copy_(mask.repeat(-(-len(batch.mask) // len(mask)), 1)[: len(batch.mask)])
        return batch

    heldout, poisoned = OwnCorpus(corpora.heldout, with_mask), Poisoned(model, mask)
    sae, settings = ReluSAE(WIDTH, 40, seed=1).requires_grad_(False), EvaluationConfig(tokens=64, batch=4, bootstrap=9)
    found = []
    for poisoned.bad in (0.0, bad):
        measured = measure(poisoned, {"sae": (model.site(LAST), sae)}, heldout, settings)["sae"]
        found.append((measured.sums, measured.metrics, measured.baselines))
    (sums, *expected), (own, *ours) = found
    for name, values in sums.items():
        assert np.array_equal(own[name], values) and np.isfinite(values).all(), name
    assert ours == expected


@pytest.mark.parametrize("share", [1.0, 0.0], ids=["sparse", "dense"])
@pytest.mark.parametrize("shape", [(0,), (0, 5), (4, 0)])
def test_no_rows_at_all(share, shape):
    sae = ReluSAE(D, F, seed=1)
    sae.sparse_below = share
    x = torch.randn(*shape, D, requires_grad=True)
    latents = sae.encode(x)
    estimate = sae.decode(latents)
    nowhere = torch.ones(shape, dtype=torch.bool)
    assert estimate.shape == x.shape and latents.dense().shape == (*shape, F)
    assert latents.l0().shape == latents.penalty(0.5, nowhere).shape == latents.of(2).shape == shape
    assert not latents.fired(nowhere).any() and not latents.firings(nowhere).any()
    assert latents.only(torch.ones(F, dtype=torch.bool)).dense().shape == (*shape, F)
    (estimate.sum() + latents.penalty(0.5).sum()).backward()
    assert all(not parameter.grad.any() for parameter in sae.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("kernels", [pytest.param(kernels, id=name) for name, kernels in registered().items()])
def test_kernels_of_no_rows(kernels):
    readout, x = Readout(torch.randn(VOCAB, D)), torch.randn(0, D)
    found = kernels.active(x, torch.randn(F, D), torch.randn(F), limit=0)
    assert found is not None and not len(found.values) and found.pairs.n_rows == 0
    total, gradient = kernels.kl(x, x, torch.ones(0, dtype=torch.bool), readout.unembedding)
    assert total == 0 and gradient.shape == (0, D)
    rows, tokens = torch.randn(0, POS, D), torch.zeros(0, POS, dtype=torch.int64)
    mask = tokens.bool()
    assert readout.cross_entropy(rows, tokens, mask).shape == (0, POS)
    assert readout.compare(rows, [rows], tokens, mask)[0].kl.shape == (0, POS)
