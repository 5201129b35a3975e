"""Packing against a slow definition; every source; every error; the cache; and that the two sides share nothing."""

import csv
import gzip
import json
import os
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from endwise import embedded
from endwise.common.errors import DataError, NoTokenizer
from endwise.common.seeds import numpy_stream
from endwise.config.run import DataConfig
from endwise.tokens import BatchOrder, Corpora, Corpus, check_disjoint, check_readable, load_corpora, loading
from endwise.tokens.corpus import SequenceLayout
from endwise.tokens.encoding import text_ids
from endwise.tokens.sources import ROWS_AT_ONCE
from endwise.tokens.tokenising import documents_in
from word_tokenizer import BOS, EOS, UNK, VOCAB, WORDS, CountingTokenizer, make_tokenizer


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def load(tmp_path, tokenizer):
    """`load_corpora` with small numbers and a cache of its own."""

    def call(source, *, tokenizer=tokenizer, model_context=8, vocab_size=VOCAB, train=8, evaluate=8, **data):
        config = DataConfig.build({"source": str(source), "cache": tmp_path / "cache", **data})
        return load_corpora(
            config,
            tokenizer=tokenizer,
            model_context=model_context,
            vocab_size=vocab_size,
            training_tokens=train,
            evaluation_tokens=evaluate,
        )

    return call


