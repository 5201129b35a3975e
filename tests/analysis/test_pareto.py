"""Pareto curves of measured runs: which are compared, their fronts and bands against slow definitions."""

import json
from dataclasses import replace

import numpy as np
import pytest

from endwise.analysis.comparable import Setting, runs_in
from endwise.analysis.pareto.curves import band, front, pareto, point_rows, ratio_rows
from endwise.analysis.pareto.page import pareto_chart, prefix_chart, prefix_rows
from endwise.analysis.ratios import ratio_of
from endwise.common.errors import RunFolderError
from endwise.common.statistics import interpolate_at, resampling_weights
from endwise.config.method import PRESET_METHODS
from made_runs import make_run, measured

CURVE = ((1, 0.1, 60.0), (2, 0.2, 30.0), (4, 0.4, 15.0))


def curve(kind="e2e", factor=1.0, seed=0, **changes):
    return [make_run(kind, c, ce, factor * l0, seed=seed, **changes) for c, ce, l0 in CURVE]


def with_rate(run, rate):
    return type(run)(**{**vars(run), "learning_rate": rate, "folder": f"{run.folder}-{rate:g}"})


def test_the_front_is_what_nothing_dominates():
    random = np.random.default_rng(0)
    runs = [make_run("e2e", number, *map(float, pair)) for number, pair in enumerate(random.integers(1, 6, (40, 2)), 1)]
    expected = set()
    for run in runs:
        worse = [other for other in runs if other.l0 <= run.l0 and other.ce_increase <= run.ce_increase]
        if all((other.l0, other.ce_increase) == (run.l0, run.ce_increase) for other in worse):
            expected.add(run.folder)
    assert front(runs, "l0", "ce_increase") == expected and 1 < len(expected) < len(runs)


def test_a_band_over_text_is_of_curves_drawn_again(monkeypatch):
    monkeypatch.setattr("endwise.analysis.pareto.curves.RESAMPLES", 200)
    runs = curve(noise=0.05)
    found = band(runs, "l0", "ce_increase")
    weights = resampling_weights(len(runs[0].sums["tokens"]), 200, 12345)

    def drawn(run, name, per, row):
        return float(row @ run.sums[name]) / float(row @ run.sums[per])

    values = []
    for row in weights:
        across = [drawn(run, "l0", "tokens", row) for run in runs]
        up = [drawn(run, "ce_increase", "predictions", row) for run in runs]
        at = [interpolate_at(across, up, x) if min(across) <= x <= max(across) else np.nan for x in found.x]
        values.append(np.array(at, dtype=float))
    kept = np.isfinite(values).mean(axis=0)
    assert (kept >= 0.95).all() and len(found.x) < 40  # the ends, which few draws reach, have no band
    low, high = np.nanquantile(values, [0.025, 0.975], axis=0)
    np.testing.assert_allclose(found.low, low)
    np.testing.assert_allclose(found.high, high)
    assert found.over == "held-out text" and (found.low < found.middle).all() and (found.middle < found.high).all()


def test_with_three_seeds_a_band_is_students_t_over_them():
    factors = (1.0, 1.1, 1.25)
    runs = [run for seed, factor in enumerate(factors) for run in curve(factor=factor, seed=seed)]
    found = band(runs, "l0", "ce_increase")
    assert found.over == "3 seeds"
    assert (found.x[0], found.x[-1]) == (15 * 1.25, 60)  # where all three were measured
    for at in (0, 17, 39):
        logs = [
            np.log(interpolate_at([f * l0 for *_, l0 in CURVE], [ce for _, ce, _ in CURVE], found.x[at]))
            for f in factors
        ]
        half = 4.302653 * np.std(logs, ddof=1) / np.sqrt(3)  # the 0.975 quantile of t with 2 degrees of freedom
        assert found.middle[at] == pytest.approx(np.exp(np.mean(logs)))
        assert found.low[at] == pytest.approx(np.exp(np.mean(logs) - half))
        assert found.high[at] == pytest.approx(np.exp(np.mean(logs) + half))


