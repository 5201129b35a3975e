"""Checks that a text is the model's own, made before training, and recorded with every measurement."""

from typing import Any

import torch

from endwise.models.language_model import LanguageModel
from endwise.models.readout import next_tokens
from endwise.tokens import Corpus

TRIED_TOKENS = 1024
TRIED_SEQUENCES = 64


def facts_of_text(model: LanguageModel, corpus: Corpus) -> dict[str, Any]:
    """`vocabulary`, the model's number of tokens, and `bos_left_out`, the token with which its tokenizer begins every
    text but these sequences do not begin; None where there is none.
    """
    return {"vocabulary": model.vocab_size, "bos_left_out": bos_left_out(model.tokenizer, corpus)}


def bos_left_out(tokenizer: Any, corpus: Corpus) -> str | None:
    """The token with which a tokenizer begins every text but these sequences do not begin; None: there is none."""
    bos = own_bos(tokenizer)
    if bos is None or corpus.layout.bos is not None:
        return None
    firsts = corpus.batch(range(min(TRIED_SEQUENCES, len(corpus)))).tokens[:, 0]
    return None if float((firsts == bos).float().mean()) > 0.5 else str(tokenizer.bos_token)


def own_bos(tokenizer: Any) -> int | None:
    """Id of the token with which a tokenizer begins every text."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos if bos is not None and list(tokenizer("a").input_ids[:1]) == [bos] else None


@torch.no_grad()
def tried_on(model: LanguageModel, corpus: Corpus) -> dict[str, Any]:
    """The record (`remarks`) of the model on about `TRIED_TOKENS` tokens: what training can be warned of beforehand."""
    batch = corpus.batch(range(min(len(corpus), max(1, TRIED_TOKENS // corpus.context)))).to(model.device)
    model.attend_within(corpus.layout.ends)
    final = model.clean(batch.tokens, record=(), final=True).final
    assert final is not None
    _, predicts = next_tokens(batch.tokens, batch.mask)
    total = model.readout.cross_entropy(final, batch.tokens, batch.mask).double().sum()
    return {**facts_of_text(model, corpus), "baselines": {"clean": float(total / predicts.sum())}}
