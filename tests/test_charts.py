"""Figures as they are described, for print and for a page: ticks apart, legends whole, text that stays text."""

import itertools
import json
import math
import re

import pytest

from endwise.figures.charts import Axis, Band, Chart, Mark, Panel, Series
from endwise.figures.interactive import div
from endwise.figures.print import draw, save
from endwise.figures.style import first_of_each_name, limits, log_ticks, tick_text

HOSTILE = '</script><img src=x onerror="alert(1)">&amp;\u202egnp$x$'
X, Y = Axis("L0: features per token", log=True), Axis("CE increase, nats per token", from_zero=True)


def chart(*series, title="a title", x=X, y=Y):
    return Chart("name", title, "a caption", (Panel("a panel", x, y, tuple(series)),))


def line(kind="e2e", **changes):
    return Series(kind, (Mark(10.0, 0.5, "first"), Mark(100.0, 0.1, "second")), **changes)


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
    crowd = Series("local", tuple(Mark(1.0 + n, 1.0) for n in range(200)), "all", joined=False)
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
    bars = described(div(chart(Series("e2e", (mark,)))))[0]["data"]
    assert bars[0]["hovertext"] == ["e2e, λ 1<br>runs/e2e-1"]
    ends = {axis: bars[0][f"error_{axis}"][side] for axis, side in (("x", "array"), ("y", "arrayminus"))}
    assert ends == {"x": [2], "y": pytest.approx([0.1])}
    assert bars[1]["marker"]["symbol"] == "circle-open"  # the ring of the front


def test_hostile_text_is_text_on_a_page_and_in_print(tmp_path):
    mark = Mark(1.0, 0.5, HOSTILE)
    names = Axis(HOSTILE, categories=(HOSTILE, "b"))
    panels = (Panel(HOSTILE, names, Y, (Series("e2e", (mark,), HOSTILE),)), Panel("", X, Y, (line(),)))
    made = Chart("name", HOSTILE, HOSTILE, panels)
    text = div(made)
    assert text.count("<script") == text.count("</script>") == 1 and "<img" not in text and "\u202e" not in text
    first = described(text)[0]
    hover = first["data"][0]["hovertext"][0].replace("<br>", "")
    assert "&lt;img" in hover and "<" not in hover
    assert "<" not in first["layout"]["xaxis"]["title"]["text"] + "".join(first["layout"]["xaxis"]["ticktext"])
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
    made = chart(Series("e2e", (Mark(0.0, 0.5), Mark(10.0, 0.5), Mark(20.0, math.nan))))
    assert "2 points are at 0 or below" in div(made)
    assert limits(made.panels[0])[0] == pytest.approx((10 / 1.15, 10 * 1.15))
