"""A small study from first to last: what it writes, and that it ends alike however often it is killed."""

import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

import warm
from endwise.common.errors import ConfigError
from endwise.paper import StudyConfig, reproduce
from endwise.runs.folder import RunFolder
from warm import Warm

STUDY = {
    "recipe": {
        "data": {"context": 32},
        "dictionary": {"ratio": 2},
        "training": {"tokens": 256, "batch": 2, "alive_window": 256, "checkpoint_every": 2},
        "evaluation": {"tokens": 256, "during_training_tokens": 64, "batch": 8, "bootstrap": 10},
    },
    "sites": {"blocks.3.hook_resid_pre": {}},
    "kinds": {
        "local": {"coefficients": [0.5, 2.0], "learning_rates": [2e-2]},
        "e2e": {"coefficients": [0.5, 2.0], "learning_rates": [2e-2]},
        "e2e_ds": {"coefficients": [1.0, 4.0], "learning_rates": [2e-2], "downstream_mse": 1.0},
    },
    "seeds": 2,
    "lengths": [0.5],
    "ratios": [3],
    "starts": [0.5],
    "cost_tokens": 192,
}
pytestmark = pytest.mark.usefixtures("models_outlined_once")
TIMED = ("costs", "costs_of_variants")
VERDICTS = {"shown", "not shown", "not testable here"}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Study in a folder of relative name: a run that starts from one of its SAEs names the path as it is given."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("study"))
        yield Path("made")


@pytest.fixture(scope="module")
def made(out):
    return reproduce(StudyConfig.build(STUDY), out, display=False)


def tables(folder):
    return {file.name: file.read_bytes() for file in sorted((folder / "tables").iterdir()) if file.stem not in TIMED}


def test_every_experiment_is_carried_out_and_no_run_fails(made):
    counts = {name: len(made.runs.finished(name)) for name in made.runs.plan.experiments}
    assert counts == {"learning_rates": 6, "curves": 6, "starts": 8, "seeds": 6, "sizes": 6, "lengths": 6}
    assert made.runs.failures == {} and made.runs.plan.tokens == 256


def test_a_start_from_local_continues_from_that_sae(made):
    for config in made.runs.finished("starts"):
        local = RunFolder(config.init_from).config()
        assert local.objective.kind == "local" and local.site == config.site


def test_the_tables_hold_every_run_and_every_claim(made, out):
    runs = pq.read_table(out / "tables" / "runs.parquet").to_pylist()
    assert len(runs) == len({row["run"] for row in runs}) == 38
    for row in runs:
        evaluation = RunFolder(out / "runs" / row["run"]).evaluation()
        assert (row["l0"], row["ce_increase"], row["alive"]) == tuple(
            evaluation[name] for name in ("l0", "ce_increase", "alive")
        )
    claims = pq.read_table(out / "tables" / "claims.parquet").to_pylist()
    untimed = [claim for claim in made.claims if not claim.timed]
    assert [row["claim"] for row in claims] == [claim.claim for claim in untimed]
    assert {claim.verdict for claim in made.claims} <= VERDICTS
    for name in ("ratios", "similar", "norms", "variants", *TIMED):
        assert (out / "tables" / f"{name}.csv").stat().st_size > 0


def test_the_report_needs_nothing_else(made):
    text = made.report.read_text()
    own = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"""(?:src|href|url)\s*[=(]\s*["']?(?:https?:)?//""", own)
    assert "default-src 'none'" in own
    for claim in made.claims:
        assert claim.verdict in own
    figures = sorted(path.stem for path in (made.report.parent / "figures").glob("*.pdf"))
    assert figures == sorted(path.stem for path in (made.report.parent / "figures").glob("*.png"))
    assert {"pareto-1", "downstream", "explained_variance", "norms", "cosines", "learning_rates", "seeds"} <= {*figures}
    for name in figures:
        assert f'id="{name}"' in own


def test_begun_again_it_trains_nothing_and_ends_alike(made, out, undrawn):
    before, configs = tables(out), sorted((out / "runs").rglob("metrics.jsonl"))
    stamps = [file.stat().st_mtime_ns for file in configs]
    assert reproduce(StudyConfig.build(STUDY), out, display=False).claims == made.claims
    assert [file.stat().st_mtime_ns for file in configs] == stamps
    assert tables(out) == before


def test_moved_elsewhere_only_what_is_missing_is_done_and_it_ends_alike(made, out, tmp_path, monkeypatch, undrawn):
    """As a kill leaves it: one run is gone, another was trained and not measured."""
    here = out.absolute()
    monkeypatch.chdir(tmp_path)
    shutil.copytree(here, "moved")
    gone, unmeasured, *whole = sorted(path.parent for path in Path("moved", "runs").glob("*/metrics.jsonl"))
    shutil.rmtree(gone)
    (unmeasured / "evaluation.json").unlink()
    stamps = [(run / "metrics.jsonl").stat().st_mtime_ns for run in (unmeasured, *whole)]
    assert reproduce(StudyConfig.build(STUDY), "moved", display=False).runs.failures == {}
    assert [(run / "metrics.jsonl").stat().st_mtime_ns for run in (unmeasured, *whole)] == stamps
    assert tables(Path("moved")) == tables(here)


def test_a_folder_holds_one_study(made, out):
    with pytest.raises(ConfigError, match="another study"):
        reproduce(StudyConfig.build({**STUDY, "seeds": 1}), out, display=False)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_and_begun_again_it_ends_with_the_same_tables(made, out, tmp_path):
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY, sort_keys=False))
    command = ["-m", "endwise", "reproduce", "paper", "--model", "study.yaml", "--out", str(out)]
    for moment in (3, 14, 25):  # runs: at the first checkpoints, and further on
        process = Warm(*command, "--quiet", cwd=tmp_path, stdout=subprocess.DEVNULL)
        give_up = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < give_up:
            if len(list((tmp_path / out / "runs").glob("*/checkpoints/*.safetensors"))) >= moment:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = warm.run(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "The report: " in done.stdout
    assert tables(tmp_path / out) == tables(out)
