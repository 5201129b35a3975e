"""Permutations against an enumeration, equal samples of features, and kinds compared by scores that are known."""

import io
import re
from itertools import combinations

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from endwise.analysis.comparable import Setting
from endwise.analysis.interpretability.page import print_interpretability, write_interpretability
from endwise.analysis.interpretability.study import (
    Interpretability,
    mean_rows,
)
from endwise.analysis.scored import difference_rows, equal_samples, permutation_test
from endwise.common.statistics import interval_with_seeds
from endwise.config.method import PRESET_METHODS
from endwise.figures.violins import violin
from made_explanations import explained, study


def exact_p(a, b):
    """The share of all deals, in whole numbers, that are at least as far apart."""
    both = np.concatenate([a, b])
    left = both[np.array(list(combinations(range(len(both)), len(a))))].sum(1)
    apart = np.abs(left * len(both) - both.sum() * len(a))  # mean less mean, times n m
    return float((apart >= apart[0]).mean())


@pytest.mark.parametrize("shift", [0, 2, 9])
def test_permutations_at_random_come_near_all_of_them(shift):
    random = np.random.default_rng(0)
    a, b = random.integers(0, 20, 10) + shift, random.integers(0, 20, 8)  # 43,758 deals
    found = permutation_test(a / 10, b / 10, np.random.default_rng(2))
    assert found == pytest.approx(exact_p(a, b), abs=0.015)  # three standard errors at p = 0.5
    assert (found * 10_000) % 1 == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("sizes", [(2, 2), (5, 3), (6, 6)])
def test_every_deal_of_few_values_is_counted_and_ties_are_ties(sizes):
    random = np.random.default_rng(1)
    a, b = (random.integers(0, 4, size) for size in sizes)
    for scale in (0.1, 1e-20):
        assert permutation_test(a * scale, b * scale, random) == pytest.approx(exact_p(a, b), rel=1e-12)


def test_equal_values_are_never_called_different():
    same = np.full(12, 0.7)
    assert permutation_test(same, same, np.random.default_rng(0), permutations=500) == 1.0


def test_samples_of_one_size():
    a, b = np.arange(10.0), np.arange(100.0, 104.0)
    first, second = equal_samples(a, b, np.random.default_rng(0))
    assert len(first) == len(second) == 4 and set(first) <= set(a) and len(set(first)) == 4
    assert (second == b).all()
    assert equal_samples(a, a, np.random.default_rng(0)) == (pytest.approx(a), pytest.approx(a))


def test_kinds_are_compared_by_their_own_explanations():
    found = study(local=(0.7, 0.5), e2e_ds=(0.8, 0.5))
    (difference,) = (each for each in found.differences if each.at == "ce_increase")
    assert difference.difference.estimate == pytest.approx(0.1) and difference.features == 40
    half = stats.norm.ppf(0.975) * np.sqrt(2 * np.var(np.linspace(-0.1, 0.1, 40)) / 40)
    assert difference.difference.low == pytest.approx(0.1 - half, abs=0.004)
    assert difference.p == pytest.approx(1e-4)  # none of 9,999 deals is as far apart
    assert {row["score"] for row in mean_rows([found])} == {"detection", "detection.shuffled"}
    assert len(difference_rows([found])) == 2


def test_a_verdict_rests_on_an_interval_that_holds_features_and_seeds():
    alike = study((0, 1, 2), 0.01, local=(0.7, 0.5), e2e_ds=(0.8, 0.5))
    assert [claim.verdict for claim in alike.claims] == ["shown", "shown", "not shown"]
    differences = [each for each in alike.differences if each.at == "ce_increase"]
    means = [each.difference.estimate for each in differences]
    error = np.mean([each.draws for each in differences], axis=0).std(ddof=1)
    expected = interval_with_seeds(float(np.mean(means)), means, float(error))
    told = f"detection +0.110 [{expected.low:+.3f}, {expected.high:+.3f}] over features and 3 seeds"
    assert told in alike.claims[0].ours
    widely = study((0, 1, 2), 0.1, local=(0.7, 0.5), e2e_ds=(0.73, 0.5))  # each seed's own difference is above 0
    assert all(each.difference.low > 0 for each in widely.differences)
    assert widely.claims[1].verdict == "not shown"


@pytest.mark.parametrize(("seeds", "told"), [((0,), "one seed"), ((0, 1), "two seeds (initialisation)")])
def test_one_or_two_seeds_give_figures_and_no_verdict(seeds, told):
    found = study(seeds, local=(0.7, 0.5), e2e_ds=(0.8, 0.5))
    assert [claim.verdict for claim in found.claims] == ["not testable here"] * 3
    assert all(f"over features alone, {told}" in claim.ours and "+0.100 [" in claim.ours for claim in found.claims)


def test_what_is_printed_fits_80_columns():
    lines = io.StringIO()
    console = Console(file=lines, width=80, force_terminal=True, color_system=None)
    print_interpretability([study(local=(0.7, 0.5), e2e_ds=(0.8, 0.5))], console)
    told = lines.getvalue()
    assert "…" not in told and all(len(line) <= 80 for line in told.splitlines())
    assert re.search(r"e2e\+ds +1 +0 +\+0.300 +30.0 +40 +0.800 \[0.7\d\d, 0.8\d\d\] +0.50", told)
    assert re.search(r"e2e\+ds − local +CE \+ +0 +detection +40 +\+0.10 \[\+0.0\d, \+0.1\d\] +0.0001", told)


@pytest.mark.parametrize(("count", "outlines"), [(14, 0), (15, 1)])
def test_few_values_have_no_outline(count, outlines):
    values = np.linspace(0.4, 0.9, count)
    series = violin(PRESET_METHODS["e2e"], 0.0, values, [""] * count)
    assert sum(not each.marked for each in series) == outlines
    assert [mark.y for mark in series[-1].marks] == values.tolist()


def test_explanations_that_tell_nothing_bear_no_verdict():
    found = study(local=(0.5, 0.5), e2e_ds=(0.8, 0.5))
    assert [claim.verdict for claim in found.claims] == ["not testable here"] * 3
    assert all("no better than another feature's" in claim.ours for claim in found.claims)


def test_kinds_of_other_ce_increase_bear_no_verdict():
    runs = (explained("local", 0.7, 0.5), explained("e2e_ds", 0.8, 0.5, ce_increase=0.9))
    claims = Interpretability(Setting.of(runs[0].summary), runs).claims
    assert claims[0].verdict == "not testable here" and "further apart than" in claims[0].ours


def test_the_page_shows_text_as_text(tmp_path, undrawn):
    page = write_interpretability([study(local=(0.7, 0.5), e2e=(0.6, 0.5), e2e_ds=(0.8, 0.5))], tmp_path)
    text = page.read_text()
    assert "<b>local</b>" not in text
    assert {path.name for path in tmp_path.glob("*.png")} == {"scores-ce_increase-1.png", "scores-l0-1.png"}
    assert (tmp_path / "differences.csv").read_text().count("\n") == 7  # three pairs at two similarities
