"""Every architecture, objective and place together: a pairwise covering set of short runs, each measured."""

import math

import pytest
import torch

import endwise
from endwise.config.dictionary import ARCHITECTURES
from endwise.config.objective import KINDS

PLACES = {
    "residual stream": {"site": "blocks.1.hook_resid_pre"},
    "heads": {"site": "blocks.2.attn.hook_z"},
    "between": {"site": "blocks.1.hook_resid_mid"},
    "MLP": {"site": "blocks.2.mlp_in", "writes": "blocks.2.hook_mlp_out"},
}
NEEDED = {"k": 4}
"""Values for keys that an architecture may ask for."""


def shipped():
    """Names of the architectures that the package has, without other words for them."""
    names = [name for name in ARCHITECTURES.names() if ARCHITECTURES[name].architecture == name]
    return [name for name in names if ARCHITECTURES[name].__module__.startswith("endwise.")]


def covering(names):
    """Rows of (architecture, objective, place) that hold every pair of two of them."""
    return [
        (name, KINDS[(i + j) % len(KINDS)], place) for i, name in enumerate(names) for j, place in enumerate(PLACES)
    ]


def config(name, kind, place, out):
    section = ARCHITECTURES[name].Config
    objective = {"kind": kind, **({"downstream_mse": 1.0} if kind == "e2e_ds" else {})}
    own = {key: value for key, value in NEEDED.items() if key in section.model_fields}
    return endwise.RunConfig.build(
        {
            **PLACES[place],
            "dictionary": {"architecture": name, "size": 24, **own},
            "objective": objective | ({"sparsity": {"coefficient": 0.1}} if section.penalised else {}),
            "data": {"context": 16},
            "training": {"tokens": 64, "batch": 2, "learning_rate": 1e-3, "log_every": 1},
            "evaluation": {"tokens": 64, "during_training_tokens": 16, "bootstrap": 5},
            "out": str(out / f"{kind} {place}"),
        }
    )


@pytest.fixture(scope="module")
def model():
    return endwise.load_model("embedded")


def test_the_rows_hold_every_pair():
    rows = covering(shipped())
    assert {(name, place) for name, _, place in rows} == {(name, place) for name in shipped() for place in PLACES}
    assert {(name, kind) for name, kind, _ in rows} == {(name, kind) for name in shipped() for kind in KINDS}
    if len(shipped()) >= len(KINDS):
        assert {(kind, place) for _, kind, place in rows} == {(kind, place) for kind in KINDS for place in PLACES}


@pytest.mark.parametrize("name", shipped())
def test_an_architecture_with_every_objective_at_every_place(model, tmp_path, name):
    configs = [config(*row, tmp_path) for row in covering(shipped()) if row[0] == name]
    runs = endwise.train_together(configs, model=model, display=False)
    measured = endwise.evaluate([run.folder for run in runs], model=model)
    for run, given in zip(runs, configs, strict=True):
        found, sae = measured[run.folder], endwise.SAE.load(run.folder)
        assert found.place == model.place(given.place)
        assert all(math.isfinite(found[metric]) for metric in ("l0", "kl", "ce_increase", "explained_variance.pooled"))
        assert 0 < found["l0"] <= 24 and found["kl"] >= 0
        x = torch.randn(9, sae.d_in, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(sae(x), run.sae.eval()(x), rtol=1e-4, atol=1e-4)
