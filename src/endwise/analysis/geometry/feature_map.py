"""A map of the alive directions of several dictionaries (paper, figures 19 and 20): UMAP by cosine, and its regions.

Regions are the clusters that HDBSCAN finds on the map, numbered from the largest; what lies in none has region 0. Both
are descriptions of a picture: distances on it are not distances between directions.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from endwise.analysis.geometry.cosines import Directions
from endwise.analysis.geometry.geometry import Geometry, Say, alive
from endwise.common.errors import ConfigError, ModelError
from endwise.evaluation.provenance import model_of
from endwise.evaluation.summary import RunSummary
from endwise.features.harvest.top_tokens import token_effects, written
from endwise.models.language_model import LanguageModel
from endwise.models.sites import Place
from endwise.runs.folder import RunFolder

NEIGHBOURS = 15
LEAST = 20
"""Features that a map takes."""
REGION_SHARE = 0.01
REGION_LEAST = 10
"""A region has at least this share of the features, and at least this many."""
MOST_RUNS = 4
SEED = 12345

Tokens = Callable[[torch.Tensor], Sequence[tuple[str, ...]]]
"""Top tokens of each of some directions."""


@dataclass(frozen=True)
class FeatureMap:
    """One place for every alive feature of every run."""

    runs: tuple[RunSummary, ...]
    run: NDArray[np.int64]
    """Number of the run, `[n]` as all that follow."""
    features: NDArray[np.int64]
    places: NDArray[np.float32]
    """`[n 2]`"""
    region: NDArray[np.int64]
    """Region from 1; 0: in none."""
    density: NDArray[np.float64]
    """Share of the held-out tokens on which it fired."""
    importance: NDArray[np.float64]
    """NaN where it was not measured."""
    tokens: tuple[tuple[str, ...], ...] | None
    """Tokens whose logits it raises most."""

    @property
    def regions(self) -> int:
        return int(self.region.max())


def mapped_runs(found: Geometry) -> tuple[RunSummary, ...]:
    """The kinds at similar CE increase and what was asked for as pairs; if that is one run, the first few of all."""
    asked = {folder for pair in found.given for folder in pair}
    chosen = [run for run in found.runs if run in found.similar or run.folder in asked]
    living = [run for run in found.runs if run.folder in found.within]
    return tuple(chosen if len(chosen) > 1 else living[:MOST_RUNS])


def feature_map(
    found: Geometry,
    runs: Sequence[RunSummary] | None = None,
    *,
    tokens: Tokens | None = None,
    seed: int = SEED,
    umap: Callable[..., Any] | None = None,
) -> FeatureMap:
    """
    Args:
        runs: the dictionaries to lay out together; None: `mapped_runs`.
        tokens: what gives the top tokens of directions, `[n d_model]`.
        umap: lays them out, with UMAP's settings; None: `umap_class`.

    Raises:
        ConfigError: the extra `umap` is not installed, or there are too few features.
    """
    chosen = tuple(runs or mapped_runs(found))
    parts = [alive(run) for run in chosen]
    if (count := sum(len(part.features) for part in parts)) < LEAST:
        raise ConfigError(f"A map takes {LEAST} alive features or more; these runs have {count}. Name others.")

    def worth(run: RunSummary) -> NDArray[np.float64]:
        return found.importance.get(run.folder, np.full(run.d_sae, np.nan))

    directions = torch.cat([part.directions for part in parts])
    places = _places(directions.numpy(), seed, umap or umap_class())
    return FeatureMap(
        runs=chosen,
        run=np.repeat(np.arange(len(parts)), [len(part.features) for part in parts]),
        features=np.concatenate([part.features for part in parts]),
        places=places,
        region=_regions(places),
        density=np.concatenate([part.firings / run.alive_tokens for run, part in zip(chosen, parts, strict=True)]),
        importance=np.concatenate([worth(run)[part.features] for run, part in zip(chosen, parts, strict=True)]),
        tokens=None if tokens is None else tuple(tokens(directions)),
    )


def _places(directions: NDArray[np.float32], seed: int, umap: Callable[..., Any]) -> NDArray[np.float32]:
    neighbours = min(NEIGHBOURS, len(directions) - 1)
    mapper = umap(n_neighbors=neighbours, min_dist=0.05, metric="cosine", random_state=seed, n_jobs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parts of the graph that nothing joins, which are laid out apart
        return np.asarray(mapper.fit_transform(directions), dtype=np.float32)


def umap_class() -> Any:
    """
    Raises:
        ConfigError: the extra `umap` is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of parts of UMAP that want TensorFlow
            from umap import UMAP
    except ImportError:
        raise ConfigError("A map of features needs UMAP. Install it: pip install 'endwise[umap]'") from None
    return UMAP


