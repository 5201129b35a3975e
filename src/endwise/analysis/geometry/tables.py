"""The geometry of dictionaries as rows: by run, by pair, by method, and by feature."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from endwise.analysis.geometry.geometry import Geometry, Pair, Similarity
from endwise.analysis.geometry.geometry_claims import differences
from endwise.analysis.geometry.similarity import QUANTILES, across_seeds, mean_of, quantiles, within
from endwise.analysis.geometry.stability import (
    THRESHOLD,
    THRESHOLDS,
    Recurrence,
    recurrence,
    stability,
    stable_functions,
)
from endwise.analysis.over_seeds import interval_columns
from endwise.analysis.sets import once
from endwise.evaluation.evaluate import read_firings
from endwise.evaluation.summary import RunSummary, what_varies

Row = dict[str, Any]


def within_rows(found: Geometry) -> list[Row]:
    """One row a run: what it measured, and the mean and the quantiles of its within-dictionary cosines."""
    rows = []
    for run in found.runs:
        row = {**_setting(found), **_run(run), "l0": run.l0, "alive": run.alive, "ce_increase": run.ce_increase}
        similarity = found.within.get(run.folder)
        rows.append(row if similarity is None else row | _summary(similarity))
    return rows


def pair_rows(found: Geometry, threshold: float = THRESHOLD) -> list[Row]:
    """Two rows a pair, one for each direction, with its one-to-one matching."""
    return [row for pair in found.pairs.values() for row in _pair(found, pair, threshold)]


def difference_rows(found: Geometry) -> list[Row]:
    """List what the methods differ by."""
    return [
        {**_setting(found), "measure": each.name, "a": each.a.label, "b": each.b.label}
        | interval_columns("difference", each.interval)
        | {**_seeds(each.runs), "paired": each.paired, "reason": each.reason}
        for each in differences(found)
    ]


@once
def recurrences(found: Geometry) -> list[Recurrence]:
    """Measure each set of twins, once."""
    made: dict[tuple[str, ...], Recurrence] = {}
    for run in found.runs:
        key = tuple(twin.folder for twin in found.twins(run))
        if key not in made and (of := recurrence(found, run)) is not None:
            made[key] = of
    return list(made.values())


def recurrence_rows(found: Geometry) -> list[Row]:
    """The threshold curves, long."""
    return [
        {
            **_setting(found),
            **_kind(of.run),
            **_seeds(of.runs),
            "threshold": threshold,
            **interval_columns("share", share),
        }
        for of in recurrences(found)
        for threshold, share in zip(THRESHOLDS, of.share, strict=True)
    ]


def seed_rows(found: Geometry) -> list[Row]:
    """List each set of twins, within and across seeds."""
    rows = []
    for of in recurrences(found):
        measures = {"within": within(found, of.run), "across_seeds": across_seeds(found, of.run)}
        row = {**_setting(found), **_kind(of.run), **_seeds(of.runs)}
        for name, measure in measures.items():
            row |= {} if measure is None else interval_columns(name, measure.interval)
        rows.append(row)
    return rows


def function_rows(found: Geometry, threshold: float = THRESHOLD) -> list[Row]:
    """List what stable features carry, one row a run whose features' importance is known."""
    return [
        {
            **_run(of.run),
            "threshold": of.threshold,
            **interval_columns("spearman", of.correlation),
            **interval_columns("stable_features", of.of_features),
            **interval_columns("importance_of_stable", of.of_importance),
        }
        for of in stable_functions(found, threshold)
    ]


def feature_columns(found: Sequence[Geometry], threshold: float = THRESHOLD) -> Mapping[str, NDArray[Any]]:
    """Every alive feature of every run, as columns; where a run has no twins, or no importance, NaN."""
    parts = [_features(one, run, threshold) for one in found for run in one.runs if run.folder in one.within]
    names = parts[0] if parts else {}
    return {name: np.concatenate([part[name] for part in parts]) for name in names}


def _features(found: Geometry, run: RunSummary, threshold: float) -> dict[str, NDArray[Any]]:
    importance = found.importance.get(run.folder)
    similarity, seeds = found.within[run.folder], stability(found, run)
    n, firings = len(similarity.features), read_firings(Path(run.folder))
    unknown = np.full(n, np.nan)
    return {
        "run": np.full(n, run.folder, dtype=object),
        "kind": np.full(n, run.method.label, dtype=object),
        "seed": np.full(n, run.seed),
        "data_seed": np.full(n, run.data_seed),
        "feature": similarity.features,
        "density": firings[similarity.features] / run.alive_tokens,
        "within": similarity.cosine,
        "nearest": similarity.nearest,
        "seeds": unknown if seeds is None else seeds.mean_cosine,
        "recurrence": unknown if seeds is None else seeds.recurrence(threshold),
        "importance": unknown if importance is None else importance[similarity.features],
    }


def _pair(found: Geometry, pair: Pair, threshold: float) -> Iterator[Row]:
    run, other, matching = pair.there.run, pair.back.run, pair.matching
    matched = {
        "matched.pairs": len(matching.cosine),
        "matched.mean": matching.mean,
        "matched.bound": matching.bound,
        "matched.share": matching.share_above(threshold),
        "matched.threshold": threshold,
        "matched.method": matching.method,
    }
    relation = _relation(found, run, other)
    for a, b, similarity in ((run, other, pair.there), (other, run, pair.back)):
        near = {"nearest_in": b.folder, "nearest_in.kind": b.method.label, "nearest_in.seed": b.seed}
        yield {**_setting(found), "relation": relation, **_run(a), **near, **_summary(similarity), **matched}


def _relation(found: Geometry, run: RunSummary, other: RunSummary) -> str:
    if other in found.twins(run):
        return "across seeds"
    return "given" if (run.folder, other.folder) in found.given else "across kinds"


def _summary(similarity: Similarity) -> Row:
    row = interval_columns("mean", mean_of(similarity))
    for share, interval in zip(QUANTILES, quantiles(similarity), strict=True):
        row |= interval_columns(f"q{100 * share:02.0f}", interval)
    return row


def _setting(found: Geometry) -> Row:
    setting = found.setting
    return {"model": setting.model, "site": setting.site, "d_sae": setting.d_sae, "training_tokens": setting.tokens}


def _run(run: RunSummary) -> Row:
    return run.known({"run": run.folder, **_kind(run), "seed": run.seed, "data_seed": run.data_seed})


def _kind(run: RunSummary) -> Row:
    return {"kind": run.method.label, **run.knob.columns, "learning_rate": run.learning_rate, "knob": str(run.knob)}


def _seeds(runs: Sequence[RunSummary]) -> Row:
    """Say how many there are, and what they vary."""
    return {"seeds": len(runs), "seeds_vary": what_varies(runs) or None}
