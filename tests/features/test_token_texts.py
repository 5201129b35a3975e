"""Text that is shown token by token joins to what the tokenizer's `decode` gives of the tokens, whatever they are."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from endwise.common.errors import FormatError
from endwise.common.text import printable
from endwise.dashboard import write_dashboard
from endwise.explaining.rendering import Writer
from endwise.explaining.samples import Text
from endwise.features.harvest.neuronpedia import export
from endwise.features.harvest.results import TOKENIZER_FILE, open_harvest
from endwise.features.harvest.top_tokens import written, written_text
from endwise.features.token_texts import REPLACEMENT, named_bytes, pieces
from endwise.models.language_model import LanguageModel
from made_harvests import LENGTH, write_harvested_run

SCRIPTS = {
    "latin": "Once upon a time, a naïve café wasn't — in “Zürich”.\n\tdef f(x): return x",
    "cjk": "你好，世界。日本語のテキスト 한국어 텍스트",
    "emoji": "👩‍🔬 😀🇬🇧👍🏽 ok",
    "devanagari": "नमस्ते दुनिया, क्षत्रिय",
    "arabic": "مرحبا بالعالم، می‌خواهم",
    "hebrew and thai": "שָׁלוֹם สวัสดีชาวโลก",
    "combining": "é ạ̈ Z̸͓̈a̷l̶g̵o̴",
    "odd": "  two  spaces \r\n \ufffd \x00 end ",
}
TEXT = " ".join(SCRIPTS.values())


def byte_level():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet))
    return backend


def sentence_piece():
    """As Llama has it: words begin with ▁, characters it has not seen are bytes, the first space goes."""
    fallback = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    letters = {letter: len(fallback) + place for place, letter in enumerate(dict.fromkeys("▁etaoinshrdlu"))}
    merged = {"▁t": len(fallback) + len(letters)}
    backend = Tokenizer(
        models.BPE({**fallback, **letters, **merged}, [("▁", "t")], unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    return backend


def word_piece():
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    backend.train_from_iterator([TEXT], trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[SEP]"]))
    return backend


def metaspace():
    pieces_ = [("<unk>", 0.0), ("▁", -2.0), *((letter, -5.0) for letter in dict.fromkeys(TEXT) if letter != " ")]
    backend = Tokenizer(models.Unigram(pieces_, unk_id=0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return backend


BACKENDS = {made.__name__: made() for made in (byte_level, sentence_piece, word_piece, metaspace)}
for backend in BACKENDS.values():
    backend.add_special_tokens([AddedToken("<|end of text|>", special=True)])


def decode_of(backend):
    return lambda tokens: backend.decode(list(tokens), skip_special_tokens=False)


def plain(backend):
    return lambda token: backend.decode([token], skip_special_tokens=False)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("name", BACKENDS)
def test_pieces_join_in_every_script(name, script):
    backend = BACKENDS[name]
    decode = decode_of(backend)
    ids = backend.encode(SCRIPTS[script] + "<|end of text|>" + SCRIPTS[script]).ids
    whole = pieces(ids, decode, plain(backend))
    assert len(whole) == len(ids) and "".join(whole) == decode(ids)
    if REPLACEMENT not in decode(ids):
        assert not any(REPLACEMENT in piece for piece in whole)
    for start in range(0, len(ids), 3):  # a context begins and ends anywhere, within a character too
        window = ids[start : start + 12]
        assert "".join(pieces(window, decode, plain(backend))) == decode(window)


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_pieces_of_any_tokens_join(name, data):
    backend = BACKENDS[name]
    ids = data.draw(st.lists(st.integers(0, backend.get_vocab_size() - 1), max_size=12))
    found = pieces(ids, decode_of(backend), plain(backend))
    assert len(found) == len(ids) and "".join(found) == decode_of(backend)(ids)


def test_a_character_is_where_its_last_token_is():
    backend = Tokenizer(models.BPE({letter: n for n, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    ids = backend.encode("a你b").ids
    assert pieces(ids, decode_of(backend), plain(backend)) == ["a", "", "", "你", "b"]
    assert [named_bytes(backend.id_to_token(token)) for token in ids[1:4]] == [r"\xe4", r"\xbd", r"\xa0"]
    assert named_bytes("<0xE4>") == "<0xE4>"


@pytest.mark.parametrize("name", BACKENDS)
def test_a_models_text_is_written_whole(name):
    model = LanguageModel.__new__(LanguageModel)
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=BACKENDS[name])
    ids = model.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert "".join(written_text(model, ids)) == model.tokenizer.decode(ids)
    ids = model.tokenizer(TEXT.replace(REPLACEMENT, ""), add_special_tokens=False)["input_ids"]
    assert not any(REPLACEMENT in written(model, token) for token in ids)


def test_contexts_join_wherever_they_are_shown(tmp_path):
    """On a dashboard, in prompts and in an export, of a harvest whose tokens are mostly bytes of characters."""
    run = write_harvested_run(tmp_path / "run", d_sae=12)
    about = json.loads((run / "harvest" / "harvest.json").read_text())
    about |= {"sequences": 9, "corpus": {"source": "made"}, "settings": {"kept": {"groups": 4}}}
    (run / "harvest" / "harvest.json").write_text(json.dumps(about))
    harvest, backend = open_harvest(run), byte_level()
    backend.save(str(harvest.folder / TOKENIZER_FILE))
    contexts = [context for _, own in harvest.all_contexts() for context in own]
    wholes = [backend.decode(list(context.tokens), skip_special_tokens=False) for context in contexts]
    alone = ["".join(harvest.vocabulary[token] for token in context.tokens) for context in contexts]
    assert wholes != alone and any(REPLACEMENT in whole for whole in wholes)
    writer = Writer(harvest.vocabulary, harvest.written)
    for context, whole in zip(contexts[:50], wholes, strict=False):
        text = Text.of(context)
        assert writer.plain(text) == writer.marked(text, [False] * LENGTH) == printable(whole.replace("\n", "\\n"))
    exported = export(run, tmp_path / "export")[0].folder / "activations" / "batch-0.jsonl.gz"
    rows = map(json.loads, gzip.decompress(exported.read_bytes()).splitlines())
    assert ["".join(row["tokens"]) for row in rows] == [whole.replace("\0", " ") for whole in wholes]
    write_dashboard([run], tmp_path / "site")
    (shard,) = (tmp_path / "site" / "data").glob("*/0/features-0.js")
    page = json.loads(shard.read_text().partition(", ")[2].removesuffix(");\n"))
    shown = ["".join(page["texts"][place] for place in context[4]) for own in page["features"] for context in own["x"]]
    assert shown == list(map(printable, wholes))


def test_a_harvest_without_its_tokenizer_shows_each_token_by_itself(tmp_path):
    harvest = open_harvest(write_harvested_run(tmp_path / "run", d_sae=12))
    (first, *_) = harvest.contexts(int(harvest.firings.argmax()))
    assert harvest.written(first.tokens) == [harvest.vocabulary[token] for token in first.tokens]
    (harvest.folder / TOKENIZER_FILE).write_text("{}")
    with pytest.raises(FormatError, match=r"tokenizer\.json is not what a harvest writes"):
        open_harvest(tmp_path / "run").written(first.tokens)
