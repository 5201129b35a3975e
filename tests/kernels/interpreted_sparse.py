"""Kernels of sparse latents in Triton's interpreter: run by `test_triton.py`, as `interpreted_triton.py` is."""

import itertools

import pytest
import torch

from endwise.dictionaries import ReluSAE, SparseLatents
from endwise.kernels import Pairs, registered, standing_in
from endwise.kernels.on_cuda import TritonKernels, launch
from endwise.kernels.triton_sparse import bag_sums, chunk_sums, pair_dots

# The interpreter computes in NumPy, which tells of what is not a number.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
EAGER = registered()["eager"]
VARIANTS = {
    "two strips": (6, 5, 140, 0.5),
    "one column": (9, 7, 1, 0.4),
    "a whole strip": (5, 6, 128, 0.5),
    "more columns than pairs": (3, 4, 33, 0.2),
    "all active": (17, 3, 20, 1.0),
    "none active": (4, 3, 16, 0.0),
    "no rows": (0, 3, 16, 0.0),
    "more than a chunk": (300, 4, 7, 0.9),
}
SAMPLE = {
    ("two strips", torch.float32, 8),
    ("all active", torch.bfloat16, 8),
    ("one column", torch.float16, 256),
    ("none active", torch.float32, 8),
    ("no rows", torch.float32, 8),
}
CASES = [
    pytest.param(*case, marks=() if case in SAMPLE else pytest.mark.slow)
    for case in itertools.product(VARIANTS, (torch.float32, torch.float16, torch.bfloat16), (8, 256))
]


class SmallKernels(TritonKernels):
    """Chunks so small that several lie within a bag."""

    chunk = 8


def pairs_of(active):
    rows, features = active.nonzero(as_tuple=True)
    return Pairs(rows, features, torch.searchsorted(rows, torch.arange(len(active))), active.shape[1])


def made(n, d_sae, width, density, dtype=torch.float32):
    """Pairs of which a feature is in nearly all rows, the first and last row and feature in none; the decoder, and what
    it is multiplied with.
    """
    draw = torch.Generator().manual_seed(n + width)
    active = torch.rand(n, d_sae, generator=draw) < density
    if 0 < density < 1:
        active[:, 1] = True
        active[[0, -1]] = active[:, [0, -1]] = False
    pairs = pairs_of(active)
    table = torch.randn(d_sae, 2 * width, generator=draw).to(dtype)[:, ::2]  # as a slice lies in memory
    rows = torch.randn(n, width, generator=draw).to(dtype)
    return pairs, torch.randn(len(pairs.rows), generator=draw).to(dtype), table, rows


def all_of(kernels, pairs, weights, table, rows):
    order, row_of, starts = pairs.by_feature
    return {
        "sums": kernels.weighted_sums(table, pairs.features, pairs.row_starts, weights),
        "transposed": kernels.weighted_sums(rows, row_of, starts, weights[order]),
        "dots": kernels.dot_products(table, pairs.features, rows, pairs),
        "features": kernels.feature_sums(weights, pairs),
        **kernels.decoder_gradients(table, pairs, weights, rows)._asdict(),
    }


def exact(pairs, weights, table, rows):
    """All of it by dense products in float64."""
    dense = torch.zeros(pairs.n_rows, pairs.n_features, dtype=torch.float64)
    dense[pairs.rows, pairs.features] = weights.double()
    transposed, dots = dense.T @ rows.double(), (rows.double() @ table.double().T)[pairs.rows, pairs.features]
    sums = {"sums": dense @ table.double(), "transposed": transposed, "features": dense.sum(0)}
    return sums | {"dots": dots, "weights": dots, "table": transposed}


@pytest.mark.parametrize(("variant", "dtype", "chunk"), CASES)
def test_sums_and_dot_products_are_those_of_float64(variant, dtype, chunk):
    own = made(*VARIANTS[variant], dtype)
    kernels = SmallKernels() if chunk == SmallKernels.chunk else TritonKernels()
    expected = exact(*own)
    for each in (kernels, EAGER) if dtype == torch.float32 else (kernels,):
        for name, found in all_of(each, *own).items():
            # Added up in fp32, and rounded once
            assert found.dtype == dtype
            rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 2e-6
            torch.testing.assert_close(found.double(), expected[name], rtol=rounding, atol=1e-5, msg=name)


def test_float64_stays_float64():
    own = [each.double() if isinstance(each, torch.Tensor) else each for each in made(5, 6, 4, 0.5)]
    for found, expected in zip(all_of(TritonKernels(), *own).values(), all_of(EAGER, *own).values(), strict=True):
        assert torch.equal(found, expected)