def some_documents(count, seed=0, longest=12):
    """Distinct documents of random ids below `WORDS`."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, longest + 1, count)
    return [rng.integers(0, WORDS, length).tolist() for length in lengths]


def as_text(ids):
    return " ".join(f"w{i}" for i in ids)


def write_jsonl(path, documents, column="text"):
    values = [as_text(ids) if column == "text" else ids for ids in documents]
    path.write_text("".join(json.dumps({column: value, "other": 1}) + "\n" for value in values))
    return path


def packed(documents, context, packing="stream", bos=None, mask_first=False, separator=EOS):
    """The definition, slowly: (ids, mask) of every sequence."""
    head = [] if bos is None else [bos]
    room = context - len(head)
    if packing == "stream":
        joined = [token for document in documents for token in [*document, separator]]
        chunks = [joined[i : i + room] for i in range(0, len(joined) - room + 1, room)]
    else:
        chunks = []
        for document in documents:
            whole = [*document, separator]
            cut = [whole[i : i + room] for i in range(0, len(whole), room)]
            chunks += [chunk for chunk in cut if chunk != [separator]]
    rows = []
    for chunk in chunks:
        pad = room - len(chunk)
        mask = [False] * len(head) + [True] * len(chunk) + [False] * pad
        if mask_first:
            mask[0] = False
        rows.append((head + chunk + [separator] * pad, mask))
    return rows


def rows_of(corpus):
    batch = corpus.batch(range(len(corpus)))
    assert batch.tokens.dtype == torch.int64 and batch.mask.dtype == torch.bool
    return list(zip(batch.tokens.tolist(), batch.mask.tolist(), strict=True))


def heldout_count(documents, share=0.1):
    return max(1, round(share * len(documents)))


# Packing


@pytest.mark.parametrize("packing", ["stream", "document"])
@pytest.mark.parametrize("prepend_bos", [False, True])
@pytest.mark.parametrize("mask_first_position", [False, True])
def test_packing_follows_its_definition(tmp_path, load, packing, prepend_bos, mask_first_position):
    documents = some_documents(30)
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    corpora = load(source, packing=packing, prepend_bos=prepend_bos, mask_first_position=mask_first_position)
    held = heldout_count(documents)
    settings = (8, packing, BOS if prepend_bos else None, mask_first_position)
    assert rows_of(corpora.train) == packed(documents[:-held], *settings)
    assert rows_of(corpora.heldout) == packed(documents[-held:], *settings)
    assert corpora.train.context == 8 and corpora.train.tokens == 8 * len(corpora.train)


def digest_of(corpus):
    return corpus.text_digest(range(len(corpus)))


@pytest.mark.parametrize("packing", ["stream", "document"])
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("named", [[], [("w3", 0)], [("w3", 2), ("w5", 1)]])
def test_tokens_that_are_left_out_do_not_count(tmp_path, load, packing, special, named):
    """The sequences are as without it; of each, the mask loses the special tokens, and the named with those after."""
    source = write_jsonl(tmp_path / "a.jsonl", some_documents(30))
    plain = load(source, packing=packing, prepend_bos=True)
    corpora = load(source, packing=packing, prepend_bos=True, leave_out_special=special, leave_out_tokens=named)
    for corpus, before in ((corpora.train, plain.train), (corpora.heldout, plain.heldout)):
        expected = []
        for tokens, mask in rows_of(before):
            gone = {place for place, token in enumerate(tokens) if special and token in (BOS, EOS, UNK)}
            for name, after in named:
                starts = [place for place, token in enumerate(tokens) if token == int(name[1:])]
                gone |= {start + later for start in starts for later in range(after + 1)}
            expected.append((tokens, [counts and place not in gone for place, counts in enumerate(mask)]))
        assert rows_of(corpus) == expected
        assert (expected != rows_of(before)) == (digest_of(corpus) != digest_of(before))
        assert (corpus.fingerprint() != before.fingerprint()) == bool(special or named)
    assert (rows_of(corpora.train) != rows_of(plain.train)) == bool(special or named)


def test_a_layout_that_leaves_nothing_out_is_what_it_was():
    """Digests of run folders are made of what it says."""
    assert SequenceLayout(8, "stream", None, 3).content == (
        "Layout(context=8, packing='stream', bos=None, separator=3, mask_first_position=False)"
    )


def test_tokens_to_leave_out_must_be_in_the_vocabulary(tmp_path, load):
    source = write_jsonl(tmp_path / "a.jsonl", some_documents(30))
    with pytest.raises(DataError, match=r"data\.leave_out_tokens is 'two words', not a single token"):
        load(source, leave_out_tokens=[("two words", 0)])
    np.save(tmp_path / "ids.npy", np.arange(100, dtype=np.uint16) % 7)
    for setting in ({"leave_out_special": True}, {"leave_out_tokens": [("w3", 0)]}):
        with pytest.raises(NoTokenizer, match=rf"data\.{next(iter(setting))} is set, but the model has no tokenizer"):
            load(tmp_path / "ids.npy", tokenizer=None, **setting)


@settings(max_examples=150, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=20), min_size=1, max_size=12),
    kept=st.data(),
    context=st.integers(2, 9),
    packing=st.sampled_from(["stream", "document"]),
    bos=st.sampled_from([None, 11]),
)
def test_packing_loses_no_token(documents, kept, context, packing, bos):
    """Whatever documents are left out between others, the rest is all there, in order, and the mask shows just it."""
    separator = 10
    flat = np.array([token for document in documents for token in [*document, separator]], dtype=np.uint16)
    everything = documents_in(flat, separator)
    assert len(everything) == len(documents)
    keep = kept.draw(st.lists(st.booleans(), min_size=len(documents), max_size=len(documents)).filter(any))
    corpus = Corpus(everything.where(np.array(keep)), SequenceLayout(context, packing, bos, separator))
    remaining = [document for document, wanted in zip(documents, keep, strict=True) if wanted]
    rows = rows_of(corpus)
    assert rows == packed(remaining, context, packing, bos, separator=separator)
    seen = [token for tokens, mask in rows for token, counts in zip(tokens, mask, strict=True) if counts]
    whole = [token for document in remaining for token in [*document, separator]]
    if packing == "stream":
        assert seen == whole[: len(seen)] and len(whole) - len(seen) < corpus.layout.payload
    else:
        assert [t for t in seen if t != separator] == [t for t in whole if t != separator]
    # Packed alike, with 1 for every document's first token and 2 for the others, the text shows where they begin.
    firsts = packed([[1] + [2] * (len(each) - 1) for each in remaining], context, packing, bos and 0, separator=0)
    assert corpus.document_starts(range(len(corpus))).tolist() == [[token == 1 for token in ids] for ids, _ in firsts]


def test_only_after_a_separator_does_a_document_begin(tmp_path, load):
    source = write_jsonl(
        tmp_path / "a.jsonl", [[7, 7, 7], [8, 8], *[[token] * 12 for token in range(10)]], column="tokens"
    )
    train = load(source, train=16).train
    assert train.document_starts([1, 0]).int().tolist() == [[0] * 8, [1, 0, 0, 0, 1, 0, 0, 1]]
    np.save(tmp_path / "stream.npy", np.random.default_rng(0).integers(0, 9, 4000).astype(np.uint16))
    pieces = load(tmp_path / "stream.npy", tokenizer=None).train
    assert len(pieces.documents) > 1
    assert not pieces.document_starts(range(len(pieces))).any()
    np.save(tmp_path / "rows.npy", np.array([[token, EOS, *[token + 10] * 6, token, EOS] for token in range(9)]))
    rows = load(tmp_path / "rows.npy").train
    assert rows.document_starts([1, 0]).int().tolist() == [[0, 0, 1, 0, 0, 0, 0, 0]] * 2


def test_a_batch_takes_sequences_in_any_order_and_no_others(tmp_path, load):
    corpus = load(write_jsonl(tmp_path / "a.jsonl", some_documents(30))).train
    whole, some = corpus.batch(range(len(corpus))), corpus.batch(np.array([5, 0, 5]))
    assert torch.equal(some.tokens, whole.tokens[[5, 0, 5]])
    assert some.to("cpu").tokens.shape == (3, 8)
    for index in (-1, len(corpus)):
        with pytest.raises(IndexError):
            corpus.batch([index])


# Sources


def save_dataset(path, documents, column):
    values = [as_text(ids) if column == "text" else ids for ids in documents]
    datasets.Dataset.from_dict({column: values, "other": [1] * len(values)}).save_to_disk(path)
    return path


def write_parquet(path, documents, column):
    values = [as_text(ids) if column == "text" else ids for ids in documents]
    pq.write_table(pa.table({"other": [1] * len(values), column: values}), path)
    return path


def write_csv(path, documents, column):
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        rows = csv.writer(file)
        rows.writerows([["other", "text"], [1, ""], []])
        rows.writerows([1, as_text(ids).replace(" ", "\r\n", 1)] for ids in documents)
    return path


def zst(write, suffix):
    """Pack what a function writes, each half by itself, as tools that append to such files do."""

    def write_packed(path, documents, column):
        plain = write(path.with_suffix(suffix), documents, column)
        content = plain.read_bytes()
        plain.unlink()
        codec = pa.Codec("zstd")
        half = len(content) // 2
        path.write_bytes(b"".join(codec.compress(part, asbytes=True) for part in (content[:half], content[half:])))
        return path

    return write_packed


def write_txt(path, documents, column):
    path.write_text("\n \n\n".join(as_text(ids).replace(" ", "\n", 1) for ids in documents), encoding="utf-8-sig")
    return path


WRITERS = {".jsonl": write_jsonl, ".parquet": write_parquet, ".txt": write_txt, "": save_dataset, ".csv": write_csv}
WRITERS |= {f".{kind}.zst": zst(WRITERS[f".{kind}"], f".{kind}") for kind in ("txt", "jsonl", "csv")}
TEXT_ALONE = (".txt", ".csv", ".txt.zst", ".jsonl.zst", ".csv.zst")


@pytest.mark.parametrize("column", ["text", "input_ids", "tokens"])
@pytest.mark.parametrize("suffix", WRITERS)
def test_every_source_gives_the_same_documents(tmp_path, load, suffix, column):
    if suffix in TEXT_ALONE and column != "text":
        pytest.skip("this file is written with text alone")
    documents = some_documents(25)
    source = WRITERS[suffix](tmp_path / f"source{suffix}", documents, column)
    corpora = load(source, tokenizer=make_tokenizer())
    assert rows_of(corpora.train) == packed(documents[: -heldout_count(documents)], 8)


def test_a_folder_is_its_files_in_order(tmp_path, load):
    documents = some_documents(25)
    folder = tmp_path / "folder"
    (folder / "deeper").mkdir(parents=True)
    write_parquet(folder / "b.parquet", documents[10:20], "text")
    write_jsonl(folder / "a.jsonl", documents[:10])
    write_txt(folder / "deeper" / "c.txt", documents[20:], "text")
    (folder / "README.md").write_text("not read")
    assert rows_of(load(folder).train) == packed(documents[: -heldout_count(documents)], 8)


def test_a_folder_is_read_whole_or_says_what_it_left(tmp_path, load, capsys):
    documents = some_documents(40)
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    for made in (folder / "c.parquet", folder / ".ipynb_checkpoints", elsewhere):
        made.mkdir(parents=True)
    write_jsonl(folder / "a.jsonl", documents[:5])
    plain = write_jsonl(tmp_path / "plain.jsonl", documents[5:10])
    (folder / "b.JSONL.gz").write_bytes(gzip.compress(plain.read_bytes()))
    write_parquet(folder / "c.parquet" / "part-0.parquet", documents[10:20], "text")
    write_txt(elsewhere / "d.txt", documents[20:30], "text")
    (folder / "d").symlink_to(elsewhere)
    (elsewhere / "again").symlink_to(folder)  # which leads back
    (folder / "e.txt").symlink_to(write_txt(tmp_path / "linked.txt", documents[30:], "text"))
    write_jsonl(folder / ".ipynb_checkpoints" / "a.jsonl", documents[:5])
    (folder / "README.md").write_text("not data")
    os.mkfifo(folder / "pipe.txt")
    assert rows_of(load(folder).train) == packed(documents[:36], 8)
    told = capsys.readouterr().err
    assert "3 that hold no data (.ipynb_checkpoints, README.md, pipe.txt)" in told
    write_txt(tmp_path / "f.txt", documents, "text")
    load(tmp_path / "f.txt")
    assert not capsys.readouterr().err
    (folder / "f.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"Cannot read .*f\.txt"):
        load(folder)


@pytest.mark.parametrize(
    "content", [b"not gzip", gzip.compress(b'{"text": "w1"}\n' * 900)[:-20]], ids=["none", "cut off"]
)
def test_a_damaged_gzip_file(tmp_path, load, content):
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    with pytest.raises(DataError, match="not a gzip file that can be read"):
        load(tmp_path / "a.jsonl.gz")


@pytest.mark.parametrize("content", [b"not zst", pa.Codec("zstd").compress(b"w1 " * 900, asbytes=True)[:-9]])
def test_a_damaged_zst_file(tmp_path, load, content):
    (tmp_path / "a.txt.zst").write_bytes(content)
    with pytest.raises(DataError, match="not a zst file that can be read"):
        load(tmp_path / "a.txt.zst")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("text,other\nw1 w2,1\nw3\n", r"line 3: a row has 1 fields, and the first line names 2 columns"),
        ('text\n"w1" w2\n', r"line 2 is not CSV"),
        ("body\nw1\n", r"has no column text or .*; it has body"),
        ("text\n", "it holds no document"),
    ],
)
def test_a_csv_file_that_is_none(tmp_path, load, content, why):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(DataError, match=why):
        load(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("names", "split"),
    [
        (["train-00000-of-00001", "test-00000-of-00001", "validation-00000-of-00001"], None),
        (["train/a", "test/a", "valid/a"], None),
        (["Stories-train", "my_eval", "stories.dev"], None),
        (["a", "b-test", "val"], None),
        (["b-test", "a", "val"], "test"),
        (["val", "test", "train"], "validation"),
    ],
)
def test_a_split_of_a_folder_is_its_files_that_say_so(tmp_path, load, capsys, names, split):
    documents = [some_documents(20, seed) for seed in range(3)]
    for name, own in zip(names, documents, strict=True):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", own)
    settings = {} if split is None else {"split": split}
    assert rows_of(load(tmp_path / "data", **settings).train) == packed(documents[0][:18], 8)
    told = capsys.readouterr().err
    assert "2 of other splits" in told and all(name in told for name in names[1:])
    held = "train" if split else "test"
    corpora = load(tmp_path / "data", heldout_split=held, **settings)
    assert rows_of(corpora.train) == packed(documents[0], 8)
    assert rows_of(corpora.heldout) == packed(
        documents[{"test": 1, "train": 2 if split == "validation" else 1}[held]], 8
    )
    # A file that is named is read, whatever its name says.
    assert len(load(tmp_path / "data" / f"{names[1]}.jsonl").train)


def test_settings_that_a_local_source_has_no_use_for_are_refused(tmp_path, load):
    documents = some_documents(30)
    (tmp_path / "folder").mkdir()
    sources = [
        write_jsonl(tmp_path / "folder" / "a.jsonl", documents).parent,
        write_jsonl(tmp_path / "a.jsonl", documents),
        save_dataset(tmp_path / "saved", documents, "text"),
        "embedded",
    ]
    for source in sources:
        with pytest.raises(DataError, match=r"no split 'nonsense'; it has train\..*data\.split"):
            load(source, split="nonsense")
        with pytest.raises(DataError, match=r"no split 'nonsense'; it has train\..*data\.heldout_split"):
            load(source, heldout_split="nonsense")
        with pytest.raises(DataError, match=r"data\.dataset_config is 'en', but only a dataset on the .* hub"):
            load(source, dataset_config="en")
    for source in (write_txt(tmp_path / "a.txt", documents, "text"), "embedded"):
        with pytest.raises(DataError, match=r"data\.column is 'story', but .* has no columns"):
            load(source, column="story")
    # One that the held-out source has a use for is none of these.
    load(tmp_path / "a.txt", heldout=str(write_jsonl(tmp_path / "b.jsonl", some_documents(30, 1))), column="text")


def test_splits_of_a_saved_dataset(tmp_path, load):
    train, heldout = some_documents(20, seed=1), some_documents(10, seed=2)
    tables = {"train": train, "validation": heldout}
    datasets.DatasetDict(
        {split: datasets.Dataset.from_dict({"text": [as_text(d) for d in rows]}) for split, rows in tables.items()}
    ).save_to_disk(tmp_path / "both")
    corpora = load(tmp_path / "both", heldout_split="validation")
    assert rows_of(corpora.train) == packed(train, 8) and rows_of(corpora.heldout) == packed(heldout, 8)
    with pytest.raises(DataError, match=r"no split 'test'.*train, validation"):
        load(tmp_path / "both", heldout_split="test")


def test_null_text_is_left_out_alike_everywhere(tmp_path, load):
    documents = some_documents(25)
    texts = [None, *(as_text(ids) for ids in documents[:9]), None, *(as_text(ids) for ids in documents[9:]), None]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved")
    for name in ("a.jsonl", "a.parquet", "saved"):
        assert rows_of(load(tmp_path / name, tokenizer=make_tokenizer()).train) == packed(documents[:23], 8)
    (tmp_path / "none.jsonl").write_text('{"text": null}\n' * 3)
    pq.write_table(pa.table({"text": pa.nulls(3)}), tmp_path / "none.parquet")
    for name in ("none.jsonl", "none.parquet"):
        with pytest.raises(DataError, match="is empty: it holds no document"):
            load(tmp_path / name)


TEXT_TYPES = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
ID_TYPES = [pa.list_(pa.int32()), pa.large_list(pa.uint16()), pa.list_(pa.int64(), 8)]


@pytest.mark.parametrize("kind", [*TEXT_TYPES, *ID_TYPES], ids=str)
def test_every_type_of_text_and_ids_in_parquet(tmp_path, load, kind):
    is_text = kind in TEXT_TYPES
    documents = some_documents(25) if is_text else np.random.default_rng(0).integers(0, WORDS, (25, 8)).tolist()
    values = pa.array([as_text(ids) if is_text else ids for ids in documents])
    column = values.dictionary_encode() if pa.types.is_dictionary(kind) else values.cast(kind)
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    found = rows_of(load(tmp_path / "a.parquet").train)
    assert found == (packed if is_text else cut_rows)(documents[:23], 8)


def test_a_dataset_that_is_a_script_is_told_in_one_line(load, monkeypatch):
    for error, remedy in (
        (RuntimeError("Dataset scripts are no longer supported, but found text.py"), "data.revision=refs/convert/par"),
        (NotImplementedError("no such\nthing"), "Check the name"),
        (KeyError("train"), "Check the name"),
    ):

        def load_dataset(*arguments, error=error, **options):
            raise error

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(DataError) as caught:
            load("someone/some-text")
        assert caught.value.exit_code == 4 and "\n" not in str(caught.value) and remedy in str(caught.value)


def test_a_hub_dataset_goes_through_datasets(tmp_path, load, monkeypatch):
    documents = some_documents(25)
    asked = []

    def load_dataset(name, config, *, split, revision, streaming):
        asked.append((name, config, split, revision, streaming))
        rows = datasets.Dataset.from_dict({"text": [as_text(ids) for ids in documents]})
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpora = load("someone/some-text", dataset_config="en", split="train")
    assert rows_of(corpora.train) == packed(documents[: -heldout_count(documents)], 8)
    load("someone/some-text", dataset_config="en", split="train", streaming=True, heldout_share=0.3)
    assert asked == [("someone/some-text", "en", "train", None, streaming) for streaming in (False, True)]

    def unreachable(*arguments, **options):
        raise ConnectionError("Couldn't reach it")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"'someone/else'.*Couldn't reach it"):
        load("someone/else")


def test_a_hub_dataset_is_tried_by_its_first_document_before_long_work(tmp_path, monkeypatch):
    asked, silent = [], []

    def load_dataset(name, config, *, split, revision, streaming):
        asked.append((name, split, streaming, constants.HF_HUB_OFFLINE))
        if name == "someone/gone":
            raise ConnectionError("Couldn't reach it")
        return datasets.Dataset.from_dict({"text": ["a b"]}).to_iterable_dataset()

    def dataset_info(self, name, *, revision=None, timeout=None):
        if silent:
            raise ConnectionError("no hub")
        return SimpleNamespace(sha="1" * 40)

    monkeypatch.setenv("ENDWISE_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    with pytest.raises(DataError, match="someone/gone"):
        check_readable(DataConfig(source="someone/there", heldout="someone/gone", split="a", heldout_split="b"))
    assert asked == [("someone/there", "a", True, False), ("someone/gone", "b", True, False)]
    silent.append(True)
    asked.clear()
    check_readable(DataConfig(source="someone/there"))  # what was asked for before may be kept
    check_readable(DataConfig(source="someone/new"))
    assert asked == [("someone/new", "train", False, True)] and not constants.HF_HUB_OFFLINE


def test_a_pinned_revision_is_asked_for_recorded_and_cached_apart(tmp_path, load, monkeypatch):
    asked = []

    def load_dataset(name, config, *, split, revision, streaming):
        asked.append((name, revision))
        documents = some_documents(25, seed=("v1", "v2", None).index(revision))
        return datasets.Dataset.from_dict({"text": [as_text(ids) for ids in documents]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    first, second, again = (load("someone/some-text", revision=revision) for revision in ("v1", "v2", "v1"))
    assert asked == [("someone/some-text", "v1"), ("someone/some-text", "v2")]  # the third comes from the cache
    assert rows_of(first.train) == rows_of(again.train) != rows_of(second.train)
    assert first.describe()["train"]["source"] == "someone/some-text at revision v1"
    assert "someone/some-text at revision v1" in first.describe()["heldout"]["source"]
    asked.clear()
    apart = load("someone/some-text", revision="v2", heldout="someone/other-text")
    assert sorted(asked) == [("someone/other-text", None)]
    assert "revision" not in apart.describe()["heldout"]["source"]


def test_a_revision_that_would_pin_nothing_is_refused(tmp_path, load):
    (tmp_path / "a.txt").write_text("a b c\n\nd e f\n")
    for source in (tmp_path / "a.txt", "embedded"):
        with pytest.raises(DataError, match=r"data\.revision is 'v1', but only a dataset on the Hugging Face hub"):
            load(source, revision="v1")


@pytest.mark.parametrize("rows", [1, 2])
def test_token_streams_are_taken_as_they_are(tmp_path, load, rows):
    """No separator is added to an array; its documents end at separators (and rows)."""
    documents = some_documents(40, longest=30)
    flat = np.array([token for document in documents for token in [*document, EOS]])
    flat = flat[: len(flat) // 8 * 8]
    np.save(tmp_path / "a.npy", flat.astype(np.int32) if rows == 1 else flat.reshape(-1, 8))
    corpora = load(tmp_path / "a.npy")
    train = corpora.train.batch(range(len(corpora.train))).tokens.flatten()
    assert torch.equal(train, torch.from_numpy(flat[: len(train)]))
    assert len(train) > 0.8 * len(flat)


def rows_with_documents(count, length, seed=0):
    """Rows of `length` ids cut out of joined documents, the way others pack them."""
    documents = some_documents(1 + 3 * count * length // 20, seed)
    flat = np.array([token for document in documents for token in [*document, EOS]] * 2)
    return flat[: count * length].reshape(count, length).tolist()


def write_npy(path, rows, column):
    np.save(path, np.array(rows))
    return path


def cut_rows(rows, context, bos=None, mask_first=False):
    """The definition, slowly: each row by itself, what fills no sequence left out."""
    head = [] if bos is None else [bos]
    room = context - len(head)
    cut = [[*head, *row[i : i + room]] for row in rows for i in range(0, len(row) - room + 1, room)]
    masked = {0} if bos is not None or mask_first else set()
    return [(ids, [place not in masked for place in range(context)]) for ids in cut]


@pytest.mark.parametrize("write", [write_npy, write_jsonl, write_parquet])
@pytest.mark.parametrize(("length", "context"), [(8, 8), (16, 8), (8, 3), (13, 6)])
@pytest.mark.parametrize(("prepend_bos", "mask_first"), [(False, False), (True, False), (False, True)])
def test_rows_that_are_packed_stay_packed(tmp_path, load, write, length, context, prepend_bos, mask_first):
    """On both sides of the split, whatever separators stand in them."""
    rows = rows_with_documents(30, length)
    suffix = {write_npy: ".npy", write_jsonl: ".jsonl", write_parquet: ".parquet"}[write]
    source = write(tmp_path / f"rows{suffix}", rows, "input_ids")
    corpora = load(source, context=context, prepend_bos=prepend_bos, mask_first_position=mask_first, model_context=16)
    settings = (context, BOS if prepend_bos else None, mask_first)
    kept = [row for row in rows[:27] if row not in rows[27:]]
    held = rows_of(corpora.heldout)
    assert held == cut_rows(rows[27:], *settings)
    left_out = len(kept) * (length % (context - prepend_bos)) - corpora.train.cut_off
    assert left_out == (len(kept) - len(corpora.train.documents)) * (length % (context - prepend_bos))
    whole = cut_rows(kept, *settings)
    assert all(sequence in whole for sequence in rows_of(corpora.train))
    assert ("fill no sequence and were left out" in str(corpora)) == (length % (context - prepend_bos) > 0)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_that_shares_a_document_with_held_out_rows_is_left_out_whole(tmp_path, load, streaming):
    rng = np.random.default_rng(0)
    long = rng.integers(0, WORDS, 20).tolist()

    def row(*middle):
        left = 40 - len(middle) - 2
        return [*rng.integers(0, WORDS, 5).tolist(), EOS, *middle, EOS, *rng.integers(0, WORDS, left - 5).tolist()]

    rows = [row(*long) if number in (3, 17, 29) else row() for number in range(30)]
    rows[5] = rows[28]
    write_jsonl(tmp_path / "rows.jsonl", rows[:27], "tokens")
    other = write_jsonl(tmp_path / "heldout.jsonl", rows[27:], "tokens")
    corpora = load(
        tmp_path / "rows.jsonl",
        heldout=str(other),
        context=20,
        model_context=40,
        streaming=streaming,
        train=240,
        evaluate=120,
    )
    left = [each for number, each in enumerate(rows[:27]) if number not in (3, 5, 17)]
    expected = cut_rows(left, 20)
    assert rows_of(corpora.train) == (expected[:12] if streaming else expected)
    assert corpora.dropped == (2 if streaming else 3) and "training rows" in str(corpora)


def test_a_stream_of_rows_is_read_on_for_those_that_are_left_out(tmp_path, load):
    """More rows than are read at once hold as many sequences as are wanted."""
    rng = np.random.default_rng(0)
    same = rng.integers(0, WORDS, 20).tolist()  # a document in every second row
    rows = [
        [*(same if i % 2 else rng.integers(0, WORDS, 20)), EOS, *rng.integers(0, WORDS, 3), EOS] for i in range(3000)
    ]
    rows = [[int(token) for token in row[:24]] for row in rows]
    source = write_jsonl(tmp_path / "rows.jsonl", rows, "tokens")
    corpora = load(source, streaming=True, heldout_share=0.3, context=24, model_context=24, train=24 * 900, evaluate=24)
    assert len(corpora.train) == 900 > 0.7 * ROWS_AT_ONCE / 2 and corpora.dropped > 5
    assert all(ids[:20] != same for ids, _ in rows_of(corpora.train))


def test_rows_that_cannot_stay_packed_are_refused(tmp_path, load):
    rows = rows_with_documents(20, 8)
    np.save(tmp_path / "short.npy", np.array(rows))
    with pytest.raises(DataError, match=r"rows of at most 8 ids, fewer than the 16.*data\.context"):
        load(tmp_path / "short.npy", model_context=16)
    np.save(tmp_path / "bos.npy", np.array([[BOS, *row] for row in rows]))
    with pytest.raises(DataError, match=r"begins with the beginning-of-sequence token already"):
        load(tmp_path / "bos.npy", prepend_bos=True)
    (tmp_path / "both").mkdir()
    np.save(tmp_path / "both" / "a.npy", np.array(rows))
    write_jsonl(tmp_path / "both" / "b.jsonl", some_documents(9))
    with pytest.raises(DataError, match="both documents and rows of ids"):
        load(tmp_path / "both")


def test_lists_of_ids_shorter_than_a_sequence_are_documents(tmp_path, load):
    rows = np.random.default_rng(0).integers(0, WORDS, (20, 8)).tolist()
    write_jsonl(tmp_path / "a.jsonl", rows, "input_ids")
    corpora = load(tmp_path / "a.jsonl", model_context=16, train=16, evaluate=16)
    assert rows_of(corpora.train) == packed(rows[:18], 16)


def test_documents_of_rows_are_padded_one_by_one(tmp_path, load):
    """`document` packing takes rows apart, as it says, but joins nothing of two rows."""
    rows = rows_with_documents(20, 16)
    np.save(tmp_path / "a.npy", np.array(rows))
    held = load(tmp_path / "a.npy", packing="document", model_context=16, train=16, evaluate=16).heldout
    documents = [part for row in rows[18:] for part in np.split(row, np.flatnonzero(np.array(row) == EOS) + 1)]
    documents = [part[part != EOS].tolist() for part in documents if len(part)]
    ids = [np.array(tokens)[np.array(mask)].tolist() for tokens, mask in rows_of(held)]
    assert [[token for token in each if token != EOS] for each in ids] == [each for each in documents if each]


def test_a_stream_without_separators_needs_no_tokenizer(tmp_path, load):
    flat = np.random.default_rng(0).integers(0, VOCAB, 20_000).astype(np.uint16)
    np.save(tmp_path / "a.npy", flat)
    corpora = load(tmp_path / "a.npy", tokenizer=None)
    train, heldout = (c.batch(range(len(c))).tokens.flatten().numpy() for c in (corpora.train, corpora.heldout))
    assert np.array_equal(train, flat[: len(train)])
    assert 0.85 * len(flat) < len(train) < 0.95 * len(flat)
    assert len(train) + len(heldout) > len(flat) - 16


def test_special_tokens_in_letters_are_text_unless_asked_for(tmp_path, load, capsys):
    documents = some_documents(21)
    joined = [as_text(a) + " <eos> " + as_text(b) for a, b in zip(documents[::2], documents[1::2], strict=False)]
    (tmp_path / "a.txt").write_text("\n\n".join(joined))
    train = load(tmp_path / "a.txt", special_tokens=True).train
    assert rows_of(train) == packed(documents[:18], 8) and len(train.documents) == 18
    assert "special_tokens" not in capsys.readouterr().err
    as_it_stands = [[*a, UNK, UNK, *b] for a, b in zip(documents[::2], documents[1::2], strict=False)]
    train = load(tmp_path / "a.txt").train
    assert rows_of(train) == packed(as_it_stands[:9], 8) and len(train.documents) == 9
    assert "holds '<eos>' in letters" in capsys.readouterr().err


def test_no_tokenizer_makes_a_special_token_of_text():
    """Byte-level, and a Unigram vocabulary, which holds `</s>` as a piece like any other."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), *((letter, -5.0) for letter in "</s>ab")]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    unigram = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    byte_level = PreTrainedTokenizerFast(tokenizer_object=loading._embedded_tokenizer(), eos_token="<|endoftext|>")
    for tokenizer, text in ((unigram, "a</s>b"), (byte_level, "Once<|endoftext|>upon"), (unigram, "a"), (unigram, "")):
        (parsed,), (ids,) = (text_ids(tokenizer, [text], specials) for specials in (True, False))
        assert (tokenizer.eos_token_id in parsed) == (len(text) > 1)
        assert tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids).replace(" ", "") == text


