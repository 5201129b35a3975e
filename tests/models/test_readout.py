"""The chunked KL and its gradient against the plain definition in float64."""

import pytest
import torch

from endwise.kernels import standing_in
from endwise.models.readout import Readout
from own_kernels import OwnKernels

VOCAB, D = 37, 8
VARIANTS = {
    "plain": {},
    "bias": {"bias": True},
    "scaled": {"scale": 0.25},
    "capped": {"softcap": 3.0},
    "all": {"bias": True, "scale": 2.0, "softcap": 5.0},
}


def make(bias=False, scale=1.0, softcap=None):
    torch.manual_seed(0)
    return Readout(torch.randn(VOCAB, D), torch.randn(VOCAB) if bias else None, scale, softcap)


def slow_logits(readout, hidden):
    logits = hidden @ readout.unembedding.weight.double().T
    if readout.unembedding.bias is not None:
        logits = logits + readout.unembedding.bias.double()
    logits = logits * readout.unembedding.scale
    cap = readout.unembedding.softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def slow_kl(readout, clean, spliced):
    p, q = (slow_logits(readout, h).softmax(-1) for h in (clean, spliced))
    return (p * (p.log() - q.log())).sum(-1)


@pytest.fixture(params=VARIANTS)
def readout(request):
    return make(**VARIANTS[request.param])


@pytest.fixture
def hidden():
    torch.manual_seed(1)
    return torch.randn(3, 50, D), torch.randn(3, 50, D), torch.rand(3, 50) > 0.3


@pytest.fixture(params=[1, 32, 64, None])
def _in_chunks(request):
    """Run in chunks of so many rows; None: as they ship."""
    with standing_in("cpu", OwnKernels(logits=request.param)):
        yield


@pytest.mark.usefixtures("_in_chunks")
def test_cross_entropy_and_gradient_equal_the_float64_definition(readout, hidden):
    state, _, mask = hidden
    tokens, weights = torch.randint(VOCAB, (3, 50)), torch.rand(3, 50)
    ours = state.clone().requires_grad_()
    losses = readout.cross_entropy(ours, tokens, mask)
    (losses * weights).sum().backward()
    slow = state.double().requires_grad_()
    expected = torch.zeros(3, 50, dtype=torch.float64)
    for b in range(3):
        for t in range(49):
            if mask[b, t] and mask[b, t + 1]:
                expected[b, t] = -slow_logits(readout, slow[b, t]).log_softmax(-1)[tokens[b, t + 1]]
    (expected * weights).sum().backward()
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.grad.double(), slow.grad, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(readout.cross_entropy(state, tokens, mask), losses)


@pytest.mark.usefixtures("_in_chunks")
def test_kl_and_gradient_equal_the_float64_definition(readout, hidden):
    clean, spliced, mask = hidden
    ours = spliced.clone().requires_grad_()
    total = readout.kl(clean, ours, mask)
    (3 * total).backward()
    slow = spliced.double().requires_grad_()
    expected = (slow_kl(readout, clean.double(), slow) * mask).sum()
    (3 * expected).backward()
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.grad.double(), slow.grad, rtol=1e-4, atol=1e-5)


def test_kl_direction_is_original_against_spliced():
    readout = Readout(torch.eye(2))
    clean, spliced = torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
    p, q = clean.softmax(-1), spliced.softmax(-1)
    ours = readout.kl(clean, spliced, torch.ones(1, 1, dtype=torch.bool))
    right, wrong = float((p * (p / q).log()).sum()), float((q * (q / p).log()).sum())
    rounding = 16 * torch.finfo(torch.float32).eps  # of logarithms and shares of size 1, in either way of computing it
    assert ours == pytest.approx(right, abs=rounding)
    assert abs(wrong - right) > 0.1


def test_equal_states_have_no_kl_and_no_gradient(readout, hidden):
    clean, _, mask = hidden
    same = clean.clone().requires_grad_()
    total = readout.kl(clean, same, mask)
    total.backward()
    assert abs(float(total.detach())) < 1e-4
    assert float(same.grad.abs().max()) < 1e-5


def test_masked_positions_get_no_gradient(readout, hidden):
    clean, spliced, mask = hidden
    ours = spliced.clone().requires_grad_()
    readout.kl(clean, ours, mask).backward()
    assert not ours.grad[~mask].any()
    assert ours.grad[mask].any(-1).all()


def test_compare_equals_the_slow_definitions(readout, hidden):
    clean, spliced, mask = hidden
    mask[:] = True
    mask[1, 40:] = False  # padding on the right
    tokens = torch.randint(VOCAB, mask.shape)
    same, ours = readout.compare(clean, [clean, spliced], tokens, mask)
    assert not same.kl.any() and bool((same.ce_clean == same.ce_spliced).all())
    p, q = (slow_logits(readout, h.double()) for h in (clean, spliced))
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    for b, t in [(0, 0), (0, 48), (0, 49), (1, 38), (1, 39), (1, 45), (2, 7)]:
        predicts = bool(mask[b, t]) and t + 1 < mask.shape[1] and bool(mask[b, t + 1])
        assert bool(ours.predicts[b, t]) == predicts
        kept = float(mask[b, t])
        expected = {
            "kl": kept * float((log_p[b, t].exp() * (log_p - log_q)[b, t]).sum()),
            "statistical_distance": kept * 0.5 * float((log_p[b, t].exp() - log_q[b, t].exp()).abs().sum()),
            "top1_agreement": kept * float(p[b, t].argmax() == q[b, t].argmax()),
            "ce_clean": -float(log_p[b, t, tokens[b, t + 1]]) if predicts else 0.0,
            "ce_spliced": -float(log_q[b, t, tokens[b, t + 1]]) if predicts else 0.0,
        }
        for name, value in expected.items():
            assert float(getattr(ours, name)[b, t]) == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_the_value_is_exact_over_a_large_vocabulary():
    """Fifty thousand terms of mixed size: added one after the other they lose four digits."""
    torch.manual_seed(2)
    readout = Readout(torch.randn(50_257, 4))
    clean, spliced = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    total = readout.kl(clean, spliced, torch.ones(1, 3, dtype=torch.bool))
    expected = slow_kl(readout, clean.double(), spliced.double()).sum()
    torch.testing.assert_close(total.double(), expected, rtol=2e-6, atol=0)
