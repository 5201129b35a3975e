"""A map of features: what lies together, what is said of each, and what is said where there can be none."""

import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from pyarrow import parquet

import endwise
from endwise.analysis.geometry.feature_map import (
    feature_map,
    feature_maps,
    map_columns,
    mapped_runs,
    region_rows,
    top_tokens,
)
from endwise.analysis.geometry.page import map_chart, write_geometry
from endwise.common.errors import ConfigError
from endwise.figures.interactive import div, in_words
from endwise.figures.style import CROWD
from made_dictionaries import WIDTH, directions, near, write_run

COUNT = 40


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Two kinds with two bundles each: one that both have, and one of its own."""
    folder = tmp_path_factory.mktemp("runs")
    centres = torch.linalg.qr(directions(3).T)[0].T

    def bundle(centre, seed):
        return near(centres[centre].repeat(20, 1), 0.3, seed)[0]

    firings = np.arange(COUNT)
    write_run(folder / "local", torch.cat([bundle(0, 1), bundle(1, 2)]), firings=firings)
    write_run(folder / "e2e", torch.cat([bundle(0, 3), bundle(2, 4)]), kind="e2e", firings=firings)
    (one,) = endwise.geometry([folder], importance=lambda run: np.arange(COUNT) / 10 if run.name == "e2e" else None)
    return one


class Flat:
    """Stands in for UMAP, whose compilation takes most of a minute: two coordinates of the directions themselves."""

    def __init__(self, **settings):
        self.settings = settings

    def fit_transform(self, directions):
        assert self.settings["metric"] == "cosine" and self.settings["random_state"] == 12345
        u = np.linalg.svd(directions.astype(np.float64), full_matrices=False)[2]
        return directions @ u[:2].T


def test_regions_are_the_bundles(found):
    pytest.importorskip("sklearn")
    made = feature_map(found, tokens=lambda rows: [("a", "<b>") if row[0] > 0 else ("a",) for row in rows], umap=Flat)
    assert [run.kind for run in made.runs] == ["local", "e2e"]
    assert len(made.run) == 2 * (COUNT - 1)  # the feature that never fired is dead
    assert (made.features == np.tile(np.arange(1, COUNT), 2)).all()
    assert made.density == pytest.approx(np.tile(np.arange(1, COUNT), 2) / 256)
    assert np.isnan(made.importance[: COUNT - 1]).all() and made.importance[-1] == pytest.approx(3.9)
    assert made.regions == 3
    shared = made.region[:19]  # of local's first bundle
    assert (made.region[COUNT - 1 :][:19] == np.bincount(shared).argmax()).mean() > 0.9
    rows = region_rows(made)
    assert [row["region"] for row in rows] == [1, 2, 3, 0]
    sizes = [row["features"] for row in rows[:-1]]
    assert sizes == sorted(sizes, reverse=True) and sum(row["features"] for row in rows) == 2 * (COUNT - 1)
    for row in rows:
        assert row["local.features"] + row["e2e.features"] == row["features"]
    assert sum(row["e2e.share_of_run"] for row in rows) == pytest.approx(1.0)
    both = [row for row in rows[:-1] if row["local.features"] and row["e2e.features"]]
    assert len(both) == 1
    assert set(map_columns(made)) >= {"run", "kind", "feature", "x", "y", "region", "density", "importance", "tokens"}


def test_the_page_tells_of_every_feature_as_text(found, tmp_path):
    pytest.importorskip("sklearn")
    made = feature_map(found, tokens=lambda rows: [("<script>", "\x1b")] * len(rows), umap=Flat)
    chart = map_chart(made, "map-1")
    assert sum(len(series.marks) for series in chart.panels[0].series) == 2 * (COUNT - 1)
    assert [note.text for note in chart.panels[0].notes] == ["1", "2", "3"]
    html = div(chart)
    assert 'class="chart large"' in html and "e2e, feature 39" in html and "importance 3.9 nats" in html
    assert "<script>" not in html.replace('<script type="application/json">', "") and "\x1b" not in html
    page = write_geometry([found], tmp_path, maps={0: made}).read_text()
    assert 'id="map-1"' in page and "Regions of the map" in page
    assert len(parquet.read_table(tmp_path / "map-1.parquet")) == 2 * (COUNT - 1)
    assert len(parquet.read_table(tmp_path / "map-1-regions.parquet")) == 4
    assert (tmp_path / "map-1.png").stat().st_size > 0 and (tmp_path / "map-1.csv").stat().st_size > 0


def test_a_crowd_is_thinned_in_the_figure_and_in_words(found):
    pytest.importorskip("sklearn")
    chart = map_chart(feature_map(found, umap=Flat), "map", shown=40)
    assert [len(series.marks) for series in chart.panels[0].series] == [20, 20]
    assert "One in 2 features is shown" in chart.caption
    (panel,) = chart.panels
    crowd = replace(panel, series=tuple(replace(each, marks=each.marks * 6) for each in panel.series))
    assert CROWD == 100 and "and 20 more" in in_words(crowd)


@pytest.mark.slow
def test_umap_itself_lays_like_with_like(found):
    """The one test that runs it."""
    pytest.importorskip("umap")
    made = feature_map(found)
    again = feature_map(found)
    assert (made.places == again.places).all()
    rows = np.concatenate([np.repeat([0, 1], [19, 20]), np.repeat([0, 2], [19, 20])])
    gaps = np.linalg.norm(made.places[:, None] - made.places[None], axis=-1)
    np.fill_diagonal(gaps, np.inf)
    assert (rows[gaps.argmin(1)] == rows).mean() > 0.95


def test_what_can_be_mapped(found, tmp_path):
    assert [run.kind for run in mapped_runs(found)] == ["local", "e2e"]
    (alone,) = endwise.geometry([write_run(tmp_path / f"{seed}", directions(9), seed=seed) for seed in range(2)])
    assert [run.seed for run in mapped_runs(alone)] == [0, 1]
    with pytest.raises(ConfigError, match="20 alive features or more; these runs have 18"):
        feature_map(alone)


def test_without_the_extra_it_is_named(found, monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)  # as Python marks what cannot be imported
    with pytest.raises(ConfigError, match=re.escape("pip install 'endwise[umap]'")):
        feature_maps([found])


def test_top_tokens_are_those_with_the_greatest_products(model):
    rows = directions(7, width=WIDTH)
    logits = rows.double() @ model.readout.unembedding.weight.double().T
    expected = [tuple(map(str, row)) for row in logits.argsort(dim=1, descending=True)[:, :6].tolist()]
    assert top_tokens(model, rows) == expected
