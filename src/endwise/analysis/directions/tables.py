"""The tables of a study of directions: one row a run, a direction, a later site, a contrast, a claim."""

from collections.abc import Sequence
from typing import Any

from endwise.analysis.comparable import columns_of
from endwise.analysis.directions.study import Directions
from endwise.analysis.over_seeds import interval_columns
from endwise.analysis.sets import columns_of_run
from endwise.evaluation.summary import RunSummary, what_varies


def norm_rows(found: Sequence[Directions]) -> list[dict[str, Any]]:
    """One row a run: lengths and cosine, with position 0 and document starts apart."""
    return [{**_run_columns(one, run), **one.norms[run.folder].to_row()} for one in found for run in one.runs]


def direction_rows(found: Sequence[Directions]) -> list[dict[str, Any]]:
    """One row for each run and direction, from the first, 0, on; nothing where a number is not defined."""
    rows = []
    for one in found:
        for run in one.runs:
            of = one.measured[run.folder]
            common, shares = _run_columns(one, run), of.variance_share
            for index in range(len(shares)):
                row = {**common, "direction": index, "variance_share": float(shares[index])}
                for name in ("correlation", "explained_variance", "kl"):
                    row |= interval_columns(name, getattr(of, name).of(index))
                rows.append(row)
    return rows


def downstream_rows(found: Sequence[Directions]) -> list[dict[str, Any]]:
    """One row for each run and later residual stream."""
    rows = []
    for one in found:
        for run in one.runs:
            for later in run.downstream_mse:
                row = {**_run_columns(one, run), "later_site": later}
                for column, numbers in (("mse", run.downstream_mse), ("cosine", run.downstream_cosine)):
                    low, high = run.intervals.get(f"downstream_{column}.{later}", (None, None))
                    row |= {column: numbers.get(later), f"{column}.low": low, f"{column}.high": high}
                rows.append(row)
    return rows


def use_rows(found: Sequence[Directions]) -> list[dict[str, Any]]:
    """One row a run: how its reconstruction of directions follows their use."""
    rows = []
    for one in found:
        for run in one.runs:
            if (of := one.follows.get(run.folder)) is not None:
                row = {**_run_columns(one, run), "directions": of.directions}
                rows.append(
                    row | interval_columns("rank", of.rank) | interval_columns("rank_given_variance", of.given_variance)
                )
    return rows


def contrast_rows(found: Sequence[Directions]) -> list[dict[str, Any]]:
    """One row for each pair of methods, of their runs at similar CE increase: means over seeds."""
    return [
        {
            **columns_of(one.setting),
            "kind": each.method.key,
            "reference": each.reference.key,
            "seeds": each.rank.seeds,
            "seeds_vary": what_varies(each.runs) or None,
            **interval_columns("rank", each.rank),
            **interval_columns("rank_given_variance", each.given_variance),
            **interval_columns("dropped", each.dropped),
            **interval_columns("dropped_given_variance", each.dropped_given_variance),
        }
        for one in found
        for each in one.contrasts
    ]


def _run_columns(one: Directions, run: RunSummary) -> dict[str, Any]:
    similar = any(run in runs for runs in one.by_seed.values())
    measured = {"at_similar_ce": similar, "ce_increase": run.ce_increase, "l0": run.l0, "run": run.folder}
    return run.told({**columns_of(one.setting), **columns_of_run(run), **measured})


def claim_rows(found: Sequence[Directions]) -> list[dict[str, Any]]:
    """One row for each claim of each set."""
    names = ("claim", "published", "ours", "verdict")
    return [
        {**columns_of(one.setting), **{name: getattr(claim, name) for name in names}}
        for one in found
        for claim in one.claims
    ]
