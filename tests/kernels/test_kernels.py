"""Every registered implementation of the kernels against slow definitions in float64, and the screen's guarantee."""

import pytest
import torch

from endwise.kernels import Pairs, kernels_for, registered
from endwise.kernels.screen import Screen
from own_kernels import OwnKernels, all_kernels

N, D, F = 75, 12, 64


def cases(**variants):
    return [pytest.param(kernels, id=name) for name, kernels in all_kernels(**variants).items()]


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def some_pairs(density=0.1):
    """Random pairs that leave whole rows and whole features empty, the first and the last among them."""
    active = torch.rand(N, F, generator=torch.Generator().manual_seed(5)) < density
    active[[0, 7, N - 1]] = False
    active[:, [0, 9, F - 1]] = False
    rows, features = active.nonzero(as_tuple=True)
    starts = torch.tensor([int((rows < row).sum()) for row in range(N)])
    return Pairs(rows, features, starts, F)


def matrix(pairs, values):
    result = torch.zeros(N, F, dtype=values.dtype)
    for row, feature, value in zip(pairs.rows, pairs.features, values, strict=True):
        result[row, feature] += value
    return result


@pytest.mark.parametrize("kernels", cases())
def test_weighted_sums_are_the_product_and_by_feature_the_transposed_one(kernels):
    pairs = some_pairs()
    values, table, rows = draw(len(pairs.rows), seed=1), draw(F, D, seed=2), draw(N, D, seed=3)
    sparse = matrix(pairs, values)
    product = kernels.weighted_sums(table, pairs.features, pairs.row_starts, values)
    torch.testing.assert_close(product, sparse @ table)
    order, row_of, starts = pairs.by_feature
    torch.testing.assert_close(kernels.weighted_sums(rows, row_of, starts, values[order]), sparse.T @ rows)


@pytest.mark.parametrize("kernels", cases())
def test_dot_products_are_one_number_per_pair(kernels):
    pairs = some_pairs()
    table, rows = draw(F, D, seed=2), draw(N, D, seed=3)
    expected = torch.stack([table[f] @ rows[r] for r, f in zip(pairs.rows, pairs.features, strict=True)])
    torch.testing.assert_close(kernels.dot_products(table, pairs.features, rows, pairs), expected)


@pytest.mark.parametrize("kernels", cases())
def test_decoder_gradients_are_those_of_the_product(kernels):
    pairs = some_pairs()
    values, table = draw(len(pairs.rows), seed=1).requires_grad_(), draw(F, D, seed=2).requires_grad_()
    upstream = draw(N, D, seed=3)
    dense = torch.zeros(N, F, dtype=torch.float64).index_put((pairs.rows, pairs.features), values)
    expected = torch.autograd.grad(dense @ table, (values, table), upstream)
    found = kernels.decoder_gradients(table.detach(), pairs, values.detach(), upstream)
    torch.testing.assert_close(tuple(found), expected)
    torch.testing.assert_close(kernels.feature_sums(values.detach(), pairs), dense.detach().sum(0))


@pytest.mark.parametrize("kernels", cases())
def test_no_pairs_at_all(kernels):
    none = torch.zeros(0, dtype=torch.int64)
    pairs = Pairs(none, none, torch.zeros(N, dtype=torch.int64), F)
    table, rows, values = draw(F, D), draw(N, D), draw(0)
    assert not kernels.weighted_sums(table, none, pairs.row_starts, values).any()
    assert not kernels.weighted_sums(rows, none, pairs.by_feature.starts, values).any()
    assert kernels.dot_products(table, none, rows, pairs).shape == (0,)


@pytest.mark.parametrize("kernels", cases(elements=(1, 1 << 23)))
@pytest.mark.parametrize("bias", [-2.0, -1e6, 0.0])
def test_active_finds_every_positive_place_in_order(kernels, bias):
    x, weight, b = draw(N, D), draw(F, D, seed=1), bias + draw(F, seed=2)
    expected = torch.relu(x @ weight.T + b)
    found = kernels.active(x, weight, b, limit=N * F)
    assert torch.equal(torch.stack([found.pairs.rows, found.pairs.features]), expected.nonzero().T)
    torch.testing.assert_close(matrix(found.pairs, found.values), expected)
    assert found.pairs.row_starts.tolist() == [int((found.pairs.rows < row).sum()) for row in range(N)]


@pytest.mark.parametrize("kernels", cases(elements=(1, 1 << 23)))
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_active_finds_every_place_above_a_threshold_with_the_value_there(kernels, each, dtype):
    x, weight, b = draw(N, D, dtype=dtype), draw(F, D, seed=1, dtype=dtype), draw(F, seed=2, dtype=dtype)
    above = 2 + draw(F, seed=3, dtype=dtype).abs() if each else torch.tensor(2.5, dtype=dtype)
    before = x @ weight.T + b
    expected = before.where(before > above, 0.0)
    found = kernels.active(x, weight, b, N * F, above)
    assert torch.equal(torch.stack([found.pairs.rows, found.pairs.features]), expected.nonzero().T)
    torch.testing.assert_close(matrix(found.pairs, found.values), expected)
    assert len(found.values) < len(kernels.active(x, weight, b, N * F).values)
    assert kernels.active(x, weight, b, len(found.values) - 1, above) is None


