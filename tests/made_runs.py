"""Measured runs that were never made, so that what follows from them is known."""

from dataclasses import replace

import numpy as np

from endwise.config.method import PRESET_METHODS, Knob, Method
from endwise.evaluation.summary import RunSummary

SITES = ("blocks.4.hook_resid_pre", "blocks.5.hook_resid_pre", "blocks.5.hook_resid_post")
DOWNSTREAM = {"local": 1.0, "e2e": 6.0, "e2e_ds": 1.5}
SEQUENCES, TOKENS = 60, 100


def make_run(kind, coefficient, ce_increase, l0, alive=None, *, seed=0, noise=0.2, data_seed=0):
    """A run whose per-sequence sums average exactly to the given values; noise is shared across runs (the text's)."""
    random = np.random.default_rng(data_seed)
    shared = random.normal(0, noise, SEQUENCES)
    wobble = 1 + shared - shared.mean()
    mse = {site: DOWNSTREAM.get(kind, 4.0) * (1 + i) for i, site in enumerate(SITES)}
    counts = np.full(SEQUENCES, float(TOKENS))
    sums = {"tokens": counts, "predictions": counts - 1, "l0": l0 * wobble * counts}
    sums["ce_increase"] = ce_increase * wobble * (counts - 1)
    sums["kl"] = 0.9 * ce_increase * wobble * counts
    sums |= {f"downstream_mse.{site}": value * wobble * counts for site, value in mse.items()}
    return RunSummary(
        method=PRESET_METHODS.get(kind) or Method(kind, kind, {"name": kind}),
        site="blocks.3.hook_resid_pre",
        knob=Knob(float(coefficient)),
        seed=seed,
        l0=float(l0),
        alive=alive or round(10 * l0),
        alive_tokens=SEQUENCES * TOKENS,
        d_sae=1536,
        ce_increase=ce_increase,
        kl=ce_increase * 0.9,
        explained_variance=0.7,
        downstream_mse=mse,
        tokens=600_000,
        seconds=30.0,
        folder=f"runs/{kind}-{coefficient:g}-{seed}",
        intervals={"ce_increase": (ce_increase - 0.01, ce_increase + 0.01)},
        sums=sums,
    )


def with_mse(run, factor):
    """The run with so many times the downstream MSE."""
    mse = {site: factor * value for site, value in run.downstream_mse.items()}
    sums = {name: values * (factor if name.startswith("downstream") else 1) for name, values in run.sums.items()}
    return replace(run, downstream_mse=mse, sums=sums)
