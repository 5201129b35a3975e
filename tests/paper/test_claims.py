"""Each claim's verdict can come out either way, and rests on whole intervals."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from endwise.analysis.comparison.comparison import summarise
from endwise.analysis.directions.norms import BINS, Norms
from endwise.common.statistics import Interval
from endwise.config.run import EvaluationConfig
from endwise.paper.costs import Cost
from endwise.paper.experiments import Experiments
from endwise.paper.findings import Findings, MeasuredStudy
from endwise.paper.mitigations import Variant, mitigations
from endwise.paper.plan import StudyPlan
from endwise.paper.report import charts
from endwise.paper.runs import StudyRuns
from endwise.paper.study_claims import claims
from made_runs import make_run, with_mse
from small_studies import OTHER, SITE, study

KINDS = ("local", "e2e", "e2e_ds")
CURVE = ((1.0, 0.1, 80.0), (2.0, 0.2, 40.0), (4.0, 0.4, 20.0))
TOKENS = 2048
VERDICTS = {True: "shown", False: "not shown", None: "not testable here"}


def curve(kind, l0=1.0, ce=1.0, **changes):
    """Curve of runs whose downstream MSE grows with their CE increase."""
    runs = [make_run(kind, c, ce * increase, l0 * features, **changes) for c, increase, features in CURVE]
    return [with_mse(run, run.coefficient) for run in runs]


@cache
def findings(factors=(1.0, 0.5, 0.6), *, seeds=(0, 1, 2), jitter=0.01):
    """Findings of a study in which a kind needs `factors` of local's features, varied a little by seed."""
    made = study(sites={SITE: {}})
    runs = [
        run
        for kind, factor in zip(KINDS, factors, strict=True)
        for seed, wobble in zip(seeds, range(len(seeds)), strict=True)
        for run in curve(kind, l0=factor * (1 + jitter * wobble * (kind != "local")), seed=seed)
    ]
    summary = summarise(runs, clean_ce=2.0, resamples=100)
    seconds = zip(KINDS, (1.0, 3.0, 3.5), strict=True)
    costs = [Cost(kind, SITE, None, each, 9, 0.9 * each, 1.1 * each) for kind, each in seconds]
    experiments = Experiments(made, TOKENS, Path("x"))
    recipes = {(r.objective.kind, r.training.learning_rate): r for r in experiments.learning_rates()}
    return Findings(
        made=StudyRuns(
            experiments,
            StudyPlan(TOKENS, (), (), None, {}),
            {SITE: dict.fromkeys(KINDS, 1e-2)},
            costs,
            {},
        ),
        sites={SITE: summary},
        similar_l0={},
        norms={},
        experiments={
            "learning_rates": tuple(
                MeasuredStudy(
                    recipe, make_run(kind, 1, 0.2, 40.0 if rate == 1e-2 else 44.0, 900 if rate == 1e-2 else 700)
                )
                for (kind, rate), recipe in recipes.items()
            ),
            "curves": tuple(MeasuredStudy(next(iter(recipes.values())), run) for run in runs if run.seed == 0),
            "seeds": tuple(MeasuredStudy(next(iter(recipes.values())), run) for run in runs if run.seed > 0),
        },
        mitigations=None,
        settings=EvaluationConfig(bootstrap=100),
    )


def verdict(found, words):
    (claim,) = [claim for claim in claims(found) if words in claim.claim]
    return claim.verdict


@pytest.mark.parametrize(
    ("factors", "jitter", "shown"),
    [
        ((1.0, 0.5, 0.6), 0.01, True),
        ((1.0, 1.2, 1.3), 0.01, False),
        ((1.0, 0.9, 0.9), 0.2, False),
        ((1.0, 0.01, 0.01), 0.01, True),
    ],
    ids=["fewer", "more", "fewer, but seeds differ widely", "far fewer"],
)
def test_fewer_features(factors, jitter, shown):
    found = findings(factors, jitter=jitter)
    for kind in ("e2e ", "e2e+ds "):
        assert verdict(found, f"{kind}needs fewer features per token") == VERDICTS[shown]


def test_without_a_local_curve_nothing_is_said_of_ratios():
    found = findings()
    alone = [run for run in found.sites[SITE].runs if run.kind != "local"]
    found = replace(found, sites={SITE: summarise(alone, clean_ce=2.0, resamples=50)})
    assert verdict(found, "e2e needs fewer features per token") == "not testable here"


@pytest.mark.parametrize(("jitter", "shown"), [(0.01, True), (0.6, False)])
def test_seeds_against_kinds(jitter, shown):
    assert verdict(findings(jitter=jitter), "differ less than the kinds do") == VERDICTS[shown]
    assert verdict(findings(seeds=(0, 1)), "differ less than the kinds do") == "not testable here"


