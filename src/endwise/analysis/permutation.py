"""A permutation test of two means, of as many values on either side."""

import numpy as np

from endwise.statistics import Floats

PERMUTATIONS = 9_999
_CHUNK = 1 << 21
"""Values that are permuted at a time."""


def permutation_test(a: Floats, b: Floats, generator: np.random.Generator, permutations: int = PERMUTATIONS) -> float:
    """Two-sided p of mean a − mean b, values `[n]` and `[m]`, if which side a value is on were chance.

    The values are dealt again to the two sides, `permutations` times; p = (1 + how often the difference is at least as
    far from 0 as it was) / (1 + permutations), which is never 0 and valid at any number of them (Phipson and Smyth
    2010).
    """
    both = np.concatenate([a, b]).astype(np.float64)
    seen = abs(a.mean() - b.mean())
    slack = 1e-9 * (np.abs(both).max(initial=0.0) + 1e-300)  # sums in another order
    rows = max(1, _CHUNK // len(both))
    as_far = 0
    for start in range(0, permutations, rows):
        dealt = np.tile(both, (min(rows, permutations - start), 1))
        generator.permuted(dealt, axis=1, out=dealt)
        left = dealt[:, : len(a)].mean(1)
        right = dealt[:, len(a) :].mean(1)
        as_far += int((np.abs(left - right) >= seen - slack).sum())
    return (1 + as_far) / (1 + permutations)


def equal_samples(a: Floats, b: Floats, generator: np.random.Generator) -> tuple[Floats, Floats]:
    """As many of each: of the longer, as many as the shorter has, drawn without replacement."""
    count = min(len(a), len(b))
    if len(a) == len(b):
        return a, b
    first, second = (each if len(each) == count else generator.choice(each, count, replace=False) for each in (a, b))
    return first, second
