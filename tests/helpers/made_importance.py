"""Measured importances that were never measured, so that what follows from them is known."""

import numpy as np

from endwise.analysis.comparable import Setting
from endwise.analysis.importance.study import ImportanceStudy, ImportantRun
from endwise.features.importance_table import Ablations, Faithfulness, FeatureImportance, MeasuredImportance
from made_runs import make_run

BLOCKS, FEATURES, SEQUENCES, SAMPLE = 20, 64, 30, 24


def made_importance(spread, seed=0):
    """Importances that fall off by rank as exp(−rank / spread), the last four of features that never fire."""
    random = np.random.default_rng(seed)
    ce = np.exp(-np.arange(FEATURES) / spread) * np.where(np.arange(FEATURES) % 3 == 2, -1, 1) * 0.01
    ce[-4:] = 0
    firings = np.where(ce == 0, 0, 100 + np.arange(FEATURES))
    blocks = ce * 10 * (1 + 0.2 * random.standard_normal((BLOCKS, 1)))
    nothing = np.full(FEATURES, np.nan)
    return FeatureImportance(
        ce=ce,
        ce_second=ce,
        ce_se=np.abs(ce) / 10,
        ce_absolute=np.abs(ce),
        kl=nothing,
        kl_se=nothing,
        kl_absolute=nothing,
        firings=firings,
        mean_active=np.where(firings > 0, 1.0, np.nan),
        ce_blocks=blocks,
        squares_blocks=np.zeros_like(blocks),
        predictions_blocks=np.full(BLOCKS, 10.0),
        kl_blocks=np.zeros((0, FEATURES)),
        tokens_blocks=np.full(BLOCKS, 11.0),
        tokens=4000,
    )


def made_measured(spread, seed=0):
    random, found = np.random.default_rng(seed), made_importance(spread, seed)
    kept = np.array([0, 1, 2, 4, 8, 16, 32, 60])
    noise = 1 + 0.05 * random.standard_normal(SEQUENCES)
    carried = 0.9 * (1 - np.exp(-kept / spread)) / (1 - np.exp(-60 / spread))
    clean, base = 3 * 10 * noise, 8 * 10 * noise
    ce = base - carried[:, None] * (base - clean)
    features = np.arange(SAMPLE)
    nothing = np.full(SAMPLE, np.nan)
    ablations = Ablations(
        features=features,
        by_rank=features < 12,
        ce=found.ce[:SAMPLE] * (1 + 0.3 * random.standard_normal(SAMPLE)),
        ce_se=found.ce_se[:SAMPLE],
        kl=found.ce[:SAMPLE],
        kl_se=found.ce_se[:SAMPLE],
        sequences=np.full(SAMPLE, 12),
        estimated_ce=found.ce[:SAMPLE],
        estimated_kl=nothing,
        second_ce=found.ce[:SAMPLE],
        second_kl=nothing,
    )
    random_ce = base - (carried / 2)[:, None] * (base - clean)
    curve = Faithfulness(kept, ce, ce, random_ce, clean, base, np.full(SEQUENCES, 10.0))
    return MeasuredImportance(found, ablations, curve, {"tokens": 4096, "heldout": "text"})


def made_study(kinds, seeds=(0,)):
    """`kinds`: the spread of each kind's importances."""
    runs = [
        ImportantRun(make_run(kind, 1, 0.3, 20, seed=seed), made_measured(spread * (1 + 0.02 * seed), seed))
        for kind, spread in kinds.items()
        for seed in seeds
    ]
    return ImportanceStudy(Setting.of(runs[0].summary), tuple(runs))