def embed(monkeypatch, train, heldout):
    """Puts documents of the embedded tokenizer's ids in place of the embedded corpus, found again."""
    monkeypatch.setattr(loading, "_embedded_documents", loading._embedded_documents.__wrapped__)
    for side, documents in (("train", train), ("heldout", heldout)):
        tokens = np.array([token for document in documents for token in [*document, 0]], dtype=np.uint16)
        monkeypatch.setattr(embedded, f"{side}_tokens", lambda tokens=tokens: tokens, raising=False)


def test_the_embedded_corpus(load, monkeypatch):
    rng = np.random.default_rng(0)
    train, heldout = ([rng.integers(300, 2000, 30).tolist() for _ in range(count)] for count in (20, 5))
    embed(monkeypatch, [*train, heldout[2]], heldout)
    corpora = load("embedded", tokenizer=None, vocab_size=4096)
    assert rows_of(corpora.train) == packed(train, 8, separator=0)
    assert rows_of(corpora.heldout) == packed(heldout, 8, separator=0)
    assert corpora.dropped == 1
    with pytest.raises(DataError, match="outside the model's vocabulary of 500"):
        load("embedded", tokenizer=None, vocab_size=500)


def test_the_embedded_corpus_is_tokenised_again_for_another_model(load, monkeypatch):
    monkeypatch.setattr("endwise.tokens.loading._embedded_tokenizer", lambda: Tokenizer(models.WordLevel({"w3": 5})))
    embed(monkeypatch, [[5] * 16 for _ in range(3)], [[5] * 17 for _ in range(3)])
    corpora = load("embedded")
    assert corpora.train.batch([0]).tokens.tolist() == [[3] * 8]