@pytest.mark.parametrize(
    "runs",
    [
        curve()[:1],
        [*curve()[:2], make_run("e2e", 4, 0.15, 15.0)],
        [with_rate(run, rate) for rate, factor in ((1e-3, 1.0), (1e-2, 1.01)) for run in curve(factor=factor)],
    ],
    ids=["one point", "not monotone", "two learning rates"],
)
def test_what_is_no_curve_has_no_band(runs):
    assert band(runs, "l0", "ce_increase") is None


def test_runs_of_two_learning_rates_are_not_averaged():
    runs = [*curve("local", 2.0), *(with_rate(run, rate) for rate in (1e-3, 1e-2) for run in curve())]
    ratio = ratio_of(runs, PRESET_METHODS["e2e"], "l0", "ce_increase", 50, 0)
    assert ratio.estimate is None
    assert "e2e has 2 runs of λ 1 and seed 0, of the learning rates 0.001, 0.01" in ratio.reason
    series = pareto_chart(runs, "here", "name").panels[0].series
    drawn = [s for s in series if s.method.key == "e2e" and s.marked]
    assert [(s.label, len(s.marks)) for s in drawn] == [("learning rate 0.001", 3), ("learning rate 0.01", 3)]


def test_a_line_stays_within_its_band_and_meets_its_marks():
    series = pareto_chart(curve("local", 2.0), "here", "name").panels[0].series
    (line,) = [s for s in series if s.band is not None]
    at = {mark.x: mark.y for mark in line.marks}
    ends = list(zip(line.band.x, line.band.low, line.band.high, strict=True))
    assert len(ends) > 10 and all(low <= at[x] <= high for x, low, high in ends)
    (dots,) = [s for s in series if s.marked]
    assert all(at[mark.x] == mark.y for mark in dots.marks)


def test_a_learning_rate_of_its_own_for_each_coefficient_is_a_curve():
    runs = [*curve("local", 2.0), *(with_rate(run, 1e-3 * run.coefficient) for run in curve())]
    assert ratio_of(runs, PRESET_METHODS["e2e"], "l0", "ce_increase", 50, 0).estimate == pytest.approx(0.5)


def test_only_what_agrees_is_compared(tmp_path):
    for kind, l0 in (("local", 50), ("e2e", 30)):
        for coefficient in (1, 2):
            measured(tmp_path / f"{kind}-{coefficient}", kind, coefficient, l0 / coefficient)
    measured(tmp_path / "batch", "e2e", 1, 3, training={"batch": 7})
    measured(tmp_path / "text", "e2e", 1, 3, data={"source": "other.txt"})
    measured(tmp_path / "longer", "e2e", 1, 3, training={"tokens": 2000})
    measured(tmp_path / "started", "e2e", 1, 3, init_from="somewhere")
    measured(tmp_path / "saved", "e2e", 4, 5, training={"checkpoint_every": 10, "learning_rate": 0.1})
    found = pareto([tmp_path])
    assert sorted(len(one.runs) for one in found) == [1, 1, 1, 1, 5]
    (compared,) = [one for one in found if one.is_compared]
    assert compared.ratios["features_at_equal_ce", "e2e"].estimate == pytest.approx(0.6)
    told = [str(one.setting) for one in found]
    assert len(set(told)) == 5 and any("data.source other.txt" in text for text in told)
    assert "training.batch" in point_rows(found)[0] and len(ratio_rows(found)) == 4 * 2  # of one set


def needed(one):
    """By label, L0 at equal CE increase relative to the baseline's."""
    return {method.label: one.ratios["features_at_equal_ce", method.key].estimate for method in one.summary.compared}


