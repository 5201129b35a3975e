"""Ratios between curves whose answer is known, their paired intervals, and honest words where there is no answer."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from endwise.analysis.comparison.comparison import runs_at_similar, similar_by_seed
from endwise.analysis.ratios import downstream_ratio, percent, ratio_of
from endwise.common.errors import ConfigError
from endwise.common.seeds import numpy_stream
from endwise.config.method import PRESET_METHODS
from endwise.evaluation.summary import LATER_MSE
from made_curves import compare, curve, local_l0, three_kinds
from made_runs import SEQUENCES, SITES, make_run, with_mse

LOCAL, E2E, E2E_DS = PRESET_METHODS.values()


def test_a_known_ratio_is_found_over_the_range_where_both_curves_exist():
    ratio = compare(three_kinds()).features_at_equal_ce["e2e"]
    assert ratio.estimate == pytest.approx(0.5, rel=1e-9)
    assert ratio.over == (0.1, 0.26)
    assert ratio.at_ends == pytest.approx((0.5, 0.5), rel=1e-9) and ratio.crossings == ()
    assert compare(three_kinds()).features_at_equal_ce["e2e_ds"].estimate == pytest.approx(0.6, rel=1e-9)


def test_the_average_is_over_levels_of_ce_in_logs():
    runs = [*curve("local", 1.0, (0.1, 0.3)), make_run("e2e", 1, 0.1, 60.0), make_run("e2e", 2, 0.3, 4.0)]
    grid = np.geomspace(0.1, 0.3, 20)
    e2e = np.interp(grid, [0.1, 0.3], np.log([60.0, 4.0]))
    local = np.interp(grid, [0.1, 0.3], np.log([local_l0(0.1), local_l0(0.3)]))
    ratio = ratio_of(runs, E2E, "l0", "ce_increase", 50, 0)
    assert ratio.estimate == pytest.approx(np.exp(np.mean(e2e - local)), rel=1e-9)


def test_ce_increase_at_equal_l0_answers_the_other_question():
    runs = [make_run("local", i, ce, l0) for i, (ce, l0) in enumerate([(0.1, 100), (0.2, 50), (0.4, 25)])]
    runs += [make_run("e2e", i, ce / 2, l0) for i, (ce, l0) in enumerate([(0.1, 100), (0.2, 50), (0.4, 25)])]
    summary = compare(runs)
    assert summary.ratios["ce_increase_at_equal_l0"]["e2e"].estimate == pytest.approx(0.5, rel=1e-9)
    assert summary.ratios["ce_increase_at_equal_alive"]["e2e"].estimate == pytest.approx(0.5, rel=1e-9)


def test_the_interval_is_paired_so_noise_that_all_runs_share_cancels():
    paired = three_kinds()
    unpaired = [
        replace(run, sums=make_run(run.kind, run.coefficient, run.ce_increase, run.l0, data_seed=i).sums)
        for i, run in enumerate(paired)
    ]
    narrow, wide = (ratio_of(runs, E2E, "l0", "ce_increase", 200, 0).interval for runs in (paired, unpaired))
    assert narrow is not None and wide is not None
    assert narrow[0] <= 0.5 <= narrow[1]
    assert wide[1] - wide[0] > 3 * (narrow[1] - narrow[0])


def test_the_interval_repeats_the_whole_comparison_on_each_resample():
    runs = [
        replace(run, sums=make_run(run.kind, run.coefficient, run.ce_increase, run.l0, data_seed=i, noise=0.1).sums)
        for i, run in enumerate(three_kinds())
        if run.kind != "e2e_ds"
    ]
    weights = numpy_stream(5, "bootstrap").multinomial(SEQUENCES, np.full(SEQUENCES, 1 / SEQUENCES), size=100)
    draws = []
    for counts in weights:
        drawn = []
        for run in runs:
            picked = {name: (counts * values).sum() for name, values in run.sums.items()}
            ce = picked["ce_increase"] / picked["predictions"]
            drawn.append(replace(run, ce_increase=ce, l0=picked["l0"] / picked["tokens"], sums=None))
        draws.append(ratio_of(drawn, E2E, "l0", "ce_increase", 1, 0).estimate)
    expected = np.quantile(draws, [0.025, 0.975])
    assert ratio_of(runs, E2E, "l0", "ce_increase", 100, 5).interval == pytest.approx(expected, rel=1e-9)


def test_seeds_of_one_coefficient_are_one_point():
    runs = curve("local", 1.0, (0.1, 0.2, 0.3))
    for i, ce in enumerate((0.1, 0.3)):
        runs += [make_run("e2e", i, ce, share * local_l0(ce), seed=s) for s, share in enumerate((0.4, 0.6))]
    assert compare(runs).features_at_equal_ce["e2e"].estimate == pytest.approx(0.5, rel=1e-9)


@pytest.mark.parametrize(
    ("runs", "reason"),
    [
        (three_kinds(e2e=(0.4, 0.5, 0.6)), "no CE increase in common"),
        (three_kinds(e2e=(0.2,)), "at least two points"),
        (three_kinds(e2e=()), "there are no runs of e2e"),
        ([*three_kinds(), make_run("e2e", 9, 0.2, 500.0)], "not strictly monotone"),
        ([*curve("local", 1, (0.1, 0.2)), make_run("e2e", 1, 0.1, 9), make_run("e2e", 2, 0.2, 10)], "rises with"),
    ],
)
def test_where_there_is_no_answer_there_is_a_reason(runs, reason):
    summary = compare(runs)
    ratio = summary.features_at_equal_ce["e2e"]
    assert ratio.estimate is None and ratio.interval is None
    assert reason in (ratio.reason or "")
    assert "These runs do not determine" in summary.verdicts[0] and reason in summary.verdicts[0]


def test_without_shared_sequences_there_is_a_ratio_but_no_interval():
    bare = [replace(run, sums=None) for run in three_kinds()]
    ratio = compare(bare).features_at_equal_ce["e2e"]
    assert ratio.estimate == pytest.approx(0.5) and ratio.interval is None
    assert "per-sequence sums" in (ratio.reason or "")
    assert "no interval:" in compare(bare).verdicts[0]
    runs = three_kinds()
    other = {name: values[:-1] for name, values in runs[-1].sums.items()}
    mixed = compare([*runs[:-1], replace(runs[-1], sums=other)]).features_at_equal_ce["e2e_ds"]
    assert mixed.interval is None and "same held-out sequences" in (mixed.reason or "")


def test_the_downstream_ratio_is_the_geometric_mean_over_later_sites():
    e2e, ds = make_run("e2e", 1, 0.2, 30), make_run("e2e_ds", 1, 0.2, 30)
    ratio = downstream_ratio(ds, e2e, 100, 0)
    assert ratio.estimate == pytest.approx(0.25)
    assert ratio.interval == pytest.approx((0.25, 0.25))
    assert "no later site" in (downstream_ratio(replace(ds, downstream_mse={}), e2e, 100, 0).reason or "")


def test_where_curves_determine_nothing_similar_runs_of_each_seed_are_compared():
    """Downstream MSE is the same along each made curve, so that it is no curve."""
    factors = (1.0, 1.1, 1.3)
    runs = []
    for seed, factor in enumerate(factors):
        for run in three_kinds():
            scaled = with_mse(run, factor) if run.kind == "e2e_ds" else run
            runs.append(replace(scaled, seed=seed, folder=f"{run.folder}-{seed}"))
    ratio = compare(runs).downstream["e2e_ds/e2e"]
    logs = np.log(0.25 * np.array(factors))
    half = 4.302653 * logs.std(ddof=1) / math.sqrt(3)
    assert ratio.over is None and ratio.seeds == 3 and ratio.estimate == pytest.approx(np.exp(logs.mean()))
    assert ratio.interval == pytest.approx(tuple(np.exp([logs.mean() - half, logs.mean() + half])), rel=1e-4)


def test_runs_at_similar_are_the_closest_of_all_choices():
    assert [run.ce_increase for run in compare(three_kinds()).similar] == [0.2, 0.17, 0.21]


def of_seeds(runs, seeds=3):
    return [
        replace(run, seed=seed, data_seed=seed, folder=f"{run.folder}-{seed}") for run in runs for seed in range(seeds)
    ]


def test_curves_that_cross_have_no_one_figure():
    """L0 over CE increase: local's is 100 throughout in logarithms' terms, e2e's passes it at a known place."""
    local = [make_run("local", 2, 0.1, 100.0), make_run("local", 1, 0.4, 10.0)]
    e2e = [make_run("e2e", 2, 0.1, 120.0), make_run("e2e", 1, 0.4, 6.0)]
    ratio = ratio_of(of_seeds([*local, *e2e]), E2E, "l0", "ce_increase", 50, 0)
    assert ratio.estimate is None and ratio.interval is None and ratio.below == "not shown"
    assert ratio.at_ends == pytest.approx((1.2, 0.6)) and ratio.over == pytest.approx((0.1, 0.4))
    share = math.log(1.2) / (math.log(1.2) - math.log(0.6))
    assert ratio.crossings == pytest.approx((0.1 + 0.3 * share,))
    assert "the curves cross: 120 % of the L0 at CE increase 0.1, 60 % at 0.4, equal at" in ratio.reason
    summary = compare(of_seeds([*local, *e2e]))
    assert "No single ratio of" in summary.verdicts[0]
    written = summary.to_json()["features_at_equal_ce"]["e2e"]
    assert written["ratio"] is None and "cross" in written["reason"]