@pytest.mark.skipif(not hasattr(embedded, "train_tokens"), reason="the embedded corpus is not built")
def test_the_shipped_corpus_is_disjoint():
    corpora = load_corpora(
        DataConfig(context=256),
        tokenizer=None,
        model_context=256,
        vocab_size=4096,
        training_tokens=1_000_000,
        evaluation_tokens=500_000,
    )
    check_disjoint(corpora.train, corpora.heldout)


# The cache, and streaming


def test_the_second_start_tokenises_nothing(tmp_path, load):
    source = write_jsonl(tmp_path / "a.jsonl", some_documents(30))
    first = make_tokenizer()
    before = load(source, tokenizer=first)
    assert first.texts == 30
    second = make_tokenizer()
    after = load(source, tokenizer=second)
    assert second.texts == 0
    assert rows_of(before.train) == rows_of(after.train)
    assert before.describe() == after.describe()
    assert isinstance(after.train.documents.tokens, np.memmap) and after.train.documents.tokens.dtype == np.uint16


def test_what_changes_the_tokens_is_tokenised_again(tmp_path, load):
    source = write_jsonl(tmp_path / "a.jsonl", some_documents(30))
    load(source)
    for change in (
        {"separator": "w0"},
        {"vocab_size": 70_000},
        {"tokenizer": make_tokenizer(bos_token=None)},
    ):
        tokenizer = change.get("tokenizer", make_tokenizer())
        load(source, **{"tokenizer": tokenizer, **change})
        assert tokenizer.texts == 30, change
    changed = some_documents(30, seed=1)
    write_jsonl(source, changed)
    assert rows_of(load(source).train) == packed(changed[:27], 8)


