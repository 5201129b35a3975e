"""Every architecture, objective, place and option together: a covering set of short runs that holds every pair of two
settings, each run measured.
"""

import itertools
import math

import pytest
import torch

import endwise
from endwise.common.errors import ConfigError
from endwise.config.dictionary import ARCHITECTURES
from endwise.runs.folder import RunFolder
from small_gpt2 import SHIPPED

NEXT_BLOCK = {"downstream_mse": 1.0, "downstream_sites": ["blocks.3.hook_resid_pre"]}
FACTORS = {
    "architecture": SHIPPED,
    "objective": {
        "local": {"kind": "local"},
        "e2e": {"kind": "e2e"},
        "e2e+ds": {"kind": "e2e_ds", "downstream_mse": 1.0},
        "next block": NEXT_BLOCK,
        "all terms": {"kl": 0.5, "local_mse": 0.5, "downstream_mse": 1.0},
    },
    "place": {
        "residual stream": {"site": "blocks.1.hook_resid_pre"},
        "between": {"site": "blocks.1.hook_resid_mid"},
        "after": {"site": "blocks.1.hook_resid_post"},
        "heads": {"site": "blocks.2.attn.hook_z"},
        "attention": {"site": "blocks.2.hook_attn_out"},
        "MLP": {"site": "blocks.2.hook_mlp_out"},
        "transcoder": {"site": "blocks.2.mlp_in", "writes": "blocks.2.hook_mlp_out"},
        "transcoder with skip": {"site": "blocks.2.mlp_in", "writes": "blocks.2.hook_mlp_out"},
    },
    "normalize": ("none", "scalar", "whitening", "layer_norm", "constant_norm_rescale"),
    "dead": {
        "nothing": {},
        "aux": {"aux": 0.1},
        "aux of all signs": {"aux": 0.1, "aux_negative": True, "aux_target": "residual", "aux_k": 3},
        "revive": {"revive": 0.1},
        "revive all": {"revive": 0.1, "revives": "all"},
        "resample": {"resample_at": [0.5]},
    },
    "own": (0, 1, 2, 3),
    "decoder": {
        "unit": {},
        "free": {"decoder_norm": "free", "initialisation": "transposed", "decoder_init_norm": 0.1},
    },
    "accumulation": (1, 2),
    "schedule": {
        "plain": {},
        "microbatch": {"microbatch": 1, "betas": [0.0, 0.99], "decay": 0.5, "schedule": "linear"},
    },
}
"""Factors that are tried together, with the settings of each."""
OWN = {
    "standard": (
        {},
        {"sparsity": {"p": 0.5}},
        {"sparsity": {"p_end": 0.2, "p_changes": 1}},
        {"sparsity": {"warmup": 0.5}},
    ),
    "gated": ({}, {"gate_reconstruction": 0.5}, {"gate_reconstruction": 0.0}, {"sparsity": {"warmup": 0.5}}),
    "topk": ({"k": 4}, {"k": 1}, {"k": 24}, {"k": 4, "k_start": 8}),
    "jumprelu": (
        {},
        {"penalty": "quadratic", "target_l0": 4.0},
        {"penalty": "tanh", "straight_through": "both"},
        {"penalty": "tanh_quadratic", "threshold_init": 1.0},
    ),
    "batchtopk": ({"k": 4}, {"k": 1, "threshold_rate": 0.5}, {"k": 24}, {"k": 4, "k_start": 8, "k_steps": 0.5}),
    "matryoshka_batchtopk": (
        {"k": 4},
        {"k": 4, "groups": [0.3, 0.2]},
        {"k": 4, "random_prefixes": 3},
        {"k": 2, "k_start": 8},
    ),
}
"""Settings of each architecture alone, four of each."""
FITTED_ON = 256
"""Tokens: what is fitted is asked for nothing but numbers."""
TRANSCODERS = ("transcoder", "transcoder with skip")
CHOOSES_AMONG_ALL = (
    ("architecture", "batchtopk"),
    ("architecture", "matryoshka_batchtopk"),
    ("dead", "aux"),
    ("dead", "aux of all signs"),
)
NOT_TOGETHER = [
    *(frozenset({pair, ("accumulation", 2)}) for pair in CHOOSES_AMONG_ALL),
    *(
        frozenset({("place", place), ("normalize", norm)})
        for place in TRANSCODERS
        for norm in ("layer_norm", "constant_norm_rescale")
    ),
    frozenset({("architecture", "jumprelu"), ("own", 3), ("accumulation", 2)}),
]
"""Combinations that a recipe refuses: several passes a step where all tokens are chosen among, or averaged over; and
norms of each token where what is written is not what is read.
"""


def allowed(settings):
    """Return whether no rule forbids settings, of all factors or of some."""
    return not any(rule <= set(settings.items()) for rule in NOT_TOGETHER)


def pairs_of(row):
    """Every two settings of a row, in the order of the factors."""
    return set(itertools.combinations(((name, row[name]) for name in FACTORS if name in row), 2))


