"""Any number of methods: each has a curve, a colour and a label of its own, wherever runs are compared."""

import json
import re
from dataclasses import replace

import pytest
from rich.console import Console

from endwise.analysis.comparable import Setting, distinguished, methods_of, pairs_of
from endwise.analysis.comparison.comparison import summarise
from endwise.analysis.comparison.page import report_html
from endwise.analysis.comparison.printed import print_summary
from endwise.analysis.pareto.curves import Pareto, point_rows, ratio_rows
from endwise.analysis.pareto.page import pareto_chart, print_pareto, write_pareto
from endwise.config.method import PRESET_METHODS, Knob, Method
from endwise.config.phases import PRESETS
from endwise.config.run import RunConfig
from endwise.figures.interactive import div
from endwise.figures.style import colour_of, first_of_each_name, marker_of
from made_runs import make_run

SETTING = Setting("embedded", "blocks.3.hook_resid_pre", 6000, 600_000, 1536, started=False)

LABELS = ["local", "e2e", "e2e+ds", "e2e+next_cosine"]
FACTORS = {"local": 1.0, "e2e": 0.5, "e2e_ds": 0.6, "e2e+next_cosine": 0.4}


def curves(*kinds, seeds=(0,)):
    return [
        make_run(kind, coefficient, ce, FACTORS[kind] * l0, seed=seed)
        for kind in kinds
        for seed in seeds
        for coefficient, ce, l0 in ((1, 0.1, 60.0), (2, 0.2, 40.0), (3, 0.3, 25.0))
    ]


@pytest.fixture(scope="module")
def summary():
    return summarise(curves(*FACTORS), clean_ce=3.5, resamples=20)


@pytest.fixture(scope="module")
def one(summary):
    return Pareto(SETTING, summary.runs, summary)


def test_each_is_related_to_local(summary):
    found = {key: ratio.estimate for key, ratio in summary.features_at_equal_ce.items()}
    assert found == {key: pytest.approx(FACTORS[key]) for key in ("e2e", "e2e_ds", "e2e+next_cosine")}
    assert [method.label for method in summary.methods] == LABELS
    assert len(summary.similar) == 4 and "e2e+next_cosine/local" in summary.downstream
    assert any(line.startswith("e2e+next_cosine needs 40 %") for line in summary.verdicts)
    content = json.loads(json.dumps(summary.to_json()))
    assert {run["kind"] for run in content["runs"]} == set(FACTORS)
    assert content["features_at_equal_ce"]["e2e_ds"]["ratio"] == pytest.approx(0.6)


def test_without_local_the_first_is_what_others_are_related_to():
    summary = summarise(curves("e2e_ds", "e2e+next_cosine"), clean_ce=3.5, resamples=20)
    assert summary.baseline.label == "e2e+ds"
    assert summary.features_at_equal_ce["e2e+next_cosine"].estimate == pytest.approx(0.4 / 0.6)
    assert any("of e2e+ds's features per token" in line for line in summary.verdicts)


def test_a_figure_has_a_name_a_colour_and_a_marker_for_each(one):
    chart = pareto_chart(one.runs, "a site", "pareto")
    names = first_of_each_name(chart)
    assert list(names) == LABELS
    marked = [series for panel in chart.panels for series in panel.series if series.marked]
    assert marked and all(len(series.marks) == 3 for series in marked)  # none has another's runs
    looks = [(colour_of(series.method), marker_of(series)) for series in names.values()]
    assert len({colour for colour, _ in looks}) == len({marker for _, marker in looks}) == 4
    assert [colour_of(PRESET_METHODS[kind]) for kind in ("local", "e2e", "e2e_ds")] == ["#0072B2", "#D55E00", "#009E73"]
    assert all(label.replace("+", "&#43;") in div(chart) or label in div(chart) for label in LABELS)


def test_pages_and_tables_name_each(one, summary, tmp_path, undrawn):
    page = report_html(summary)
    assert len(re.findall(r"<button[^>]*><svg class=\"swatch\"", page)) == 2 * 4  # two legends
    assert page.count("e2e+next_cosine") > 4 and "var(--method-0)" in page
    assert write_pareto([one], tmp_path).exists()
    print_pareto([one], Console(record=True, width=200))
    console = Console(record=True, width=200)
    print_summary(summary, console)
    told = console.export_text()
    assert all(label in told for label in LABELS)
    assert {row["method"] for row in point_rows([one])} == set(LABELS)
    assert {(row["kind"], row["method"], row["relative_to"]) for row in ratio_rows([one])} == {
        ("e2e", "e2e", "local"),
        ("e2e_ds", "e2e+ds", "local"),
        ("e2e+next_cosine", "e2e+next_cosine", "local"),
    }


def test_claims_compare_the_presets_and_each_further_method_with_the_baseline():
    methods = methods_of(curves(*FACTORS))
    pairs = pairs_of([("e2e", "local"), ("e2e_ds", "e2e")], methods)
    assert [(a.label, b.label) for a, b in pairs] == [("e2e", "local"), ("e2e+ds", "e2e"), ("e2e+next_cosine", "local")]


def test_methods_of_one_name_are_told_apart_by_what_differs():
    base = {"kl": 1.0, "next_cosine": 1.0}
    runs = [
        replace(run, method=Method("e2e+next_cosine", "e2e+next_cosine", {**base, "next_cosine": weight}))
        for weight in (1.0, 1.0, 2.0)
        for run in curves("e2e")
    ]
    apart = distinguished([*curves("local"), *runs])
    assert [method.label for method in methods_of(apart)] == [
        "local",
        "e2e+next_cosine",
        "e2e+next_cosine, next_cosine 2.0",
    ]
    assert len({colour_of(method) for method in methods_of(apart)}) == 3
    assert distinguished(apart) == apart


def test_a_recipe_says_its_method_and_its_knob():
    recipe = {
        "site": "blocks.3.hook_resid_pre",
        "dictionary": {"size": 24},
        "objective": {"kind": "e2e_ds", "downstream_mse": 2, "sparsity": {"coefficient": 3}},
        "training": {"tokens": 1000},
    }
    config = RunConfig.build(recipe)
    method, knob = Method.of(config), Knob.of(config)
    assert (method.key, method.label, str(knob), knob.tag) == ("e2e_ds", "e2e+ds", "λ 3", "3")
    assert method.content["downstream_mse"] == 2 and not any("coefficient" in key for key in method.content)
    assert Knob.of(knob.set_in(config, 5.0)).value == 5.0
    other = RunConfig.build({**recipe, "dictionary": {"size": 48}})
    assert Method.of(other).digest == method.digest


def test_phases_that_a_word_stands_for_have_its_name():
    values = {
        "site": "blocks.3.hook_resid_pre",
        "dictionary": {"ratio": 2},
        "objective": {"sparsity": {"target_l0": 9}},
    }
    by_word, spelled, other = (
        Method.of(RunConfig.build({**values, "training": {"tokens": 9}, "phases": phases}, "it"))
        for phases in ("staged", PRESETS["staged"], [{**PRESETS["staged"][0], "share": 1.0}])
    )
    assert by_word == spelled and by_word.label == "staged" and other.key == "local"
