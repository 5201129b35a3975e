"""Operations against `FlopCounterMode`, which counts the products that PyTorch carries out."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from endwise.dictionaries import DenseLatents, ReluSAE
from endwise.models.readout import Readout
from endwise.training.planning.flops import (
    DENSE_GRADIENT_PRODUCTS,
    Stretch,
    attention_pairs,
    forward_flops,
    product_flops,
)


def counted(act) -> int:
    with FlopCounterMode(display=False) as counter:
        act()
    return counter.get_total_flops()


@pytest.mark.parametrize("window", [None, 1, 3, 8, 20])
def test_attention_pairs_are_those_of_the_mask(window):
    query, key = torch.arange(8)[:, None], torch.arange(8)
    mask = (key <= query) & (query - key < (window or 8))
    assert attention_pairs(8, window) == int(mask.sum())


def test_a_window_costs_what_it_leaves():
    assert forward_flops([Stretch(0, width=4, window=2)], 5) == 2 * 2 * 4 * (1 + 2 + 2 + 2 + 2)


def test_a_dense_dictionary():
    sae, x = ReluSAE(6, 40), torch.randn(5, 6)
    product = product_flops(5, 6, 40)
    outputs = []

    def forward():
        values = torch.relu(torch.nn.functional.linear(x, sae.encoder, sae.b_enc))
        outputs.append(sae.decode(DenseLatents(values)))

    assert counted(forward) == 2 * product
    assert counted(outputs[0].sum().backward) == DENSE_GRADIENT_PRODUCTS * product


def test_the_readout_multiplies_three_times():
    """The clean logits, the spliced ones, and the gradient of these."""
    readout, mask = Readout(torch.randn(50, 6)), torch.ones(2, 4, dtype=torch.bool)
    clean, spliced = torch.randn(2, 4, 6), torch.randn(2, 4, 6, requires_grad=True)
    assert counted(lambda: readout.kl(clean, spliced, mask).backward()) == 3 * product_flops(8, 6, 50)
