"""One-to-one matching of two dictionaries: the pairs, no direction in two of them, whose cosines sum to the most.

Up to `EXACT` directions on a side this is the Hungarian method on all cosines (`scipy.optimize`'s
`linear_sum_assignment`). Beyond, only the `CANDIDATES` nearest of each direction, seen from either side, may be its
partner, and the best matching among these is found exactly (`scipy.sparse.csgraph`'s
`min_weight_full_bipartite_matching`). A direction for which none of them is left stays alone. How much that can have
cost is bounded by what the nearest ones sum to if several directions may share one.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

from endwise.analysis.geometry.cosines import Directions, Nearest, Others, nearest_across

EXACT = 4096
CANDIDATES = 16
_ALONE = 4.0
"""Cost of having no partner; having one costs 2 − cosine, 1 to 3."""

Indices = NDArray[np.int64]
Cosines = NDArray[np.float32]


@dataclass(frozen=True)
class Matching:
    a: Indices
    """Rows of the first dictionary, ascending; `[pairs]` as the next two."""
    b: Indices
    """Their partners among the rows of the second."""
    cosine: Cosines
    method: Literal["Hungarian", "Hungarian among candidates"]
    bound: float
    """Bound on the mean cosine of any matching of the smaller dictionary: the mean of its directions' nearest."""

    @property
    def mean(self) -> float:
        return float(self.cosine.mean(dtype=np.float64))

    def share_above(self, threshold: float) -> float:
        """Share of the pairs that have at least this cosine."""
        return float((self.cosine >= threshold).mean())


def match(a: Directions, b: Others, found: tuple[Nearest, Nearest] | None = None, *, exact: int = EXACT) -> Matching:
    """
    Args:
        a, b: rows of unit length, float32.
        found: what `nearest_across(a, b, k=CANDIDATES)` gave, if it is known already.
        exact: the size of the larger dictionary up to which all pairs are considered, which takes 12 bytes for each.
    """
    of_a, of_b = found or nearest_across(a, b, k=CANDIDATES)
    bound = float((of_a if len(a) <= len(b) else of_b).best.double().mean())
    if max(len(a), len(b)) <= exact:
        cosines = (a @ b.T).clamp_(-1, 1).cpu().numpy()
        rows, columns = linear_sum_assignment(cosines, maximize=True)
        return Matching(rows.astype(np.int64), columns.astype(np.int64), cosines[rows, columns], "Hungarian", bound)
    rows, columns, values = _candidates(of_a, of_b)
    if len(a) <= len(b):
        kept = _best_of(rows, columns, values, len(a), len(b))
    else:
        kept = _best_of(columns, rows, values, len(b), len(a))
    kept = kept[np.argsort(rows[kept])]
    return Matching(rows[kept], columns[kept], values[kept], "Hungarian among candidates", bound)


def _candidates(of_a: Nearest, of_b: Nearest) -> tuple[Indices, Indices, Cosines]:
    """Rows, columns and cosines of all pairs of which one is among the other's nearest, each pair once."""
    there, back = of_a.index.cpu().numpy(), of_b.index.cpu().numpy()
    rows = np.concatenate([np.repeat(np.arange(len(there)), there.shape[1]), back.ravel()])
    columns = np.concatenate([there.ravel(), np.repeat(np.arange(len(back)), back.shape[1])])
    values = np.concatenate([of_a.cosine.cpu().numpy().ravel(), of_b.cosine.cpu().numpy().ravel()])
    _, first = np.unique(rows * len(back) + columns, return_index=True)
    return rows[first], columns[first], values[first]


def _best_of(rows: Indices, columns: Indices, values: Cosines, n_rows: int, n_columns: int) -> Indices:
    """Choose the pairs that are matched. Every row has a column of its own besides, which stands for being alone, so
    that there always is a matching of all rows.
    """
    own = np.arange(n_rows)
    costs = np.concatenate([2.0 - values.astype(np.float64), np.full(n_rows, _ALONE)])
    ends = (np.concatenate([rows, own]), np.concatenate([columns, n_columns + own]))
    graph = csr_array((costs, ends), shape=(n_rows, n_columns + n_rows))
    matched_rows, matched_columns = (each.astype(np.int64) for each in min_weight_full_bipartite_matching(graph))
    partnered = matched_columns < n_columns
    keys = rows * n_columns + columns
    order = np.argsort(keys)
    wanted = matched_rows[partnered] * n_columns + matched_columns[partnered]
    return order[np.searchsorted(keys, wanted, sorter=order)]