def test_a_crossing_between_points_of_either_curve_is_found():
    """Both ends lie below 1; in the middle, at a point of e2e's alone, the ratio is above."""
    local = [make_run("local", 2, 0.1, 100.0), make_run("local", 1, 0.4, 10.0)]
    between = math.sqrt(100.0 * 10.0)  # local's at 0.25
    e2e = [make_run("e2e", 3, 0.1, 80.0), make_run("e2e", 2, 0.25, 1.1 * between), make_run("e2e", 1, 0.4, 8.0)]
    ratio = ratio_of([*local, *e2e], E2E, "l0", "ce_increase", 50, 0)
    assert ratio.estimate is None and len(ratio.crossings) == 2
    touching = [*e2e[:1], make_run("e2e", 2, 0.25, between), e2e[-1]]
    assert ratio_of([*local, *touching], E2E, "l0", "ce_increase", 50, 0).crossings == ()


def test_an_interval_of_three_seeds_holds_them_and_the_text():
    shares = (0.4, 0.5, 0.6)
    runs = []
    for seed, share in enumerate(shares):
        of_seed = [*curve("local", 1.0, (0.1, 0.2, 0.3)), *curve("e2e", share, (0.1, 0.2, 0.3))]
        runs += [replace(run, seed=seed, sums=noisy(run, seed)) for run in of_seed]
    ratio = ratio_of(runs, E2E, "l0", "ce_increase", 400, 0)
    logs = np.log(shares)
    of_seeds, of_text = (np.diff(np.log(ends)).item() for ends in (ratio.over_seeds, ratio.over_text))
    assert ratio.seeds == 3 and ratio.varied == "initialisation" and ratio.below == "shown"
    assert of_seeds == pytest.approx(2 * 4.302653 * logs.std(ddof=1) / math.sqrt(3), rel=1e-3)
    whole = np.diff(np.log(ratio.interval)).item()
    assert whole > of_text
    error = math.hypot(of_seeds / 2 / 4.302653, of_text / 2 / 1.96)
    assert 1.96 * error < whole / 2 < 4.31 * error
    one = ratio_of([run for run in runs if run.seed == 1], E2E, "l0", "ce_increase", 400, 0)
    assert one.seeds == 1 and one.over_seeds is None and one.below == "not testable here"
    assert one.interval == one.over_text and percent(one).endswith(", one seed")