def with_norms(found, **ratios):
    each = {kind: Interval(low=r - 0.01, high=r + 0.01, estimate=r) for kind, r in ratios.items()}
    norms = {
        run.folder: Norms(each[run.kind], None, None, each[run.kind], (0,) * BINS, {}, 9)
        for run in found.sites[SITE].runs
        if run.kind in each
    }
    return replace(found, norms=norms)


@pytest.mark.parametrize(
    ("ratios", "shown"),
    [
        ({"local": 0.95, "e2e": 0.5, "e2e_ds": 0.7}, True),
        ({"local": 0.95, "e2e": 0.7, "e2e_ds": 0.5}, False),
        ({"local": 0.95, "e2e": 0.7, "e2e_ds": 0.71}, False),
        ({"local": 1.005, "e2e": 0.5, "e2e_ds": 0.7}, False),
        ({"local": 0.95, "e2e": 0.5}, None),
    ],
    ids=["in order", "out of order", "intervals meet", "local not shorter", "a kind is missing"],
)
def test_norms(ratios, shown):
    assert verdict(with_norms(findings(), **ratios), "reconstructions are shorter") == VERDICTS[shown]


def test_downstream_errors_are_compared_at_equal_ce():
    found = findings()
    assert verdict(found, "keeps the later layers") == "shown"  # `made_runs.DOWNSTREAM`: 1.5 against 6 times local's
    runs = [with_mse(run, 5.0) if run.kind == "e2e_ds" else run for run in found.sites[SITE].runs]
    worse = replace(found, sites={SITE: summarise(runs, clean_ce=2.0, resamples=50)})
    assert verdict(worse, "keeps the later layers") == "not shown"
    assert verdict(far_apart(found), "keeps the later layers") == "not testable here"


def test_where_curves_tell_nothing_the_downstream_errors_of_similar_runs_are_compared():
    found = findings()
    wild = [with_mse(run, 5.0) if (run.kind, run.coefficient) == ("e2e", 2) else run for run in found.sites[SITE].runs]
    unsteady = replace(found, sites={SITE: summarise(wild, clean_ce=2.0, resamples=50)})
    assert verdict(unsteady, "keeps the later layers") == "shown"
    worse = [with_mse(run, 50.0) if run.kind == "e2e_ds" else run for run in wild]
    unsteady = replace(found, sites={SITE: summarise(worse, clean_ce=2.0, resamples=50)})
    assert verdict(unsteady, "keeps the later layers") == "not shown"


def far_apart(found):
    """No two kinds have a CE increase in common."""
    runs = [*curve("local"), *curve("e2e"), *curve("e2e_ds", ce=10.0)]
    return replace(found, sites={SITE: summarise(runs, clean_ce=2.0, resamples=50)})


def test_lengths_at_unlike_ce_increases_are_not_compared():
    apart = with_norms(far_apart(findings()), local=0.95, e2e=0.5, e2e_ds=0.7)
    assert verdict(apart, "reconstructions are shorter") == "not testable here"


def test_learning_rates_of_one_seed_are_told_and_not_judged():
    (claim,) = [claim for claim in claims(findings()) if "A learning rate above the best" in claim.claim]
    assert claim.verdict == "not testable here"
    assert "alive 900 to 700, L0 40.0 to 44.0" in claim.ours and "one seed" in claim.ours


@pytest.mark.parametrize(
    ("cost", "shown"),
    [((3.0, 2.9, 3.1), True), ((0.8, 0.7, 0.9), False), ((1.1, 0.8, 1.4), False), ((3.0, None, None), None)],
    ids=["longer", "shorter", "not sure", "timed without an interval"],
)
def test_costs(cost, shown):
    found = findings()
    estimate, low, high = cost
    costs = [Cost("local", SITE, None, 1.0, 9, 0.95, 1.05), Cost("e2e", SITE, None, estimate, 9, low, high)]
    made = replace(found.made, costs=[*costs, Cost("local", OTHER, None, 1.0, 9, 0.95, 1.05)])
    assert verdict(replace(found, made=made), "Training e2e takes longer") == VERDICTS[shown]
    assert verdict(replace(found, made=made), "Training e2e+ds takes longer") == "not testable here"


def variants(found, way, ends, noise=0.0):
    """Pair every kind's own training with one variant, with a CE increase `ends[kind]` times as large; `noise` is not
    shared between the two.
    """
    made = []
    runs = [run.summary for name in ("curves", "seeds") for run in found.experiments[name]]
    for kind, factor in ends.items():
        own = [run for run in runs if run.kind == kind]
        other = []
        for seed in sorted({run.seed for run in own}):
            l0 = next(run.l0 for run in own if run.seed == seed)
            other += curve(kind, l0=l0 / 80.0, ce=factor, noise=noise or 0.2, data_seed=int(noise > 0), seed=seed)
        d_sae = 3000 if way == "dictionary" else 1536
        other = [replace(run, folder=f"{run.folder}-other", d_sae=d_sae) for run in other]
        tokens = (TOKENS, TOKENS * (4 if way == "tokens" else 1))
        seconds = {"tokens": 4.0, "dictionary": 2.0}[way]
        made += [
            Variant(kind, way, "own", tuple(own), False, tokens[0], 1.0),
            Variant(kind, way, "other", tuple(other), False, tokens[1], seconds),
        ]
    return mitigations(made, 200, 12345)


