"""Harvests that were never made: each feature fires at one token of the embedded text, so that what shows is known."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet
from torch.nn.functional import normalize

from endwise.embedded import heldout_tokens
from endwise.features.explanations import Explanation, Score, write_explanations
from endwise.features.harvest.results import (
    CONTEXT_SCHEMA,
    FEATURE_SCHEMA,
    HARVEST_FOLDER,
    HARVEST_FORMAT,
    TOP,
    VOCABULARY_SCHEMA,
    read_harvest,
)
from endwise.features.patterns.files import COUNTS, SCORE_SCHEMA, SCORES, Patterns, write_patterns
from endwise.features.patterns.trie import Pattern
from endwise.runs.folder import RunFolder
from made_dictionaries import write_run

LENGTH, BEFORE = 24, 14
"""Tokens of a context, and how many of them come before the one at which the feature fires."""
GROUPS = ((TOP, 10), (0, 3), (1, 3), (2, 3), (3, 3))
TOKENS = 400_000
BINS, EFFECTS = 24, 10


def write_harvested_run(
    folder: Path, d_sae=200, *, kind="e2e", seed=0, width=16, measured=True, texts=None, groups=GROUPS, **run
) -> Path:
    """A run folder with a harvest; about one feature in nine is dead.

    Args:
        texts: how some tokens are written, instead of as the embedded model's tokenizer does.
        groups: of contexts, each with how many a feature has.
        run: for `made_dictionaries.write_run`.
    """
    shared = normalize(torch.randn(d_sae, width, generator=torch.Generator().manual_seed(0)), dim=1)
    own = normalize(torch.randn(d_sae, width, generator=torch.Generator().manual_seed(seed + 1)), dim=1)
    firings = made_firings(d_sae, seed)
    write_run(folder, normalize(shared + 0.4 * own, dim=1), kind=kind, seed=seed, firings=firings, **run)
    write_harvest(folder, firings, seed=seed, measured=measured, texts=texts, groups=groups)
    return folder


def made_firings(d_sae, seed=0):
    random = np.random.default_rng(seed)
    firings = np.exp(random.normal(5.5, 1.7, d_sae)).clip(1, TOKENS / 3).astype(np.int64)
    firings[random.random(d_sae) < 0.11] = 0
    firings[:3] = (1200, 40, 0)  # the first ones are known
    return firings


def vocabulary(texts=None):
    from endwise import load_model

    tokenizer = load_model().tokenizer
    written = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    for token, text in (texts or {}).items():
        written[token] = text
    return written


def fires_at(d_sae, text):
    """The token of each feature: all tokens that the text has often enough, in turn."""
    counts = np.bincount(text[BEFORE : len(text) - LENGTH])
    usual = np.flatnonzero(counts >= 5)
    return usual[np.arange(d_sae) % len(usual)]


def write_harvest(run: Path, firings, *, seed=0, measured=True, texts=None, groups=GROUPS) -> None:
    random = np.random.default_rng(seed)
    text = np.asarray(heldout_tokens()[:TOKENS]).astype(np.int64)
    folder = run / HARVEST_FOLDER
    folder.mkdir()
    written = vocabulary(texts)
    table = pa.table({"token": range(len(written)), "text": written}, schema=VOCABULARY_SCHEMA)
    parquet.write_table(table, folder / "vocabulary.parquet")
    tokens = fires_at(len(firings), text)
    scales = np.exp(random.normal(0.5, 0.6, len(firings)))
    parquet.write_table(_features(firings, scales, tokens, len(written), random, measured), folder / "features.parquet")
    contexts = _contexts(firings, scales, tokens, text, random, groups)
    parquet.write_table(contexts, folder / "contexts.parquet", row_group_size=4096)
    about = {"format": HARVEST_FORMAT, "model": "embedded", "site": "blocks.1.hook_resid_pre", "kind": "e2e"}
    about |= {"d_sae": len(firings), "tokens": TOKENS, "context": 128, "corpus": {}, "settings": {}}
    (folder / "harvest.json").write_text(json.dumps(about | {"weights": RunFolder(run).weights_digest()}))


def _lists(rows, kind):
    """Rows of one length."""
    offsets = np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(rows.ravel(), type=kind))


def _features(firings, scales, tokens, vocabulary_size, random, measured):
    d_sae, alive = len(firings), firings > 0
    importance = np.where(alive, firings / TOKENS * scales * 1e-2 * random.normal(1, 0.6, d_sae), 0.0)
    edges = np.linspace(0, 1, BINS + 1)[None] * scales[:, None]
    middles = np.arange(BINS) + 0.5
    shape = middles * np.exp(-middles / random.uniform(1.5, 5, (d_sae, 1)))
    histogram = np.round(shape / shape.sum(1, keepdims=True) * firings[:, None])
    boosted = random.integers(0, vocabulary_size, (d_sae, EFFECTS))
    boosted[:, 0] = (tokens + 1) % vocabulary_size
    logits = -np.sort(-random.gamma(2, 0.3, (d_sae, EFFECTS)), axis=1)
    co_firing = random.integers(0, d_sae, (d_sae, 5))
    columns = {
        "feature": np.arange(d_sae),
        "firings": firings,
        "density": firings / TOKENS,
        "mean_active": pa.array(scales * 0.3, mask=~alive, type=pa.float32()),
        "max_active": pa.array(np.where(alive, scales, 0), type=pa.float32()),
        "histogram": _lists(histogram, pa.int64()),
        "histogram_edges": _lists(edges, pa.float32()),
        "boosted": _lists(boosted, pa.int32()),
        "boosted_logits": _lists(logits, pa.float32()),
        "suppressed": _lists(random.integers(0, vocabulary_size, (d_sae, EFFECTS)), pa.int32()),
        "suppressed_logits": _lists(-logits, pa.float32()),
        "co_firing": _lists(co_firing, pa.int32()),
        "co_firing_jaccard": _lists(-np.sort(-random.random((d_sae, 5)) * 0.4, axis=1), pa.float32()),
        "ce_second": pa.array(importance, mask=np.full(d_sae, not measured)),
        "ce": pa.array(importance * 0.7, mask=np.full(d_sae, not measured)),
    }
    return pa.table(columns).cast(FEATURE_SCHEMA)


def _contexts(firings, scales, tokens, text, random, groups):
    inside = text[BEFORE : len(text) - LENGTH]
    order = np.argsort(inside, kind="stable")
    strengths = _strengths(groups)
    groups = [(group, rank) for group, count in groups for rank in range(count)]
    of = np.repeat(np.flatnonzero(firings), len(groups))
    each = int((firings > 0).sum())
    first, last = (np.searchsorted(inside[order], tokens[of], side=side) for side in ("left", "right"))
    positions = BEFORE + order[first + (random.random(len(of)) * (last - first)).astype(np.int64)]
    windows = text[positions[:, None] + np.arange(LENGTH) - BEFORE]
    strength = np.tile(strengths, each) * scales[of]
    activations = np.where(
        windows == tokens[of][:, None], strength[:, None] * random.uniform(0.2, 0.99, windows.shape), 0
    )
    faint = random.random(windows.shape) < 0.04
    activations = np.where(
        faint & (activations == 0), 0.2 * strength[:, None] * random.random(windows.shape), activations
    )
    activations[:, BEFORE] = strength
    columns = {
        "feature": of,
        "group": np.tile([group for group, _ in groups], each),
        "rank": np.tile([rank for _, rank in groups], each),
        "sequence": positions // 128,
        "position": positions % 128,
        "activation": strength,
        "start": positions % 128 - BEFORE,
        "tokens": _lists(windows, pa.int32()),
        "activations": _lists(activations, pa.float32()),
    }
    return pa.table(columns).cast(CONTEXT_SCHEMA)


def _strengths(groups):
    """Strengths: 1 for the greatest context, then a little less; for the quantiles less and less."""
    falling = {TOP: 1.0, 3: 0.7, 2: 0.5, 1: 0.3, 0: 0.12}
    return np.array([falling[group] * 0.97**rank for group, count in groups for rank in range(count)])


def write_said(run, told) -> None:
    """Explanations as `endwise explain` writes them.

    Args:
        told: by feature, a text and its scores by detection and by fuzzing, either None where it was not scored.
    """
    rows = []
    for feature, (text, *scores) in told.items():
        named = zip(("detection", "fuzzing"), scores, strict=True)
        scored = {name: Score(value, 20, 0) for name, value in named if value is not None}
        rows.append(Explanation(feature, text, "m", "m", scored))
    write_explanations(run, rows, {})


def write_predicted(run, of) -> None:
    """Patterns as `endwise patterns` writes them, with an F1 of 0.8, a precision of 0.9 and a recall of 0.7.

    Args:
        of: by feature, the places of one pattern: tokens that serve, or None.
    """
    d_sae = read_harvest(run).d_sae
    patterns = [Pattern(feature, tuple(places), 1.25, 7) for feature, places in of.items()]
    values = {"f1": 0.8, "precision": 0.9, "recall": 0.7, "correlation": 0.6}
    columns = {name: [values.get(name, 0) if feature in of else None for feature in range(d_sae)] for name in SCORES}
    columns |= {name: [0] * d_sae for name in COUNTS} | {"feature": list(range(d_sae)), "control": [""] * d_sae}
    scores = pa.table({name: columns[name] for name in SCORE_SCHEMA.names}, schema=SCORE_SCHEMA)
    about = {"d_sae": d_sae, "settings": {"weights": RunFolder(run).weights_digest()}}
    write_patterns(run, Patterns.of(patterns, [""] * len(patterns), scores, about))
