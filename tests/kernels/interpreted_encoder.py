"""Encoders' kernels in Triton's interpreter, run by `test_triton.py` as those of the vocabulary are."""

import copy

import pytest
import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode

from endwise.config.dictionary import ARCHITECTURES
from endwise.kernels import registered, standing_in
from endwise.kernels.encoder_on_cuda import Bounds
from endwise.kernels.on_cuda import TritonKernels, launch
from endwise.kernels.triton_encoder import bounds_of, places_of_bits
from interpreting import in_fp32

# The interpreter computes in NumPy, which tells of what is not a number.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
EAGER = registered()["eager"]
ALL = 10**9


class SmallBounds(Bounds):
    """Several tiles of rows, of features and of width, where there are few."""

    tile, listed = {"ROWS": 16, "FEATURES": 64, "WIDTH": 32}, {"ROWS": 16, "WORDS": 4}


class SmallKernels(TritonKernels):
    bounds = SmallBounds


OWN = SmallKernels(in_fp32)
"""In bf16 the interpreter would multiply the bits; bounds of what was rounded to bf16 are bounds in fp32 too."""
SIZES = {
    "one row": (1, 17, 65),
    "several tiles": (17, 33, 70),
    "a word and a bit": (3, 20, 33),
    "few features": (5, 7, 3),
    "tiles to the brim": (32, 45, 128),
    "many": (70, 70, 700),
}
GATE = ["several tiles", "few features"]
FEW = {("jumprelu", False), ("topk", False), ("batchtopk", True)}
SAMPLED = [pytest.param(name, marks=() if name in GATE else pytest.mark.slow) for name in SIZES]


