"""From measured importance to counts, ratios, correlations, verdicts, tables and the page."""

from dataclasses import replace

import numpy as np
import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from endwise import evaluate, importance, train
from endwise.analysis.comparable import Setting
from endwise.analysis.correlations import pearson, spearman
from endwise.analysis.importance import concentration
from endwise.analysis.importance.concentration import (
    carrying_ratio,
    correlation,
    count_carrying,
    count_with,
    cumulative_share,
    half_ratio,
    shares,
)
from endwise.analysis.importance.page import importance_charts
from endwise.analysis.importance.study import ImportanceStudy, faithfulness_rows, run_rows
from endwise.cli import app
from endwise.common.statistics import interval_with_seeds, resampling_weights, student_t
from made_importance import BLOCKS, FEATURES, SAMPLE, SEQUENCES, made_importance, made_measured, made_study
from small_gpt2 import data, recipe


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    monkeypatch.setattr(concentration, "RESAMPLES", 100)


def test_shares_and_counts_by_rank():
    ce = np.array([0.1, -0.4, 0.2, 0.0, 0.3])
    np.testing.assert_allclose(cumulative_share(ce), [0.4, 0.7, 0.9, 1.0, 1.0])
    assert count_with(0.4, ce) == pytest.approx(1)
    assert count_with(0.55, ce) == pytest.approx(1.5)
    assert count_with(0.5, np.full(10, -2.0)) == pytest.approx(5)
    assert np.isnan(count_with(0.5, np.zeros(3)))


def test_the_share_of_behaviour_is_0_at_the_mean_and_1_at_the_clean_model():
    curve = made_measured(10).faithfulness
    total = [curve.mean_ablated.sum(), curve.clean.sum()]
    expected = [(total[0] - ce.sum()) / (total[0] - total[1]) for ce in curve.ce]
    np.testing.assert_allclose(shares(curve, curve.ce), expected, atol=1e-12)
    np.testing.assert_allclose(shares(curve, np.stack([curve.mean_ablated, curve.clean])), [0, 1], atol=1e-12)
    weights = resampling_weights(SEQUENCES, 5, 0)
    drawn = shares(curve, curve.ce, weights)
    for row, counts in zip(drawn, weights, strict=True):
        chosen = np.repeat(np.arange(SEQUENCES), counts.astype(int))
        base, clean = curve.mean_ablated[chosen].sum(), curve.clean[chosen].sum()
        np.testing.assert_allclose(row, [(base - ce[chosen].sum()) / (base - clean) for ce in curve.ce], atol=1e-12)


def test_the_count_that_carries_a_part():
    kept, curves = (
        np.array([0, 1, 2, 4, 8]),
        {
            (0.0, 0.2, 0.4, 0.8, 1.0): np.exp(np.log(4) + np.log(2) / 2),
            (0.0, 0.95, 0.97, 0.98, 1.0): 1,
            (0.95, 0.97, 0.97, 0.98, 1.0): 0,
            (-1.0, 0.1, 0.45, 0.2, 0.5): 2,
            (0.0, 0.0, 0.0, 0.0, -0.1): np.nan,
        },
    )
    np.testing.assert_allclose(count_carrying(kept, np.array(list(curves))), list(curves.values()))


def test_the_ratio_of_counts_is_resampled_in_pairs():
    one, other = (made_measured(spread).faithfulness for spread in (5, 10))
    ratio = carrying_ratio([(one, other)])
    assert carrying_ratio([(one, one)]) == replace(ratio, low=1.0, high=1.0, estimate=1.0)
    assert ratio.low <= ratio.estimate <= ratio.high < 1
    counts = [count_carrying(each.kept, shares(each, each.ce)[None])[0] for each in (one, other)]
    assert ratio.estimate == pytest.approx(counts[0] / counts[1])


def test_the_ratio_of_halves_is_a_jackknife_over_blocks():
    random = np.random.default_rng(1)
    one, other = (
        replace(made_importance(spread), ce_blocks=b)
        for spread, b in (
            (5, made_importance(5).ce_blocks * (1 + 0.5 * random.standard_normal((BLOCKS, FEATURES)))),
            (10, made_importance(10).ce_blocks * (1 + 0.5 * random.standard_normal((BLOCKS, FEATURES)))),
        )
    )

    def log_ratio(without=()):
        kept = [block for block in range(BLOCKS) if block not in without]
        counts = [count_with(0.5, sum(each.ce_blocks[b] for b in kept)) for each in (one, other)]
        return np.log(counts[0] / counts[1])

    pseudo = [BLOCKS * log_ratio() - (BLOCKS - 1) * log_ratio([block]) for block in range(BLOCKS)]
    half = student_t(0.975, BLOCKS - 1) * np.std(pseudo, ddof=1) / np.sqrt(BLOCKS)
    found = half_ratio([(one, other)])
    np.testing.assert_allclose(
        np.log([found.low, found.estimate, found.high]), log_ratio() + half * np.array([-1, 0, 1])
    )


