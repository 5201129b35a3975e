"""Recipes and overrides that nobody should write: each is taken, or refused in words that name the field."""

import json
import re
from functools import cache

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bad_input import HOSTILE, ran, refused
from endwise.common.errors import ConfigError
from endwise.config.base import LARGEST_FILE
from endwise.config.run import RunConfig
from endwise.config.strict_yaml import DEEPEST, LARGEST, parse_yaml
from small_gpt2 import data, recipe, small_model, write_tokens

pytestmark = pytest.mark.usefixtures("loaded_once")

# A file or a folder of the module's is written again for each example.
repeated = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, tokens, and a recipe for them."""
    folder = tmp_path_factory.mktemp("place")
    small_model().model.save_pretrained(folder / "model")
    write_tokens(folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(valid(folder)))
    return folder


@cache
def valid_text(folder):
    values = recipe(folder / "out", "e2e").model_dump(mode="json")
    values["model"]["name"] = str(folder / "model")
    values["data"] = data(folder).model_dump(mode="json")
    return json.dumps(values)


def valid(folder):
    return json.loads(valid_text(folder))


def leaves(values, path=()):
    if isinstance(values, dict):
        for key, value in values.items():
            yield (*path, key)
            yield from leaves(value, (*path, key))


@pytest.fixture
def accepted(monkeypatch):
    """Recipes that the commands would continue with; none of them is trained."""
    taken = []

    class Done:
        folder, remarks, diverged = "somewhere", (), False

    monkeypatch.setattr("endwise.training.train.train", lambda config, **_: taken.append(config) or Done)
    return taken


PATHS = sorted(leaves(recipe("out").model_dump(mode="json")))
ODD_STRINGS = st.sampled_from(
    [HOSTILE, "", "\0", "a" * 10_000, "../../x", "~nobody/x", "nan", "0x1f", "1e999", "\ufeff"]
)
ODD_VALUES = (
    st.sampled_from([None, True, -1, 0, 2**63, 10**30, -(10**30), float("nan"), float("inf"), 1e308, 5e-324, [], {}])
    | ODD_STRINGS
    | st.text(max_size=8)
    | st.recursive(
        st.none() | st.integers() | st.text(max_size=3), lambda v: st.lists(v) | st.dictionaries(st.text(), v)
    )
)


@repeated
@given(path=st.sampled_from(PATHS), value=ODD_VALUES)
def test_any_value_in_any_field_is_taken_or_refused_by_its_name(place, accepted, path, value):
    values = valid(place)
    section = values
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    run = place / "run"
    run.mkdir(exist_ok=True)
    for file in (place / "changed.yaml", run / "config.yaml"):
        file.write_text(yaml.safe_dump(values), encoding="utf-8")
    accepted.clear()
    result = ran("train", place / "changed.yaml")
    resumed = ran("train", "--resume", run)
    assert (result.exit_code == 0) == (resumed.exit_code == 0) == (len(accepted) == 2)
    if result.exit_code:
        for message in (result.stderr, resumed.stderr, refused("evaluate", run)):
            assert names_a_field(message, path), message
    else:
        assert "no trained SAE" in refused("evaluate", run, code=5)


def names_a_field(message, path):
    """Return whether a line says the rule for the field or for a section that it is in, as in `training.batch: ...`."""
    fields = {".".join(path[:length]) for length in range(1, len(path) + 1)}
    lines = [line.strip().partition(": ") for line in message.splitlines()[1:]]
    rules = [rule for field, _, rule in lines if any(field == name or field.startswith(f"{name}.") for name in fields)]
    return any(re.search(r"should|must|give|need|no such key|required", rule) for rule in rules)


@repeated
@given(
    key=st.text(min_size=1, max_size=12) | ODD_STRINGS,
    section=st.sampled_from([None, "training", "objective", "model"]),
)
def test_an_unknown_key_is_named_with_the_valid_ones(place, accepted, key, section):
    values = valid(place)
    (values if section is None else values[section])[key] = 1
    (place / "changed.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    message = refused("train", place / "changed.yaml", code=2)
    if key not in PATHS and "no such key" in message:
        assert re.search(r"did you mean '\w+'|valid: \w+, \w+", message), message


@repeated
@given(content=st.text().map(str.encode) | st.binary() | st.text("{}[]&*!|>-:?,#'\"\n ab1").map(str.encode))
def test_any_text_or_bytes_as_a_recipe_are_refused(place, content):
    (place / "changed.yaml").write_bytes(content)
    assert "changed.yaml" in refused("train", place / "changed.yaml", code=2)


@repeated
@given(override=st.text() | st.tuples(st.sampled_from([".".join(path) for path in PATHS]), st.text()).map("=".join))
def test_any_override_is_taken_or_refused(place, accepted, override):
    message = ran("train", place / "recipe.yaml", override).stderr
    key = override.partition("=")[0]
    if message and key in [".".join(path) for path in PATHS]:
        assert key.partition(".")[0] in message


@repeated
@given(name=st.text(max_size=30) | ODD_STRINGS)
def test_any_name_of_a_recipe_or_a_model_is_refused(name):
    assert ran("train", name).exit_code
    assert ran("sites", name).exit_code


@repeated
@given(
    command=st.sampled_from(["train", "evaluate", "sites"]),
    arguments=st.lists(
        st.sampled_from(["--resume", "--tokens", "--csv", "-1", "--", "x=1"]) | st.text(max_size=9), min_size=1
    ),
)
def test_any_arguments_are_refused(command, arguments):
    assert ran(command, *arguments).exit_code


LAUGHS = "a0: &a0 {x: ha}\n" + "".join(f"a{n}: &a{n} {{x: *a{n - 1}, y: *a{n - 1}}}\n" for n in range(1, 30))
MERGED = "a0: &a0 {x: ha}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 30))
HELD = "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 200))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (LAUGHS, f"more than {LARGEST:,} values, aliases unfolded"),
        (MERGED, f"more than {LARGEST:,} values, aliases unfolded"),
        (HELD, f"deeper than {DEEPEST} levels"),
        ("site: &a [*a]", "alias refers to a section that contains it"),
        ("site: &a {b: *a}", "alias refers to a section that contains it"),
        ("[" * 5000, "deeper than|maximum nesting depth"),  # the latter by PyYAML 6.0.4 itself
        ("seed: 1\nsite: x\nseed: 2", r"key 'seed' is there twice; keep one \(line 3\)"),
        ("training: {batch: 1, batch: 2}", "key 'batch' is there twice"),
        ("seed: !!python/object/apply:os.system [touch hacked]", "could not determine a constructor"),
        ("seed: !!python/name:os.system", "could not determine a constructor"),
        ("seed: 1\n---\nseed: 2", "expected a single document"),
        ("seed: !!int many", "invalid literal"),
        ("seed: !!int ''", "range"),
        ("seed: !!bool perhaps", "perhaps"),
        ("seed: 2024-13-45", "month"),
        ("seed: " + "1" * 5000, "4300 digits"),
        ("? [a, b]\n: 1\n? {c: d}\n: 2", "a key must be a word"),
        ("seed: *nothing", "undefined alias"),
        ("#" * (LARGEST_FILE + 1), f"more than {LARGEST_FILE:,} bytes"),
        ("- seed", "must hold a mapping .* it holds a list"),
        ("1: 2", "a key must be a word"),
        ("", "must hold a mapping .* it is empty"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else None,
)
def test_yaml_that_is_no_recipe(tmp_path, text, says):
    (tmp_path / "recipe.yaml").write_text(text)
    message = refused("train", tmp_path / "recipe.yaml", code=2)
    assert re.search(says, message), message
    assert "recipe.yaml" in message and len(message) < 2000
    if text.startswith("seed: ") and "\n" not in text:
        override = text.replace(": ", "=", 1)
        assert re.search(says, refused("train", "embedded-layer3-e2e", override, code=2))


def test_aliases_and_merge_keys_of_honest_size_are_yaml_as_ever():
    text = "base: &base {a: 1, b: [x, y]}\nother: {<<: *base, a: 2}\nagain: *base\n'1': one"
    assert parse_yaml(text) == yaml.safe_load(text)
    assert parse_yaml("other: {<<: &base {a: 1}, a: 2}\nthird: {<<: *base}")["third"] == {"a": 1}


@pytest.mark.parametrize(
    ("override", "code", "words"),
    [
        ("dictionary.size=1" + "0" * 30, 2, ["dictionary.size", "less than"]),
        (
            "dictionary.size=1000000000000",
            2,
            ["1,000,000,000,000 features", "width 16", "GiB", "Lower dictionary.size"],
        ),
        ("training.tokens=1" + "0" * 30, 2, ["training.tokens", "less than"]),
        ("training.batch=1" + "0" * 12, 2, ["training.batch", "training.tokens is 640", "Raise the one or lower"]),
        ("training.tokens=1" + "0" * 15, 4, ["asked for", "lower training.tokens"]),
        ("data.context=1" + "0" * 15, 2, ["context 1000000000000000", "lower"]),
        ("data.epochs=1" + "0" * 30, 2, ["data.epochs", "less than"]),
        ("evaluation.bootstrap=1000000", 2, ["evaluation.bootstrap", "less than or equal to 100000"]),
        ("evaluation.tokens=1" + "0" * 15, 4, ["evaluation.tokens"]),
        ("seed=9223372036854775808", 2, ["seed", "less than"]),
        ("seed=-1", 2, ["seed", "greater than or equal to 0"]),
        ("out=" + "x" * 300, 5, ["Cannot write", "choose another folder"]),
        ("out=" + "x" * 5000, 2, ["out", "1 to 4,096 characters"]),
        ("out=''", 2, ["out", "1 to 4,096 characters"]),
        ('out="\\0"', 2, ["out", "neither NUL"]),
        ("data.cache=" + "x" * 300, 4, ["data.cache", "File name too long"]),
        ("data.source=" + "x" * 300 + ".txt", 4, ["There is no file", "data.source"]),
        ("data.source=~nobody-of-this-name/x.txt", 4, ["There is no file", "data.source"]),
        ("model.name=" + "x" * 300, 3, ["neither 'embedded'", "Check the spelling"]),
        ("model.gguf_file=../model.gguf", 2, ["model.gguf_file", "inside"]),
        ("model.gguf_file=/etc/passwd", 2, ["model.gguf_file", "inside"]),
        ("model.device=meta", 2, ["model.device", "'meta'", "or auto"]),
        ("site=blocks.0.hook_resid_pre/../../x", 3, ["A site is named", "blocks.<layer>"]),
    ],
    ids=lambda value: value[:32] if isinstance(value, str) else None,
)
def test_values_that_would_fail_late_are_refused_before_any_work(place, tmp_path, override, code, words):
    message = refused("train", place / "recipe.yaml", f"out={tmp_path / 'run'}", override, code=code)
    for word in words:
        assert word in message
    assert not (tmp_path / "run").exists()


def test_a_ratio_that_asks_for_too_much(place):
    changed = valid(place)
    changed["dictionary"] = {"ratio": 1e308}
    with pytest.raises(ConfigError, match=r"dictionary\.ratio: .*less than or equal to 1000000"):
        RunConfig.build(changed)


@pytest.mark.parametrize("digits", [10, 5000])
def test_an_integer_too_long_to_write_out_is_refused_all_the_same(place, digits):
    with pytest.raises(ConfigError, match=r"seed: .*less than"):
        RunConfig.build({**valid(place), "seed": 10**digits + 2**63})


def test_one_message_lists_only_so_many_broken_rules(tmp_path):
    (tmp_path / "recipe.yaml").write_text("\n".join(f"key{number}: 1" for number in range(3000)))
    message = refused("train", tmp_path / "recipe.yaml", code=2)
    assert len(message.splitlines()) == 22 and message.endswith("and 2984 more")
