"""Kernels in Triton's interpreter: run by `test_triton.py`, with TRITON_INTERPRET=1, in a process of its own."""

import itertools

import pytest
import torch

from endwise.kernels import Unembedding, registered, standing_in
from endwise.kernels.on_cuda import TritonKernels, launch
from endwise.kernels.triton_vocabulary import add_product, differences
from endwise.models.readout import Readout
from interpreting import in_fp32

# The interpreter computes in NumPy, which tells of what is not a number.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
EAGER = registered()["eager"]
VARIANTS = {
    "plain": (67, 131, 20, {}),
    "one row": (1, 130, 17, {"bias": True}),
    "all": (65, 129, 18, {"bias": True, "scale": 0.7, "softcap": 5.0}),
    "far beyond the cap": (9, 130, 20, {"scale": 50.0, "softcap": 30.0}),
    "near zero under the cap": (9, 66, 20, {"scale": 1e-3, "softcap": 30.0}),
    "few tokens": (5, 3, 7, {"bias": True}),
}
SAMPLE = {
    ("all", torch.float32, True),
    ("one row", torch.bfloat16, True),
    ("far beyond the cap", torch.float16, False),
    ("near zero under the cap", torch.float32, False),
}
"""Cases tried for every change; an interpreter takes seconds for a tile."""
CASES = [
    pytest.param(*case, marks=() if case in SAMPLE else pytest.mark.slow)
    for case in itertools.product(VARIANTS, (torch.float32, torch.float16, torch.bfloat16), (False, True))
]


class SmallKernels(TritonKernels):
    """The vocabulary in two shares of several tiles, and in several slabs."""

    programs, slab = 2, 128


def kernels_of(dtype, small):
    return (SmallKernels if small else TritonKernels)(in_fp32 if dtype == torch.bfloat16 else launch)


def made(n, vocab, width, dtype, bias=False, scale=1.0, softcap=None):
    """Two passes' states, targets, rows that count (what the others hold is not a number), and an unembedding."""
    draw = torch.Generator().manual_seed(n)
    weight = torch.randn(vocab, width, generator=draw).to(dtype)
    clean = torch.randn(n, 2 * width, generator=draw).to(dtype)[:, ::2]  # as a slice lies in memory
    spliced = (clean.float() + 0.3 * torch.randn(n, width, generator=draw)).to(dtype)
    keep = torch.rand(n, generator=draw) < 0.7
    keep[0] = True
    spliced[~keep] = torch.nan
    own = torch.randn(vocab, generator=draw).to(dtype) if bias else None
    targets = torch.randint(vocab, (n,), generator=draw)
    return clean, spliced, targets, keep, Unembedding(weight, own, scale, softcap)


def in_float64(unembedding):
    bias = None if unembedding.bias is None else unembedding.bias.double()
    return Unembedding(unembedding.weight.double(), bias, unembedding.scale, unembedding.softcap)


def assert_as_exact(found, eager, exact, dtype):
    """In fp32 within its rounding; in half precision no farther from float64 than the eager kernel or one rounding."""
    if dtype == torch.float32:
        torch.testing.assert_close(found.double(), exact, rtol=2e-5, atol=2e-6 * float(exact.abs().max()) + 1e-7)
        return
    error, allowed = (float((each.double() - exact).abs().max()) for each in (found, eager))
    assert error <= max(allowed, torch.finfo(dtype).eps * float(exact.abs().max()))


