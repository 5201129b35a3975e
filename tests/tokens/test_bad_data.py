"""Data files that are damaged, hostile or merely odd: taken as text and ids, or refused by name and line."""

import json
import pickle

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from bad_input import HOSTILE, hidden_in
from endwise.common.errors import DataError
from endwise.config.run import DataConfig
from endwise.tokens import load_corpora
from word_tokenizer import VOCAB, make_tokenizer

repeated = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
TOKENIZER = make_tokenizer()
WORDS = "\n\n".join(f"w{number} w1 w2 w3 w4 w5 w6 w7 w8" for number in range(20))


@pytest.fixture
def load(tmp_path):
    def call(source, **changes):
        return load_corpora(
            DataConfig.build({"source": str(source), "cache": tmp_path / "cache", "context": 4, **changes}),
            tokenizer=TOKENIZER,
            model_context=8,
            vocab_size=VOCAB,
            training_tokens=8,
            evaluation_tokens=8,
        )

    return call


@pytest.fixture
def says(load):
    """Function that returns the message with which a file or folder is refused."""

    def call(source, **changes):
        with pytest.raises(DataError) as caught:
            load(source, **changes)
        assert str(source) in str(caught.value)
        return str(caught.value)

    return call


def taken_or_refused(load, source):
    message = ""
    try:
        load(source)
    except DataError as error:
        message = str(error)
    assert not message or (str(source) in message and len(message) < 1000)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from([10**30, 2**63, -1]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=8,
)
RECORDS = st.dictionaries(st.sampled_from(["text", "input_ids", "tokens", "x"]), JSON, max_size=2)


@repeated
@given(
    lines=st.lists(
        RECORDS.map(json.dumps).map(str.encode) | st.binary(max_size=12) | JSON.map(json.dumps).map(str.encode)
    )
)
def test_any_lines_of_jsonl(load, tmp_path, lines):
    good = [json.dumps({"text": text}).encode() for text in WORDS.split("\n\n")]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*good, *lines]))
    taken_or_refused(load, tmp_path / "a.jsonl")


@repeated
@given(content=st.binary() | st.text().map(str.encode))
@pytest.mark.parametrize("name", ["a.txt", "a.npy", "a.parquet", "a.jsonl", "a.csv", "a.txt.zst"])
def test_any_bytes_in_a_file_of_any_kind(load, tmp_path, name, content):
    (tmp_path / name).write_bytes(WORDS.encode() * (name == "a.txt") + content)
    taken_or_refused(load, tmp_path / name)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("[" * 200_000, "line 2 is not JSON"),
        ('{"text":' * 100_000, "line 2 is not JSON"),
        ('{"input_ids": [' + "1" * 5000 + "]}", "line 2 is not JSON (Exceeds the limit"),
        ('{"text": "half \\ud800 of it"}', "line 2: the text holds half of a surrogate pair"),
        ('{"input_ids": [' + str(10**30) + "]}", "line 2: a document must be text or a list of token ids"),
        ('{"input_ids": [18446744073709551615]}', "line 2: a document must be text or a list of token ids"),
        ('{"input_ids": [-1]}', "token id -1"),
        ('{"input_ids": [[1], [2]]}', "line 2: a document must be text"),
        ('{"input_ids": [[1], [2, 3]]}', "line 2: a document must be text"),
        ('{"input_ids": [1.5]}', "line 2: a document must be text"),
        ('{"input_ids": [true]}', "line 2: a document must be text"),
        ('{"input_ids": [NaN]}', "line 2: a document must be text"),
        ('{"x\\u001b": 1}', "line 2 has no column"),
        ("null", "line 2 must be an object"),
    ],
    ids=lambda value: value[:30],
)
def test_lines_that_are_no_document(says, tmp_path, line, why):
    (tmp_path / "a.jsonl").write_text('{"text": "w1", "input_ids": [1]}\n' + line)
    column = "text" if '"text"' in line else "input_ids"
    assert why in says(tmp_path / "a.jsonl", column=column)


def test_invalid_utf_8_is_named_by_its_byte(says, tmp_path):
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_bytes(b'{"text": "w1"}\n\xff\xfe')
        assert "is not UTF-8 text (byte" in says(tmp_path / name)


def test_control_characters_in_text_are_text(load, tmp_path):
    documents = [f"w{number} {HOSTILE}\0 w1 w2 w3 w4" for number in range(20)]
    (tmp_path / "a.txt").write_text("\n\n".join(documents))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
    assert len(load(tmp_path / "a.txt").train) > 2
    assert len(load(tmp_path / "a.jsonl").train) > 2


def header(text):
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


