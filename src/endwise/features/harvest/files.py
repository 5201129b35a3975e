"""Path from what was gathered to the files of a harvest (their columns are in `features.harvest`)."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

from endwise.common.files import replacing, write_atomic, write_json
from endwise.common.tables import write_parquet
from endwise.features.harvest.co_firing import co_firing
from endwise.features.harvest.gathering import Gathered, bin_edges
from endwise.features.harvest.results import (
    CONTEXT_SCHEMA,
    FEATURE_SCHEMA,
    HARVEST_FOLDER,
    TOKENIZER_FILE,
    TOP,
    VOCABULARY_SCHEMA,
)
from endwise.features.harvest.slots import EMPTY, Slots
from endwise.features.harvest.top_tokens import token_effects, written
from endwise.features.importance_table import FeatureImportance
from endwise.models.language_model import LanguageModel
from endwise.tokens import Corpus

_BLOCK_CONTEXTS = 4096
"""About as many are in one row group of `contexts.parquet`."""


def write_harvest(
    run: Path,
    gathered: Gathered,
    model: LanguageModel,
    corpus: Corpus,
    measured: FeatureImportance | None,
    about: Mapping[str, Any],
) -> None:
    """The files of a run's harvest, `harvest.json` the last; an older one is gone before the first changes.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    folder = run / HARVEST_FOLDER
    (folder / "harvest.json").unlink(missing_ok=True)
    write_parquet(feature_table(gathered, model, measured), folder / "features.parquet")
    with (
        replacing(folder / "contexts.parquet") as partial,
        parquet.ParquetWriter(partial, CONTEXT_SCHEMA, compression="zstd") as writer,
    ):
        for table in context_tables(gathered, corpus):
            writer.write_table(table)
    words = [written(model, token) for token in range(model.vocab_size)]
    vocabulary = {"token": np.arange(len(words)), "text": words}
    write_parquet(pa.table(vocabulary, schema=VOCABULARY_SCHEMA), folder / "vocabulary.parquet")
    _write_tokenizer(model, folder / TOKENIZER_FILE)
    write_json(folder / "harvest.json", about)


def _write_tokenizer(model: LanguageModel, path: Path) -> None:
    """Write the tokenizer's file; of tokenizers that are code nothing is kept."""
    backend = getattr(model.tokenizer, "backend_tokenizer", None)
    if backend is None:
        path.unlink(missing_ok=True)
    else:
        write_atomic(path, backend.to_str().encode())


def feature_table(gathered: Gathered, model: LanguageModel, measured: FeatureImportance | None) -> pa.Table:
    """`FEATURE_SCHEMA`."""
    kept, d_sae = gathered.kept, gathered.sae.d_sae
    histogram = gathered.histogram.cpu().numpy()
    firings = histogram.sum(1)
    sums = gathered.activation.total().cpu().numpy()
    mean = np.divide(sums, firings, out=np.zeros(d_sae), where=firings > 0).astype(np.float32)
    effects = token_effects(model, gathered.sae.W_dec.detach(), kept.tokens)
    partners = co_firing(gathered.together, d_sae, kept.co_firing)
    counts, edges = _histograms(histogram)
    never = firings == 0
    columns: dict[str, Any] = {
        "feature": np.arange(d_sae),
        "firings": firings,
        "density": firings / max(1, gathered.tokens),
        "mean_active": pa.array(mean, mask=never),
        "max_active": pa.array(gathered.greatest.cpu().numpy(), mask=never),
        "histogram": counts,
        "histogram_edges": edges,
        "boosted": list(effects.boosted),
        "boosted_logits": list(effects.boosted_logits),
        "suppressed": list(effects.suppressed),
        "suppressed_logits": list(effects.suppressed_logits),
        "co_firing": partners.features,
        "co_firing_jaccard": partners.jaccard,
        **_importance(gathered, measured),
    }
    arrays = [
        values if isinstance(values, pa.Array) else pa.array(values, type=field.type)
        for field, values in zip(FEATURE_SCHEMA, columns.values(), strict=True)
    ]
    return pa.table(dict(zip(columns, arrays, strict=True))).cast(FEATURE_SCHEMA)


def _histograms(histogram: NDArray[np.int64]) -> tuple[list[NDArray[np.int64]], list[NDArray[np.float32]]]:
    """Cut histograms from each feature's first bin with a firing to its last."""
    edges = bin_edges().numpy()
    counts_of, edges_of = [], []
    for counts in histogram:
        (filled,) = counts.nonzero()
        first, last = (filled[0], filled[-1] + 1) if len(filled) else (0, 0)
        counts_of.append(counts[first:last])
        edges_of.append(edges[first : last + 1] if len(filled) else edges[:0])
    return counts_of, edges_of