def test_correlations_are_those_of_numpy():
    random = np.random.default_rng(0)
    x = random.standard_normal(40)
    y = np.round(x + random.standard_normal(40))  # with ties
    assert pearson(x, y)[0] == pytest.approx(np.corrcoef(x, y)[0, 1])
    ranks = [[(each < v).sum() + ((each == v).sum() + 1) / 2 for v in each] for each in (x, y)]
    assert spearman(x, y)[0] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    found = correlation(x, y, spearman)
    assert found.low < found.estimate < found.high
    assert correlation(x[:3], y[:3], spearman) is None and correlation(x, np.ones(40), pearson) is None


def test_the_ratio_of_halves_of_several_seeds_has_the_jackknife_of_their_mean():
    pairs = [(made_importance(5 + 0.2 * seed, seed), made_importance(10, seed)) for seed in range(3)]

    def logs(without=()):
        kept = [block for block in range(BLOCKS) if block not in without]
        return np.log(
            [count_with(0.5, a.ce_blocks[kept].sum(0)) / count_with(0.5, b.ce_blocks[kept].sum(0)) for a, b in pairs]
        )

    pseudo = [BLOCKS * logs().mean() - (BLOCKS - 1) * logs([block]).mean() for block in range(BLOCKS)]
    expected = interval_with_seeds(float(logs().mean()), logs(), float(np.std(pseudo, ddof=1) / np.sqrt(BLOCKS)))
    found = half_ratio(pairs)
    np.testing.assert_allclose(
        np.log([found.low, found.estimate, found.high]), [expected.low, expected.estimate, expected.high]
    )


def test_verdicts_follow_the_intervals():
    study = made_study({"local": 10, "e2e": 5, "e2e_ds": 10}, seeds=(0, 1, 2))
    found = {claim.claim: claim for claim in study.claims}
    verdicts = {claim: each.verdict for claim, each in found.items()}
    assert verdicts == {
        "e2e needs fewer features than local to carry 90 % of what its SAE carries": "shown",
        "Half of the importance lies in fewer features of e2e than of local": "shown",
        "e2e+ds needs fewer features than local to carry 90 % of what its SAE carries": "not shown",
        "Half of the importance lies in fewer features of e2e+ds than of local": "not shown",
    } | {claim: "shown" for claim in verdicts if "-order" in claim}
    assert len(verdicts) == 10
    ratios = [each.ours for claim, each in found.items() if "-order" not in claim]
    assert all("over held-out text and 3 seeds (initialisation)" in ours for ours in ratios)
    assert all("L0s of 20.0 and 20.0" in ours for ours in ratios)
    assert (
        "over features and 3 seeds"
        in found["The first-order estimate ranks e2e's features as exact ablation does (Spearman above 0.5)"].ours
    )


@pytest.mark.parametrize(("seeds", "told"), [((0,), "one seed"), ((0, 1), "two seeds (initialisation)")])
def test_one_or_two_seeds_give_figures_and_no_verdict(seeds, told):
    study = made_study({"local": 10, "e2e": 5}, seeds=seeds)
    assert {claim.verdict for claim in study.claims} == {"not testable here"}
    assert all(told in claim.ours and "[" in claim.ours for claim in study.claims)
    alone = made_study({"e2e": 5})
    assert {claim.verdict for claim in alone.claims} == {"not testable here"}
    assert len(alone.claims) == 2  # there is nothing to relate it to


def test_kinds_of_different_seeds_or_unlike_ce_increase_are_not_compared():
    runs = made_study({"local": 10, "e2e": 5}, seeds=(0, 1, 2)).runs
    other = [replace(run, summary=replace(run.summary, data_seed=9 * (run.summary.kind == "e2e"))) for run in runs]
    increases = {"local": 0.1, "e2e": 0.3}
    apart = [replace(run, summary=replace(run.summary, ce_increase=increases[run.summary.kind])) for run in runs]
    unlike = "no two runs of a seed have a similar CE increase"
    for changed, why in ((other, "no seed has both kinds"), (apart, unlike)):
        claims = ImportanceStudy(Setting.of(runs[0].summary), tuple(changed)).claims[:2]
        assert [(claim.ours, claim.verdict) for claim in claims] == [(why, "not testable here")] * 2


