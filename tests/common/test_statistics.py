"""The bootstrap against an explicit loop; interpolation against numpy's in log space; and what both refuse."""

import math

import numpy as np
import pytest

from endwise.common.errors import DataError
from endwise.common.statistics import (
    InterpolationError,
    bootstrap_ratio,
    error_of,
    interpolate_at,
    interval_over_seeds,
    interval_with_seeds,
    resampled_ratio,
    resampling_weights,
    student_t,
)


def sums(sequences=40, seed=0):
    random = np.random.default_rng(seed)
    return random.gamma(2.0, 5.0, sequences), random.integers(5, 20, sequences).astype(float)


def test_bootstrap_ratio_equals_an_explicit_loop_over_drawn_sequences():
    top, bottom = sums()
    draws = []
    for counts in resampling_weights(len(top), 300, 7):
        drawn = [s for s, count in enumerate(counts) for _ in range(int(count))]
        draws.append(sum(top[s] for s in drawn) / sum(bottom[s] for s in drawn))
    interval = bootstrap_ratio(top, bottom, 300, 7)
    assert interval.low == pytest.approx(np.quantile(draws, 0.025), rel=1e-12)
    assert interval.high == pytest.approx(np.quantile(draws, 0.975), rel=1e-12)
    assert interval.estimate == pytest.approx(sum(top) / sum(bottom), rel=1e-12)


def test_every_resample_draws_as_many_sequences_as_there_are_and_equal_seeds_draw_alike():
    weights = resampling_weights(12, 500, 3)
    assert weights.shape == (500, 12)
    assert (weights.sum(1) == 12).all()
    assert weights.mean() == 1
    assert weights.std() == pytest.approx(np.sqrt(1 - 1 / 12), rel=0.05)
    resampling_weights.cache_clear()
    assert (resampling_weights(12, 500, 3) == weights).all()
    assert (resampling_weights(12, 500, 4) != weights).any()
    with pytest.raises(ValueError, match="read-only"):
        weights[0, 0] = 9


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        tokens = random.integers(20, 60, 50).astype(float)
        values = random.normal(3.0, 1.0, 50)
        interval = bootstrap_ratio(values * tokens, tokens, 200, 5)
        covered += interval.low <= 3.0 <= interval.high
    assert 0.88 <= covered / 300 <= 0.98


def test_resamples_are_paired_across_metrics():
    top, bottom = sums()
    one, other = (resampled_ratio(scale * top, bottom, 100, 2) for scale in (1.0, 0.5))
    np.testing.assert_allclose(other / one, 0.5, rtol=1e-12)


def test_resamples_of_empty_sequences_only_are_undefined_and_left_out():
    top, bottom = np.array([0.0, 3.0]), np.array([0.0, 1.0])
    assert np.isnan(resampled_ratio(top, bottom, 100, 0)).any()
    interval = bootstrap_ratio(top, bottom, 100, 0)
    assert (interval.low, interval.estimate, interval.high) == (3.0, 3.0, 3.0)


@pytest.mark.parametrize(
    ("top", "bottom", "message"),
    [
        ([1.0], [1.0, 2.0], "one sum per sequence"),
        ([], [], "one sum per sequence"),
        ([1.0, np.nan], [1.0, 1.0], "NaN or infinite"),
        ([1.0, 1.0], [0.0, 0.0], "sums to zero"),
    ],
)
def test_bootstrap_refuses_what_is_not_a_metric(top, bottom, message):
    with pytest.raises(DataError, match=message):
        bootstrap_ratio(top, bottom, 10, 0)


def test_interpolation_is_numpys_in_log_space_whatever_the_order_of_the_points():
    x, y = np.array([0.3, 0.1, 0.7, 0.2]), np.array([40.0, 120.0, 9.0, 70.0])
    order = np.argsort(x)
    targets = np.linspace(0.1, 0.7, 23)
    expected = np.exp(np.interp(targets, x[order], np.log(y[order])))
    np.testing.assert_allclose(interpolate_at(x, y, targets), expected, rtol=1e-12)
    np.testing.assert_allclose(interpolate_at(x, y, x), y, rtol=1e-12)
    assert float(interpolate_at([0.0, 1.0], [100.0, 1.0], 0.5)) == pytest.approx(10.0)