@pytest.mark.parametrize(
    ("ends", "noise", "shown"),
    [
        ({"local": 0.99, "e2e": 0.7, "e2e_ds": 0.7}, 0.0, True),
        ({"local": 0.7, "e2e": 0.8, "e2e_ds": 0.6}, 0.0, False),
        ({"local": 1.2, "e2e": 1.1, "e2e_ds": 1.1}, 0.0, False),
        ({"local": 1.0, "e2e": 0.97, "e2e_ds": 0.97}, 0.3, False),
        ({"e2e": 0.7, "e2e_ds": 0.7}, 0.0, None),
    ],
    ids=["more than local", "one of them less", "nothing improves", "not sure", "no local"],
)
def test_longer_training(ends, noise, shown):
    found = findings()
    found = replace(found, mitigations=variants(found, "tokens", ends, noise))
    assert verdict(found, "With longer training") == VERDICTS[shown]


@pytest.mark.parametrize(
    ("factor", "noise", "shown"),
    [(0.8, 0.0, True), (1.1, 0.0, False), (0.98, 0.3, False)],
    ids=["lower", "higher", "not sure"],
)
def test_larger_dictionaries(factor, noise, shown):
    found = findings()
    found = replace(found, mitigations=variants(found, "dictionary", dict.fromkeys(KINDS, factor), noise))
    assert verdict(found, "A larger dictionary") == VERDICTS[shown]


def cheaper(found, factor, noise=0.0):
    """As if the study's own training were the dearer one."""
    made = variants(found, "tokens", dict.fromkeys(KINDS, factor), noise)
    points = [replace(p, variant=replace(p.variant, seconds=1.0 / p.variant.seconds)) for p in made.points]
    return replace(found, mitigations=replace(made, points=tuple(points)))


@pytest.mark.parametrize(
    ("factor", "noise", "shown"),
    [(1.01, 0.0, True), (0.9, 0.0, True), (1.2, 0.0, False), (1.0, 0.5, False)],
    ids=["as good", "better", "worse", "perhaps as good"],
)
def test_cheaper_training(factor, noise, shown):
    assert verdict(cheaper(findings(), factor, noise), "Training on fewer tokens") == VERDICTS[shown]


def test_no_variant_is_cheaper():
    found = findings()
    found = replace(found, mitigations=variants(found, "tokens", dict.fromkeys(KINDS, 0.5)))
    assert verdict(found, "Training on fewer tokens") == "not testable here"
    assert verdict(found, "A start from a local SAE") == "not testable here"


@pytest.mark.parametrize(("seconds", "shown"), [(0.9, True), (1.1, False)])
def test_the_break_even_with_local(seconds, shown):
    found = cheaper(findings((1.0, 0.5, 0.5)), 1.0)
    points = [
        replace(p, variant=replace(p.variant, seconds=1.0 if p.variant.kind == "local" else seconds))
        for p in found.mitigations.points
    ]
    found = replace(found, mitigations=replace(found.mitigations, points=tuple(points)))
    assert verdict(found, "reaches local's CE increase") == VERDICTS[shown]
    assert verdict(cheaper(findings((1.0, 1.5, 1.5)), 1.0), "reaches local's CE increase") == "not shown"
    assert verdict(findings(), "reaches local's CE increase") == "not testable here"


def test_every_claim_is_told_with_what_was_published():
    found = findings()
    assert all(claim.claim and claim.published and claim.ours for claim in claims(found))
    assert np.isfinite([len(claim.ours) for claim in claims(found)]).all()


def test_figures_of_learning_rates_are_of_one_site():
    found = findings()
    elsewhere = [MeasuredStudy(r.config, replace(r.summary, site=OTHER)) for r in found.experiments["learning_rates"]]
    both = (*found.experiments["learning_rates"], *elsewhere)
    found = replace(found, experiments={"learning_rates": both, "curves": (), "seeds": ()})
    rates = len({run.config.training.learning_rate for run in both})
    of_rates, by_rate = charts(found)["ablations"][:2]
    assert (of_rates.name, by_rate.name) == ("learning_rates", "rates") and rates > 1
    assert all(len(series.marks) == rates for panel in of_rates.panels for series in panel.series)
    assert all(len(series.marks) == 1 for panel in by_rate.panels for series in panel.series)
