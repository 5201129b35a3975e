"""A study: its recipes, its plan within a budget, its learning rates, and what its runs show."""

import itertools
import json
import math
from dataclasses import replace

import pytest

from endwise.common.errors import ConfigError, EndwiseError
from endwise.paper.costs import Cost, costs, seconds_per_token
from endwise.paper.experiments import Experiments, inner, middle
from endwise.paper.plan import EXPERIMENTS, parse_budget, plan
from endwise.paper.runs import best_rates, features_needed, make_runs
from endwise.paper.study_config import STUDIES, find_study
from endwise.sweeps.engines import InProcess
from endwise.sweeps.points import fingerprint
from made_runs import make_run
from small_studies import OTHER, SITE, study

SHIPPED = sorted(path.stem for path in STUDIES.glob("*.yaml"))


RATES = {site: {"local": 1e-2, "e2e": 1e-2, "e2e_ds": 2e-2} for site in (SITE, OTHER)}


@pytest.fixture
def experiments(tmp_path):
    return Experiments(study(), 2048, tmp_path / "runs")


def test_the_studies_that_ship_are_whole(tmp_path):
    assert SHIPPED == ["embedded", "gpt2-small", "tinystories-1m"]
    for name in SHIPPED:
        made = find_study(name)
        of_study = Experiments(made, made.recipe["training"]["tokens"], tmp_path)
        rates = {site: {k: middle(made.kind(k, site).learning_rates) for k in made.kinds} for site in made.sites}
        folders = [recipe.out for recipes in EXPERIMENTS.values() for recipe in recipes(of_study, rates)]
        assert len(set(folders)) > 40
        for site in made.sites:
            grids = {made.kind(kind, site).learning_rates for kind in made.kinds}
            assert len(grids) == 1, "learning rates are tuned alike"
        assert all(len(made.kind(kind, site).coefficients) >= 5 for kind in made.kinds for site in made.sites)


def test_the_embedded_study_meets_the_bar_of_the_headline():
    made = find_study("embedded")
    assert len(made.sites) >= 2 and made.seeds >= 3


def test_curves_are_of_every_kind_site_and_coefficient(experiments):
    recipes = experiments.curves(RATES)
    got = {(r.objective.kind, r.site, r.objective.sparsity.coefficient) for r in recipes}
    coefficients = {"local": (0.5, 1, 2), "e2e": (0.25, 0.5, 1), "e2e_ds": (1, 2, 4)}
    assert got == {(k, site, c) for k, cs in coefficients.items() for site in (SITE, OTHER) for c in cs}
    assert {r.training.learning_rate for r in recipes if r.objective.kind == "e2e_ds"} == {2e-2}
    betas = {(r.site, r.objective.downstream_mse) for r in recipes if r.objective.kind == "e2e_ds"}
    assert betas == {(SITE, 1.0), (OTHER, 0.5)}
    assert all(r.objective.downstream_mse is None for r in recipes if r.objective.kind != "e2e_ds")


def test_experiments_differ_from_the_curves_in_what_they_name(experiments):
    def without(recipe, *keys):
        content = json.loads(recipe.model_copy(update={"out": None}).model_dump_json())
        for key in keys:
            section = content
            *path, last = key.split(".")
            for part in path:
                section = section[part]
            del section[last]
        return content

    varied = ("seed", "data.seed", "training.tokens", "dictionary", "init_from")
    curves = [without(r, *varied) for r in experiments.curves(RATES)]
    names = {"seeds": "seed", "lengths": "training.tokens", "sizes": "dictionary"}
    for name, key in names.items():
        for recipe in EXPERIMENTS[name](experiments, RATES):
            assert without(recipe, *varied) in curves
            own = experiments.curves(RATES)[0]
            assert without(recipe, key) != without(recipe) and without(own, key) != without(own)
    assert {(r.seed, r.data.seed, r.site) for r in experiments.seeds(RATES)} == {
        (seed, seed, site) for seed in (1, 2) for site in (SITE, OTHER)
    }
    assert {r.training.tokens for r in experiments.lengths(RATES)} == {1024, 4096}
    assert {r.dictionary.ratio for r in experiments.sizes(RATES)} == {4}


