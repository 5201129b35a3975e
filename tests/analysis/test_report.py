"""The page is one safe, self-contained file, whatever the runs are called or lack; the tables are whole."""

import io
import re
import string
from dataclasses import replace

import pytest
from rich.console import Console

from endwise.analysis.comparison.comparison import summarise
from endwise.analysis.comparison.page import report_html, write_report
from endwise.analysis.comparison.printed import print_summary
from endwise.common.errors import RunFolderError
from endwise.config.objective import KINDS
from endwise.figures.interactive import library
from made_curves import compare, three_kinds
from made_runs import make_run
from pages import Page

HOSTILE = """<script>alert(1)</script>"'&${x}$title<img src=http://evil/x onerror=a>"""


@pytest.fixture(scope="module")
def html():
    return report_html(compare(three_kinds()))


def test_the_page_is_well_formed_and_needs_nothing_else(html):
    page = Page(html)
    assert "link" not in page.tags and "img" not in page.tags
    assert page.tags.count("script") == page.attributes.count(("type", "application/json")) == 2
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", html.replace(library(), ""))
    assert "default-src 'none'" in html
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_ids_are_unique_and_every_reference_leads_somewhere(html):
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    referred = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"|aria-labelledby="([^"]+)"', html.replace(library(), ""))
    referred = {name for group in referred for name in group if name}
    assert len(referred) > 5
    assert referred <= set(page.ids)


def test_hostile_text_is_text():
    runs = [replace(run, folder=HOSTILE, site=HOSTILE) for run in three_kinds()]
    runs = [replace(run, downstream_mse={HOSTILE: 0.5}) for run in runs]
    summary = summarise(
        runs,
        clean_ce=3.5,
        resamples=20,
        model=HOSTILE,
        command=HOSTILE,
        environment={"platform": HOSTILE, "python": HOSTILE, "packages": {HOSTILE: HOSTILE, "gone": None}},
    )
    page = Page(report_html(summary))
    assert page.tags.count("script") == 2 and "img" not in page.tags
    assert "onerror" not in [name for name, _ in page.attributes]
    assert page.text.count(HOSTILE) >= len(runs) + 5
    assert "gone" not in page.text


def test_the_page_shows_the_numbers_and_the_verdicts(html):
    summary = compare(three_kinds())
    text = Page(html).text
    for sentence in summary.verdicts:
        assert sentence in text
    for run in summary.runs:
        assert run.folder in text and f"{run.ce_increase:+.3f}" in text
    assert "50\N{NO-BREAK SPACE}%" in text and "endwise x" in text and "+2.500 with the site at its mean" in text


def test_both_colour_schemes_and_phones_are_served(html):
    assert "prefers-color-scheme: dark" in html and "width=device-width" in html
    for kind in KINDS:
        assert html.count(f"var(--{kind})") > 3
    drawings = re.findall(r'<script type="application/json">(.*?)</script>', html)
    assert len(drawings) == 2
    for drawing in drawings:
        assert not re.search(r"#[0-9a-fA-F]{6}\b", drawing), "a colour that the style sheet does not control"


def test_figures_are_described_in_words(html):
    labels = [value for name, value in Page(html).attributes if name == "aria-label"]
    assert any(
        value.startswith("CE increase, nats per token over L0: features per token. local: 0.3") for value in labels
    )
    assert any("e2e+ds: 1.5 at 4, 3 at 5, 4.5 at 5 out" in value for value in labels)


@pytest.mark.parametrize(
    "runs",
    [
        three_kinds(e2e=(), e2e_ds=()),
        three_kinds(local=()),
        [make_run("e2e", 1, 0.2, 30)],
        [replace(run, downstream_mse={}, intervals={}, sums=None) for run in three_kinds()],
        [make_run("local", 1, 0.0, 0.0, alive=0), make_run("e2e", 1, -0.01, 0.0)],
        [replace(run, seed=i, seconds=0.0) for i, run in enumerate(three_kinds())],
    ],
    ids=["local alone", "no local", "one run", "no intervals or later sites", "dead", "seeds and no time"],
)
def test_what_is_missing_is_said_and_nothing_breaks(runs):
    page = Page(report_html(compare(runs)))
    assert len(page.ids) == len(set(page.ids))
    assert "nan" not in page.text.lower() and "None" not in page.text
    kinds = {run.kind for run in runs}
    if "local" in kinds and not {"e2e", "e2e_ds"} <= kinds:
        assert "These runs do not determine" in page.text


def test_the_file_is_replaced_whole_and_failure_is_plain(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    write_report(compare(three_kinds()), path)
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(RunFolderError):
        write_report(compare(three_kinds()), tmp_path)


def test_one_summary_makes_one_page(html):
    assert report_html(compare(three_kinds())) == html


def test_the_template_holds_no_placeholder_that_is_not_filled(html):
    assert not re.search(string.Template.delimiter.replace("$", r"\$") + r"[a-z_{]", html.replace(library(), ""))


def test_the_table_prints_every_run_and_verdict():
    out = io.StringIO()
    summary = compare(three_kinds())
    print_summary(summary, Console(file=out, width=140))
    text = out.getvalue()
    assert text.count("e2e+ds") > 3 and "+0.170 [0.160, 0.180]" in text and "50 % [50, 50]" in text
    assert all(sentence[:60] in text for sentence in summary.verdicts)
    narrow = io.StringIO()
    print_summary(summary, Console(file=narrow, width=80))
    assert "…" not in narrow.getvalue()