def noisy(run, seed):
    return make_run(run.kind, run.coefficient, run.ce_increase, run.l0, data_seed=seed * 7 + len(run.kind)).sums


def test_kinds_are_compared_by_runs_of_one_seed():
    near = make_run("e2e", 1, 0.2, 30.0, seed=0)
    runs = [make_run("local", 1, 0.2, 40.0, seed=1), make_run("local", 1, 0.3, 40.0, seed=0), near]
    runs.append(make_run("e2e", 1, 0.26, 30.0, seed=1))
    assert {run.seed for run in runs_at_similar(runs, "ce_increase")} == {1}
    assert {seeds: [run.ce_increase for run in choice] for seeds, choice in similar_by_seed(runs, "l0").items()} == {
        (0, 0): [0.3, 0.2],
        (1, 0): [0.2, 0.26],
    }


def test_one_seed_is_said_and_shows_nothing():
    first = compare(three_kinds()).verdicts[0]
    assert first.startswith("e2e needs 50 % [50, 50] of local's features") and "by one seed" in first
    assert "other seeds" in first
    assert all("is shown" not in line and "follows" not in line for line in compare(three_kinds()).verdicts)


def test_verdicts_say_what_the_numbers_say():
    good = compare(of_seeds([with_mse(run, run.coefficient) for run in three_kinds()])).verdicts
    assert good[0].startswith("e2e needs 50 % [50, 50] of local's features per token at the same CE increase")
    assert good[0].endswith("over 3 seeds (initialisation and order of the text).")
    assert any(
        line.startswith("e2e+ds follows the original activations more closely than e2e: its downstream MSE is 0.19")
        for line in good
    )
    assert any(
        line.startswith("e2e follows the original activations less closely than local: its downstream MSE is 7.10")
        for line in good
    )
    swapped = {LOCAL: E2E, E2E: LOCAL}
    worse = [replace(run, method=swapped.get(run.method, run.method)) for run in of_seeds(three_kinds())]
    assert "more features than local, not fewer" in compare(worse).verdicts[0]
    same = [
        replace(make_run(kind, i, ce, factor * local_l0(ce), data_seed=10 * i + len(kind)), folder=f"{kind}{i}")
        for kind, factor in (("local", 1.0), ("e2e", 0.99))
        for i, ce in enumerate((0.1, 0.2, 0.3))
    ]
    same = of_seeds(same)
    assert "is not shown" in compare(same).verdicts[0] and "includes 100 %" in compare(same).verdicts[0]


