"""One interval that holds seeds and text, against the slow definition; nothing is shown by fewer than three."""

from dataclasses import replace

import numpy as np
import pytest

from endwise.analysis.over_seeds import CORRELATION, PLAIN, RATIO, judged, over, over_seeds, rests_on, with_error
from endwise.common.statistics import exp_interval, interval_with_seeds
from made_runs import make_run


def draws_of(seeds, resamples=400):
    random = np.random.default_rng(0)
    text = random.normal(0, 0.05, resamples)  # one text, which all seeds were measured on
    return np.array([[value, *(value * np.exp(text))] for value in seeds])


def test_a_ratio_of_three_seeds_has_the_variances_of_seeds_and_of_text_in_logarithms():
    values = draws_of([0.5, 0.6, 0.7])
    logs = np.log(values)
    error = logs.mean(axis=0)[1:].std(ddof=1)
    expected = exp_interval(interval_with_seeds(float(logs[:, 0].mean()), logs[:, 0], error))
    found = over_seeds(values, RATIO)
    assert (found.low, found.estimate, found.high) == pytest.approx((expected.low, expected.estimate, expected.high))
    assert found.testable and found.text("{:.2f}".format).startswith("0.59 [")


@pytest.mark.parametrize("seeds", [[0.5], [0.5, 0.6]])
def test_of_fewer_seeds_the_interval_is_over_text_alone_and_bears_no_verdict(seeds):
    found = over_seeds(draws_of(seeds), RATIO)
    mean = np.exp(np.log(draws_of(seeds)).mean(axis=0))
    assert (found.low, found.high) == pytest.approx(tuple(np.exp(np.quantile(np.log(mean[1:]), [0.025, 0.975]))))
    assert found.high < 1 and judged((found, found.high < 1)) == "not testable here"


def test_a_verdict_takes_every_part():
    below, above = (over_seeds(draws_of(seeds), RATIO) for seeds in ([0.5, 0.5, 0.51], [1.5, 1.5, 1.51]))
    assert judged((below, below.high < 1)) == "shown"
    assert judged((below, below.high < 1), (above, above.high < 1)) == "not shown"
    undefined = over_seeds(np.array([[0.5, np.nan, np.nan]] * 3))
    assert judged((below, True), (undefined, True)) == "not testable here"
    assert undefined.text() == "0.500 (no interval)"
    nothing = over_seeds(np.full((3, 9), np.nan))
    assert judged((nothing, True)) == "not testable here" and nothing.text() == "not defined"


def test_correlations_stay_correlations():
    found = over_seeds(np.array([[0.99, 0.98, 1.0, 0.97], [1.0, 0.99, 1.0, 1.0], [0.95, 0.9, 0.99, 0.9]]), CORRELATION)
    assert -1 <= found.low < found.estimate < found.high <= 1


def test_an_error_alone_gives_the_normal_interval():
    found = with_error([0.3], 0.1, PLAIN)
    assert (found.low, found.high) == pytest.approx((0.3 - 0.196, 0.3 + 0.196), abs=1e-4)


def test_it_is_said_what_seeds_vary():
    run = make_run("e2e", 1, 0.2, 20)
    order = [replace(run, data_seed=seed) for seed in range(3)]
    weights = [replace(run, seed=seed) for seed in range(2)]
    both = [replace(run, seed=seed, data_seed=seed) for seed in range(3)]
    assert rests_on([run, run]) == "one seed"
    assert rests_on(weights) == "two seeds (initialisation)"
    assert rests_on(order) == "3 seeds (order of the text)"
    assert over("held-out text", both) == "over held-out text and 3 seeds (initialisation and order of the text)"
    assert over("features", [run]) == "over features alone, one seed"