def test_counts_between_far_apart_points_say_so():
    coarse = made_study({"local": 10, "e2e": 5}, seeds=(0, 1, 2))
    assert "(interpolated between 8 and 16; --again measures in between)" in coarse.claims[0].ours
    runs = []
    for run in coarse.runs:
        curve = run.measured.faithfulness
        between = np.setdiff1d(np.arange(9, 32), curve.kept)
        ce = np.array([np.interp(between, curve.kept, row) for row in curve.ce.T]).T
        finer = replace(curve, between_kept=between, between_ce=ce)
        runs.append(replace(run, measured=replace(run.measured, faithfulness=finer)))
    fine = ImportanceStudy(coarse.setting, tuple(runs))
    assert "interpolated" not in fine.claims[0].ours
    below, above = fine.runs[0].about
    assert above == below + 1 and below <= fine.runs[0].carrying.estimate <= above
    assert run_rows([fine])[0]["measured_above"] == above
    kept, ce = fine.runs[0].measured.faithfulness.by_importance
    assert (np.diff(kept) > 0).all() and ce.shape == (len(kept), SEQUENCES)
    assert len(faithfulness_rows([fine])) == len(fine.runs) * (len(kept) + 2 * 8)


def test_tables_tell_of_every_run():
    rows = run_rows([made_study({"local": 10, "e2e": 5})])
    assert [row["kind"] for row in rows] == ["local", "e2e"]
    assert rows[0]["alive"] == 60 and rows[0]["pearson.kl.second"] is None
    assert rows[1]["carrying.low"] <= rows[1]["carrying"] <= rows[1]["carrying.high"] < rows[0]["carrying"]
    assert rows[0]["spearman.ce.first.low"] <= rows[0]["spearman.ce.first"] <= rows[0]["spearman.ce.first.high"]


def test_charts_hold_every_kind():
    study = made_study({"local": 10, "e2e": 5})
    faithfulness, counts, cumulative, density, agreement = importance_charts(study, 1)
    assert [series.method.key for series in faithfulness.panels[0].series] == ["local", "e2e"]
    assert [panel.title for panel in faithfulness.panels] == ["by importance", "by first-order estimate", "at random"]
    assert [mark.x for mark in faithfulness.panels[0].series[0].marks] == [1, 2, 4, 8, 16, 32, 60]
    assert len(counts.panels[0].series) == len(cumulative.panels[0].series) == 2
    assert [len(panel.series[0].marks) for panel in density.panels] == [40, 40]  # the others' estimate is below 0
    assert len(agreement.panels) == 4
    assert 0 < sum(len(series.marks) for series in agreement.panels[0].series) < SAMPLE


@pytest.fixture(scope="module")
def runs(model, corpora, token_files, tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    for kind in ("local", "e2e"):
        config = recipe(place / kind, kind).model_copy(update={"data": data(token_files)})
        train(config, model=model, corpora=corpora, display=False)
    evaluate([place / "local", place / "e2e"], model=model, corpora=corpora)
    return place


def test_a_study_is_written_as_tables_figures_and_a_page(model, corpora, runs, tmp_path, undrawn):
    studies = importance([runs], ablate=4, model=model, corpora=corpora)
    assert len(studies) == 1 and [run.summary.kind for run in studies[0].runs] == ["local", "e2e"]
    arguments = ["importance", runs, "--ablate", 4, "--out", tmp_path]  # which finds them measured
    said = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert said.exit_code == 0 and "first-order" in said.output
    text = (tmp_path / "importance.html").read_text()
    assert "e2e needs fewer features" in text
    names = {"faithfulness-1", "concentration-1", "cumulative-1", "density-1", "agreement-1"}
    assert {path.stem for path in tmp_path.glob("*.png")} == {path.stem for path in tmp_path.glob("*.pdf")} == names
    features = parquet.read_table(tmp_path / "features.parquet").to_pylist()
    assert len(features) == 80
    for run in ("local", "e2e"):
        own = [row for row in features if row["kind"] == run]
        assert sum(row["share"] for row in own) == pytest.approx(1)
        ranked = sorted((row for row in own if row["rank"]), key=lambda row: row["rank"])
        assert [row["ce.second"] for row in ranked] == sorted((row["ce.second"] for row in ranked), reverse=True)
    assert len(parquet.read_table(tmp_path / "ablations.parquet")) == 8
    curve = parquet.read_table(tmp_path / "faithfulness.parquet").to_pylist()
    assert {row["order"] for row in curve} == {"second", "first", "random"}
    assert all(row["share.low"] <= row["share"] <= row["share.high"] for row in curve)
    assert curve[0]["share_from_zeroed"] == 0
    assert len(parquet.read_table(tmp_path / "runs.parquet")) == 2