def made(n, d, d_sae, seed=0, shift=-1.0):
    """Rows, as a slice lies in memory, of which one is 0 and one has a large norm; features of very different norms."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2 * d, generator=draw)[:, ::2]
    weight = torch.randn(d_sae, d, generator=draw) / d**0.5
    weight[::3] *= 5
    x[n // 2] = 0
    x[-1] *= 10
    return x, weight, torch.randn(d_sae, generator=draw) * 0.1 + shift


def exact(x, weight, bias):
    return x.double() @ weight.double().T + bias.double()


def assert_found(found, wanted, numbers):
    """The pairs at the places of a mask, in order, and the values there."""
    assert torch.equal(torch.stack([found.pairs.rows, found.pairs.features]), wanted.nonzero().T)
    assert found.pairs.row_starts.tolist() == [int(wanted[:row].sum()) for row in range(len(wanted))]
    scale = float(numbers.abs().max()) if numbers.numel() else 1.0
    torch.testing.assert_close(found.values.double(), numbers[wanted], rtol=1e-5, atol=1e-6 * scale)
    assert found.values.dtype == torch.float32 and found.pairs.features.dtype == torch.int64


@pytest.mark.parametrize("size", SAMPLED)
def test_active_is_every_place_above_a_threshold(size):
    x, weight, bias = made(*SIZES[size])
    numbers, draw = exact(x, weight, bias), torch.Generator().manual_seed(1)
    for above in (None, torch.tensor(0.7), torch.rand(len(weight), generator=draw)):
        least = 0.0 if above is None else above.double()
        assert_found(OWN.active(x, weight, bias, ALL, above), numbers > least, numbers)


@pytest.mark.parametrize("size", SAMPLED)
@pytest.mark.parametrize("k", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_largest_is_the_first_k_of_each_row_that_are_positive(size, k):
    x, weight, bias = made(*SIZES[size], shift=0.1)
    numbers = exact(x, weight, bias)
    first = numbers.argsort(dim=1, descending=True, stable=True)[:, :k]
    wanted = torch.zeros_like(numbers, dtype=torch.bool).scatter_(1, first, True) & (numbers > 0)
    assert_found(OWN.largest(x, weight, bias, k, ALL), wanted, numbers)


def test_of_equal_ones_the_first_are_among_the_largest():
    x, weight, bias = made(3, 20, 33)
    weight, bias = weight[:1].expand(40, -1).contiguous(), torch.full((40,), 0.5)
    found = OWN.largest(x, weight, bias, 4, ALL)
    some = (exact(x, weight, bias)[:, 0] > 0).nonzero()[:, 0]
    assert found.pairs.rows.tolist() == some.repeat_interleave(4).tolist()
    assert found.pairs.features.tolist() == [0, 1, 2, 3] * len(some)


@pytest.mark.parametrize("value", [torch.nan, pytest.param(torch.inf, marks=pytest.mark.slow)])
def test_what_is_not_a_number_stays_visible_in_its_row_alone(value):
    x, weight, bias = made(5, 20, 70)
    sound = {True: OWN.active(x, weight, bias, ALL), False: OWN.largest(x, weight, bias, 3, ALL)}
    x[1, 2] = value
    for find, found in ((True, OWN.active(x, weight, bias, ALL)), (False, OWN.largest(x, weight, bias, 3, ALL))):
        there, before = found.pairs.rows == 1, sound[find].pairs.rows == 1
        assert not found.values[there].isfinite().all()
        assert torch.equal(found.values[~there], sound[find].values[~before])
        if value != value:
            assert found.pairs.features[there].tolist() == list(range(70))


def test_limits_are_met_exactly():
    x, weight, bias = made(5, 20, 70)
    count, few = int((exact(x, weight, bias) > 0).sum()), int((exact(x, weight, bias) > 0).any(1).sum())
    assert len(OWN.active(x, weight, bias, count).values) == count and OWN.active(x, weight, bias, count - 1) is None
    assert len(OWN.largest(x, weight, bias, 1, few).values) == few and OWN.largest(x, weight, bias, 1, few - 1) is None
    assert OWN.active(x, weight, bias, 0) is None  # after the candidates alone: they are not worth their cost
    assert len(OWN.active(x, weight, bias - 1e6, 0).values) == 0


def test_no_rows_and_another_dtype():
    x, weight, bias = made(5, 20, 70)
    for found in (OWN.active(x[:0], weight, bias, ALL), OWN.largest(x[:0], weight, bias, 3, ALL)):
        assert found.pairs.n_rows == len(found.values) == 0
    for dtype in (torch.float64, torch.bfloat16):
        own, eager = (each.active(x.to(dtype), weight.to(dtype), bias.to(dtype), ALL) for each in (OWN, EAGER))
        assert torch.equal(own.values, eager.values) and own.values.dtype == dtype


@pytest.mark.parametrize("spread", [pytest.param(1.0, marks=pytest.mark.slow), 1000.0])
def test_bounds_miss_nothing(spread):
    """Pre-activations that nearly cancel against their bias, with a few directions of huge norm as real models have."""
    draw = torch.Generator().manual_seed(2)
    x, weight = torch.randn(40, 48, generator=draw), torch.randn(64, 48, generator=draw)
    x[:, :2] *= spread
    weight[::3] *= spread
    bias = -(x[:, None] * weight).sum(2)[torch.arange(64) % 40, torch.arange(64)]
    bias *= 1 + 1e-3 * torch.randn(64, generator=draw)
    numbers, bounds = exact(x, weight, bias), SmallBounds(in_fp32, x, weight, bias)
    found = bounds.reaching()
    pairs = bounds.places(found, int(found.number))
    candidates = torch.zeros_like(numbers, dtype=torch.bool)
    candidates[pairs.rows, pairs.features] = True
    assert (numbers > 0).any() and not ((numbers > 0) & ~candidates).any() and not candidates.all()
    assert (bounds.reached_by(2).double() <= numbers.topk(2).values[:, 1].clamp_min(0)).all()


class NothingDense(TorchDispatchMode):
    """Nothing holds so many numbers."""

    def __init__(self, most):
        super().__init__()
        self.most = most

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            real = isinstance(each, torch.Tensor) and each.is_floating_point()  # and no bytes of the interpreter's
            assert not real or each.numel() < self.most, function
        return result


@pytest.mark.parametrize(
    ("architecture", "training"),
    [
        pytest.param(name, training, marks=() if (name, training) in FEW else pytest.mark.slow)
        for name in ("standard", "jumprelu", "gated", "topk", "batchtopk", "matryoshka_batchtopk")
        for training in (False, True)
    ],
)
def test_outside_a_step_features_are_counted_and_nothing_is_dense(architecture, training):
    """No room is in use, where the host waits."""
    n, d, d_sae, kind = 80 if "batchtopk" in architecture else 40, 8, 256, ARCHITECTURES[architecture]
    chooses = {"k": 4} if "topk" in architecture else {}
    sae = kind.build(kind.Config(size=d_sae, **chooses), d, 0)
    x = torch.randn(2, n // 2, d, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        if chooses:
            sae.see_last(x.view(n, d), x.view(n, d))
        else:
            sae.raise_bar(1.4)
    exact = copy.deepcopy(sae).double().train(training)
    exact.sparse_below = 0.0
    wanted = exact.encode(x.double())
    with standing_in("cpu", OWN), NothingDense(n * d_sae):
        latents = sae.train(training).encode(x)
        reconstruction = sae.reconstruct(latents, x)
    assert wanted.pairs() is None and latents.pairs().places.pads is None
    assert torch.equal(latents.l0(), wanted.l0()) and 0 < latents.l0().mean() < d_sae / 32
    torch.testing.assert_close(latents.dense().double(), wanted.dense(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(reconstruction.double(), exact.reconstruct(wanted, x.double()), rtol=1e-4, atol=1e-5)


@triton.jit
def far_bounds(x, weight, out, first_row, begin, n, d_sae, width, ROWS: tl.constexpr, FEATURES: tl.constexpr):
    bounds, _, _, _ = bounds_of(x, weight, first_row, begin, n, d_sae, width, ROWS, FEATURES, 16)
    tl.store(out + tl.arange(0, ROWS)[:, None] * FEATURES + tl.arange(0, FEATURES)[None, :], bounds)


def test_places_beyond_32_bits():
    """Memory that is not touched is not there: only the last rows of tables of 2³¹ numbers and more are."""
    width, first = 16, 2**31 // 16 + 48
    x, weight = (torch.empty(first + 16, width, dtype=torch.float16) for _ in range(2))
    x[first:], weight[first:] = torch.randn(2, 16, width)
    out = torch.zeros(16, 16)
    launch(far_bounds, (1,), x, weight, out, first, first, len(x), len(weight), width, ROWS=16, FEATURES=16)
    torch.testing.assert_close(out, x[first:].float() @ weight[first:].float().T, rtol=1e-4, atol=1e-4)

    begin = 46_080 * 65_536
    features = torch.empty(begin + 5, dtype=torch.int8)
    features[begin:] = -1
    bits = torch.tensor([[1 << 30 | 0b101], [-(2**31)]], dtype=torch.int32)
    begins = torch.tensor([begin, begin + 3])
    launch(places_of_bits, (2,), bits, begins, features, 2, 1, begin + 3, ROWS=1, WORDS=2)
    assert features[begin:].tolist() == [0, 2, 30, -1, -1]  # and nothing where there is no room
    launch(places_of_bits, (2,), bits, begins, features, 2, 1, begin + 4, ROWS=1, WORDS=2)
    assert features[begin:].tolist() == [0, 2, 30, 31, -1]
