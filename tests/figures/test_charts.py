"""Figures as they are described, for print and for a page: ticks apart, legends whole, text that stays text."""

import itertools
import json
import math
import re
from dataclasses import replace

import pytest

from endwise.analysis.directions.reconstruction import explained_variance
from endwise.config.method import PRESET_METHODS
from endwise.figures.charts import Axis, Band, Chart, Mark, Panel, Series
from endwise.figures.interactive import div
from endwise.figures.print import draw, save
from endwise.figures.style import first_of_each_name, limits, log_ticks, tick_text
from made_runs import make_run


@pytest.fixture(autouse=True, scope="module")
def coarsely_drawn():
    """Nothing: figures are drawn as readers get them."""


HOSTILE = '</script><img src=x onerror="alert(1)">&amp;\u202egnp$x$'
X, Y = Axis("L0: features per token", log=True), Axis("CE increase, nats per token", from_zero=True)


def chart(*series, title="a title", x=X, y=Y):
    return Chart("name", title, "a caption", (Panel("a panel", x, y, tuple(series)),))


def line(kind="e2e", **changes):
    return Series(PRESET_METHODS[kind], (Mark(10.0, 0.5, "first"), Mark(100.0, 0.1, "second")), **changes)


def described(text):
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', text, re.DOTALL)[1])


@pytest.mark.parametrize("low", [0.0034, 0.2, 7.0, 110.0, 1024.0, 230e3])
@pytest.mark.parametrize("factor", [1.4, 3.0, 8.0, 22.0, 400.0, 1e4])
def test_ticks_of_a_logarithmic_axis_are_round_and_apart(low, factor):
    ticks = log_ticks(low, low * factor)
    assert 1 <= len(ticks) <= 9 and low <= ticks[0] and ticks[-1] <= low * factor
    assert all(len(tick_text(tick).replace(",", "").strip("0.")) <= 2 for tick in ticks)
    places = [math.log(tick / low) / math.log(factor) for tick in ticks]
    letters = [len(tick_text(tick)) for tick in ticks]
    for (a, b), (left, right) in zip(itertools.pairwise(places), itertools.pairwise(letters), strict=True):
        assert b - a > 0.02 * (left + right) / 2  # a letter takes about 2 % of an axis


def test_a_legend_joins_a_line_and_the_marks_about_it():
    middle, marks = line(marked=False), line(joined=False)
    (shown,) = first_of_each_name(chart(middle, marks)).values()
    assert shown.joined and shown.marked


def test_a_printed_legend_has_marks_to_be_seen_though_they_are_a_crowd():
    crowd = Series(PRESET_METHODS["local"], tuple(Mark(1.0 + n, 1.0) for n in range(200)), "all", joined=False)
    figure = draw(chart(crowd))
    handle = figure.legends[0].legend_handles[0]
    assert handle.get_markersize() > 4 and handle.get_alpha() == 1


def test_panels_keep_their_height_under_a_legend_of_many_rows():
    def height_of_panel(count):
        figure = draw(chart(*(line(label=f"a label that is rather long {n}") for n in range(count))))
        figure.draw_without_rendering()
        return figure.axes[0].get_window_extent().height

    assert height_of_panel(12) == pytest.approx(height_of_panel(1), rel=0.1)


def test_a_point_tells_its_run_and_every_interval_is_drawn():
    mark = Mark(10.0, 0.5, "e2e, λ 1\nruns/e2e-1", x_ends=(9.0, 12.0), y_ends=(0.4, 0.7), front=True)
    bars = described(div(chart(Series(PRESET_METHODS["e2e"], (mark,)))))[0]["data"]
    assert bars[0]["hovertext"] == ["e2e, λ 1<br>runs/e2e-1"]
    ends = {axis: bars[0][f"error_{axis}"][side] for axis, side in (("x", "array"), ("y", "arrayminus"))}
    assert ends == {"x": [2], "y": pytest.approx([0.1])}
    assert bars[1]["marker"]["symbol"] == "circle-open"  # the ring of the front


def test_a_label_longer_than_its_axis_on_a_phone_is_folded():
    axis = Axis("unexplained share of the variance along v")
    made = described(div(Chart("name", "", "", (Panel("", X, axis, (line(),)),))))[0]["layout"]["yaxis"]["title"]
    assert made["text"] == "unexplained share of the variance<br>along v"


def test_hostile_text_is_text_on_a_page_and_in_print(tmp_path):
    mark = Mark(1.0, 0.5, HOSTILE)
    names = Axis(HOSTILE, categories=(HOSTILE, "b"))
    panels = (Panel(HOSTILE, names, Y, (Series(PRESET_METHODS["e2e"], (mark,), HOSTILE),)), Panel("", X, Y, (line(),)))
    made = Chart("name", HOSTILE, HOSTILE, panels)
    text = div(made)
    assert text.count("<script") == text.count("</script>") == 1 and "<img" not in text and "\u202e" not in text
    first = described(text)[0]
    hover = first["data"][0]["hovertext"][0].replace("<br>", "")
    assert "&lt;img" in hover and "<" not in hover
    title = first["layout"]["xaxis"]["title"]["text"].replace("<br>", "")
    assert "<" not in title + "".join(first["layout"]["xaxis"]["ticktext"])
    for path in save(made, tmp_path):
        assert path.stat().st_size > 1000


