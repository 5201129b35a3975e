"""The studies that tools/price_study.py carries out: their recipes are valid, and no two runs are one."""

import sys

import pytest

from places import TOOLS


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    yield pytest.importorskip("price_study")
    for name in ("price_study", "study_rows"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["price", "smollm2", "smollm2/gpu"])
def test_every_run_of_a_study_is_a_recipe_of_its_own(tool, name):
    every = tool.curves_of(tool.Study(tool.RESULTS / name))
    curves = [curve for curve in every if "of" not in curve.own]  # but for those held against another reference
    asked = [
        (curve.site, curve.name, seed, rate, level)
        for curve in curves
        for seed, levels in ((0, [curve.middle]), (curve.seed, curve.levels))
        for rate in curve.rates
        for level in levels
    ]
    built = {key: tool.fingerprint(tool.Curve(curves[0].study, *key[:3]).recipe(key[4], key[3])) for key in set(asked)}
    assert len(set(built.values())) == len(built) > len(curves)
    assert {curve.own.get("reference", curve.study["reference"]) for curve in every} <= {curve.name for curve in curves}


def test_a_run_that_is_there_is_not_wanted_again(tool, tmp_path):
    study = tool.Study(tmp_path)
    values = tool.yaml.safe_load((tool.RESULTS / "smollm2" / "study.yaml").read_text())
    (tmp_path / "study.yaml").write_text(tool.yaml.safe_dump(values))
    curve = tool.curves_of(study)[0]
    first, second = curve.wanted()
    tool.write_json(study.rows.file(first), {"tuning": {"ce_increase": 0.4}, "learning_rate": 0.004})
    assert curve.rate() is None
    tool.write_json(study.rows.file(second), {"tuning": {"ce_increase": 0.3}, "learning_rate": 0.012})
    assert curve.rate() == 0.012 and [each.training.learning_rate for each in curve.wanted()] == [0.012]
