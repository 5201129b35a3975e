"""Curves of runs that were never made, whose ratios are known."""

import math

from endwise.analysis.comparison.comparison import Summary, summarise
from made_runs import make_run


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
