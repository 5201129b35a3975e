"""Text from recipes, files and folders' names, at every place where it is shown: text it stays."""

import io
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from bad_input import HOSTILE, hidden_in, ran, refused, write_place
from endwise.analysis.comparison.comparison import summarise
from endwise.analysis.comparison.page import report_html
from endwise.analysis.comparison.printed import print_evaluations, print_summary
from endwise.common.html import table
from endwise.common.terminal import Grid, show
from endwise.common.text import minus, model_title, printable
from endwise.config.run import ModelConfig
from endwise.figures.interactive import library
from endwise.training.display import Display
from made_curves import compare, three_kinds
from made_runs import LINE
from pages import Page
from small_gpt2 import recipe

MARKUP = "[red]x[/][/nope]"
NAME = HOSTILE.replace("/", "|")
"""As the name of a folder."""
SAFE = printable(HOSTILE)


NUMBERS = {
    "-0.2 [-1.5, .3]": "−0.2 [−1.5, .3]", "(-.5)": "(−.5)", "±-3 %": "±−3 %", "-1.5e-05": "−1.5e−05", "-inf": "−inf",
    "blocks.3-to-4": "blocks.3-to-4", "e2e-0.5": "e2e-0.5", "2026-11-30": "2026-11-30", "runs/-a": "runs/-a",
    "--by": "--by", "e2e-10": "e2e-10",
}  # fmt: skip


@pytest.mark.parametrize(("stored", "shown"), NUMBERS.items())
def test_numbers_are_shown_with_minus_signs_and_nothing_else_is(stored, shown):
    assert minus(stored) == shown and minus(shown) == shown


def test_tables_show_minus_signs_in_columns_of_numbers_alone():
    """A token may be -1, or a folder."""
    rows = [("-1", "-0.25", "-2")]
    lines = io.StringIO()
    show(Grid(("token", "logit", "next"), rows, words=("next",)), Console(file=lines, width=60))
    narrow = io.StringIO()
    show(Grid(("token", "logit", "next"), rows, words=("next",)), Console(file=narrow, width=10, force_terminal=True))
    assert lines.getvalue().split()[-3:] == ["-1", "−0.25", "-2"] and "−0.25" in narrow.getvalue()
    html = table(("token", "logit", "next"), rows, text=(2,))
    assert all(cell in html for cell in (">-1<", ">−0.25<", ">-2<"))


@given(st.text() | st.text(st.characters(categories=["Cc", "Cf", "Cs", "Zl", "Zp"])))
def test_printable_text_hides_nothing_and_loses_nothing(text):
    shown = printable(text)
    assert not hidden_in(shown) and printable(shown) == shown
    if "\\" not in text:
        assert shown.encode("ascii", "backslashreplace").decode("unicode_escape") == text


@pytest.mark.parametrize("text", ["plain", "λ 50\N{NO-BREAK SPACE}%", "می‌خواهم", "👩‍🔬", "日本語", "two\nlines", ""])
def test_what_people_write_is_shown_as_it_is(text):
    assert printable(text) == text


def test_the_report_has_no_tag_handler_or_hidden_character_of_anyone_elses():
    runs = [
        replace(run, folder=HOSTILE, site=HOSTILE, downstream_mse={HOSTILE: 0.5, "</svg>": 0.1})
        for run in three_kinds()
    ]
    environment = {"platform": HOSTILE, "python": HOSTILE, "packages": {HOSTILE: HOSTILE}}
    settings = {"clean_ce": 3.5, "resamples": 20, "model": HOSTILE, "command": HOSTILE, "environment": environment}
    html = report_html(summarise(runs, **settings))
    page, own = Page(html), Page(report_html(compare(three_kinds())))
    assert not hidden_in(html.replace(library(), ""))
    assert set(page.tags) <= set(own.tags) and {name for name, _ in page.attributes} <= {
        name for name, _ in own.attributes
    }
    assert page.text.count(SAFE) >= len(runs) + 5
    assert page.tags.count("script") == own.tags.count("script") == 2


def tables():
    out = io.StringIO()
    return out, Console(file=out, width=400)


def test_the_tables_of_a_comparison_show_markup_as_text():
    runs = [replace(run, folder=HOSTILE, site=HOSTILE, downstream_mse={HOSTILE: 0.5}) for run in three_kinds()]
    out, console = tables()
    print_summary(summarise(runs, clean_ce=3.5, resamples=20), console)
    assert out.getvalue().replace("\n", "").count(SAFE) >= 2  # a title is folded
    assert not hidden_in(out.getvalue())


@pytest.fixture
def evaluated(tmp_path):
    """A run in a folder with a hostile name, through every command."""
    write_place(tmp_path)
    out = tmp_path / NAME
    model = shutil.copytree(tmp_path / "model", tmp_path / f"model {NAME}")
    said = ran("train", tmp_path / "recipe.yaml", f"out={json.dumps(str(out))}", f"model.name={json.dumps(str(model))}")
    assert said.exit_code == 0, said.output
    return out, said


def test_a_runs_folder_may_be_called_anything(evaluated, tmp_path):
    out, said = evaluated
    outputs = [said, ran("evaluate", out, "--csv", tmp_path / "all.csv"), ran("train", "--resume", out)]
    for each in outputs:
        assert each.exit_code == 0, each.output
        assert not hidden_in(each.output) and MARKUP.replace("/", "|") in each.output
    assert yaml.safe_load((out / "config.yaml").read_text())["out"] == str(out)
    for file in ("data.json", "sae/cfg.json"):
        text = (out / file).read_text()
        text = text.replace("best", "worst").replace("fingerprint", HOSTILE).replace("standard", "\\u001b[31m")
        (out / file).write_text(text)
    assert MARKUP.replace("/", "|") in refused("train", "--resume", out)
    assert MARKUP.replace("/", "|") in refused("evaluate", out)


def test_a_folder_whose_name_is_not_unicode(tmp_path, monkeypatch):
    write_place(tmp_path)
    assert ran("train", tmp_path / "recipe.yaml").exit_code == 0
    odd = os.fsdecode(b"caf\xe9")
    (tmp_path / "run").rename(tmp_path / odd)
    monkeypatch.chdir(tmp_path)  # a long path is cut short
    for command in (("evaluate", odd), ("train", "--resume", odd), ("sites", odd), ("train", odd)):
        assert r"caf\udce9" in refused(*command)


def test_a_site_and_a_model_in_the_table_of_evaluations(evaluated):
    from endwise import evaluate

    out, _ = evaluated
    evaluations = evaluate(out)
    config = recipe(out).model_copy(update={"site": HOSTILE, "model": ModelConfig(name=HOSTILE)})
    shown, console = tables()
    print_evaluations({out: config}, evaluations, console)
    assert not hidden_in(shown.getvalue())
    assert f"{SAFE} of {model_title(SAFE)}, " in shown.getvalue()


def test_progress_shows_names_as_text(capsys):
    display = Display(steps=10, first=0, tokens_per_step=5, shown=True)
    hostile = recipe(Path("unused")).model_copy(update={"site": HOSTILE})
    for folder in (Path(HOSTILE), Path("second") / HOSTILE):
        display.show(folder, hostile, LINE)
    shown, console = tables()
    console.print(display._table(5))
    display._shown_at -= display._log.every
    display.advance(5)
    display.fail(Path(HOSTILE), HOSTILE)
    for text in (shown.getvalue(), capsys.readouterr().err):
        assert not hidden_in(text) and text.count(SAFE) >= 2