NPY = {
    "a pickle": pickle.dumps([1, 2]),
    "cut off": header(b"{'descr': '<i8', 'fortran_order': False, 'shape': (8,), }\n"),
    "too large for any memory": header(b"{'descr': '<i8', 'fortran_order': False, 'shape': (10000000000000000,), }\n"),
    "a shape that overflows": header(b"{'descr': '<i8', 'fortran_order': False, 'shape': (%d,), }\n" % 10**30),
    "a negative shape": header(b"{'descr': '<i8', 'fortran_order': False, 'shape': (-8,), }\n") + b"\0" * 64,
    "no shape": header(b"{'descr': '<i8', 'fortran_order': False}\n"),
    "objects": header(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n") + pickle.dumps([1]),
    "code": header(b"__import__('os').system('true')\n"),
    "a deep header": header(b"(" * 9000 + b")" * 9000),
    "an unknown dtype": header(b"{'descr': 'nonsense', 'fortran_order': False, 'shape': (1,), }\n"),
    "records": header(b"{'descr': [('a', '<i8')], 'fortran_order': False, 'shape': (1,), }\n") + b"\0" * 8,
    "no axes": header(b"{'descr': '<i8', 'fortran_order': False, 'shape': (), }\n") + b"\0" * 8,
    "an unknown version": b"\x93NUMPY\x09\x09" + b"\0" * 64,
}


@pytest.mark.parametrize("content", NPY.values(), ids=NPY)
def test_arrays_that_are_none(says, tmp_path, content):
    (tmp_path / "a.npy").write_bytes(content)
    message = says(tmp_path / "a.npy")
    assert "integer" in message and ("Pickles are never read" in message or "1 or 2 axes" in message)


def test_an_array_of_objects_is_not_unpickled(says, tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert "Pickles are never read, since they can run any code" in says(tmp_path / "a.npy")


def test_parquet_that_lies(says, tmp_path):
    parquet.write_table(pa.table({"text": ["w1 w2"] * 100}), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    for damaged in (
        whole[:-1],
        whole[: len(whole) // 2],
        b"PAR1" + b"\xff" * 40 + b"PAR1",
        whole.replace(b"w1", b"\xff\xfe"),
    ):
        (tmp_path / "a.parquet").write_bytes(damaged)
        says(tmp_path / "a.parquet")
    parquet.write_table(pa.table({"text": [{"a": 1}] * 100}), tmp_path / "a.parquet")
    assert "struct" in says(tmp_path / "a.parquet")


@pytest.fixture
def saved(tmp_path):
    """A folder that `datasets` wrote, with two splits, and an Arrow file outside it."""
    half = datasets.Dataset.from_dict({"text": WORDS.split("\n\n")})
    datasets.DatasetDict({"train": half, "test": half}).save_to_disk(tmp_path / "saved")
    (tmp_path / "outside").mkdir()
    (tmp_path / "saved" / "train" / "data-00000-of-00001.arrow").rename(tmp_path / "outside" / "x.arrow")
    return tmp_path / "saved"


@pytest.mark.parametrize(
    "splits", ['["../outside"]', '["/etc"]', '{"../outside": 1}', "3", '"train"', "[3]", "null", '[""]']
)
def test_the_splits_of_a_saved_dataset_stay_inside(says, saved, splits):
    (saved / "dataset_dict.json").write_text(f'{{"splits": {splits}}}')
    for split in ("../outside", "/etc", "train", "t"):
        assert "dataset_dict.json" in says(saved, split=split)


@pytest.mark.parametrize(
    "files",
    [
        '[{"filename": "../../outside/x.arrow"}]',
        '[{"filename": "/etc/passwd"}]',
        "[3]",
        "3",
        "[{}]",
        '[{"filename": 3}]',
    ],
)
def test_the_files_of_a_saved_dataset_stay_inside(says, saved, files):
    state = json.loads((saved / "train" / "state.json").read_text()) | {"_data_files": json.loads(files)}
    (saved / "train" / "state.json").write_text(json.dumps(state))
    assert "state.json" in says(saved)


def test_a_saved_dataset_that_lacks_its_files(says, saved):
    assert "lacks data-00000-of-00001.arrow" in says(saved)
    (saved / "train" / "data-00000-of-00001.arrow").write_bytes(b"\xff" * 100)
    assert "is not a dataset that can be loaded" in says(saved)
    (saved / "train" / "dataset_info.json").write_text("[" * 100_000)
    assert "is not a dataset that can be loaded" in says(saved)


@repeated
@given(content=st.binary(max_size=40) | JSON.map(json.dumps).map(str.encode))
@pytest.mark.parametrize("name", ["tokens.npy", "ends.npy", "hashes.npy", "info.json"])
def test_a_damaged_cache_is_made_again(load, tmp_path, name, content):
    if not (tmp_path / "a.txt").exists():
        (tmp_path / "a.txt").write_text(WORDS)
    whole = load(tmp_path / "a.txt").describe()
    (kept,) = (tmp_path / "cache" / "tokens").glob("[!.]*")
    (kept / name).write_bytes(content)
    assert load(tmp_path / "a.txt").describe() == whole


def test_the_name_of_a_source_is_text_on_a_terminal(load, tmp_path, monkeypatch, capsys):
    for name, value in (("TTY_COMPATIBLE", "1"), ("NO_COLOR", "1"), ("COLUMNS", "200")):
        monkeypatch.setenv(name, value)
    name = HOSTILE.replace("/", "|") + ".txt"
    (tmp_path / name).write_text(WORDS)
    load(tmp_path / name)
    shown = capsys.readouterr().err
    assert "\\x1b[31m[red]x[|][|nope]" in shown
    own = "\x1b\r"  # of the progress display's
    assert hidden_in(shown) <= set(own)