def test_methods_are_not_pooled(tmp_path):
    for kind, l0 in (("local", 60), ("e2e", 30)):
        for coefficient in (1, 2, 4):
            measured(tmp_path / f"{kind}-{coefficient}", kind, coefficient, l0 / coefficient)
    for coefficient in (1, 2, 4):
        mixed = {"weights": {"local_mse": 1.0}, "p": 0.5}
        measured(tmp_path / f"mixed-{coefficient}", "e2e", coefficient, 24 / coefficient, **mixed)
    (one,) = pareto([tmp_path])
    found = needed(one)
    assert found.pop("e2e+ds") is None  # of which there are no runs
    assert found == {
        "e2e": pytest.approx(0.5),
        "e2e, local_mse 1.0, p 0.5": pytest.approx(0.4),
    }
    assert [len([run for run in one.runs if run.method == method]) for method in one.methods] == [3, 3, 3]


def test_of_methods_with_one_name_the_presets_own_keeps_it(tmp_path):
    for coefficient in (1, 2, 4):
        for p, l0 in ((1.0, 60), (0.5, 48)):
            measured(tmp_path / f"local-{p}-{coefficient}", "local", coefficient, l0 / coefficient, p=p)
        for beta, l0 in ((1.0, 30), (2.0, 15)):
            weights = {"downstream_mse": beta}
            measured(tmp_path / f"ds-{beta}-{coefficient}", "e2e_ds", coefficient, l0 / coefficient, weights=weights)
        measured(tmp_path / f"half-{coefficient}", "e2e", coefficient, 24 / coefficient, p=0.5)
    (one,) = pareto([tmp_path])
    assert one.summary.baseline.label == "local"
    assert needed(one) == {
        "e2e": pytest.approx(24 / 60),  # all of e2e's runs are of one
        "e2e+ds": pytest.approx(0.5),
        "e2e+ds, downstream_mse 2.0": pytest.approx(0.25),
        "local, p 0.5": pytest.approx(48 / 60),
    }


def test_an_objective_is_the_kind_whose_terms_its_weights_keep(tmp_path):
    for coefficient in (1, 2):
        measured(tmp_path / f"l-{coefficient}", "local", coefficient, 60 / coefficient)
        weights = {"kl": 1.0, "local_mse": 0.0}
        measured(tmp_path / f"e-{coefficient}", "local", coefficient, 30 / coefficient, weights=weights)
    (one,) = pareto([tmp_path])
    assert [run.kind for run in one.runs] == ["local", "local", "e2e", "e2e"]
    assert one.ratios["features_at_equal_ce", "e2e"].estimate == pytest.approx(0.5)


def test_runs_measured_on_other_held_out_text_are_not_compared(tmp_path):
    for coefficient in (1, 2):
        measured(tmp_path / f"l-{coefficient}", "local", coefficient, 60 / coefficient)
        measured(tmp_path / f"e-{coefficient}", "e2e", coefficient, 30 / coefficient, evaluation={"skip": 1000})
    assert sorted(one.is_compared for one in pareto([tmp_path])) == [False, False]


def test_of_several_learning_rates_the_one_of_most_runs_is_compared(tmp_path):
    for coefficient in (1, 2, 4):
        measured(tmp_path / f"local-{coefficient}", "local", coefficient, 60 / coefficient)
        measured(tmp_path / f"e2e-{coefficient}", "e2e", coefficient, 30 / coefficient)
    measured(tmp_path / "tried", "e2e", 2, 1, training={"learning_rate": 0.1})
    (one,) = pareto([tmp_path])
    assert one.ratios["features_at_equal_ce", "e2e"].estimate == pytest.approx(0.5)
    assert "e2e: compared at learning rate 0.0005" in one.remarks[0] and len(one.remarks) == 1
    assert [run.l0 for run in one.runs if run.kind == "e2e"] == [30, 15, 1, 7.5] and len(point_rows([one])) == 7
    measured(tmp_path / "more", "e2e", 1, 2, training={"learning_rate": 0.1})
    measured(tmp_path / "many", "e2e", 4, 0.5, training={"learning_rate": 0.1})
    (undecided,) = pareto([tmp_path])
    assert undecided.ratios["features_at_equal_ce", "e2e"].estimate is None and not undecided.remarks


def test_settings_alike_are_told_without_what_they_share(tmp_path):
    measured(tmp_path / "a", "e2e", 1, 3, training={"batch": 7})
    (one,) = pareto([tmp_path])
    assert one.setting == Setting("embedded", "blocks.3.hook_resid_pre", 100, 1000, 256, started=False)