@pytest.mark.parametrize("kernels", cases())
def test_active_gives_up_beyond_its_limit(kernels):
    x, weight, b = draw(N, D), draw(F, D, seed=1), draw(F, seed=2) - 2
    count = int((x @ weight.T + b > 0).sum())
    assert kernels.active(x, weight, b, limit=count) is not None
    assert kernels.active(x, weight, b, limit=count - 1) is None
    assert kernels.active(x, weight, b, limit=0) is None


@pytest.mark.parametrize("kernels", cases(screens=(False, True)))
def test_what_is_not_a_number_stays_visible(kernels):
    """Dense latents would be NaN there, and stop the run."""
    x, weight = draw(N, D, dtype=torch.float32), draw(F, D, seed=1, dtype=torch.float32)
    x[3, 2] = float("nan")
    found = kernels.active(x, weight, draw(F, seed=2, dtype=torch.float32) - 9, limit=N * F)
    assert found.pairs.features[found.pairs.rows == 3].tolist() == list(range(F))
    assert found.values[found.pairs.rows == 3].isnan().all()
    assert not found.values[found.pairs.rows != 3].isnan().any()


def test_a_device_without_kernels_of_its_own_gets_the_eager_ones():
    assert kernels_for(torch.device("meta")) is registered()["eager"]


def hard_encoder(spread, seed):
    """Pre-activations that nearly cancel against their bias, with a few directions of huge norm as real models have."""
    x, weight = draw(400, 48, seed=seed, dtype=torch.float32), draw(300, 48, seed=seed + 1, dtype=torch.float32)
    x[:, :2] *= spread
    weight[::3] *= spread
    bias = -(x[:300] * weight).sum(1) * (1 + 1e-3 * draw(300, seed=seed + 2, dtype=torch.float32))
    return x, weight, bias


@pytest.mark.parametrize("spread", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("seed", range(5))
def test_the_screen_misses_no_active_feature(spread, seed):
    x, weight, bias = hard_encoder(spread, seed)
    exact = (x.double() @ weight.double().T + bias.double()) > 0
    candidates = torch.zeros(exact.numel(), dtype=torch.bool)
    candidates[Screen(weight, bias).candidates(x)] = True
    assert not (exact.flatten() & ~candidates).any()
    assert candidates.sum() < exact.numel()  # or it would screen nothing


@pytest.mark.parametrize("size", [1e3, 1e5])
def test_a_large_bias_belongs_in_the_margin(size):
    """Near a large |b|, bf16's rounding of b alone would lose the sign."""
    x = torch.full((1, 8), 1.0)
    bias = torch.full((200,), -size) * torch.linspace(1.0, 1.02, 200)
    for excess in (1e-3, 1e-2):
        weight = (-bias * (1 + excess) / 8)[:, None].expand(200, 8).contiguous()
        assert len(Screen(weight, bias).candidates(x)) == 200


@pytest.mark.parametrize("spread", [1.0, 100.0])
def test_the_screened_encoder_is_the_dense_one(spread):
    x, weight, bias = hard_encoder(spread, seed=9)
    dense, screened = (
        OwnKernels(screened).active(x, weight, bias, limit=x.shape[0] * len(weight)) for screened in (False, True)
    )
    a = torch.zeros(400, 300).index_put((dense.pairs.rows, dense.pairs.features), dense.values)
    b = torch.zeros(400, 300).index_put((screened.pairs.rows, screened.pairs.features), screened.values)
    scale = float((x.norm(dim=1)[:, None] * weight.norm(dim=1)).max())
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * scale)  # a place within rounding of 0 may be in only one


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("spread", [1.0, 100.0])
@pytest.mark.parametrize("level", [1e-3, 1.0, 1e3])
def test_the_screen_never_misses_a_feature_above_a_threshold(level, spread, each):
    x, weight, bias = hard_encoder(spread, seed=4)
    before = x.double() @ weight.double().T + bias.double()
    # A threshold in the midst of what there is, where b − t all but cancels
    above = (before.abs().median(0).values if each else before.abs().median()).float() * level
    bias = bias + above
    exact = (x.double() @ weight.double().T + bias.double()) > above.double()
    candidates = torch.zeros(exact.numel(), dtype=torch.bool)
    candidates[Screen(weight, bias, above).candidates(x)] = True
    assert exact.any() and not (exact.flatten() & ~candidates).any()
    assert candidates.sum() < exact.numel()