def test_a_damaged_cache_is_built_again(tmp_path, load):
    source = write_jsonl(tmp_path / "a.jsonl", some_documents(30))
    before = rows_of(load(source).train)
    (tokens,) = (tmp_path / "cache").rglob("tokens.npy")
    tokens.write_bytes(tokens.read_bytes()[:-10])
    assert rows_of(load(source).train) == before
    assert not list((tmp_path / "cache").rglob("*partial*"))


def test_a_failure_leaves_no_half_cache(tmp_path, load):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"text": "w1 w2"}) + "\n" + "{broken\n")
    with pytest.raises(DataError, match="line 2"):
        load(bad)
    assert not [file for file in (tmp_path / "cache" / "tokens").iterdir() if file.suffix != ".lock"]


class BreaksOff(CountingTokenizer):
    """Ctrl-C comes as the ids of a text, counted over all calls, are taken."""

    at = 0

    def __call__(self, texts, **options):
        before, encoding = self.texts, super().__call__(texts, **options)
        return {"input_ids": Ids(encoding["input_ids"], self.at - before)}


class Ids(list):
    def __init__(self, ids, at):
        super().__init__(ids)
        self.at, self.checked = at, False

    def __iter__(self):
        for number, ids in enumerate(super().__iter__(), 1):
            if self.checked and number == self.at:
                raise KeyboardInterrupt
            yield ids
        self.checked = True  # for special tokens, before any is taken