def test_runs_are_looked_for_below_a_folder_but_not_among_trials(tmp_path):
    runs = [measured(tmp_path / "sweep" / "runs" / name, "e2e", 1, 3) for name in "ab"]
    measured(tmp_path / "sweep" / "trials" / "c", "e2e", 1, 3)
    unmeasured = measured(tmp_path / "sweep" / "runs" / "d", "e2e", 1, 3)
    (unmeasured / "evaluation.json").unlink()
    assert runs_in([tmp_path, runs[0]]) == runs
    with pytest.raises(RunFolderError, match="not measured yet"):
        pareto([unmeasured])
    (runs[0] / "evaluation.json").unlink()
    (runs[1] / "evaluation.json").unlink()
    with pytest.raises(RunFolderError, match="holds 3 run folders, none of which was measured"):
        runs_in([tmp_path])


def with_prefixes(run, numbers):
    intervals = {
        f"prefix_{name}.{m}": (0.9 * v, 1.1 * v)
        for m, pair in numbers.items()
        for name, v in zip(("l0", "ce_increase"), pair, strict=True)
    }
    return replace(run, prefixes=numbers, intervals={**run.intervals, **intervals})


def test_prefixes_are_a_line_for_each_run():
    plain, *nested = curve()
    numbers = [{48: (1.5, 3.0), 336: (6.0, 1.2)}, {48: (1.0, 4.0), 336: (4.0, 1.5)}]
    nested = [with_prefixes(run, each) for run, each in zip(nested, numbers, strict=True)]
    chart = prefix_chart([plain, *nested], "a site", "prefixes-1")
    over_l0, over_length = chart.panels
    assert [series.label for series in over_l0.series] == ["λ 2, seed 0", "λ 4, seed 0"]
    for series, run, each in zip(over_l0.series, nested, numbers, strict=True):
        assert [(mark.x, mark.y) for mark in series.marks] == [*each.values(), (run.l0, run.ce_increase)]
        assert series.marks[0].y_ends == pytest.approx((0.9 * each[48][1], 1.1 * each[48][1]))
        assert "the first 48 of 1,536 features" in series.marks[0].hover
    assert [mark.x for mark in over_length.series[1].marks] == [48, 336, 1536]
    assert len({series.rank for series in over_l0.series}) == 2
    rows = prefix_rows([plain, *nested])
    assert [row["features"] for row in rows] == 2 * [48, 336, 1536] and rows[0]["ce_increase.high"] == pytest.approx(
        3.3
    )
    assert not any(panel.series for panel in prefix_chart([plain], "a site", "prefixes-1").panels)


def test_prefixes_of_several_seeds_are_one_line_of_their_means():
    nested = [
        with_prefixes(run, {48: (l0, ce), 336: (4 * l0, ce / 2)})
        for seed, l0, ce in ((0, 1.0, 4.0), (1, 1.5, 3.0))
        for run in curve(seed=seed)[:2]
    ]
    chart = prefix_chart([*nested, with_prefixes(curve()[2], {48: (2.0, 1.0)})], "a site", "prefixes-1")
    for panel, first in zip(chart.panels, (1.25, 48), strict=True):
        lines = [series for series in panel.series if series.joined]
        assert [series.label for series in lines] == ["λ 1, 2 seeds", "λ 2, 2 seeds", "λ 4, seed 0"]
        assert [(mark.x, mark.y) for mark in lines[0].marks[:1]] == [(first, 3.5)] and not lines[0].marked
        dots = [series for series in panel.series if not series.joined]
        assert [len(series.marks) for series in dots] == [6, 6] and [series.rank for series in dots] == [0, 1]
    assert "the line joins their means" in chart.caption


def test_prefixes_are_told_in_a_summary_as_in_the_run():
    run = with_prefixes(curve()[0], {48: (1.5, 3.0)})
    assert json.loads(json.dumps(run.to_json()))["prefixes"] == {"48": [1.5, 3.0]}
