"""Explained runs that no model explained, whose scores are known."""

import numpy as np

from endwise.analysis.comparable import Setting
from endwise.analysis.interpretability.study import (
    ExplainedRun,
    Interpretability,
)
from endwise.features.explanations import Explanation, Explanations, Score
from made_runs import make_run


def explained(kind, detection, shuffled, ce_increase=0.3, features=40, seed=0):
    """A run whose features' scores lie evenly 0.1 around the two means."""
    around = np.linspace(-0.1, 0.1, features)

    def row(feature):
        own, other = detection + around[feature], shuffled + around[-1 - feature]
        scores = {"detection": Score(float(own), 20, 0), "detection.shuffled": Score(float(other), 20, 0)}
        return Explanation(feature, f"<b>{kind}</b> {feature}", "m", "m", scores)

    summary = make_run(kind, 1, ce_increase, 30, seed=seed)
    return ExplainedRun(summary, Explanations(tuple(map(row, range(features))), {"settings": {"model": "m"}}))


def study(seeds=(0,), jitter=0.0, **means):
    """Make a study in which e2e+ds's explanations predict more by `jitter` from seed to seed."""
    runs = tuple(
        explained(kind, detection + jitter * seed * (kind == "e2e_ds"), shuffled, seed=seed)
        for kind, (detection, shuffled) in means.items()
        for seed in seeds
    )
    return Interpretability(Setting.of(runs[0].summary), runs)