@pytest.fixture
def at_once(monkeypatch):
    """A tenth of the rows are tokenised at once."""
    monkeypatch.setattr("endwise.tokens.tokenising.ROWS_AT_ONCE", ROWS_AT_ONCE // 10)
    return ROWS_AT_ONCE // 10


@pytest.mark.parametrize("at", [1, 99, 100, 101, 299])
def test_ctrl_c_while_tokenising_keeps_whole_batches(tmp_path, load, at_once, at):
    source = write_jsonl(tmp_path / "a.jsonl", some_documents(300))
    whole = rows_of(load(source, cache=tmp_path / "whole").train)
    breaks_off = make_tokenizer(BreaksOff)
    breaks_off.at = at
    with pytest.raises(KeyboardInterrupt):
        load(source, tokenizer=breaks_off)
    tokenizer = make_tokenizer()
    assert rows_of(load(source, tokenizer=tokenizer).train) == whole
    assert tokenizer.texts == 300 - (at - 1) // at_once * at_once


def test_a_cache_that_cannot_be_written(tmp_path, load):
    source = write_jsonl(tmp_path / "a.jsonl", some_documents(30))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.cache"):
        load(source, cache=tmp_path / "file")


def test_streaming_reads_what_is_needed(tmp_path, load, at_once):
    documents = some_documents(1200)
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    tokenizer = make_tokenizer()
    few = load(source, tokenizer=tokenizer, streaming=True, heldout_share=0.2, train=800, evaluate=160)
    assert at_once <= tokenizer.texts <= 3 * at_once
    assert len(few.train) == 100 and len(few.heldout) >= 20
    many = load(source, tokenizer=tokenizer, streaming=True, heldout_share=0.2, train=4000, evaluate=400)
    check_disjoint(many.train, few.heldout)
    check_disjoint(few.train, many.heldout)
    counted = tokenizer.texts
    again = load(source, tokenizer=tokenizer, streaming=True, heldout_share=0.2, train=800, evaluate=160)
    assert tokenizer.texts == counted
    # What was read for another run changes nothing.
    assert again.describe() == few.describe() and rows_of(again.train) == rows_of(few.train)


def test_streaming_a_separate_heldout_source(tmp_path, load):
    train, heldout = some_documents(60, seed=1), some_documents(60, seed=2)
    source = write_jsonl(tmp_path / "a.jsonl", [*heldout[:3], *train])
    other = write_jsonl(tmp_path / "b.jsonl", heldout)
    corpora = load(source, heldout=str(other), streaming=True, packing="document", train=160, evaluate=80)
    assert corpora.dropped == 3
    assert rows_of(corpora.train) == packed(train, 8, "document")[:20]


# Disjointness


def two_sources(load, tmp_path, train, heldout):
    other = write_jsonl(tmp_path / "heldout.jsonl", heldout)
    return load(write_jsonl(tmp_path / "train.jsonl", train), heldout=str(other))


def test_identical_documents_leave_the_training_side(tmp_path, load):
    train, heldout = some_documents(20, seed=1), some_documents(10, seed=2)
    corpora = two_sources(load, tmp_path, [*train[:5], heldout[3], *train[5:], heldout[7], heldout[3]], heldout)
    assert rows_of(corpora.train) == packed(train, 8)
    assert corpora.dropped == 3 and corpora.describe()["dropped_duplicates"] == 3
    assert "3 training documents" in str(corpora)


def test_identical_documents_within_one_source(tmp_path, load):
    documents = some_documents(20)
    repeated = [documents[19], *documents]
    corpora = load(write_jsonl(tmp_path / "a.jsonl", repeated))
    assert rows_of(corpora.train) == packed(documents[:18], 8)
    assert corpora.dropped == 1


def test_the_same_source_twice_is_refused(tmp_path, load):
    documents = some_documents(20)
    with pytest.raises(DataError, match=r"All 20 training documents.*data\.heldout"):
        two_sources(load, tmp_path, documents, documents)


def test_a_slice_of_a_stream_is_found_wherever_it_starts(tmp_path, load):
    """No separator tells where documents end: pieces are cut by content, so a shifted copy has the same ones."""
    flat = np.random.default_rng(0).integers(0, WORDS, 20_000)
    np.save(tmp_path / "train.npy", flat)
    np.save(tmp_path / "heldout.npy", flat[7_013:9_027])
    corpora = load(tmp_path / "train.npy", heldout=str(tmp_path / "heldout.npy"), tokenizer=None)
    left = corpora.train.tokens
    assert 20_000 - 2_014 - 64 < left < 20_000 - 2_014 + 600
    assert corpora.dropped > 10


def test_check_disjoint_sees_an_overlap(tmp_path, load):
    corpora = load(write_jsonl(tmp_path / "a.jsonl", some_documents(30)))
    check_disjoint(corpora.train, corpora.heldout)
    with pytest.raises(DataError, match=r"must not overlap, but 27 documents"):
        check_disjoint(corpora.train, corpora.train)


# Order


def test_every_epoch_is_a_permutation_of_its_own(tmp_path, load):
    corpus = load(write_jsonl(tmp_path / "a.jsonl", some_documents(30))).train
    n = len(corpus)
    order = BatchOrder(corpus, 4, seed=3, epochs=3)
    assert len(order) == 3 * n // 4
    drawn = [index for number in range(len(order)) for index in order[number]]
    for epoch in range(2):
        expected = numpy_stream(3, "order", epoch).permutation(n)
        assert drawn[epoch * n : (epoch + 1) * n] == expected.tolist()
    assert drawn[:n] != drawn[n : 2 * n]
    assert order[5] == BatchOrder(corpus, 4, seed=3, epochs=1)[5]
    assert order[5] != BatchOrder(corpus, 4, seed=4, epochs=1)[5]
    for number in (-1, len(order)):
        with pytest.raises(IndexError):
            order[number]


# Errors


def test_a_corpus_shorter_than_asked(tmp_path, load):
    source = write_jsonl(tmp_path / "a.jsonl", some_documents(30))
    there = load(source).train.tokens
    load(source, train=2 * there, epochs=2)
    with pytest.raises(DataError, match=rf"{there} training tokens .* x 2 epochs = {2 * there}.*data\.epochs to 3"):
        load(source, train=2 * there + 8, epochs=2)
    held = load(source).heldout.tokens
    load(source, evaluate=held)
    with pytest.raises(DataError, match=rf"{held} held-out tokens .*evaluation\.tokens"):
        load(source, evaluate=held + 8)


def test_tokens_outside_the_vocabulary(tmp_path, load):
    source = write_jsonl(tmp_path / "a.jsonl", some_documents(30))
    with pytest.raises(DataError, match=r"outside the model's vocabulary of 30"):
        load(source, vocab_size=30, tokenizer=make_tokenizer(eos_token="w1"))
    load(source)
    ids = write_jsonl(tmp_path / "b.jsonl", [[1, 2], [42]], "tokens")
    with pytest.raises(DataError, match=r"vocabulary of 42"):
        load(ids, vocab_size=42)
    with pytest.raises(DataError, match="token id -1"):
        load(write_jsonl(tmp_path / "c.jsonl", [[1, 2], [-1]], "tokens"))
    with pytest.raises(DataError, match=r"data\.separator.*token id 40"):
        load(source, vocab_size=40)


def test_a_cached_corpus_is_checked_against_the_vocabulary_again(tmp_path, load):
    source = write_jsonl(tmp_path / "a.jsonl", [[1, 2], [20, 3], [4, 5], [6, 7, 8, 9, 10, 11, 12, 13]], "tokens")
    same = make_tokenizer(eos_token="w1")
    load(source, tokenizer=same, vocab_size=30)
    with pytest.raises(DataError, match=r"token id 20.*vocabulary of 15"):
        load(source, tokenizer=same, vocab_size=15)


def test_a_context_the_model_does_not_have(tmp_path, load):
    source = write_jsonl(tmp_path / "a.jsonl", some_documents(30))
    with pytest.raises(DataError, match=r"data\.context is 16.*at most 8"):
        load(source, context=16)
    with pytest.raises(DataError, match=r"Set data\.context"):
        load(source, model_context=None)
    assert load(source, context=4).train.context == 4
    assert load(source, context=4, model_context=None).train.context == 4


EMPTY = {"a.txt": b"", "b.txt": b"\n \n\n", "c.jsonl": b"\n\n", "d.npy": None, "e.parquet": None}


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_file(tmp_path, load, name):
    path = tmp_path / name
    if name == "d.npy":
        np.save(path, np.empty(0, np.int64))
    elif name == "e.parquet":
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    else:
        path.write_bytes(EMPTY[name])
    with pytest.raises(DataError, match="is empty"):
        load(path)


def test_documents_without_a_token(tmp_path, load):
    with pytest.raises(DataError, match="no document with a token"):
        load(write_jsonl(tmp_path / "a.jsonl", [[], []]))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ""])
