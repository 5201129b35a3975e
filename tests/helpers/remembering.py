"""A model whose activation says in plain numbers which tokens came last, so that what fires where is known."""

from functools import cache

import numpy as np
import torch
from torch.nn.functional import one_hot
from transformers import GPT2Config, GPT2LMHeadModel

from endwise import LanguageModel, ReluSAE
from endwise.config.run import DataConfig
from endwise.models.passes import Clean
from endwise.models.sites import Place
from endwise.tokens import load_corpora

VOCAB, CONTEXT, BACK = 24, 32, 14
PLACE = Place.parse("blocks.0.hook_resid_pre")
WIDTH = BACK * VOCAB


class Remembering(LanguageModel):
    """The activation at a position is a one-hot of its token, then of the one before it, and so on, `BACK` in all."""

    ready = False

    def clean(self, tokens, record=(), final=False):
        if not self.ready:  # a GPT-2, while it is looked into
            return super().clean(tokens, record, final)
        hot = one_hot(tokens, VOCAB).float()
        before = [torch.nn.functional.pad(hot, (0, 0, back, 0))[:, : tokens.shape[1]] for back in range(BACK)]
        return Clean(tokens, {PLACE.reads: torch.cat(before, -1)}, None)


@cache
def remembering():
    """Tokens 8 and 9 have one embedding."""
    config = GPT2Config(vocab_size=VOCAB, n_positions=CONTEXT, n_embd=16, n_layer=1, n_head=2, bos_token_id=0)
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(config)
    with torch.no_grad():
        gpt2.transformer.wte.weight[9] = gpt2.transformer.wte.weight[8]
    model = Remembering(gpt2, None)
    model.ready = True
    return model


def planted(*features):
    """A dictionary whose features add up weights and fire above a bias.

    Args:
        features: each a bias, and the weights of tokens by how many positions back they stand: `(−1.5, {(1, 4): 1})`.
    """
    sae = ReluSAE(WIDTH, len(features))
    encoder, bias = torch.zeros(WIDTH, len(features)), torch.zeros(len(features))
    for number, (below, weights) in enumerate(features):
        bias[number] = below
        for (back, token), weight in weights.items():
            encoder[back * VOCAB + token, number] = weight
    sae.fill({"W_enc": encoder, "b_enc": bias, "W_dec": encoder.T.contiguous() + 0.01, "b_dec": torch.zeros(WIDTH)})
    return sae.requires_grad_(False).eval()


def text(folder, sequences=300, seed=0, first=1):
    """Held-out sequences of random tokens, none of which is 0 or another below `first`."""
    rng = np.random.default_rng(seed)
    for name, count in (("train", 4096), ("heldout", sequences * CONTEXT)):
        np.save(folder / f"{name}.npy", rng.integers(first, VOCAB, count).astype(np.uint16))
    data = DataConfig(source=str(folder / "train.npy"), heldout=str(folder / "heldout.npy"), context=CONTEXT)
    return load_corpora(
        data,
        tokenizer=None,
        model_context=CONTEXT,
        vocab_size=VOCAB,
        training_tokens=2048,
        evaluation_tokens=sequences * CONTEXT,
    ).heldout
