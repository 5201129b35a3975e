"""Figures of the README and the pages of results, checked against the tables that are committed beside them."""

import csv
import re
from functools import cache

import pytest

from places import ROOT

README = ROOT / "README.md"
RESULTS = ROOT / "docs" / "results"
PAGES = [README, RESULTS.parent / "tutorial.md", *sorted(RESULTS.glob("*.md"))]
FIGURE = re.compile(r"(\d+) % \[(\d+), (\d+)\]")
"""A ratio with its 95 % interval."""
CROSSING = re.compile(r"(\d+) % to (\d+) %")
"""A ratio at both ends of a range in which the curves cross."""
SPEED = re.compile(r"(\d+\.\d) times")


def tables():
    return sorted(RESULTS.rglob("*.csv"))


@cache
def figures():
    """Every ratio with an interval, and every pair of ends, that a committed table holds, as pages write them."""
    ratios, pairs = set(), set()
    for file in tables():
        text = file.read_text()
        ratios |= set(FIGURE.findall(text))
        pairs |= set(CROSSING.findall(text))
        for row in csv.DictReader(text.splitlines()):
            for found, ends in (("ratio", ""), ("saving", "saving.")):
                if row.get(found) and row.get(f"{ends}low"):
                    names = found, f"{ends}low", f"{ends}high"
                    ratios.add(tuple(f"{100 * float(row[name]):.0f}" for name in names))
            if row.get("ratio_at_ends.low"):
                pairs.add(tuple(f"{100 * float(row[f'ratio_at_ends.{end}']):.0f}" for end in ("low", "high")))
    return ratios, pairs


def rows(file):
    return list(csv.DictReader(file.read_text().splitlines()))


def text_of(page):
    """Its text, without emphasis and line breaks."""
    return " ".join(page.read_text().replace("*", "").split())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_ratio_is_in_a_table(page):
    ratios, _ = figures()
    missing = [figure for figure in FIGURE.findall(text_of(page)) if figure not in ratios]
    assert not missing, f"{page.name} gives ratios that no table below docs/results holds: {missing}"


def test_pairs_of_ends_are_in_a_table():
    """Pairs stand where curves cross; the page of training lengths has its own table."""
    _, pairs = figures()
    for page in PAGES:
        if page.stem != "training_length":
            assert set(CROSSING.findall(text_of(page))) <= pairs, page.name


def test_the_readme_gives_what_the_study_found():
    """The ratios of L0 at equal CE increase, as the study's table has them; those of one seed say so."""
    text = text_of(README)
    for row in rows(RESULTS / "paper-embedded" / "tables" / "ratios.csv"):
        if row["measure"] != "features_at_equal_ce":
            continue
        if row["ratio"]:
            expected = "{:.0f} % [{:.0f}, {:.0f}]".format(*(100 * float(row[n]) for n in ("ratio", "low", "high")))
            expected += ", one seed" if row["seeds"] == "1" else ""
        else:
            assert row["crossings"], row["reason"]
            expected = "{:.0f} % to {:.0f} %".format(*(100 * float(row[f"ratio_at_ends.{n}"]) for n in ("low", "high")))
        assert expected in text, f"{row['kind']} at {row['site']}: {expected}"


def test_no_claim_that_is_called_shown_crosses_or_rests_on_one_seed():
    folder = RESULTS / "paper-embedded" / "tables"
    for row in rows(folder / "ratios.csv"):
        assert not (row["ratio"] and row["crossings"])
    for file in RESULTS.rglob("claims.csv"):
        for claim in rows(file):
            if claim["verdict"] == "shown":
                assert "one seed" not in claim["ours"] and "curves cross" not in claim["ours"], claim["claim"]


def test_the_readme_s_speeds_are_measured_ones():
    measured = set(re.findall(r"(\d+\.\d) ×", (ROOT / "benchmarks" / "RESULTS.md").read_text()))
    text = text_of(README)
    speeds = SPEED.findall(text)
    assert speeds and set(speeds) <= measured, f"{sorted(set(speeds) - measured)} are not in benchmarks/RESULTS.md"
    for named in ("4.3", "7.8", "2.3", "4.1", "11.7", "3.7"):
        assert named in speeds, "as it is and with the allocator tuned"


def test_the_tutorial_s_figures_are_its_tables():
    text, folder = text_of(RESULTS.parent / "tutorial.md"), RESULTS / "tutorial"
    (ablated,) = [row for row in rows(folder / "ablations.csv") if row["feature"] == "1183"]
    (measured,) = rows(folder / "first.csv")
    assert f"{float(ablated['ce']):.3f} nats per token (standard error {float(ablated['ce.se']):.3f})" in text
    for name, form in (("l0", "{:.1f}"), ("ce_increase", "{:+.3f}"), ("kl", "{:.3f}"), ("ce_clean", "CE {:.3f}")):
        assert form.format(float(measured[name])) in text, name
    assert f"All but {int(measured['d_sae']) - int(measured['alive'])} of the features" in text


def test_the_readme_is_short():
    assert README.read_text().count("\n") < 120
