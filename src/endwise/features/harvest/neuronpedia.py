"""Harvests in the files that Neuronpedia imports.

    OUT/<model>/<source>/
        model.jsonl, release.jsonl, sourceset.jsonl, source.jsonl       one line each
        features/batch-0.jsonl.gz, batch-1.jsonl.gz, ...                a feature a line
        activations/batch-0.jsonl.gz, batch-1.jsonl.gz, ...             a context a line; of the same features

The folders are documented at docs.neuronpedia.org/api-and-data/exports. What a line holds is a row of a table of
Neuronpedia's database (apps/webapp/prisma/schema.prisma of github.com/hijohnnylin/neuronpedia) and is imported as such
(apps/webapp/app/api/admin/import/route.ts): each line of a file has the same columns, one that it does not know is
refused in the first four and dropped in the others, and what has a default (the time of creation, for one) may be left
out. Which numbers belong into them is read off SAEDashboard's own export
(sae_dashboard/neuronpedia/neuronpedia_export.py and neuronpedia_converter.py of github.com/jbloomAus/SAEDashboard).
"""

import gzip
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from endwise.common.errors import ConfigError
from endwise.common.files import expanded, write_atomic
from endwise.features.harvest.results import TOP, Context, Harvest, open_harvest
from endwise.models.sites import Part, Place
from endwise.runs.finding import Paths, harvested_runs

CREATOR_VARIABLE = "DEFAULT_CREATOR_ID"
CREATOR_ID = "clkht01d40000jv08hvalcvly"
"""The user to whom Neuronpedia's own exports belong, who is in every instance of it."""
BATCH = 1024
"""Features a file, as in Neuronpedia's exports."""
BARS = 50
_PARTS = {
    Part.RESID_PRE: "res-pre",
    Part.ATTN_Z: "att-z",
    Part.ATTN_OUT: "att",
    Part.RESID_MID: "res-mid",
    Part.MLP_IN: "mlp-in",
    Part.MLP_OUT: "mlp",
    Part.RESID_POST: "res",
}
Row = dict[str, Any]
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,127}")


@dataclass(frozen=True)
class NeuronpediaExport:
    folder: Path
    """`OUT/<model>/<source>`"""
    features: int
    activations: int


def export(
    runs: Paths,
    out: Path,
    *,
    model_id: str | None = None,
    source_set: str | None = None,
    release: str = "endwise",
    creator: str = "endwise",
    creator_id: str | None = None,
) -> list[NeuronpediaExport]:
    """Write runs' harvests as Neuronpedia imports them; files of an earlier export are replaced.

    Args:
        model_id: Neuronpedia's id of the model; None: made from the model's name.
        source_set: None: of the site, the kind and the dictionary's size; the layer comes before it.
        creator_id: the importing server's user; None: `$DEFAULT_CREATOR_ID`, or the one of Neuronpedia's own exports.

    Raises:
        RunFolderError: a run was not harvested, or the folder cannot be written.
        ConfigError: a name is not one that Neuronpedia takes, or two runs have one.
        FormatError: the harvest is damaged.
    """
    planned: dict[Path, tuple[Harvest, _Names]] = {}
    for run in harvested_runs(runs):
        found = open_harvest(run)
        place = Place.parse(str(found.about["site"]))
        parts = "-to-".join(_PARTS[site.part] for site in place.sites)
        names = _Names(
            model=_checked("--model-id", model_id or _slug(str(found.about["model"]))),
            source_set=_checked("--set", source_set or f"{parts}-{_slug(found.about['kind'])}-{found.d_sae}"),
            release=_checked("--release", release),
            creator=creator,
            creator_id=creator_id or os.environ.get(CREATOR_VARIABLE) or CREATOR_ID,
            layer=place.writes.layer,
        )
        folder = expanded(out) / names.model / names.source
        if folder in planned:
            other = planned[folder][0].folder.parent
            raise ConfigError(f"{other} and {run} would both be {folder}. Export each alone, with a --set of its own.")
        planned[folder] = found, names
    return [_write(folder, found, names) for folder, (found, names) in planned.items()]


def _write(folder: Path, found: Harvest, names: "_Names") -> NeuronpediaExport:
    for old in (*folder.glob("features/*.jsonl.gz"), *folder.glob("activations/*.jsonl.gz")):
        old.unlink()
    for name, row in _descriptions(found, names).items():
        write_atomic(folder / f"{name}.jsonl", _lines([row]))
    written = 0
    for number, start in enumerate(range(0, found.d_sae, BATCH)):
        features = range(start, min(start + BATCH, found.d_sae))
        written += _write_batch(folder, number, found, names, features)
    return NeuronpediaExport(folder, found.d_sae, written)


@dataclass(frozen=True)
class _Names:
    model: str
    source_set: str
    release: str
    creator: str
    creator_id: str
    layer: int

    @property
    def source(self) -> str:
        return f"{self.layer}-{self.source_set}"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9-]+", "-", name.rstrip("/").rpartition("/")[2].lower()).strip("-") or "model"


def _checked(option: str, name: str) -> str:
    if _NAME.fullmatch(name) is None:
        raise ConfigError(
            f"{option} must be lower-case letters, digits, - and _, at most 128, as in Neuronpedia's addresses; given "
            f"{name!r:.140}. Change it."
        )
    return name


