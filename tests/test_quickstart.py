"""The quickstart from end to end, at a hundredth of its size."""

import json
import math
from pathlib import Path

import pytest

from endwise.common.errors import RunFolderError
from endwise.config.objective import KINDS
from endwise.paper.quickstart import quickstart, recipes
from endwise.runs.folder import RunFolder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart") / "out"
    small = ("training.tokens=8192", "evaluation.tokens=4096", "dictionary.ratio=2")
    return out, quickstart(out, seed=3, overrides=small, display=False)


def test_summary_has_the_promised_fields(finished):
    out, _ = finished
    content = json.loads((out / "summary.json").read_text())
    assert 2 < content["clean_ce"] < 5
    assert len(content["runs"]) == len(recipes(out, 3))
    for run in content["runs"]:
        assert {"kind", "site", "coefficient", "seed", "l0", "alive", "d_sae", "ce_increase", "kl"} <= set(run)
        assert {"explained_variance", "downstream_mse", "tokens", "seconds", "folder"} <= set(run)
        assert run["seed"] == 3 and run["d_sae"] == 256 and run["tokens"] == 8192
        assert math.isfinite(run["ce_increase"]) and run["l0"] > 0 and run["seconds"] > 0
        assert len(run["downstream_mse"]) == 3
        assert RunFolder.open(Path(run["folder"])).evaluation()["l0"] == run["l0"]
    assert set(content["features_at_equal_ce"]) == {"e2e", "e2e_ds"}


def test_report_shows_every_run(finished):
    out, summary = finished
    page = (out / "report.html").read_text()
    for run in summary.runs:
        assert f"{run.l0:.1f}" in page


def test_a_folder_in_use_is_refused_before_any_work(finished):
    out, _ = finished
    with pytest.raises(RunFolderError, match="not an empty folder"):
        quickstart(out, display=False)


def test_each_kind_gets_the_same_setting(tmp_path):
    configs = list(recipes(tmp_path, 0))
    assert {config.objective.kind for config in configs} == set(KINDS)
    for config in configs:
        ours, first = config.training.model_dump(), configs[0].training.model_dump()
        assert ours | {"learning_rate": 0} == first | {"learning_rate": 0}
        assert (config.site, config.dictionary, config.seed) == (configs[0].site, configs[0].dictionary, 0)