def _importance(gathered: Gathered, measured: FeatureImportance | None) -> dict[str, Any]:
    if measured is not None:
        return {"ce_second": measured.ce_second, "ce": measured.ce}
    if not gathered.attribute:
        nothing = pa.nulls(gathered.sae.d_sae, pa.float64())
        return {"ce_second": nothing, "ce": nothing}
    _, all_predictions, attributed = gathered.counts.tolist()
    predictions = max(1, attributed)
    ce = gathered.ce.total().cpu().numpy() / predictions
    squares = gathered.squares.total().cpu().numpy() / predictions
    fired = gathered.histogram.sum(1).cpu().numpy() > 0
    unknown = fired & (squares == 0) & (attributed < all_predictions)  # it fired in sequences that were left out
    values = {"ce_second": ce + squares / 2, "ce": ce}
    return {name: pa.array(value, pa.float64(), mask=unknown) for name, value in values.items()}


def context_tables(gathered: Gathered, corpus: Corpus) -> Iterator[pa.Table]:
    """`CONTEXT_SCHEMA`, some features at a time, in their order."""
    kept = gathered.kept
    per_feature = max(1, kept.top + kept.groups * kept.per_group)
    size = max(1, _BLOCK_CONTEXTS // per_feature)
    for start in range(0, gathered.sae.d_sae, size):
        features = slice(start, min(start + size, gathered.sae.d_sae))
        chosen = [_ranked_top(gathered.top, features), _ranked_sample(gathered.sample, features, kept.groups)]
        joined = {name: np.concatenate([each[name] for each in chosen]) for name in chosen[0]}
        order = np.lexsort((joined["rank"], joined["group"], joined["feature"]))
        if len(order):
            yield _context_table({name: values[order] for name, values in joined.items()}, corpus, kept.before)


def _filled(slots: Slots, features: slice) -> dict[str, NDArray[Any]]:
    """The firings in the slots of some features, by feature, the greatest activation first, then in text order."""
    part = {name: tensor[features].cpu().numpy() for name, tensor in slots.tensors().items()}
    row, slot = (part["keys"] > EMPTY).nonzero()
    found = {name: values[row, slot] for name, values in part.items()} | {"feature": row + features.start}
    order = np.lexsort((found["positions"], found["sequences"], -found["activations"], row))
    return {name: values[order] for name, values in found.items()}


def _ranked_top(slots: Slots, features: slice) -> dict[str, NDArray[Any]]:
    found = _filled(slots, features)
    rank, _ = _places(found["feature"])
    return found | {"rank": rank, "group": np.full(len(rank), TOP)}


def _ranked_sample(slots: Slots, features: slice, groups: int) -> dict[str, NDArray[Any]]:
    """The sample of each feature, cut into groups of as nearly equal size as can be."""
    found = _filled(slots, features)
    place, size = _places(found["feature"])
    # Ascending place i of n is in group ⌊i·groups / n⌋; from the greatest down, i = n − 1 − place.
    group = (size - 1 - place) * max(1, groups) // np.maximum(size, 1)
    rank, _ = _places(found["feature"] * 128 + group)
    return found | {"rank": rank, "group": group}


def _places(runs: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return each element's place in its run of equal ones, and the run's length."""
    first = np.concatenate([[True], runs[1:] != runs[:-1]]) if len(runs) else np.zeros(0, bool)
    number = np.cumsum(first) - 1
    starts = np.flatnonzero(first)
    lengths = np.diff(np.append(starts, len(runs)))
    return np.arange(len(runs)) - starts[number], lengths[number]


def _context_table(rows: Mapping[str, NDArray[Any]], corpus: Corpus, before: int) -> pa.Table:
    """A context ends at the last position that counts: padding has no place in it. A BOS has, with no activation."""
    numbers, row_of = np.unique(rows["sequences"], return_inverse=True)
    batch = corpus.batch(numbers)
    mask = batch.mask.numpy()
    last = mask.shape[1] - 1 - mask[:, ::-1].argmax(1)
    positions = rows["positions"].astype(np.int64)
    start = np.maximum(0, positions - before)
    end = np.minimum(last[row_of] + 1, positions + rows["windows"].shape[1] - before)
    lengths = end - start
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    context = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(offsets[-1]) - offsets[context] + start[context]
    tokens = batch.tokens.numpy()[row_of[context], place]
    activations = rows["windows"][context, place - positions[context] + before]

    def lists(values: NDArray[Any], kind: pa.DataType) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values.astype(kind.to_pandas_dtype())))

    columns = {
        "feature": rows["feature"],
        "group": rows["group"],
        "rank": rows["rank"],
        "sequence": rows["sequences"],
        "position": positions,
        "activation": rows["activations"],
        "start": start,
        "tokens": lists(tokens, pa.int32()),
        "activations": lists(activations, pa.float32()),
    }
    return pa.table(columns).cast(CONTEXT_SCHEMA)
