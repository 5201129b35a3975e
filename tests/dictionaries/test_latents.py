"""Sparse latents are dense ones: same values, same gradients, whatever the dictionary is made of."""

import pytest
import torch

from endwise.dictionaries import DenseLatents, ReluSAE, SparseLatents
from endwise.dictionaries.latents import feature_sums, per_pair
from endwise.kernels import Pairs

D, F = 12, 90
MASK = torch.rand(3, 20, generator=torch.Generator().manual_seed(2)) < 0.7


@pytest.fixture(params=[True, False], ids=["unit norm", "as stored"])
def sae(request):
    sae = ReluSAE(D, F, seed=1, unit_norm=request.param).double()
    with torch.no_grad():
        sae.b_enc -= 0.6
        sae.b_enc[4] = -100.0  # never active
        sae.decoder *= torch.linspace(0.1, 3.0, F)[:, None]
    return sae


def step(sae, share, x, p):
    """One forward and backward pass with everything an objective reads."""
    sae.sparse_below = share
    sae.zero_grad()
    x = x.clone().requires_grad_()
    latents = sae.encode(x)
    estimate = sae.decode(latents)
    loss = ((estimate - 2 * x.detach()).square().sum(-1) * MASK).sum() + 0.7 * (latents.penalty(p) * MASK).sum()
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in sae.named_parameters()}
    return latents, estimate.detach(), {"loss": loss.detach(), "x": x.grad, **gradients}


@pytest.mark.parametrize("p", [1.0, 0.5, 2.0])
def test_sparse_is_dense(sae, p):
    x = torch.randn(3, 20, D, dtype=torch.float64)
    sparse, sparse_estimate, sparse_gradients = step(sae, 1.0, x, p)
    dense, dense_estimate, dense_gradients = step(sae, 0.0, x, p)
    assert isinstance(sparse, SparseLatents) and isinstance(dense, DenseLatents)
    assert 0 < float(dense.l0().mean()) < F / 2
    torch.testing.assert_close(sparse.dense(), dense.dense())
    torch.testing.assert_close(sparse_estimate, dense_estimate)
    torch.testing.assert_close(sparse.penalty(p), dense.penalty(p))
    assert torch.equal(sparse.l0(), dense.l0())
    for mask in (MASK, torch.zeros_like(MASK), torch.ones_like(MASK)):
        assert torch.equal(sparse.fired(mask), dense.fired(mask))
        assert torch.equal(sparse.firings(mask), dense.firings(mask))
        assert torch.equal(dense.firings(mask), (dense.dense()[mask] > 0).sum(0))
    torch.testing.assert_close(sparse_gradients, dense_gradients)


def test_gradients_are_the_finite_differences(sae):
    sae.sparse_below = 1.0
    x = torch.randn(4, D, dtype=torch.float64)

    def loss(x, encoder, b_enc, decoder, b_dec):
        parameters = {"encoder": encoder, "b_enc": b_enc, "decoder": decoder, "b_dec": b_dec}
        return torch.func.functional_call(sae, parameters, (x,)).square().sum()

    inputs = [x, sae.encoder, sae.b_enc, sae.decoder, sae.b_dec]
    assert torch.autograd.gradcheck(loss, [value.detach().requires_grad_() for value in inputs], fast_mode=True)


def test_the_choice_is_made_by_counting(sae):
    x = torch.randn(50, D, dtype=torch.float64)
    share = float(sae.encode(x).l0().mean()) / F
    sae.sparse_below = share * 1.01
    assert isinstance(sae.encode(x), SparseLatents)
    sae.sparse_below = share * 0.99
    assert isinstance(sae.encode(x), DenseLatents)


def test_nothing_active(sae):
    with torch.no_grad():
        sae.b_enc -= 1000.0
    sae.sparse_below = 1.0
    x = torch.randn(2, 3, D, dtype=torch.float64, requires_grad=True)
    latents = sae.encode(x)
    estimate = sae.decode(latents)
    torch.testing.assert_close(estimate, sae.b_dec.expand_as(estimate))
    (estimate.sum() + latents.penalty().sum()).backward()
    assert not x.grad.any() and not sae.encoder.grad.any() and not sae.decoder.grad.any()


def test_what_features_pairs_have_and_its_sums_are_each_others_gradients():
    rows, features = torch.tensor([0, 0, 1, 3, 3]), torch.tensor([1, 4, 1, 0, 4])
    pairs = Pairs(rows, features, torch.tensor([0, 2, 3, 3]), 6)
    of_features, of_pairs = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in (6, 5))
    for of, numbers in ((per_pair, of_features), (feature_sums, of_pairs)):
        torch.autograd.gradcheck(lambda each, of=of: of(each.square(), pairs), numbers)
        torch.autograd.gradgradcheck(lambda each, of=of: of(each.square(), pairs), numbers)
