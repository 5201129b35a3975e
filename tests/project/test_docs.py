"""The documentation holds: its Python and the examples run, its recipes are valid, its commands and links exist."""

import ast
import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest
import typer
import yaml

import endwise
from endwise.cli import app
from endwise.config.places import build_recipe
from endwise.config.recipes import find_recipe, find_sweep
from endwise.paper import StudyConfig
from endwise.paper.experiments import Experiments
from endwise.paper.plan import study_tokens
from endwise.paper.runs import check
from endwise.sweeps import SweepConfig
from endwise.sweeps.points import points_of
from places import ROOT

PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
pytestmark = pytest.mark.usefixtures("fitted_on_little", "loaded_once")
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Example:
    page: Path
    line: int
    """Line at which the block's content starts, from 1."""
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def examples(language: str) -> list[Example]:
    def on(page: Path) -> Iterator[Example]:
        content = page.read_text(encoding="utf-8")
        for match in BLOCK.finditer(content):
            if match[1] == language:
                yield Example(page, content.count("\n", 0, match.start(2)) + 1, match[2])

    return [example for page in PAGES for example in on(page)]


def anchors(page: Path) -> set[str]:
    """The fragments that a page's headings can be linked by, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


MOST = {'tokens"': 256, "tokens=": 512, 'batch"': 1}
"""In a recipe one sequence; what is asked for by name may compare two."""


def in_miniature(text: str) -> str:
    """The same with fewer tokens to train and measure on; what numbers come out, no reader is told."""
    shrunk = re.compile(rf"({'|'.join(MOST)})((?:: )?)([\d_]+)")
    return shrunk.sub(lambda found: f"{found[1]}{found[2]}{min(int(found[3]), MOST[found[1]])}", text)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("example", examples("python"), ids=str)
def test_python_runs(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    padded = "\n" * (example.line - 1) + in_miniature(example.text)  # a traceback shows the page's own line
    exec(compile(padded, str(example.page), "exec"), {"__name__": "__main__"})


def test_readme_has_a_python_example():
    assert any(example.page.name == "README.md" for example in examples("python"))


@pytest.mark.parametrize("example", examples("yaml"), ids=str)
def test_recipes_sweeps_and_studies_are_valid(example, tmp_path):
    values = yaml.safe_load(example.text)
    if "grids" in values:
        points_of(SweepConfig.build(values, source=str(example)))
    elif "kinds" in values:
        study = StudyConfig.build(values, source=str(example))
        check(Experiments(study, study_tokens(study), tmp_path))
    else:
        build_recipe(values, source=str(example))


def commands() -> list[tuple[str, str]]:
    """Every `endwise ...` in a shell block or in backticks, with its page."""
    found = [(str(e), line) for e in examples("sh") for line in e.text.splitlines() if line.startswith("endwise ")]
    for page in PAGES:
        inline = re.findall(r"`(endwise [^`\n]+)`", page.read_text(encoding="utf-8"))
        found += [(str(page.relative_to(ROOT)), line) for line in inline]
    return found


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands_exist(page, line):
    words = shlex.split(re.sub(r"[\[\]]|\.\.\.", " ", line), comments=True)[1:]
    command = COMMANDS.get(words[0])
    assert command is not None, f"{page}: there is no command {words[0]}"
    options = {flag for parameter in command.params for flag in parameter.opts} | {"--help"}
    assert {word for word in words if word.startswith("--")} <= options, f"{page}: {line}"
    find = {"train": find_recipe, "sweep": find_sweep}.get(words[0])
    if find is not None and words[1:] and re.fullmatch(r"[a-z0-9][a-z0-9_-]+", words[1]):
        find(words[1])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name} links to {target}"
        assert not fragment or fragment in anchors(linked), f"{page.name} links to {target}, which has no such heading"


def test_configuration_reference_is_up_to_date():
    tool = runpy.run_path(str(ROOT / "tools" / "config_reference.py"))
    assert tool["TARGET"].read_text(encoding="utf-8") == tool["reference"](), "run `make docs`"


def test_command_reference_is_up_to_date():
    tool = runpy.run_path(str(ROOT / "tools" / "cli_reference.py"))
    assert tool["PAGE"].read_text(encoding="utf-8") == tool["render"](), "run `make docs`"


def test_python_reference_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    named = re.findall(r"^::: endwise\.(\w+)$", page, re.MULTILINE)
    assert len(named) == len(set(named)) and set(named) == set(endwise.__all__) - {"__version__"}


def test_changelog_tells_this_version():
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None and newest[1] == endwise.__version__ == version("endwise")


def literals(source: str) -> list[str]:
    """Every text in a module, with … for what is put in as the program runs."""

    def text(node: ast.AST) -> str:
        match node:
            case ast.Constant(value=str(value)):
                return value
            case ast.JoinedStr(values=parts):
                return "".join(text(part) if isinstance(part, ast.Constant) else "…" for part in parts)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return text(left) + text(right)
            case _:
                return "…"

    nodes = ast.walk(ast.parse(source))
    return [text(node) for node in nodes if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp)]


def test_messages_are_those_of_the_source():
    page = (ROOT / "docs" / "messages.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^### `(.+)`$", page, re.MULTILINE)
    assert len(quoted) == len(set(quoted)) == page.count("\n### ")
    sources = [file.read_text(encoding="utf-8") for file in (ROOT / "src").rglob("*.py")]
    words, parsed = {source: set(re.findall(r"\w+", source)) for source in sources}, cache(literals)
    for message in quoted:
        parts = [part.strip() for part in message.split("…")]
        pattern = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
        needed = set(re.findall(r"\w+", message))  # only modules that have all of them are parsed
        candidates = (literal for source in sources if needed <= words[source] for literal in parsed(source))
        assert any(map(pattern.search, candidates)), f"the source no longer says: {message}"


def notebook(name: str, **parameters: object) -> None:
    """Run its code cells in turn, with `parameters` in place of those that its first one sets."""
    cells = json.loads((ROOT / "examples" / name).read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code[0]["metadata"] == {"tags": ["parameters"]} and not any(cell["outputs"] for cell in code)
    names: dict[str, object] = {"__name__": "__main__"}
    for number, cell in enumerate(code):
        exec(compile("".join(cell["source"]), f"{name}, code cell {number}", "exec"), names)
        if number == 0:
            assert parameters.keys() <= names.keys()
            names.update(parameters)


def script(name: str, *arguments: str) -> None:
    sys.argv = [name, *arguments]
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


def test_examples_run(tmp_path, monkeypatch, capsys):
    """Run both scripts and both notebooks in miniature, one on what the other made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)

    notebook("own_model.ipynb", TOKENS=1_024, HELDOUT=256)
    notebook("see_features.ipynb", TOKENS=256)
    told = capsys.readouterr().out
    assert "L0 3" in told and "KL 0." in told and "likelier without it" in told

    script("own_model.py", "--tokens", "1_024", "--heldout", "256", "--out", "runs/script")
    (tmp_path / "runs" / "script" / "sae").rename(tmp_path / "elsewhere")  # as an SAE that somebody else gives away
    script("see_features.py", "elsewhere", "--model", "embedded", "--text", "embedded", "--tokens", "256")
    told = capsys.readouterr().out
    assert (tmp_path / "runs" / "script" / "dashboard" / "index.html").is_file()
    assert told.count("feature ") == 10 and "importance" in told
