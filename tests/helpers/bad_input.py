"""Checks of any command's answer to bad input: one plain message, no traceback, nothing hidden in it."""

import json
import pickle
import struct
import unicodedata
from functools import cache

import yaml
from click.testing import CliRunner
from hypothesis import strategies as st
from typer.main import get_command

from endwise.cli import app
from small_gpt2 import data, recipe, small_model, write_tokens

HOSTILE = "<script>alert(1)</script>\x1b[31m[red]x[/][/nope]\x07\r\x9b5m\u202eevil\u2066 \"'&"
"""Tags, escape sequences of terminals, rich's markup, characters that turn a line around."""
HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def hidden_in(text: str) -> set[str]:
    """The characters of a text that show nothing themselves, but may change how the others are shown."""
    return {character for character in text if unicodedata.category(character) in HIDDEN} - set("\n\u200c\u200d")


parsers = cache(get_command)  # which takes longer than most of the commands


def ran(*arguments):
    """Run a command in this process: it ends well, or with a message of ours or of the command line's own."""
    result = CliRunner().invoke(parsers(app), [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    if result.exit_code:
        ours = result.stderr.startswith("endwise: ")
        assert ours or result.stderr.startswith(("Usage: ", "Error: ")), result.stderr
        assert not (ours and hidden_in(result.output)), hidden_in(result.output)
    return result


def refused(*arguments, code=None):
    """The message of a command that must fail plainly."""
    result = ran(*arguments)
    assert result.exit_code not in (0, 1), result.output
    assert code in (None, result.exit_code), result.output
    return result.stderr.strip()


def write_place(folder):
    """A model, tokens, and a recipe for them that takes a second to train."""
    small_model().model.save_pretrained(folder / "model")
    values = recipe(folder / "run", "e2e").model_dump(mode="json")
    values["model"]["name"] = str(folder / "model")
    values["data"] = data(write_tokens(folder)).model_dump(mode="json")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder


DEEP = "[" * 200_000
LONG_NUMBER = "1" * 5000

ODD_JSON = (
    st.sampled_from([None, True, False, -1, 0, 1, 2**31, 2**63, 10**30, 1e308, 0.5, "", "16", HOSTILE, [], {}, [[]]])
    | st.text(max_size=5)
    | st.lists(st.integers() | st.text(max_size=3), max_size=3)
    | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)
)


def with_header(header, body=b"\0" * 64):
    """A safetensors file."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def of(dtype="F32", shape=(16,), offsets=(0, 64)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


BAD_SAFETENSORS = {
    "empty": b"",
    "cut off in the length": b"\0\0\0",
    "a length of 2**63": struct.pack("<Q", 2**63) + b"{}",
    "a length of 2**64-1": struct.pack("<Q", 2**64 - 1) + b"{}",
    "a length beyond the end": struct.pack("<Q", 1000) + b"{}",
    "a header that is not JSON": with_header(b"{'a': 1}"),
    "a header that is not UTF-8": with_header(b"\xff\xfe\xfd"),
    "a header that is a list": with_header([1, 2]),
    "a deep header": with_header(DEEP.encode()),
    "a header of long numbers": with_header(b'{"a": {"dtype": "F32", "shape": [' + LONG_NUMBER.encode() + b"]}}"),
    "negative offsets": with_header({"a": of(offsets=(-64, 0))}),
    "overlapping offsets": with_header({"a": of(), "b": of(offsets=(32, 96))}, b"\0" * 96),
    "backward offsets": with_header({"a": of(offsets=(64, 0))}),
    "offsets beyond the end": with_header({"a": of(offsets=(0, 640), shape=(160,))}),
    "an unknown dtype": with_header({"a": of("PICKLE")}),
    "a shape that overflows": with_header({"a": of(shape=(2**62, 2**62))}),
    "a negative shape": with_header({"a": of(shape=(-16,))}),
    "a shape that is no list": with_header({"a": {"dtype": "F32", "shape": 16, "data_offsets": [0, 64]}}),
    "no tensors": with_header({}, b""),
    "a pickle": pickle.dumps({"a": [1.0]}),
    "text": HOSTILE.encode(),
}
