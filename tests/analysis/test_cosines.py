"""Nearest directions and one-to-one matchings against definitions over all pairs, in float64."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from endwise.analysis.geometry.cosines import nearest_across, nearest_within
from endwise.analysis.geometry.matching import CANDIDATES, match
from made_dictionaries import directions, near

SIDE_7 = 16 * 7 * 7
"""Memory for tiles of 7 × 7."""


def all_cosines(a, b):
    """In float64, by definition."""
    a, b = a.double().numpy(), b.double().numpy()
    return (a @ b.T) / np.outer(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1))


@settings(max_examples=25)
@given(n=st.integers(2, 40), k=st.integers(1, 6), side=st.integers(1, 50))
def test_within_is_that_of_all_pairs_whatever_the_tiles(n, k, side):
    rows = directions(n, seed=n)
    cosines = all_cosines(rows, rows)
    np.fill_diagonal(cosines, -np.inf)
    found = nearest_within(rows, k=k, memory=16 * side * side)
    expected = -np.sort(-cosines, axis=1)[:, : min(k, n - 1)]
    np.testing.assert_allclose(found.cosine.numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(cosines, found.index.numpy(), 1), expected, atol=1e-6)
    assert torch.equal(found.best, found.cosine[:, 0])


@settings(max_examples=25)
@given(n=st.integers(1, 40), m=st.integers(1, 40), k=st.integers(1, 6), side=st.integers(1, 50))
def test_across_is_that_of_all_pairs_both_ways(n, m, k, side):
    a, b = directions(n, seed=n), directions(m, seed=100 + m)
    cosines = all_cosines(a, b)
    for found, of in zip(nearest_across(a, b, k=k, memory=16 * side * side), (cosines, cosines.T), strict=True):
        expected = -np.sort(-of, axis=1)[:, :k]
        np.testing.assert_allclose(found.cosine.numpy(), expected, atol=1e-6)
        np.testing.assert_allclose(np.take_along_axis(of, found.index.numpy(), 1), expected, atol=1e-6)


def test_no_more_is_held_than_was_granted(monkeypatch):
    """Every product of two tiles is counted with what its transpose and the reductions take."""
    held = []
    product = torch.Tensor.__matmul__

    def counted(a, b):
        held.append(len(a) * b.shape[1] * 16)
        return product(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", counted)
    nearest_across(directions(50), directions(30), memory=SIDE_7)
    nearest_within(directions(50), memory=SIDE_7)
    assert max(held) == SIDE_7
    assert sum(held) < 16 * (50 * 30 + 0.6 * 50 * 50)  # within takes each product of two tiles once


def test_no_cosine_exceeds_1():
    rows = directions(2000)
    assert nearest_across(rows, rows)[0].best.max() <= 1


@pytest.mark.parametrize(
    ("search", "rule"),
    [
        (lambda rows: nearest_within(2 * rows), "unit length"),
        (lambda rows: nearest_within(rows.double()), "float32"),
        (lambda rows: nearest_within(rows[:1]), "two directions or more; given 1"),
        (lambda rows: nearest_within(rows, k=0), "k must be 1 or more; given 0"),
        (lambda rows: nearest_across(rows, directions(3, width=5)), "one width; given 16 and 5"),
        (lambda rows: nearest_across(rows, rows[:0]), "given 9 and 0"),
    ],
)
def test_what_cannot_be_searched_is_refused(search, rule):
    with pytest.raises(ValueError, match=rule):
        search(directions(9))


@pytest.mark.parametrize(("n", "m"), [(5, 5), (3, 6), (6, 4), (1, 4)])
@pytest.mark.parametrize("exact", [4096, 0])
def test_the_best_matching_is_that_of_all_permutations(n, m, exact):
    a, b = directions(n, seed=7, width=4), directions(m, seed=8, width=4)
    cosines = all_cosines(a, b)
    small = cosines if n <= m else cosines.T
    best = max(
        sum(row[j] for row, j in zip(small, order, strict=False)) for order in permutations(range(max(n, m)), min(n, m))
    )
    found = match(a, b, exact=exact)
    assert len(found.a) == len(found.b) == len(set(found.a)) == len(set(found.b)) == min(n, m)
    assert (np.diff(found.a) > 0).all()
    np.testing.assert_allclose(found.cosine, cosines[found.a, found.b], atol=1e-6)
    assert found.cosine.sum() == pytest.approx(best, abs=1e-5)
    assert found.bound == pytest.approx(small.max(axis=1).mean(), abs=1e-6)
    assert found.mean <= found.bound + 1e-6


@pytest.mark.parametrize("noise", [0.3, 3.0, None])
def test_among_candidates_it_comes_within_a_thousandth(noise):
    """400 × 300: more than `CANDIDATES` and few enough for the exact one."""
    a = directions(400, seed=1, width=24)
    b = (directions(400, seed=2, width=24) if noise is None else near(a, noise, seed=2)[0])[:300]
    exact, close = match(a, b), match(a, b, exact=0)
    assert exact.method == "Hungarian" and close.method == "Hungarian among candidates"
    assert CANDIDATES < 300 and len(close.cosine) >= 0.99 * 300
    assert close.cosine.sum() == pytest.approx(exact.cosine.sum(), rel=1e-3)
    assert close.cosine.sum() <= exact.cosine.sum() + 1e-4


def test_a_direction_all_of_whose_candidates_are_taken_stays_alone():
    """60 copies of one direction have the same 16 nearest."""
    a = directions(1).repeat(60, 1)
    b = torch.cat([near(directions(1).repeat(CANDIDATES, 1), 0.01)[0], directions(60, seed=5)])
    found = match(a, b, exact=0)
    assert len(set(found.b)) == len(found.b) < 60
    assert len(match(a, b).a) == 60


def test_known_matches_are_found():
    rows = directions(80)
    other, gone = near(rows, 0.3, seed=3)
    for exact in (4096, 0):
        found = match(rows, other, exact=exact)
        assert (found.b[found.a.argsort()] == gone).all()
        assert found.share_above(0.9) == 1.0