def test_a_column_that_is_not_there(tmp_path, load, suffix):
    source = WRITERS[suffix](tmp_path / f"a{suffix}", some_documents(30), "words" if suffix != ".jsonl" else "text")
    with pytest.raises(DataError, match=r"no column story; it has .*other.*data\.column"):
        load(source, column="story")
    if suffix != ".jsonl":
        with pytest.raises(DataError, match=r"no column text or input_ids or tokens or messages; it has .*words"):
            load(source)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ""])
def test_a_column_of_the_wrong_kind(tmp_path, load, suffix):
    source = WRITERS[suffix](tmp_path / f"a{suffix}", some_documents(30), "text")
    with pytest.raises(DataError, match="text or a list of token ids"):
        load(source, column="other")


@pytest.mark.parametrize("name", ["missing.txt", "missing/folder/deep", "/missing", "./missing"])
def test_a_missing_file(load, name):
    with pytest.raises(DataError, match="There is no file or folder"):
        load(name)


def test_files_that_cannot_be_read(tmp_path, load):
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        load(tmp_path / "latin.txt")
    (tmp_path / "a.doc").write_text("text\nw1\n")
    with pytest.raises(DataError, match=r"extension '\.doc' is none of \.txt, \.txt\.gz, "):
        load(tmp_path / "a.doc")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="holds no file"):
        load(tmp_path / "folder")
    (tmp_path / "a.parquet").write_text("not one")
    with pytest.raises(DataError, match="not a Parquet file"):
        load(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("1\n")
    with pytest.raises(DataError, match="must be an object"):
        load(tmp_path / "a.jsonl")


def test_arrays_that_are_no_tokens(tmp_path, load):
    for array, message in (
        (np.zeros(4), "float64"),
        (np.zeros((2, 2, 2), np.int64), "3 axes"),
        (np.array([{"a": 1}], dtype=object), "not a NumPy array"),
    ):
        np.save(tmp_path / "a.npy", array, allow_pickle=True)
        with pytest.raises(DataError, match=message):
            load(tmp_path / "a.npy")


def test_tokenizers_without_what_is_asked_of_them(tmp_path, load):
    source = write_jsonl(tmp_path / "a.jsonl", some_documents(30))
    bare = make_tokenizer(eos_token=None, bos_token=None)
    with pytest.raises(DataError, match=r"data\.separator"):
        load(source, tokenizer=bare)
    load(source, tokenizer=bare, separator="<eos>")
    with pytest.raises(DataError, match="no beginning-of-sequence"):
        load(source, tokenizer=bare, separator="<eos>", prepend_bos=True)
    with pytest.raises(DataError, match="not a single token"):
        load(source, separator="w1 w2")
    with pytest.raises(DataError, match="no tokenizer to look it up"):
        load(source, tokenizer=None, separator="<eos>")
    with pytest.raises(DataError, match="at least 2"):
        load(source, prepend_bos=True, context=1)
    np.save(tmp_path / "a.npy", np.arange(30))
    with pytest.raises(DataError, match="packing is document"):
        load(tmp_path / "a.npy", tokenizer=None, packing="document")


def test_text_without_a_tokenizer(tmp_path, load):
    with pytest.raises(DataError, match="has no tokenizer"):
        load(write_jsonl(tmp_path / "a.jsonl", some_documents(30)), tokenizer=None)


def test_what_cannot_be_held_out(tmp_path, load):
    with pytest.raises(DataError, match="single document"):
        load(write_jsonl(tmp_path / "a.jsonl", some_documents(1)))
    with pytest.raises(DataError, match=r"no split 'validation'; it has train\."):
        load(write_jsonl(tmp_path / "b.jsonl", some_documents(30)), heldout_split="validation")
    with pytest.raises(DataError, match="no document to train on"):
        load(write_jsonl(tmp_path / "c.jsonl", some_documents(2)), heldout_share=0.99)


def test_corpora_that_overlap_cannot_be_made(tmp_path, load):
    both = load(write_jsonl(tmp_path / "a.jsonl", [[i] * (3 + i % 4) for i in range(1, 40)]))
    with pytest.raises(DataError, match=r"must not overlap"):
        Corpora(both.train, both.train)
    with pytest.raises(DataError, match="text or a list of token ids"):
        load(write_jsonl(tmp_path / "b.jsonl", [[[1], [2, 3]]], "tokens"))
