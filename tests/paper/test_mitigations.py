"""CE increase at one L0 of hand-made curves, whose values there are known."""

import numpy as np
import pytest

from endwise.analysis.ratios import Ratio, below
from endwise.common.statistics import InterpolationError, resampling_weights
from endwise.config.run import RunConfig
from endwise.paper.costs import Cost
from endwise.paper.mitigations import Variant, ce_at_l0, common_l0, mitigations, total_cost
from made_runs import make_run

LOW, HIGH = (10.0, 0.8), (40.0, 0.2)
"""L0 and CE increase of a curve's ends."""


def curve(kind="e2e", factor=1.0, points=(LOW, HIGH), seeds=1):
    return tuple(
        make_run(kind, 1.0 + i, factor * ce, l0, seed=seed)
        for seed in range(seeds)
        for i, (l0, ce) in enumerate(points)
    )


def variant(runs, way="tokens", tokens=100, seconds=1.0, started=False):
    return Variant(runs[0].kind, way, f"{tokens} tokens", tuple(runs), started, tokens, seconds)


def test_the_logarithm_of_ce_is_linear_between_runs():
    middle, draws = ce_at_l0(curve(), 25.0, 200, 0)
    assert middle == pytest.approx(np.sqrt(0.8 * 0.2))
    assert draws.min() < middle < draws.max()


def test_each_resample_is_interpolated_again():
    runs, seed = curve(), 7
    weights = resampling_weights(len(runs[0].sums["tokens"]), 100, seed)
    draws = []
    for row in weights:
        ends = []
        for run in runs:
            l0 = row @ run.sums["l0"] / (row @ run.sums["tokens"])
            ends.append((l0, np.log(row @ run.sums["ce_increase"] / (row @ run.sums["predictions"]))))
        (x0, y0), (x1, y1) = sorted(ends)
        draws.append(np.exp(y0 + (25.0 - x0) / (x1 - x0) * (y1 - y0)))
    assert ce_at_l0(runs, 25.0, 100, seed)[1] == pytest.approx(draws, rel=1e-9)


def test_nothing_is_read_off_beyond_the_runs_or_where_they_are_not_monotone():
    with pytest.raises(InterpolationError, match="outside"):
        ce_at_l0(curve(), 50.0, 50, 0)
    with pytest.raises(InterpolationError, match="monotone"):
        ce_at_l0(curve(points=(LOW, (20.0, 0.1), HIGH)), 15.0, 50, 0)


def test_the_common_l0_is_covered_by_most_variants():
    spans = [(10.0, 20.0), (15.0, 40.0), (16.0, 30.0), (100.0, 200.0)]
    made = [variant(curve(points=((low, 0.8), (high, 0.2)))) for low, high in spans]
    assert 16 <= common_l0(made) <= 20
    assert common_l0([variant(curve(points=(LOW,)))]) is None


def test_a_variant_beyond_the_common_l0_tells_why_it_has_no_value():
    near = [variant(curve(factor=factor), tokens=tokens) for factor, tokens in ((1.0, 100), (0.5, 200))]
    far = variant(curve(points=((100.0, 0.3), (200.0, 0.1))), tokens=400)
    found = mitigations([*near, far], 50, 0)
    first, second, last = found.of("e2e", "tokens")
    assert second.ce_increase.estimate == pytest.approx(first.ce_increase.estimate / 2)
    assert last.ce_increase is None and "outside" in last.reason
    assert last.to_row()["ce_increase"] is None and first.to_row()["training_tokens"] == 100


def test_the_cheapest_is_the_fastest_of_those_good_enough():
    quick, slow, worse = (
        variant(curve(factor=factor, seeds=3), tokens=100 + i, seconds=seconds)
        for i, (factor, seconds) in enumerate(((0.5, 3.0), (0.4, 9.0), (1.0, 1.0)))
    )
    found = mitigations([quick, slow, worse], 50, 0)
    level, _ = ce_at_l0(quick.runs[:2], found.l0, 50, 0)
    reference = next(point for point in found.points if point.variant == quick)
    assert reference.ce_increase.estimate == pytest.approx(level)
    assert found.cheapest("e2e", reference, 1.01).variant == quick
    assert found.cheapest("e2e", reference, 0.9).variant == slow
    assert found.cheapest("e2e", reference, 0.7) is None and found.cheapest("local", reference, 2.0) is None
    once = mitigations([variant(v.runs[:2], tokens=v.tokens, seconds=v.seconds) for v in (quick, slow)], 50, 0)
    assert once.cheapest("e2e", once.points[0], 1.01) is None  # one seed bears out nothing


