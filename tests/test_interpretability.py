"""The permutation test against scipy's, and equal samples of features."""

import numpy as np
import pytest
from scipy import stats

from endwise.analysis.permutation import equal_samples, permutation_test


@pytest.mark.parametrize("shift", [0.0, 0.03, 0.2])
def test_the_permutation_test_is_scipys(shift):
    random = np.random.default_rng(0)
    a, b = random.random(40) + shift, random.random(25)

    def difference(one, other, axis):
        return one.mean(axis=axis) - other.mean(axis=axis)

    whole = stats.permutation_test((a, b), difference, n_resamples=9_999, rng=np.random.default_rng(1))
    ours = permutation_test(a, b, np.random.default_rng(2))
    assert ours == pytest.approx(whole.pvalue, abs=0.015)  # three standard errors of two such samples at p = 0.5


def test_every_deal_of_few_values_is_counted():
    a, b = np.array([3.0, 4.0]), np.array([0.0, 1.0])
    exact = stats.permutation_test((a, b), lambda x, y: x.mean() - y.mean(), n_resamples=np.inf).pvalue
    assert exact == pytest.approx(2 / 6)
    assert permutation_test(a, b, np.random.default_rng(0), permutations=20_000) == pytest.approx(exact, abs=0.01)


def test_equal_values_are_never_called_different():
    same = np.full(12, 0.7)
    assert permutation_test(same, same, np.random.default_rng(0), permutations=500) == 1.0


def test_samples_of_one_size():
    a, b = np.arange(10.0), np.arange(100.0, 104.0)
    first, second = equal_samples(a, b, np.random.default_rng(0))
    assert len(first) == len(second) == 4 and set(first) <= set(a) and len(set(first)) == 4
    assert (second == b).all()
    assert equal_samples(a, a, np.random.default_rng(0)) == (pytest.approx(a), pytest.approx(a))