def test_what_is_not_a_number_stays_in_its_bags_and_pairs():
    pairs, weights, table, rows = made(9, 6, 20, 0.4)
    sound = all_of(SmallKernels(), pairs, weights, table, rows)
    of_feature, of_row, of_pair = 3, 4, 5
    rows, table, weights = rows.clone(), table.clone(), weights.clone()
    table[of_feature, 2], rows[of_row, 3], weights[of_pair] = torch.nan, torch.inf, torch.nan
    found = all_of(SmallKernels(), pairs, weights, table, rows)
    in_pair = torch.arange(len(weights)) == of_pair
    broken_row = torch.zeros_like(rows, dtype=torch.bool)
    broken_row[pairs.rows[pairs.features == of_feature], 2] = True
    broken_row[pairs.rows[of_pair]] = True
    broken_feature = torch.zeros_like(table, dtype=torch.bool)
    broken_feature[pairs.features[pairs.rows == of_row], 3] = True
    broken_feature[pairs.features[of_pair]] = True
    broken_dot = (pairs.features == of_feature) | (pairs.rows == of_row)
    broken = {
        "sums": broken_row,
        "transposed": broken_feature,
        "dots": broken_dot,
        "features": torch.arange(6) == pairs.features[in_pair],
        "weights": broken_dot,
        "table": broken_feature,
    }
    for name, where in broken.items():
        assert where.any() and not where.all()
        assert torch.equal(~found[name].isfinite(), where)
        assert torch.equal(found[name][~where], sound[name][~where])


def test_a_bag_that_holds_whole_chunks_leaves_them_to_programs_of_their_own():
    """Or a feature that is always active would keep one program busy long after the others."""
    entries, weights = torch.arange(29), torch.randn(29, generator=torch.Generator().manual_seed(0))
    starts, table = torch.tensor([0, 3, 3, 27]), torch.eye(29, 32)
    grids = {}

    def without_chunks(kernel, grid, *arguments, **constants):
        grids[kernel.__name__] = grid
        if kernel is chunk_sums:
            arguments[6].zero_()
        else:
            launch(kernel, grid, *arguments, **constants)

    kernels = SmallKernels(without_chunks)
    found = kernels.weighted_sums(table, entries, starts, weights)
    expected = torch.zeros(4, 32)
    expected[0, :3] = weights[:3]
    expected[2, [*range(3, 8), *range(24, 27)]] = weights[[*range(3, 8), *range(24, 27)]]
    expected[3, 27:29] = weights[27:]
    assert torch.equal(found, expected)
    assert grids == {"chunk_sums": (3, 1), "bag_sums": (4, 1)}
    expected[2, 3:27] = weights[3:27]
    assert torch.equal(SmallKernels().weighted_sums(table, entries, starts, weights), expected)


def test_places_beyond_32_bits():
    """Memory that is not touched is not there: only the first columns of rows that lie 2²⁷ numbers apart."""
    apart, last, tile = 1 << 27, 16, {"PAIRS": 4, "WIDTH": 16}
    table, out, sums = (torch.empty(last + 1, apart, dtype=torch.float16) for _ in range(3))
    draw = torch.Generator().manual_seed(0)
    row = table[last, :16] = torch.randn(16, generator=draw).half()
    # All bags but the last are empty; of the chunks of 4 pairs, one lies within it.
    entries, weights = torch.full((6,), last), torch.randn(6, generator=draw)
    starts, dots = torch.tensor([0] * last + [0]), torch.zeros(1, 6)
    inputs, sizes = (table, entries, weights, starts, table, dots), (6, last + 1, apart)
    bags, constants = torch.full((last + 1,), last), {"CHUNK": 4, "DOTS": True, **tile}
    launch(chunk_sums, (1, 1), *inputs, sums, bags, *sizes, **constants)
    launch(bag_sums, (last + 1, 1), *inputs, sums, out, *sizes, **constants)
    expected = (weights.sum() * row.float()).half()
    torch.testing.assert_close(out[last, :16], expected, rtol=2e-3, atol=1e-3)
    assert not out[:last, :16].any()
    torch.testing.assert_close(dots, row.float().square().sum().expand(1, 6))

    narrow = table.view(-1, 16)
    far = torch.tensor([len(narrow) - (apart // 16)])
    products = torch.zeros(1, 1)
    launch(pair_dots, (1, 1), narrow, far, narrow, far, products, 1, 16, **tile)
    torch.testing.assert_close(products[0, 0], row.float().square().sum())


@pytest.mark.parametrize("unit_norm", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_dictionary_differentiates_through_them(unit_norm):
    sae = ReluSAE(12, 6, seed=1, unit_norm=unit_norm)
    sae.sparse_below = 1.0
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    found, started = {}, []

    def counted(kernel, *arguments, **constants):
        started.append(kernel.__name__)
        launch(kernel, *arguments, **constants)

    for kernels in (EAGER, SmallKernels(counted)):
        sae.zero_grad()
        with standing_in("cpu", kernels):
            latents = sae.encode(x)
            started.clear()
            loss = (sae.decode(latents) - x).square().sum() + latents.penalty(2.0).sum()
            loss.backward()
        assert isinstance(latents, SparseLatents)
        found[kernels] = {name: each.grad.clone() for name, each in sae.named_parameters()}
    for eager, own in zip(*(each.values() for each in found.values()), strict=True):
        torch.testing.assert_close(own, eager, rtol=1e-5, atol=1e-5)
    assert "bag_sums" in started and "pair_dots" not in started  # the decoder's gradients are computed together