@pytest.mark.parametrize(
    ("x", "y", "target", "message"),
    [
        ([1, 2, 3], [9, 5, 2], 0.99, "outside the measured range"),
        ([1, 2, 3], [9, 5, 2], [2.0, 3.01], "outside the measured range"),
        ([1, 2, 3], [9, 5, 2], np.nan, "outside the measured range"),
        ([1, 2, 3], [9, 2, 5], 1.5, "not strictly monotone"),
        ([1, 2, 3], [9, 9, 5], 1.5, "not strictly monotone"),
        ([1, 2, 2], [9, 5, 2], 1.5, "not strictly monotone"),
        ([1], [9], 1, "at least two points"),
        ([1, 2], [9, 0], 1, "positive"),
        ([1, np.inf], [9, 4], 1, "finite"),
        ([1, 2, 3], [9, 5], 1, "one length"),
    ],
)
def test_interpolation_refuses_to_guess(x, y, target, message):
    with pytest.raises(InterpolationError, match=message) as caught:
        interpolate_at(x, y, target)
    assert isinstance(caught.value, ValueError)


TABLE = {1: (6.3138, 12.7062), 2: (2.9200, 4.3027), 3: (2.3534, 3.1824), 4: (2.1318, 2.7764), 9: (1.8331, 2.2622)}
"""Student's t: the quantiles 0.95 and 0.975 by degrees of freedom, of any table of it."""


@pytest.mark.parametrize("freedom", sorted(TABLE))
def test_students_t_is_that_of_the_tables(freedom):
    assert [student_t(share, freedom) for share in (0.95, 0.975)] == pytest.approx(TABLE[freedom], abs=6e-5)
    assert student_t(0.5, freedom) == pytest.approx(0.0, abs=1e-9)
    assert student_t(0.975, 400) == pytest.approx(1.9659, abs=1e-4)


def test_the_interval_over_seeds_is_students_t_on_logarithms():
    values = [0.5, 0.6, 0.8]
    logs = [math.log(value) for value in values]
    mean = sum(logs) / 3
    half = 4.3027 * math.sqrt(sum((each - mean) ** 2 for each in logs) / 2 / 3)
    found = interval_over_seeds(values)
    assert (found.low, found.estimate, found.high) == pytest.approx(
        (math.exp(mean - half), math.exp(mean), math.exp(mean + half)), rel=1e-4
    )


def test_intervals_over_seeds_cover_the_truth_as_often_as_they_say():
    random = np.random.default_rng(0)
    ends = [interval_over_seeds(np.exp(random.normal(0.3, 0.2, 4))) for _ in range(1500)]
    covered = np.mean([each.low <= math.exp(0.3) <= each.high for each in ends])
    assert covered == pytest.approx(0.95, abs=0.017)  # three standard errors


def test_an_interval_with_seeds_adds_the_variances_of_seeds_and_of_text():
    values, text = [0.1, 0.4, 0.7], 0.2
    of_seeds = 0.09 / 3
    freedom = 2 * ((of_seeds + text**2) / of_seeds) ** 2  # Welch and Satterthwaite
    half = student_t(0.975, freedom) * math.sqrt(of_seeds + text**2)
    found = interval_with_seeds(0.5, values, text)
    assert (found.low, found.estimate, found.high) == pytest.approx((0.5 - half, 0.5, 0.5 + half))
    only_seeds = interval_with_seeds(0.4, values, 0.0)
    assert only_seeds.high - 0.4 == pytest.approx(4.3027 * math.sqrt(of_seeds), rel=1e-4)
    only_text = interval_with_seeds(0.4, [0.4, 0.4, 0.4], text)
    assert error_of(only_text) == pytest.approx(text)
    for fewer in ([0.1, 0.2], [0.1, 0.2, math.nan]):
        with pytest.raises(DataError, match="at least 3 finite values"):
            interval_with_seeds(0.1, fewer, text)


@pytest.mark.parametrize(("seed_sd", "text_sd"), [(0.2, 0.0), (0.2, 0.3), (0.05, 0.3)])
def test_intervals_with_seeds_cover_the_truth_as_often_as_they_say(seed_sd, text_sd):
    random = np.random.default_rng(0)
    trials = 2000
    texts = random.normal(0, text_sd, (trials, 1))  # one text, which every seed is measured on
    values = 0.3 + texts + random.normal(0, seed_sd, (trials, 3))
    ends = [interval_with_seeds(float(each.mean()), each, text_sd) for each in values]
    covered = np.mean([each.low <= 0.3 <= each.high for each in ends])
    assert covered == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("values", [[0.5, 0.6], [0.5, 0.6, 0.0], [0.5, 0.6, math.nan]])
def test_an_interval_over_seeds_takes_three_positive_values(values):
    with pytest.raises(DataError, match="at least 3 positive values"):
        interval_over_seeds(values)