def test_starts_begin_with_a_local_run_of_the_curves(experiments):
    curves = [*experiments.curves(RATES), *experiments.seeds(RATES)]
    local = {r.out for r in curves if r.objective.kind == "local" and r.site == SITE}
    starts = experiments.starts(RATES)
    assert {r.init_from for r in starts} == local
    assert {r.objective.kind for r in starts} == {"e2e", "e2e_ds"}


def test_rates_are_chosen_at_every_site_on_text_that_is_not_reported(experiments):
    tuned, reported = experiments.learning_rates(), experiments.curves(RATES)
    assert len({fingerprint(r) for r in tuned}) == 2 * 18
    assert {fingerprint(r) for r in tuned}.isdisjoint(fingerprint(r) for r in reported)
    for run in tuned:
        assert run.evaluation.skip >= max(each.evaluation.needed for each in reported)
    assert {run.evaluation.skip for run in reported} == {0}


@pytest.mark.parametrize(
    ("values", "expected"), [((1.0,), (1.0,)), ((1.0, 2.0), (1.0, 2.0)), ((1.0, 2.0, 3.0, 4.0, 5.0), (2.0, 3.0, 4.0))]
)
def test_the_inner_part_is_the_middle_three(values, expected):
    assert inner(values) == expected and middle(values) in inner(values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kinds": {"local": {"coefficients": [1], "learning_rates": [1e-3]}}}, "needs local"),
        ({"recipe": {"site": SITE}}, "recipe.site is what the study varies"),
        ({"sites": {}}, "sites"),
        ({"ratios": [0]}, "greater than 0"),
        ({"sits": 1}, "sites"),
    ],
)
def test_a_study_that_breaks_a_rule_is_told_which(changes, message):
    with pytest.raises(ConfigError, match=message):
        study(**changes)


def test_an_unknown_study_is_told_which_ship():
    with pytest.raises(ConfigError, match="embedded, gpt2-small, tinystories-1m"):
        find_study("gpt3")


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("1.5h", 5400), ("20min", 1200)])
def test_a_budget_reads_as_time(text, seconds):
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "2", "h", "-1h", "0h", "2 days", "1e3s"])
def test_a_budget_that_reads_otherwise_is_refused(text):
    with pytest.raises(ConfigError, match="reads 90s, 30m or 2h"):
        parse_budget(text)


def test_a_budget_is_read_before_anything_is_timed(tmp_path):
    with pytest.raises(ConfigError, match="reads 90s, 30m or 2h"):
        make_runs(study(), tmp_path, "soon", InProcess(), display=False)
    assert not any(tmp_path.iterdir())


KNOWN_COSTS = [
    Cost(kind, site, ratio, seconds, 2048)
    for (kind, seconds), (site, ratio) in itertools.product(
        {"local": 1e-5, "e2e": 1e-4, "e2e_ds": 2e-4}.items(), [(SITE, None), (OTHER, None), (SITE, 4.0)]
    )
]


def test_a_plan_fits_its_budget(experiments, tmp_path):
    made = plan(experiments, KNOWN_COSTS, "10m", tmp_path / "plan.json")
    assert made.left_out == ()
    planned = replace(experiments, tokens=made.tokens)
    recipes = {r.out: r for name in made.experiments for r in EXPERIMENTS[name](planned, RATES)}.values()
    training = sum(seconds_per_token(KNOWN_COSTS, r) * r.training.tokens for r in recipes)
    assert 0.8 * 600 < training < 600


def test_a_small_budget_drops_the_last_experiments_first(experiments, tmp_path):
    tokens = [plan(experiments, KNOWN_COSTS, budget, tmp_path / budget) for budget in ("1s", "4s", "8s", "20s", "60s")]
    names = list(EXPERIMENTS)
    for made in tokens:
        assert made.experiments == tuple(names[: len(made.experiments)]) and made.tokens >= 1024
        assert made.experiments + made.left_out == tuple(names)
    assert [len(made.experiments) for made in tokens] == sorted(len(made.experiments) for made in tokens)
    assert tokens[0].experiments == ("learning_rates", "curves") and tokens[-1].left_out == ()


