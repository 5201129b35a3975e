"""The search by blocks, and the k largest of each row that kernels find by it, against slow definitions."""

import pytest
import torch

from endwise.kernels.scan import Blocks, places_above, places_of
from own_kernels import all_kernels

ROWS, D = 50, 8


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def coarse(*shape, seed=0):
    """Numbers of few digits, whose sums and products are exact in float32, and often equal."""
    return (draw(*shape, seed=seed) * 2).round() / 2


def largest_of(values, k):
    """The k largest positive numbers of each row by sorting, of equal ones the first; NaN before all, and every one."""
    order = values.nan_to_num(nan=torch.inf).sort(dim=-1, descending=True, stable=True).indices
    first = torch.zeros_like(values, dtype=torch.bool).scatter(-1, order[:, :k], True)
    return values.isnan() | (first & (values > 0))


def cases(**variants):
    return [pytest.param(kernels, id=name) for name, kernels in all_kernels(**variants).items()]


SCREENS = (False, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 96, 100, 1])
@pytest.mark.parametrize("level", [-9.0, 0.0, 1.0, 2.5, 9.0])
@pytest.mark.parametrize("each", [False, True])
def test_places_above_are_those_of_the_comparison(dtype, width, level, each):
    numbers = coarse(ROWS, width).to(dtype)
    numbers[3, 0], numbers[7, -1], numbers[8, 0] = torch.nan, torch.inf, -torch.inf
    least = (level + coarse(width, seed=1) * each).to(dtype) if each else torch.tensor(level, dtype=dtype)
    expected = ((numbers > least) | numbers.isnan()).view(-1).nonzero()[:, 0]
    assert torch.equal(places_above(numbers, least), expected)
    assert torch.equal(places_above(numbers.T.contiguous().T, least), expected)
    if not each:
        assert torch.equal(places_above(numbers.view(-1), least), expected)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("start", [0, 1, 8])
@pytest.mark.parametrize("length", [0, 1, 7, 8, 400, 401])
def test_places_of_a_mask_are_those_that_are_true(share, start, length):
    mask = (torch.rand(start + length, generator=torch.Generator().manual_seed(length)) < share)[start:]
    assert torch.equal(places_of(mask), mask.nonzero()[:, 0])
    assert torch.equal(places_of(mask.view(1, -1)), mask.nonzero()[:, 0])


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("width", [256, 8 * 32, 2048, 100])
def test_a_row_has_k_numbers_at_its_bound_and_few_more(k, width):
    numbers = draw(200, width)
    blocks = Blocks.of(numbers, k)
    reached = (numbers >= blocks.reached_by(k)[:, None]).sum(-1)
    assert (reached >= k).all()
    if width == 2048:
        assert float(reached.float().mean()) < 1.2 * k and blocks.size in (32, 64)


@pytest.mark.parametrize("kernels", cases(screens=SCREENS, elements=(1, 1 << 23)))
@pytest.mark.parametrize(("size", "k"), [(320, 1), (320, 10), (1024, 4), (100, 3)])
@pytest.mark.parametrize("bias", [0.0, -8.0, -1e6])
def test_the_k_largest_of_rows_are_those_of_sorting(kernels, size, k, bias):
    """With many equal values, with rows of fewer positive ones than k, and with none."""
    x, weight, b = coarse(ROWS, D), coarse(size, D, seed=1), bias + coarse(size, seed=2)
    x[5] = 0.0
    values = x @ weight.T + b
    found = kernels.largest(x, weight, b, k, ROWS * size)
    expected = largest_of(values, k)
    assert torch.equal(torch.stack([found.pairs.rows, found.pairs.features]), expected.nonzero().T)
    assert torch.equal(found.values, values[expected])
    assert found.pairs.row_starts.tolist() == [int((found.pairs.rows < row).sum()) for row in range(ROWS)]
    if bias == -8.0 and k > 1:
        assert 0 < int(expected.sum()) < k * ROWS
    if len(found.values):
        assert kernels.largest(x, weight, b, k, len(found.values) // 2 - 1) is None


@pytest.mark.parametrize("kernels", cases(screens=SCREENS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_k_largest_of_rows_of_any_length(kernels, dtype):
    """Rows and features of norms that differ by orders of magnitude, whose bounds in bf16 are rough."""
    x, weight, b = draw(ROWS, D).to(dtype), draw(640, D, seed=1).to(dtype), draw(640, seed=2).to(dtype)
    x *= torch.logspace(-2, 3, ROWS, dtype=dtype)[:, None]
    weight[::7] *= 50
    values = x.double() @ weight.double().T + b.double()
    found = kernels.largest(x, weight, b, 6, ROWS * 640)
    kept = torch.zeros(ROWS, 640, dtype=torch.bool)
    kept[found.pairs.rows, found.pairs.features] = True
    assert torch.equal(kept, largest_of(values, 6))
    torch.testing.assert_close(found.values.double(), values[kept], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernels", cases(screens=SCREENS))
@pytest.mark.parametrize("size", [320, 100])
def test_nan_is_found_wherever_it_is(kernels, size):
    x, weight, b = coarse(ROWS, D), coarse(size, D, seed=1), coarse(size, seed=2)
    x[[0, 40]] = torch.nan
    b[[3, 9, 77]] = torch.nan
    found = kernels.largest(x, weight, b, 4, ROWS * size)
    kept = torch.zeros(ROWS, size, dtype=torch.bool)
    kept[found.pairs.rows, found.pairs.features] = True
    assert torch.equal(kept, largest_of(x @ weight.T + b, 4))
    assert kept[[0, 40]].all() and kept[:, [3, 9, 77]].all()
