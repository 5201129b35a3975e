"""A harvest that no model made: every feature fires at one word, so that what explains it is known."""

import json

import numpy as np
import pyarrow as pa
import yaml
from pyarrow import parquet

from endwise.features.harvest.results import CONTEXT_SCHEMA, FEATURE_SCHEMA, HARVEST_FORMAT, TOP, VOCABULARY_SCHEMA
from endwise.formats.saelens import WEIGHTS_FILE
from endwise.runs.folder import RunFolder

LENGTH, QUANTILES, PER_GROUP = 12, 4, 10
FILLERS = 40
WORDS = [f" word{number}x" for number in range(64)]
"""Feature f fires where word f stands, and nowhere else."""


def make_harvest(run, features=12, *, per_group=PER_GROUP, few=(), dead=(), importance=True, seed=0):
    """Writes `run/harvest`; contexts of a feature lie in sequences of their own.

    Args:
        few: features of which only two contexts are kept.
        dead: features that never fired.
    """
    random = np.random.default_rng(seed)
    rows, sequence = [], 0
    for feature in range(features):
        if feature in dead:
            continue
        left = 2 if feature in few else None
        for group in (TOP, *range(QUANTILES)):
            for rank in range(per_group):
                if left == 0:
                    break
                left = None if left is None else left - 1
                tokens = (len(WORDS) + random.integers(FILLERS, size=LENGTH)).tolist()
                peak = int(random.integers(LENGTH))
                tokens[peak] = feature
                strength = 8.0 if group == TOP else 1.0 + group
                activations = [0.0] * LENGTH
                activations[peak] = strength
                rows.append((feature, group, rank, sequence, 50 + peak, strength, 50, tokens, activations))
                sequence += 1
    (run / "sae").mkdir(parents=True)
    (run / "sae" / WEIGHTS_FILE).write_bytes(b"")
    folder = run / "harvest"
    folder.mkdir()
    columns = dict(zip(CONTEXT_SCHEMA.names, zip(*rows, strict=True), strict=True))
    table = pa.table({name: list(values) for name, values in columns.items()}, CONTEXT_SCHEMA)
    parquet.write_table(table, folder / "contexts.parquet", row_group_size=64)
    parquet.write_table(_features(features, dead, importance), folder / "features.parquet")
    texts = [*WORDS, *(f" filler{number}" for number in range(FILLERS))]
    vocabulary = {"token": list(range(len(texts))), "text": texts}
    parquet.write_table(pa.table(vocabulary, VOCABULARY_SCHEMA), folder / "vocabulary.parquet")
    about = {"format": HARVEST_FORMAT, "model": "made", "site": "blocks.0.hook_resid_pre", "kind": "local"}
    about |= {
        "d_sae": features,
        "tokens": 10_000,
        "context": 128,
        "corpus": {},
        "weights": RunFolder(run).weights_digest(),
        "settings": {},
    }
    (folder / "harvest.json").write_text(json.dumps(about))
    return run


def make_run(run, features=12, **options):
    """A folder that passes for a run, with a harvest."""
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump({"site": "blocks.0.hook_resid_pre"}))
    return make_harvest(run, features, **options)


def _features(count, dead, importance):
    rows = []
    for feature in range(count):
        fired = 0 if feature in dead else 100
        row = {"feature": feature, "firings": fired, "density": fired / 10_000}
        row |= {"mean_active": 2.0, "max_active": 8.0, "histogram": [fired], "histogram_edges": [0.0, 8.0]}
        row |= {name: [] for name in ("boosted", "suppressed", "co_firing")}
        row |= {name: [] for name in ("boosted_logits", "suppressed_logits", "co_firing_jaccard")}
        row |= {"ce_second": float(feature) if importance else None, "ce": None}
        rows.append(row)
    return pa.Table.from_pylist(rows, FEATURE_SCHEMA)
