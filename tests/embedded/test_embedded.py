"""Embedded model and corpus against their card: sizes, streams, tokenizer, model, and the losses it states."""

import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from endwise import embedded

SIZE_LIMIT = 16_000_000
CONTEXT = 256


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(embedded.folder()).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded.folder())


@pytest.fixture(scope="module")
def card():
    return (embedded.folder() / "README.md").read_text(encoding="utf-8")


def stated(pattern, card):
    """The numbers of the one place on the card that matches, wherever its lines break."""
    (found,) = re.findall(pattern.replace(" ", r"\s+"), card)
    return [float(number.replace(",", "")) for number in ([found] if isinstance(found, str) else found)]


def documents(tokens):
    """Each document as the bytes of its ids, without EOS."""
    return [document.tobytes() for document in np.split(tokens, np.flatnonzero(tokens == 0) + 1)]


def test_everything_fits_into_sixteen_megabytes():
    assert sum(file.stat().st_size for file in embedded.folder().rglob("*")) <= SIZE_LIMIT


def test_the_streams_hold_ids_of_the_vocabulary_and_end_with_a_document(model):
    for tokens in (embedded.train_tokens(), embedded.heldout_tokens()):
        assert tokens.dtype == np.uint16 and tokens.ndim == 1
        assert tokens.max() < model.config.vocab_size
        assert tokens[-1] == 0
        assert not ((tokens[1:] == 0) & (tokens[:-1] == 0)).any(), "an empty document"


def test_enough_is_held_out_and_none_of_its_documents_was_trained_on():
    train, heldout = embedded.train_tokens(), embedded.heldout_tokens()
    assert len(heldout) >= 500_000
    assert set(documents(heldout)) & set(documents(train)) == {b""}  # what follows the last EOS of either


def test_no_long_sentence_stands_on_both_sides(tokenizer):
    pieces = ["\n", *tokenizer.batch_decode([[token] for token in range(1, len(tokenizer))])]  # a document ends a line

    def sentences(tokens):
        text = "".join(map(pieces.__getitem__, tokens.tolist())).lower()
        parts = (part.split(": ", 1)[-1] for part in re.split(r"(?<=[.!?])\s+|\n", text))
        return {part for part in parts if len(part.split()) >= 8}

    train, heldout = sentences(embedded.train_tokens()), sentences(embedded.heldout_tokens())
    assert len(heldout) > 10_000
    assert not train & heldout


def test_the_tokenizer_round_trips_text_and_the_streams_are_its_own(tokenizer):
    for text in ("Cut the onion.", "  two  spaces,\n a line\t", "naïve café — 東京 🙂", ""):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert tokenizer.eos_token_id == 0 and tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer("<|endoftext|>")["input_ids"] == [0]
    ids = embedded.heldout_tokens()[:20_000].tolist()
    assert tokenizer(tokenizer.decode(ids))["input_ids"] == ids


def test_the_model_is_gpt2s_architecture_with_the_tokenizers_vocabulary(model, tokenizer):
    assert type(model) is GPT2LMHeadModel
    assert (model.config.n_layer, model.config.n_embd, model.config.n_head) == (6, 128, 4)
    assert model.config.n_positions == CONTEXT
    assert model.config.vocab_size == len(tokenizer) == 4096
    assert model.config.eos_token_id == 0


@torch.no_grad()
def test_the_loss_stated_for_the_first_windows_is_the_models(model, card):
    count, loss = stated(
        r"On the first ([\d,]+) held-out tokens \(80 windows\) alone the model's loss is \*\*([\d.]+)\*\*", card
    )
    assert count == 80 * CONTEXT
    rows = torch.from_numpy(embedded.heldout_tokens()[: int(count)].astype(np.int64)).view(-1, CONTEXT)
    measured = np.mean([model(row, labels=row, use_cache=False).loss.item() for row in rows.split(16)])
    assert measured == pytest.approx(loss, abs=1e-4)


def test_the_stated_margin_follows_from_the_stated_losses(card):
    (model_loss,) = stated(r"\| \*\*this model\*\* \| \*\*([\d.]+)\*\* \|", card)
    (ngram_loss,) = stated(r"\| 5-gram, modified Kneser-Ney \| ([\d.]+) \|", card)
    margin, low, high = stated(
        r"\*\*([\d.]+)%\*\* below the 5-gram's \(95 % bootstrap interval over windows: ([\d.]+)% to ([\d.]+)%\)",
        card,
    )
    assert margin == pytest.approx(100 * (1 - model_loss / ngram_loss), abs=0.01)
    assert low < margin < high
    (verdict,) = re.findall(r"which\s+(meets|misses)\s+the\s+bar\s+of\s+10%", card)
    assert verdict == ("meets" if margin >= 10 else "misses")


def test_the_card_lists_every_file_with_its_size_and_counts_both_streams(card):
    files = {file.name: file.stat().st_size for file in embedded.folder().iterdir() if file.name != "README.md"}
    listed = {
        name: int(size.replace(",", ""))
        for name, size in re.findall(r"^\| `([\w.]+)` \| ([\d,]+) \|", card, re.MULTILINE)
    }
    assert listed == files
    for row, tokens in (("training", embedded.train_tokens()), ("held out", embedded.heldout_tokens())):
        assert stated(rf"\| {row} \| ([\d,]+) \| ([\d,]+) \|", card) == [(tokens == 0).sum(), len(tokens)]


def test_the_samples_begin_as_the_first_heldout_documents_do(tokenizer, card):
    section = card.split("## Samples\n")[1].split("\n## ")[0]
    samples = re.findall(
        r"^Seed (\d+):\n\n    prompt +(.+(?:\n {18}.+)*)\n    continuation +(.+)", section, re.MULTILINE
    )
    assert [int(seed) for seed, _, _ in samples] == list(range(8))
    starts = [0, *(np.flatnonzero(embedded.heldout_tokens() == 0)[:7] + 1)]
    for (_, prompt, _), start in zip(samples, starts, strict=True):
        text = tokenizer.decode(embedded.heldout_tokens()[start : start + 16].tolist())
        assert re.sub(r"\s+", " ", prompt) == '"' + text.replace('"', r"\"").replace("\n", r"\n") + '"'
