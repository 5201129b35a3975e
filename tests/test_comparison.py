"""Ratios between curves whose answer is known, their paired intervals, and honest words where there is no answer."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from endwise.analysis.comparison import Summary, summarise
from endwise.analysis.ratios import downstream_ratio, ratio_to_local
from endwise.analysis.run_summary import LATER_MSE
from endwise.errors import ConfigError
from endwise.seeds import numpy_stream
from made_runs import SEQUENCES, SITES, make_run


def local_l0(ce_increase):
    return 150 * math.exp(-6 * ce_increase)


def curve(kind, factor, levels):
    return [make_run(kind, i + 1.0, ce, factor * local_l0(ce)) for i, ce in enumerate(levels)]


def three_kinds(**kinds):
    levels = {"local": (0.1, 0.2, 0.3), "e2e": (0.08, 0.17, 0.26), "e2e_ds": (0.12, 0.21, 0.35)} | kinds
    factors = {"local": 1.0, "e2e": 0.5, "e2e_ds": 0.6}
    return [run for kind, points in levels.items() for run in curve(kind, factors[kind], points)]


def compare(runs) -> Summary:
    return summarise(runs, clean_ce=3.5, mean_ablated_ce=6.0, zero_ablated_ce=7.0, resamples=50, command="endwise x")


def test_a_known_ratio_is_found_over_the_range_where_both_curves_exist():
    ratio = compare(three_kinds()).features_at_equal_ce["e2e"]
    assert ratio.estimate == pytest.approx(0.5, rel=1e-9)
    assert ratio.over == (0.1, 0.26)
    assert ratio.at_middle == pytest.approx(0.5, rel=1e-9)
    assert ratio.middle == 0.2
    assert compare(three_kinds()).features_at_equal_ce["e2e_ds"].estimate == pytest.approx(0.6, rel=1e-9)


def test_the_average_is_over_levels_of_ce_in_logs():
    runs = [*curve("local", 1.0, (0.1, 0.3)), make_run("e2e", 1, 0.1, 60.0), make_run("e2e", 2, 0.3, 4.0)]
    grid = np.geomspace(0.1, 0.3, 20)
    e2e = np.interp(grid, [0.1, 0.3], np.log([60.0, 4.0]))
    local = np.interp(grid, [0.1, 0.3], np.log([local_l0(0.1), local_l0(0.3)]))
    ratio = ratio_to_local(runs, "e2e", "l0", "ce_increase", 50, 0)
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
    narrow, wide = (ratio_to_local(runs, "e2e", "l0", "ce_increase", 200, 0).interval for runs in (paired, unpaired))
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
        draws.append(ratio_to_local(drawn, "e2e", "l0", "ce_increase", 1, 0).estimate)
    expected = np.quantile(draws, [0.025, 0.975])
    assert ratio_to_local(runs, "e2e", "l0", "ce_increase", 100, 5).interval == pytest.approx(expected, rel=1e-9)


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
        (three_kinds(local=()), "there are no runs of local"),
        ([*three_kinds(), make_run("e2e", 9, 0.2, 500.0)], "not strictly monotone"),
        ([*curve("local", 1, (0.1, 0.2)), make_run("e2e", 1, 0.1, 9), make_run("e2e", 2, 0.2, 10)], "rises with"),
    ],
)
def test_where_there_is_no_answer_there_is_a_reason(runs, reason):
    summary = compare(runs)
    ratio = summary.features_at_equal_ce["e2e"]
    assert ratio.estimate is None and ratio.interval is None
    assert reason in (ratio.reason or "")
    assert "cannot be said" in summary.verdicts[0] and reason in summary.verdicts[0]


def test_without_shared_sequences_there_is_a_ratio_but_no_interval():
    bare = [replace(run, sums=None) for run in three_kinds()]
    ratio = compare(bare).features_at_equal_ce["e2e"]
    assert ratio.estimate == pytest.approx(0.5) and ratio.interval is None
    assert "per-sequence sums" in (ratio.reason or "")
    assert "is not known" in compare(bare).verdicts[0]
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


def test_runs_at_similar_are_the_closest_of_all_choices():
    assert [run.ce_increase for run in compare(three_kinds()).similar] == [0.2, 0.17, 0.21]


def test_verdicts_say_what_the_numbers_say():
    good = compare(three_kinds()).verdicts
    assert good[0].startswith("e2e needs 50 % [50, 50] of local's features per token at the same CE increase")
    assert any(
        line.startswith(
            "e2e+ds follows the original activations more closely than e2e: its downstream MSE is 0.25 times"
        )
        for line in good
    )
    assert any(
        line.startswith(
            "e2e follows the original activations less closely than local: its downstream MSE is 6.00 times"
        )
        for line in good
    )
    worse = [replace(run, kind={"local": "e2e", "e2e": "local"}.get(run.kind, run.kind)) for run in three_kinds()]
    assert "more features than local, not fewer" in compare(worse).verdicts[0]
    same = [
        replace(make_run(kind, i, ce, local_l0(ce), data_seed=10 * i + len(kind)), folder=f"{kind}{i}")
        for kind in ("local", "e2e")
        for i, ce in enumerate((0.1, 0.2, 0.3))
    ]
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


def test_only_runs_of_one_site_and_known_kinds_are_compared():
    runs = three_kinds()
    with pytest.raises(ConfigError, match="one site"):
        compare([*runs, replace(runs[0], site="blocks.1.hook_resid_pre")])
    with pytest.raises(ConfigError, match="no runs"):
        compare([])
    with pytest.raises(ConfigError, match="topk"):
        compare([replace(runs[0], kind="topk")])


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
    ratio = ratio_to_local(runs, "e2e_ds", LATER_MSE, "ce_increase", 50, 0, reference="e2e")
    assert ratio.estimate == pytest.approx(1.5 / 6.0) and ratio.over == pytest.approx((0.1, 0.8))
    assert ratio.interval is not None and ratio.interval[0] <= 0.25 <= ratio.interval[1]
    apart = ratio_to_local([*runs[:2], *runs[-2:]], "e2e_ds", LATER_MSE, "ce_increase", 50, 0, reference="e2e")
    assert apart.estimate is None and "no CE increase in common" in apart.reason