def test_a_plan_is_kept(experiments, tmp_path):
    file = tmp_path / "plan.json"
    made = plan(experiments, KNOWN_COSTS, "10m", file)
    slower = [replace(cost, seconds_per_token=9 * cost.seconds_per_token) for cost in KNOWN_COSTS]
    assert plan(experiments, slower, "10m", file) == made
    with pytest.raises(ConfigError, match="the budget 10m"):
        plan(experiments, KNOWN_COSTS, "20m", file)
    with pytest.raises(ConfigError, match="another study"):
        plan(replace(experiments, study=study(seeds=2)), KNOWN_COSTS, "10m", file)


def test_costs_are_measured_once(experiments, tmp_path):
    values = experiments.study.recipe
    recipe = {**values, "data": {"context": 64}, "evaluation": {**values["evaluation"], "during_training_tokens": 128}}
    made = study(recipe=recipe, sites={SITE: {}}, cost_tokens=384, ratios=[2.5])
    small = replace(experiments, study=made)
    measured = costs(small, tmp_path / "costs.json")
    assert [(cost.kind, cost.ratio) for cost in measured] == [
        (kind, ratio) for ratio in (None, 2.5) for kind in ("local", "e2e", "e2e_ds")
    ]
    assert all(0 < cost.low <= cost.seconds_per_token <= cost.high for cost in measured)
    assert costs(small, tmp_path / "costs.json") == measured


def curve(kind, rate, features_at_one, ce_increases):
    """Runs whose L0 is inverse to their CE increase, so that the ratio of two curves is the same everywhere."""
    runs = [make_run(kind, 1 / ce, ce, features_at_one / ce) for ce in ce_increases]
    return [replace(run, learning_rate=rate) for run in runs]


def test_rates_are_compared_with_their_neighbours():
    curves = [
        curve("e2e", 1e-3, 20, (0.1, 0.2, 0.4)),
        curve("e2e", 2e-3, 10, (0.3, 0.6)),
        curve("e2e", 4e-3, 8, (0.5, 1.0)),
        curve("e2e", 8e-3, 2, (1.1, 1.4)),  # nothing in common with any other
    ]
    needed = features_needed(curves)
    assert needed[:3] == pytest.approx([2.5, 1.25, 1.0], rel=0.05) and needed[3] == math.inf
    assert features_needed(curves[:1]) == [1.0]


def test_the_best_rate_needs_the_fewest_features():
    kinds = {kind: {**each.model_dump(), "learning_rates": [1e-3, 2e-3, 4e-3]} for kind, each in study().kinds.items()}
    made = study(kinds=kinds, highest_ce_increase=1.0)
    runs = []
    for kind in kinds:
        runs += curve(kind, 1e-3, 14, (0.1, 0.2, 0.4))
        runs += curve(kind, 2e-3, 10, (0.2, 0.4, 0.8))
        runs += curve(kind, 4e-3, 9.9, (0.3, 0.6, 0.9))  # the same, so that the smaller is taken
        runs += curve(kind, 8e-3, 1, (1.5, 2.0))  # too high a CE increase
    assert best_rates(made, runs) == dict.fromkeys(kinds, 2e-3)
    with pytest.raises(EndwiseError, match=r"between 0 and 0\.01"):
        best_rates(study(kinds=kinds, highest_ce_increase=0.01), runs)


def test_where_a_run_ends_on_its_curve_does_not_decide():
    kinds = {"local": study().kinds["local"].model_dump(), "e2e": study().kinds["e2e"].model_dump()}
    steep = [replace(make_run("e2e", 1 / ce, ce, 10 / ce**2), learning_rate=1e-3) for ce in (0.2, 0.4)]
    worse = [replace(make_run("e2e", 1 / ce, ce, 12 / ce**2), learning_rate=2e-3) for ce in (0.3, 0.8)]
    assert worse[-1].l0 * worse[-1].ce_increase < min(run.l0 * run.ce_increase for run in steep)
    local = curve("local", 1e-3, 10, (0.2, 0.4))
    assert best_rates(study(kinds=kinds), [*steep, *worse, *local])["e2e"] == 1e-3