@pytest.mark.parametrize(("variant", "dtype", "small"), CASES)
def test_losses_and_gradients_are_those_of_float64(variant, dtype, small):
    n, vocab, width, own = VARIANTS[variant]
    clean, spliced, targets, keep, unembedding = made(n, vocab, width, dtype, **own)
    kernels, exact = kernels_of(dtype, small), in_float64(unembedding)

    found, eager = (each.kl(clean, spliced, keep, unembedding) for each in (kernels, EAGER))
    oracle = EAGER.kl(clean.double(), spliced.double(), keep, exact)
    assert found.total.dtype == torch.float32 and found.gradient.dtype == dtype
    assert_as_exact(found.gradient, eager.gradient, oracle.gradient, dtype)
    torch.testing.assert_close(found.total.double(), oracle.total, rtol=1e-5, atol=1e-6)

    found, eager = (each.cross_entropy(spliced, targets, keep, unembedding, True) for each in (kernels, EAGER))
    oracle = EAGER.cross_entropy(spliced.double(), targets, keep, exact, True)
    assert_as_exact(found.gradient, eager.gradient, oracle.gradient, dtype)
    torch.testing.assert_close(found.losses.double(), oracle.losses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equal_states_have_neither_divergence_nor_gradient(dtype):
    clean, _, _, keep, unembedding = made(5, 70, 20, dtype, bias=True, softcap=3.0)
    for spliced in (clean, clean.clone()):
        total, gradient = SmallKernels().kl(clean, spliced, keep, unembedding)
        assert total == 0 and not gradient.any()


def test_rows_that_do_not_count_and_no_rows():
    clean, spliced, targets, keep, unembedding = made(5, 70, 20, torch.float32)
    kernels = TritonKernels()
    for rows in (slice(None), slice(0)):
        nowhere = torch.zeros_like(keep[rows])
        total, gradient = kernels.kl(clean[rows], spliced[rows], nowhere, unembedding)
        assert total == 0 and gradient.shape == clean[rows].shape and not gradient.any()
        losses, gradient = kernels.cross_entropy(spliced[rows], targets[rows], nowhere, unembedding, True)
        assert losses.shape == nowhere.shape and not losses.any() and not gradient.any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_a_number_stays_visible_in_its_row_alone(value):
    clean, spliced, targets, keep, unembedding = made(5, 70, 20, torch.float32)
    keep[:] = True
    spliced = clean + 0.1
    sound = TritonKernels().kl(clean, spliced, keep, unembedding).gradient
    spliced[3, 2] = value
    total, gradient = TritonKernels().kl(clean, spliced, keep, unembedding)
    losses, of_losses = TritonKernels().cross_entropy(spliced, targets, keep, unembedding, True)
    others = torch.arange(5) != 3
    assert total.isnan() and gradient[3].isnan().all() and torch.equal(gradient[others], sound[others])
    assert losses.isnan().tolist() == (~others).tolist() and of_losses[others].isfinite().all()


def test_logits_beyond_half_precision_are_no_overflow():
    clean, spliced, _, keep, unembedding = made(9, 65, 32, torch.float16)
    clean, spliced = clean * 300, spliced * 300
    unembedding = Unembedding(unembedding.weight * 100, softcap=30.0)
    assert (clean.double() @ unembedding.weight.double().T).abs().max() > torch.finfo(torch.float16).max
    found = TritonKernels().kl(clean, spliced, keep, unembedding)
    exact = EAGER.kl(clean.double(), spliced.double(), keep, in_float64(unembedding))
    torch.testing.assert_close(found.total.double(), exact.total, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("target", [-1, 70])
def test_a_target_that_is_no_token_has_no_loss(target):
    _, spliced, targets, keep, unembedding = made(5, 70, 20, torch.float32)
    targets[0] = target
    losses, _ = TritonKernels().cross_entropy(spliced, targets, keep, unembedding, False)
    assert losses[0].isnan() and losses[1:].isfinite().all()


def test_the_gradient_is_only_made_when_asked_for():
    _, spliced, targets, keep, unembedding = made(5, 130, 8, torch.float32)
    started = []

    def counted(kernel, *arguments, **constants):
        started.append(kernel.__name__)
        launch(kernel, *arguments, **constants)

    assert TritonKernels(counted).cross_entropy(spliced, targets, keep, unembedding, False).gradient is None
    assert started == ["statistics"]


def test_places_beyond_32_bits():
    """Memory that is not touched is not there: only the last rows of a table of 2³¹ numbers and more are."""
    width, slab, n = 16, 64, 3
    first = 2**31 // width + 64
    weight = torch.empty(first + slab, width, dtype=torch.float16)
    weight[first:] = torch.randn(slab, width)
    tile = {"PRECISION": "ieee", "ROWS": 16, "TOKENS": 32, "WIDTH": 16}
    d_logits, gradient = torch.randn(n, slab).half(), torch.zeros(n, width)
    launch(add_product, (1, 1), d_logits, weight, gradient, first, slab, n, len(weight), width, **tile)
    torch.testing.assert_close(gradient, d_logits.float() @ weight[first:].float(), rtol=1e-4, atol=1e-4)

    states, keep, softmax = torch.randn(n, width).half(), torch.ones(n, dtype=torch.bool), torch.zeros(2, n)
    inputs = states, states, torch.full((n,), first), keep, weight, weight
    out = torch.zeros(n, slab)
    sizes = first, slab, n, len(weight), width, 1.0, 1.0
    constants = {"PAIR": False, "BIAS": False, "CAP": False, **tile}
    launch(differences, (1, 2), *inputs, softmax, out, *sizes, **constants)
    expected = (states.float() @ weight[first:].float().T).exp()
    expected[:, 0] -= 1
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_a_readout_differentiates_through_them():
    draw = torch.Generator().manual_seed(0)
    readout = Readout(torch.randn(37, 8, generator=draw), softcap=5.0)
    clean, tokens = torch.randn(2, 9, 8, generator=draw), torch.randint(37, (2, 9), generator=draw)
    mask = torch.rand(2, 9, generator=draw) < 0.8
    found = {}
    for kernels in (EAGER, TritonKernels()):
        spliced = (clean + 0.2).requires_grad_()
        with standing_in("cpu", kernels):
            loss = readout.kl(clean, spliced, mask) + 2 * readout.cross_entropy(spliced, tokens, mask).sum()
        loss.backward()
        found[kernels] = loss.detach(), spliced.grad
    for eager, own in zip(*found.values(), strict=True):
        torch.testing.assert_close(own, eager, rtol=1e-5, atol=1e-6)
