"""Rules of the plan of the house, checked on the source as text."""

import ast
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest

import endwise
from places import ROOT

SOURCE = Path(endwise.__file__).parent


def test_one_spliced_pass():
    """A replay leaves to its caller what a spliced pass must not forget: masked positions, microbatches, the tail."""
    calling = [
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*.py")
        if re.search(r"\.replay\b", path.read_text()) and "models" not in path.relative_to(SOURCE).parts[:1]
    ]
    assert not calling, f"Use models.splicing.SplicedPass in {', '.join(calling)}."


def test_the_size_of_a_microbatch_is_decided_once():
    assert [path.name for path in SOURCE.rglob("*.py") if "TAIL_TOKENS =" in path.read_text()] == ["splicing.py"]


def sources():
    return sorted(SOURCE.rglob("*.py"))


@cache
def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def definitions(path):
    """Classes and functions, and f-strings, wherever they stand."""
    return [node for node in ast.walk(parsed(path)) if isinstance(node, FUNCTIONS | ast.ClassDef | ast.JoinedStr)]


def test_the_top_folder_reads_like_a_table_of_contents():
    entries = [path for path in SOURCE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 26, f"{len(entries)} entries"


@pytest.mark.parametrize(("what", "most"), [("file", 450), ("class", 300), ("function", 60)])
def test_nothing_is_longer_than_can_be_read_at_once(what, most):
    """Lines of a file, a class and a function, docstrings included."""
    kinds = {"class": ast.ClassDef, "function": FUNCTIONS}
    long = []
    for path in sources():
        text = path.read_text(encoding="utf-8")
        nodes = [node for node in definitions(path) if isinstance(node, kinds[what])] if what in kinds else []
        lengths = [(f"{path.name}:{node.name}", node.end_lineno - node.lineno + 1) for node in nodes]
        lengths += [(path.name, len(text.splitlines()))] if what == "file" else []
        long += [f"{name} {length}" for name, length in lengths if length > most]
    assert not long


def test_every_room_is_on_a_floor():
    """The contract of import-linter (pyproject.toml) has nine floors, and every room of the package on one of them."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = contracts[0]["layers"]
    rooms = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert len(layers) <= 9
    assert rooms - {"__init__"} == {room.strip() for layer in layers for room in layer.split("|")}


def test_no_name_of_a_class_stands_for_two_things():
    found = {}
    for path in sources():
        for node in parsed(path).body:
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(path.name)
    assert {name: files for name, files in found.items() if len(files) > 1 and not name.startswith("_")} == {}


def test_html_is_written_in_templates():
    """They escape what goes in (common/html.py); an f-string does not."""
    found = []
    for path in sources():
        for node in definitions(path):
            text = (
                [part.value for part in node.values if isinstance(part, ast.Constant)]
                if isinstance(node, ast.JoinedStr)
                else []
            )
            found += [
                f"{path.name}:{node.lineno}" for part in text if re.search(r"</\w|<(br|div|p|td|li|svg|code)\b", part)
            ]
    assert not found


def test_tests_stand_in_rooms_as_the_package_does():
    """Tests of no single room stand in tests/project and tests/shapes; modules without tests, in tests/helpers."""
    tests = ROOT / "tests"
    rooms = {path.name for path in SOURCE.iterdir()} | {"project", "shapes"}
    places = {path.relative_to(tests) for path in tests.rglob("test_*.py")}
    assert {place.parts[0] for place in places if len(place.parts) == 2} <= rooms
    assert len({place.name for place in places}) == len(places) and all(len(place.parts) == 2 for place in places)
    assert {path.name for path in tests.glob("*.py")} == {"conftest.py"}