def _regions(places: NDArray[np.float32]) -> NDArray[np.int64]:
    from sklearn.cluster import HDBSCAN  # pyrefly: ignore[missing-module-attribute]  stubs of an older version

    least = max(REGION_LEAST, round(REGION_SHARE * len(places)))
    settings: dict[str, Any] = {"copy": True}  # which some versions want said
    labels = HDBSCAN(min_cluster_size=least, **settings).fit_predict(places)
    sizes = np.bincount(labels[labels >= 0], minlength=1)
    number = np.empty(len(sizes) + 1, dtype=np.int64)
    number[np.argsort(-sizes, kind="stable")] = np.arange(1, len(sizes) + 1)
    number[-1] = 0  # where the label −1 leads
    return number[labels]


def map_columns(of: FeatureMap) -> Mapping[str, NDArray[Any]]:
    """One row a feature."""
    columns: dict[str, NDArray[Any]] = {
        "run": np.array([run.folder for run in of.runs], dtype=object)[of.run],
        "kind": np.array([run.method.label for run in of.runs], dtype=object)[of.run],
        "feature": of.features,
        "x": of.places[:, 0],
        "y": of.places[:, 1],
        "region": of.region,
        "density": of.density,
        "importance": of.importance,
    }
    if of.tokens is not None:
        columns["tokens"] = np.array([" ".join(tokens) for tokens in of.tokens], dtype=object)
    return columns


def region_rows(of: FeatureMap) -> list[dict[str, Any]]:
    """One row a region, and one (0) for what is in none: how many features of each run, which share of the run's."""
    totals = np.bincount(of.run, minlength=len(of.runs))
    rows = []
    for region in [*range(1, of.regions + 1), 0]:
        inside = of.region == region
        row: dict[str, Any] = {"region": region, "features": int(inside.sum())}
        for number, name in enumerate(run_names(of.runs)):
            count = int((inside & (of.run == number)).sum())
            row |= {f"{name}.features": count, f"{name}.share_of_region": count / max(1, inside.sum())}
            row[f"{name}.share_of_run"] = count / max(1, totals[number])
        row["density.median"] = float(np.median(of.density[inside])) if inside.any() else None
        rows.append(row | ({} if of.tokens is None else {"tokens": " ".join(_typical(of, inside))}))
    return rows


def run_names(runs: Sequence[RunSummary]) -> list[str]:
    """Name the runs of a map apart: their method, and the knob and the seed where there are several."""
    methods = [run.method for run in runs]
    return [run.method.label if methods.count(run.method) == 1 else run.title for run in runs]


def _typical(of: FeatureMap, inside: NDArray[np.bool_], count: int = 6) -> list[str]:
    """The tokens that more of a region's features have among their top ones than features of the whole map do."""
    assert of.tokens is not None
    everywhere = Counter(token for tokens in of.tokens for token in set(tokens))
    here = Counter(token for index in np.flatnonzero(inside) for token in set(of.tokens[index]))
    share = inside.mean()
    return sorted(here, key=lambda token: (share * everywhere[token] - here[token], token))[:count]


def feature_maps(found: Sequence[Geometry], say: Say | None = None) -> dict[int, FeatureMap]:
    """Lay out every set that has enough alive features, by its place; with top tokens where the model can be loaded.

    Raises:
        ConfigError: the extra `umap` is not installed, or no set has enough.
    """
    umap_class()
    made = {}
    for place, one in enumerate(found):
        runs = mapped_runs(one)
        if sum(run.alive for run in runs) >= LEAST:
            if say is not None:
                say(f"a map of {', '.join(run.folder for run in runs)}")
            made[place] = feature_map(one, runs, tokens=model_tokens(runs[0]))
    if not made:
        raise ConfigError(f"A map takes {LEAST} alive features or more; no comparable runs have that many.")
    return made


def model_tokens(run: RunSummary) -> Tokens | None:
    """Return what names top tokens, if the run's model can be loaded and its site is in the residual stream."""
    try:
        model = model_of({Path(run.folder): RunFolder.open(Path(run.folder)).config()})
    except ModelError:
        return None
    if model.width(Place.parse(run.site).writes) != model.d_model:
        return None
    return partial(top_tokens, model)


TOKENS = 6


def top_tokens(model: LanguageModel, directions: Directions, count: int = TOKENS) -> list[tuple[str, ...]]:
    """Find the tokens with the greatest effect on each direction's logits (`token_effects`), the greatest first.

    Spaces are written as `␣`, which could not be seen; without a tokenizer the tokens' numbers.

    Args:
        directions: in the residual stream, `[n d_model]`.
    """
    if not len(directions):
        return []
    boosted = token_effects(model, directions, count).boosted
    visible = str.maketrans({" ": "␣", "\n": "⏎"})
    return [tuple(written(model, token).translate(visible) for token in row) for row in boosted.tolist()]