def _descriptions(found: Harvest, names: _Names) -> dict[str, Row]:
    about = found.about
    creator = {"creatorName": names.creator, "creatorId": names.creator_id}
    model = {"id": names.model, "displayNameShort": names.model, "displayName": names.model}
    # Of the model's own layers and neurons nothing is exported.
    model |= {"creatorId": names.creator_id, "instruct": False, "layers": 0, "neuronsPerLayer": 0, "owner": ""}
    release = {"name": names.release, "description": names.release, **creator, "urls": []}
    described = f"{about['kind']} SAE at {about['site']}, {found.d_sae} features"
    source_set = {"modelId": names.model, "name": names.source_set, "description": described, **creator}
    source_set |= {"releaseName": names.release, "urls": []}
    source = {
        "id": names.source,
        "modelId": names.model,
        "setName": names.source_set,
        "creatorId": names.creator_id,
        "num_prompts": about["sequences"],
        "num_tokens_in_prompt": about["context"],
        "dataset": str(about["corpus"]["source"]),
        "notes": described,
        "hasDashboards": True,
    }
    rows = {"model": model, "release": release, "sourceset": source_set, "source": source}
    return {name: {**row, "visibility": "PUBLIC"} for name, row in rows.items()}


def _write_batch(folder: Path, number: int, found: Harvest, names: _Names, features: range) -> int:
    """One file of features and one of their activations; how many of these."""
    words = found.vocabulary
    table = found.features.slice(features.start, len(features)).to_pylist()
    neurons = [_neuron(row, words, names) for row in table]
    contexts = [each for _, some in found.all_contexts(features) for each in _activations(some, found, names)]
    for name, rows in (("features", neurons), ("activations", contexts)):
        if rows:
            packed = gzip.compress(_lines(rows), compresslevel=5, mtime=0)
            write_atomic(folder / name / f"batch-{number}.jsonl.gz", packed)
    return len(contexts)


def _neuron(row: Row, words: Sequence[str], names: _Names) -> Row:
    counts = np.array(row["histogram"], np.int64)
    values, heights = bars(np.array(row["histogram_edges"]), counts, row["max_active"] or 0.0)
    return {
        "modelId": names.model,
        "layer": names.source,
        "index": str(row["feature"]),
        "creatorId": names.creator_id,
        "sourceSetName": names.source_set,
        "maxActApprox": _short(row["max_active"] or 0.0),
        "frac_nonzero": row["density"],
        "freq_hist_data_bar_values": _shorts(values),  # the middles of the bars
        "freq_hist_data_bar_heights": _shorts(heights),
        "pos_str": _written(row["boosted"], words),
        "pos_values": _shorts(row["boosted_logits"]),
        "neg_str": _written(row["suppressed"], words),
        "neg_values": _shorts(row["suppressed_logits"]),
    }


def bars(
    edges: NDArray[np.floating], counts: NDArray[np.integer], greatest: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A histogram over bars of one width from 0 to the greatest value, as Neuronpedia draws it: their middles, heights.

    Within a bin of ours, values are taken to be spread evenly up to its upper edge, or to the greatest value.
    """
    if not len(counts):
        return np.zeros(0), np.zeros(0)
    edges = np.minimum(edges.astype(np.float64), greatest)
    edges[-1] = greatest
    limits = np.linspace(0, greatest, BARS + 1)
    below = np.interp(limits, edges, np.concatenate([[0], np.cumsum(counts)]))
    below[0], below[-1] = 0, counts.sum()
    return (limits[1:] + limits[:-1]) / 2, np.diff(below)


def _activations(contexts: Sequence[Context], found: Harvest, names: _Names) -> Iterable[Row]:
    """Neuronpedia marks the contexts of the greatest activations by −1 in `binMin` and `binContains`; for others these
    are the least of the interval that they were drawn from, and the share of all activations that it holds.
    """
    groups = {context.group for context in contexts if context.group != TOP}
    spans = {group: [c.activation for c in contexts if c.group == group] for group in groups}
    share = 1 / max(1, found.about["settings"]["kept"]["groups"])
    for context in contexts:
        peak = max(context.activations)
        low, high = (-1.0, peak) if context.group == TOP else (min(spans[context.group]), max(spans[context.group]))
        yield {
            "id": f"{names.model}-{names.source}-{context.feature}-{context.group + 1}-{context.rank}",
            "modelId": names.model,
            "layer": names.source,
            "index": str(context.feature),
            "creatorId": names.creator_id,
            "tokens": _without_nul(found.written(context.tokens)),
            "values": _shorts(context.activations),
            "maxValue": _short(peak),
            "maxValueTokenIndex": context.activations.index(peak),
            "minValue": _short(min(context.activations)),
            "dataIndex": f"{context.sequence}:{context.start}",
            "dataSource": str(found.about["corpus"]["source"]),
            "binMin": _short(low),
            "binMax": _short(high),
            "binContains": -1.0 if context.group == TOP else share,
            "qualifyingTokenIndex": context.peak,  # which may be another than the greatest value's
        }


def _written(tokens: Iterable[int], words: Sequence[str]) -> list[str]:
    return _without_nul(words[token] for token in tokens)


def _without_nul(texts: Iterable[str]) -> list[str]:
    """Remove NUL, which its database does not accept."""
    return [text.replace("\0", " ") for text in texts]


def _short(number: float) -> float:
    """Six significant digits; float32 has seven."""
    return float(f"{number:.6g}")


def _shorts(numbers: Iterable[float]) -> list[float]:
    return [_short(number) for number in numbers]


def _lines(rows: Iterable[Row]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=True, allow_nan=False).encode() + b"\n" for row in rows)
