"""GPT-2's written-out GELU and the fused one are the same function."""

import math

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.activations import NewGELUActivation

from endwise import LanguageModel
from endwise.models.fused_gelu import fuse_gelu


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act, self.other = NewGELUActivation(), nn.GELU()


def test_same_values_and_gradients():
    block = Block()
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64, requires_grad=True)
    expected = block.act(x)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), x)
    fuse_gelu(block)
    ours = block.act(x)
    (gradient,) = torch.autograd.grad(ours.sum(), x)
    # Far below 0, where 1 + tanh u and 1 − tanh² u cancel, what is left is tanh's own error of a last place (in both),
    # times x and, in the gradient, times x·u' as well. Where tanh comes from depends on the processor.
    x, last_place = x.detach(), torch.finfo(torch.float64).eps
    slope = (2 / math.pi) ** 0.5 * (1 + 3 * 0.044715 * x.square())
    assert ((ours - expected).abs() <= 4 * last_place * (1 + x.abs())).all()
    assert ((gradient - expected_gradient).abs() <= 4 * last_place * (1 + x.abs() * slope)).all()


def test_only_that_function_is_replaced():
    block = Block()
    exact = block.other
    fuse_gelu(block)
    assert isinstance(block.act, nn.GELU) and block.act.approximate == "tanh"
    assert block.other is exact and exact.approximate == "none"


def test_a_language_model_has_it():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=31, n_positions=8, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    gpt2, tokens = GPT2LMHeadModel(config).eval(), torch.arange(8)[None]
    with torch.no_grad():
        expected = gpt2(tokens).logits
    model = LanguageModel(gpt2)
    assert not [module for module in gpt2.modules() if isinstance(module, NewGELUActivation)]
    torch.testing.assert_close(model.logits(tokens), expected, rtol=1e-5, atol=1e-6)