def test_summary_json_has_the_promised_shape():
    content = compare(three_kinds()).to_json()
    content = json.loads(json.dumps(content, allow_nan=False))
    assert content["clean_ce"] == 3.5
    promised = "kind site coefficient seed l0 alive d_sae ce_increase kl explained_variance downstream_mse tokens"
    promised += " seconds folder"
    assert len(content["runs"]) == 9
    for run in content["runs"]:
        assert set(promised.split()) <= set(run)
        assert "sums" not in run
        assert list(run["downstream_mse"]) == list(SITES)
        assert isinstance(run["explained_variance"], float)
    assert set(content["features_at_equal_ce"]) == {"e2e", "e2e_ds"}
    for ratio in content["features_at_equal_ce"].values():
        assert ratio["interval"][0] <= ratio["ratio"] <= ratio["interval"][1]
    assert [run["kind"] for run in content["runs"]] == ["local"] * 3 + ["e2e"] * 3 + ["e2e_ds"] * 3


def test_only_runs_of_one_site_are_compared():
    runs = three_kinds()
    with pytest.raises(ConfigError, match="one site"):
        compare([*runs, replace(runs[0], site="blocks.1.hook_resid_pre")])
    with pytest.raises(ConfigError, match="no runs"):
        compare([])


def test_the_downstream_mse_of_two_kinds_is_compared_at_equal_ce():
    """MSE = CE ** slope times each kind's factor (6 and 1.5, `made_runs.DOWNSTREAM`); it rises along both curves."""

    def curve(kind, coefficients, slope=1.5):
        made = []
        for coefficient in coefficients:
            run = make_run(kind, coefficient, 0.1 * coefficient, 60 / coefficient)
            factor = coefficient**slope
            sums = {n: s * (factor if n.startswith("downstream") else 1) for n, s in run.sums.items()}
            mse = {site: factor * value for site, value in run.downstream_mse.items()}
            made.append(replace(run, downstream_mse=mse, sums=sums))
        return made

    runs = [*curve("e2e_ds", (1, 2, 4, 8)), *curve("e2e", (1, 2, 4, 8))]
    ratio = ratio_of(runs, E2E_DS, LATER_MSE, "ce_increase", 50, 0, reference=E2E)
    assert ratio.estimate == pytest.approx(1.5 / 6.0) and ratio.over == pytest.approx((0.1, 0.8))
    assert ratio.interval is not None and ratio.interval[0] <= 0.25 <= ratio.interval[1]
    apart = ratio_of(
        [*runs[:2], *runs[-2:]],
        E2E_DS,
        LATER_MSE,
        "ce_increase",
        50,
        0,
        reference=E2E,
    )
    assert apart.estimate is None and "no CE increase in common" in apart.reason