def test_a_relation_of_two_variants_is_paired():
    """The text's noise, which all runs share, cancels; each value alone is far less sure."""
    whole, half = (variant(curve(factor=factor), tokens=tokens) for factor, tokens in ((1.0, 100), (0.5, 200)))
    first, second = mitigations([whole, half], 200, 0).of("e2e", "tokens")
    ratio = second.relative_to(first)
    assert (*ratio.interval, ratio.estimate) == pytest.approx((0.5, 0.5, 0.5)) and not ratio.holds_seeds
    assert first.ce_increase.high / first.ce_increase.low > 1.02
    far = mitigations([whole, variant(curve(points=((100.0, 0.3), (200.0, 0.1))))], 50, 0).points
    assert [point.relative_to(far[0]).estimate for point in far] == [1.0, None]


def test_a_relation_of_two_variants_is_of_the_seeds_that_both_have():
    of_seeds = [(1.0, 0.5), (1.0, 0.6), (1.0, 0.75), (9.0, None)]
    whole, part = [], []
    for seed, (own, other) in enumerate(of_seeds):
        whole += [make_run("e2e", 1.0 + i, own * ce, l0, seed=seed) for i, (l0, ce) in enumerate((LOW, HIGH))]
        if other is not None:
            part += [make_run("e2e", 1.0 + i, other * ce, l0, seed=seed) for i, (l0, ce) in enumerate((LOW, HIGH))]
    first, second = mitigations([variant(whole), variant(part, tokens=200)], 200, 0).of("e2e", "tokens")
    ratio = second.relative_to(first)
    logs = np.log([0.5, 0.6, 0.75])
    half = 4.302653 * logs.std(ddof=1) / np.sqrt(3)  # the text cancels, so that seeds alone are left
    assert ratio.holds_seeds and ratio.seeds == 3 and ratio.estimate == pytest.approx(np.exp(logs.mean()))
    assert ratio.interval == pytest.approx(tuple(np.exp([logs.mean() - half, logs.mean() + half])), rel=1e-6)


def test_the_local_phase_before_an_end_to_end_one_is_counted(tmp_path):
    costs = [
        Cost("local", "blocks.3.hook_resid_pre", None, 1.0, 1),
        Cost("e2e", "blocks.3.hook_resid_pre", None, 10.0, 1),
    ]
    values = {
        "site": "blocks.3.hook_resid_pre",
        "dictionary": {"ratio": 2},
        "objective": {"kind": "local", "sparsity": {"coefficient": 1.0}},
        "training": {"tokens": 1000},
    }
    local = RunConfig.build(values)
    (tmp_path / "config.yaml").write_text(local.to_yaml())
    later = {"objective": {"kind": "e2e", "sparsity": {"coefficient": 1.0}}, "training": {"tokens": 300}}
    assert total_cost(local, costs) == (1000, 1000.0)
    assert total_cost(RunConfig.build(values | later), costs) == (300, 3000.0)
    assert total_cost(RunConfig.build(values | later | {"init_from": str(tmp_path)}), costs) == (1300, 4000.0)


def ratio(ends, **fields):
    return Ratio(None, reason="no") if ends is None else Ratio(0.9, **{"interval": ends, "seeds": 3, **fields})


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([ratio((0.4, 0.6)), ratio((0.8, 0.99))], "shown"),
        ([ratio((0.4, 0.6)), ratio((0.8, 1.01))], "not shown"),
        ([ratio(None), ratio((0.8, 0.9))], "shown"),
        ([ratio(None), ratio(None)], "not testable here"),
        ([ratio((0.4, 0.6)), ratio((0.8, 0.9), seeds=1)], "not testable here"),
        ([ratio((0.8, 1.1), seeds=2)], "not testable here"),
        ([ratio((0.8, 1.1), seeds=1), ratio((0.8, 1.1))], "not shown"),
        ([ratio((0.4, 0.6)), Ratio(None, crossings=(0.2,), at_ends=(1.2, 0.8), seeds=3)], "not shown"),
    ],
    ids=["below", "one above", "one unknown", "none known", "one seed", "two seeds", "one seed, one above", "crossing"],
)
def test_a_claim_of_less_takes_whole_intervals_that_hold_seeds_and_no_crossing(ratios, verdict):
    assert below(ratios) == verdict
