"""Measured runs that were never made, so that what follows from them is known."""

from dataclasses import replace

import numpy as np
from safetensors.numpy import save_file

from endwise import Site
from endwise.common.files import write_json
from endwise.common.statistics import Interval
from endwise.config.method import PRESET_METHODS, Knob, Method
from endwise.config.run import RunConfig
from endwise.evaluation.measure import Baselines, Evaluation
from endwise.evaluation.summary import RunSummary
from small_gpt2 import SITE

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


def evaluation(number):
    names = ("l0", "kl", "ce_increase", "explained_variance.per_token", "downstream_mse.blocks.2.hook_resid_pre")
    metrics = {name: Interval(n + number / 7, n + number / 5, n + number / 6) for n, name in enumerate(names)}
    firings = np.ones(1234 + number, np.int64)
    return Evaluation(
        Site.parse(SITE), 12345, firings, 20_000, metrics, Baselines(3.4, 5.2, 6.1), {"tokens": np.ones(4)}
    )


LINE = {"loss": 0.71234, "kl": 0.25, "sparsity": 1.5, "l0": 12.3, "alive": 1234}


def measured(folder, kind, coefficient, l0, **changes):
    """A run folder that reads as a measured run's."""
    objective = {"kind": kind, "sparsity": {"coefficient": coefficient, "p": changes.pop("p", 1.0)}}
    values = {
        "site": "blocks.3.hook_resid_pre",
        "dictionary": {"ratio": 2},
        "objective": objective | changes.pop("weights", {}),
        "training": {"tokens": 1000, **changes.pop("training", {})},
        **changes,
    }
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(RunConfig.build(values).to_yaml())
    numbers = {
        "l0": float(l0),
        "alive": 9,
        "alive_tokens": 100,
        "d_sae": 256,
        "ce_increase": 0.1 * coefficient,
        "kl": 0.1,
    }
    nested = {"explained_variance": {"per_token": 0.5}, "downstream_mse": {}, "intervals": {}, "baselines": {}}
    write_json(folder / "evaluation.json", {**numbers, **nested})
    save_file({"tokens": np.ones(4)}, folder / "evaluation_sums.safetensors")
    (folder / "timings.jsonl").write_text('{"step": 1, "seconds": 1.0}\n')
    return folder