def all_pairs():
    """Every two settings of different factors, those that a recipe refuses left out."""
    levels = [[(name, value) for value in FACTORS[name]] for name in FACTORS]
    pairs = (pair for a, b in itertools.combinations(levels, 2) for pair in itertools.product(a, b))
    return [pair for pair in pairs if allowed(dict(pair))]


def covering():
    """Rows with a setting of every factor, in which every pair of settings is: each row begins with the first pair that
    is in none yet, and takes of every other factor the setting that adds most pairs.
    """
    left, rows = dict.fromkeys(all_pairs()), []

    def added(row, name, value):
        """Pairs that a setting adds to those of a row."""
        return sum(((name, value), other) in left or (other, (name, value)) in left for other in row.items())

    while left:
        row = dict(next(iter(left)))
        for name, levels in FACTORS.items():
            if name not in row:
                fitting = [value for value in levels if allowed(row | {name: value})]
                row[name] = max(fitting, key=lambda value: added(row, name, value))
        rows.append(row)
        for pair in pairs_of(row):
            left.pop(pair, None)
    return rows


ROWS = covering()


def merged(*values):
    """One mapping of several, those below one key put together."""
    result = {}
    for each in values:
        for key, value in each.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merged(result[key], value) if both else value
    return result


def config(row, out):
    of = {name: levels[row[name]] if isinstance(levels, dict) else row[name] for name, levels in FACTORS.items()}
    own = dict(OWN[row["architecture"]][row["own"]])
    penalised = ARCHITECTURES[row["architecture"]].Config.penalised
    penalty = {"sparsity": {"coefficient": 0.1, **own.pop("sparsity", {})}} if penalised else {}
    skip = {"skip": True} if row["place"] == "transcoder with skip" else {}
    dictionary = {"architecture": row["architecture"], "size": 24, "normalize": row["normalize"], "dead_window": 32}
    training = {"tokens": 128, "batch": 4, "learning_rate": 1e-3, "log_every": 1, "accumulation": row["accumulation"]}
    return endwise.RunConfig.build(
        {
            **of["place"],
            "dictionary": {**dictionary, **of["dead"], **of["decoder"], **skip, **own},
            "objective": merged(of["objective"], penalty),
            "data": {"context": 16},
            "training": training | of["schedule"],
            "evaluation": {"tokens": 64, "during_training_tokens": 16, "bootstrap": 5},
            "out": str(out),
        }
    )


@pytest.fixture(scope="module")
def model():
    return endwise.load_model("embedded")


def test_the_architectures_are_those_that_ship():
    names = [name for name in ARCHITECTURES.names() if ARCHITECTURES[name].architecture == name]
    shipped = {name for name in names if ARCHITECTURES[name].__module__.startswith("endwise.")}
    assert shipped == set(FACTORS["architecture"]) == OWN.keys()


def test_the_rows_hold_every_pair():
    found = set().union(*map(pairs_of, ROWS))
    levels = {(name, value) for name in FACTORS for value in FACTORS[name]}
    missing = {frozenset(pair) for pair in itertools.combinations(levels, 2) if len(dict(pair)) == 2}
    missing -= {frozenset(pair) for pair in found}
    assert missing == {rule for rule in NOT_TOGETHER if len(rule) == 2}
    assert all(allowed(row) and row.keys() == FACTORS.keys() for row in ROWS)
    assert len(ROWS) < 90


@pytest.mark.parametrize("rule", NOT_TOGETHER, ids=lambda rule: " + ".join(f"{value}" for _, value in sorted(rule)))
def test_what_is_left_out_is_what_a_recipe_refuses(rule):
    plain = {name: next(iter(FACTORS[name])) for name in FACTORS}
    config(plain, "x")
    with pytest.raises(ConfigError):
        config(plain | dict(rule), "x")


@pytest.mark.parametrize("name", FACTORS["architecture"])
@pytest.mark.usefixtures("fitted_on_little")
def test_two_steps_of_every_row(model, tmp_path, name):
    rows = [row for row in ROWS if row["architecture"] == name]
    configs = [config(row, tmp_path / str(number)) for number, row in enumerate(rows)]
    runs = []
    for passes in FACTORS["accumulation"]:
        group = [each for each in configs if each.training.accumulation == passes]
        runs += endwise.train_together(group, model=model, display=False) if group else []
    measured = endwise.evaluate([run.folder for run in runs], model=model)
    recipes = {each.out: each for each in configs}
    for run in runs:
        recipe, found, sae = recipes[run.folder], measured[run.folder], endwise.SAE.load(run.folder)
        assert RunFolder(run.folder).metrics()[-1]["step"] == 2
        assert found.place == model.place(recipe.place)
        assert all(math.isfinite(found[metric]) for metric in ("l0", "kl", "ce_increase", "explained_variance.pooled"))
        assert 0 < found["l0"] <= 24 and found["kl"] >= 0
        x = torch.randn(9, sae.d_in, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(sae(x), run.sae.eval()(x), rtol=1e-4, atol=1e-4)