def test_a_name_that_could_leave_the_folder_is_refused():
    with pytest.raises(ValueError, match="letters, digits"):
        Chart("../up", "", "", ())


def test_a_printed_figure_is_the_same_bytes_each_time(tmp_path):
    made = chart(line(band=Band((10.0, 100.0), (0.4, 0.05), (0.6, 0.2), "3 seeds")), line("local"))
    first = [path.read_bytes() for path in save(made, tmp_path / "a")]
    assert [path.read_bytes() for path in save(made, tmp_path / "b")] == first


def test_what_an_axis_has_no_place_for_is_said():
    made = chart(Series(PRESET_METHODS["e2e"], (Mark(0.0, 0.5), Mark(10.0, 0.5), Mark(20.0, math.nan))))
    assert "2 points are at 0 or below" in div(made)
    assert limits(made.panels[0])[0] == pytest.approx((10 / 1.15, 10 * 1.15))


@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize("low", [3e-9, 2e-6, 0.0004, 3.0])
@pytest.mark.parametrize("decades", [3, 5, 7, 9])
def test_powers_of_ten_stand_at_one_distance(low, decades, upright):
    ticks = log_ticks(low, low * 10**decades, upright)
    assert len(ticks) >= 3
    assert len({round(math.log10(b / a)) for a, b in itertools.pairwise(ticks)}) == 1


def test_small_numbers_are_written_as_powers():
    assert [tick_text(value) for value in (1e-8, 2e-5, 1e-4, 0.001, 1000.0)] == [
        *("10⁻⁸", "2×10⁻⁵", "0.0001", "0.001", "1,000")
    ]


def test_the_marks_at_the_ends_of_a_long_axis_are_whole():
    made = chart(Series(PRESET_METHODS["e2e"], (Mark(1e-6, 0.5), Mark(1.0, 0.1)), joined=False))
    (low, high), _ = limits(made.panels[0])
    length = math.log(high / low)
    half = 0.5 * 5.5 / 72 / 2.4  # of a marker, as a share of an axis of 2.4 inches
    assert math.log(1e-6 / low) / length > half and math.log(high / 1.0) / length > half


def test_a_legend_names_the_kinds_in_one_order():
    names = first_of_each_name(chart(line("e2e_ds"), line("local", label="a"), line("e2e"), line("local", label="b")))
    assert list(names) == ["local, a", "local, b", "e2e", "e2e+ds"]


def test_bands_over_different_things_look_different():
    def hatched(*over):
        bands = [Band((10.0, 100.0), (0.4, 0.05), (0.6, 0.2), of) for of in over]
        made = chart(*(line(kind, band=band) for kind, band in zip(("local", "e2e"), bands, strict=True)))
        figure = draw(made)
        printed = [each.get_hatch() for each in figure.axes[0].collections if each.get_facecolor().size == 4]
        legend = [h.get_hatch() for h in figure.legends[0].legend_handles if hasattr(h, "get_hatch")]
        on_page = ["fillpattern" in trace for trace in described(div(made))[0]["data"] if "fill" in trace]
        return [bool(each) for each in printed], [bool(each) for each in legend], on_page

    assert hatched("3 seeds", "held-out text") == ([False, True], [False, True], [False, True])
    assert hatched("3 seeds", "3 seeds") == ([False, False], [False], [False, False])


def test_a_legend_has_a_column_for_each_kind_of_several_names():
    figure = draw(chart(*(line(kind, label=f"seed {n}", rank=n) for kind in ("local", "e2e") for n in range(3))))
    figure.draw_without_rendering()
    places = {}
    for text in figure.legends[0].get_texts():
        if text.get_text():
            places.setdefault(text.get_text().partition(",")[0], set()).add(round(text.get_window_extent().x0))
    assert {kind: len(at) for kind, at in places.items()} == {"local": 1, "e2e": 1}


def test_four_panels_stand_two_by_two():
    panel = Panel("", X, Y, (line(),))
    figure = draw(Chart("name", "t", "c", (panel,) * 4))
    assert figure.axes[0].get_gridspec().get_geometry() == (2, 2)


def test_a_curve_joins_the_runs_of_one_seed_and_no_others():
    runs = [make_run("e2e", c, ce, l0, seed=seed) for seed in (1, 0) for c, ce, l0 in ((1, 0.3, 20.0), (2, 0.5, 10.0))]
    runs = [replace(run, explained_variances={"per_token": 0.5, "per_token_layernorm": 0.6}) for run in runs]
    for panel in explained_variance(runs, "here").panels:
        curve, others = panel.series
        assert curve.joined and not others.joined and others.label == "other seeds"
        assert all("seed 0" in mark.hover for mark in curve.marks)
        assert all("seed 1" in mark.hover for mark in others.marks) and len(others.marks) == 2
