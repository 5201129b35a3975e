"""Patterns of runs: made, stopped, resumed and read; kinds compared by them; the command."""

import io
import json
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv, parquet
from rich.console import Console
from typer.testing import CliRunner

from endwise import SAE, evaluate, train
from endwise.analysis import scored
from endwise.analysis.comparable import Setting
from endwise.analysis.patterns.page import print_patterns, write_patterns_page
from endwise.analysis.patterns.study import PatternRun, PatternStudy, patterns
from endwise.cli import app
from endwise.common.errors import FormatError, Interrupted, RunFolderError
from endwise.common.stopping import ask_to_stop
from endwise.config.run import RunConfig
from endwise.features.patterns.files import SCORE_SCHEMA, Patterns, read_patterns
from endwise.features.patterns.run import find_patterns
from endwise.features.patterns.settings import PatternSettings
from endwise.features.patterns.trie import Pattern
from made_runs import make_run
from small_gpt2 import data, recipe

pytestmark = pytest.mark.usefixtures("loaded_once")

SETTINGS = PatternSettings(random=5, substitutes=3, contexts=4, longest=3, least=2)


@pytest.fixture(autouse=True)
def _few_permutations(monkeypatch):
    monkeypatch.setattr(scored, "PERMUTATIONS", 199)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model, corpora):
    """Runs of two kinds, measured."""
    folder = tmp_path_factory.mktemp("trained")
    for kind in ("local", "e2e"):
        train(recipe(folder / kind, kind), model=model, corpora=corpora, display=False)
        evaluate(folder / kind, model=model, corpora=corpora)
    return folder


@pytest.fixture
def runs(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "runs")
    return [tmp_path / "runs" / "local", tmp_path / "runs" / "e2e"]


@pytest.fixture
def find(model, corpora):
    def find(runs, **settings):
        return find_patterns(runs, **{"settings": SETTINGS, "model": model, "corpora": corpora, **settings})

    return find


def same(one, other):
    assert one.scores.equals(other.scores) and one.texts == other.texts and one.patterns == other.patterns
    assert {**one.about, "format": 1} == {**other.about, "format": 1}


def test_what_is_written_is_read(runs, find):
    found = find(runs)
    for run in runs:
        same(found[run], read_patterns(run))
        assert sum(map(len, found[run].patterns.values())) > 0 and not (run / "patterns" / "parts").exists()
        assert all(text.startswith("[") for texts in found[run].texts.values() for text in texts)
        assert len(found[run].values("f1")) == 40 and len(found[run].values("f1.random")) <= 5


def test_what_was_made_with_the_same_settings_is_read(runs, find):
    find(runs)
    files = [run / "patterns" / "patterns.json" for run in runs]
    before = [file.stat().st_mtime_ns for file in files]
    find(runs)
    assert [file.stat().st_mtime_ns for file in files] == before
    find(runs[:1], again=True)
    find(runs[1:], settings=PatternSettings(**{**SETTINGS.to_json(), "seed": 1}))
    assert all(file.stat().st_mtime_ns > old for file, old in zip(files, before, strict=True))


def test_what_was_stopped_is_resumed_and_ends_alike(runs, find, model, monkeypatch):
    whole = find(runs[:1], block=15)[runs[0]]
    shutil.rmtree(runs[0] / "patterns")
    passes, clean = [], model.clean

    def counted(*args, **kwargs):
        passes.append(1)
        ask_to_stop()
        return clean(*args, **kwargs)

    monkeypatch.setattr(model, "clean", counted)
    with pytest.raises(Interrupted, match="Resume with the same command: endwise patterns"):
        find(runs[:1], block=15)
    assert [file.name for file in (runs[0] / "patterns" / "parts").iterdir()] == ["0-15.parquet"]
    assert read_patterns(runs[0]) is None
    monkeypatch.setattr(model, "clean", lambda *args, **kwargs: passes.append(1) or clean(*args, **kwargs))
    first = len(passes)
    same(find(runs[:1], block=15)[runs[0]], whole)
    resumed = len(passes) - first
    find(runs[:1], block=15, again=True)
    assert resumed < len(passes) - first - resumed  # what the first block takes was not done twice


def test_parts_of_other_settings_are_not_taken(runs, find):
    parts = runs[0] / "patterns" / "parts"
    whole = find(runs[:1])[runs[0]]
    table = parquet.read_table(runs[0] / "patterns" / "patterns.parquet").slice(0, 0)
    parts.mkdir()
    parquet.write_table(table.replace_schema_metadata({b"endwise": b'{"seed": 5}'}), parts / "0-45.parquet")
    same(find(runs[:1], again=True)[runs[0]], whole)


def test_patterns_of_other_weights_are_refused_where_they_are_read_and_made_again_where_asked_for(runs, find):
    find(runs[:1])
    run = runs[0]
    sae = SAE.load(run)
    digests = json.loads((run / "digests.json").read_text())
    sae.b_enc.data += 0.01
    sae.save(run / "sae", json.loads((run / "sae" / "cfg.json").read_text())["metadata"])
    (run / "digests.json").write_text(json.dumps({key: value for key, value in digests.items() if key != "sae"}))
    with pytest.raises(FormatError, match="was explained by patterns with other weights than its SAE has now"):
        read_patterns(run)
    find(runs[:1])
    assert read_patterns(run) is not None


@pytest.mark.parametrize("broken", ["patterns.parquet", "scores.parquet", "patterns.json"])
def test_broken_files_are_named(runs, find, broken):
    find(runs[:1])
    (runs[0] / "patterns" / broken).write_bytes(b"{}")
    with pytest.raises(FormatError, match="is not what endwise patterns writes"):
        read_patterns(runs[0])


def test_a_run_that_was_not_measured_is_no_subject_of_a_comparison(runs, model, corpora):
    (runs[0] / "evaluation.json").unlink()
    with pytest.raises(RunFolderError, match="endwise evaluate"):
        patterns(runs, settings=SETTINGS, model=model, corpora=corpora)


def predicted(kind, f1, shuffled, seed=0, features=40):
    """A run whose features' F1 lie evenly 0.1 around a mean; one further feature is dead."""
    around = np.linspace(-0.1, 0.1, features)
    count, nothing = features + 1, [None]
    columns = {name: [100] * features + [0] for name in ("firings", "sampled", "served", "patterns")}
    columns |= {name: [50] * features + [0] for name in ("fired", "predicted", "both")}
    columns |= {"f1": [*(f1 + around), *nothing], "f1.shuffled": [*(shuffled + around[::-1]), *nothing]}
    columns |= {"explained": [*(f1 + around >= 0.5).astype(float), *nothing]}
    columns |= {name: [0.5] * features + nothing for name in ("precision", "recall", "correlation")}
    columns |= {"correlation.shuffled": [0.0] * features + nothing}
    columns |= {"feature": list(range(count)), "control": [""] * count}
    random = dict.fromkeys(columns, 0) | {"control": "random", "f1": 0.1, "f1.shuffled": None}
    columns = {name: [*values, *[random[name]] * 12] for name, values in columns.items()}
    scores = pa.table({name: columns[name] for name in SCORE_SCHEMA.names}, schema=SCORE_SCHEMA)
    own = [Pattern(number, (frozenset({number}),), 1.0, 3) for number in range(features)]
    about = {"settings": {"least": 10, "heldout": "text"}, "d_sae": count}
    texts = [f"[<b>{number}</b>]" for number in range(features)]
    summary = make_run(kind, 1, 0.3, 30, seed=seed)
    return PatternRun(summary, Patterns.of(own, texts, scores, about))


@cache
def study(seeds=(0, 1, 2), **means):
    runs = tuple(predicted(kind, f1, 0.1, seed) for kind, f1 in means.items() for seed in seeds)
    return PatternStudy(Setting.of(runs[0].summary), runs)


def test_kinds_are_compared_by_f1():
    found = study(local=0.4, e2e_ds=0.5)
    verdicts = {claim.claim: claim.verdict for claim in found.claims}
    assert verdicts == {
        f"At similar {at}, patterns predict e2e+ds's features better than local's": "shown"
        for at in ("CE increase", "L0")
    }
    assert "f1 +0.100 [" in found.claims[0].ours and "40 features each" in found.claims[0].ours
    assert [claim.verdict for claim in study(local=0.5, e2e_ds=0.4).claims] == ["not shown"] * 2
    assert [claim.verdict for claim in study((0,), local=0.4, e2e_ds=0.5).claims] == ["not testable here"] * 2
    assert [claim.verdict for claim in study(local=0.1, e2e_ds=0.5).claims] == ["not testable here"] * 2


def test_what_is_printed_fits_80_columns():
    lines = io.StringIO()
    console = Console(file=lines, width=80, force_terminal=True, color_system=None)
    print_patterns([study(local=0.4, e2e_ds=0.5)], console)
    told = lines.getvalue()
    assert "…" not in told and all(len(line) <= 80 for line in told.splitlines())
    assert "0.500 [0.4" in told and "e2e+ds − local" in told


def test_the_page_shows_patterns_as_text(tmp_path, undrawn):
    page = write_patterns_page([study(local=0.4, e2e=0.45, e2e_ds=0.5)], tmp_path)
    told = page.read_text()
    assert "<b>1</b>" not in told and "favour features that follow from the last few tokens" in told
    means = csv.read_csv(tmp_path / "means.csv").to_pylist()
    assert {row["score"] for row in means} >= {"f1", "f1.shuffled", "f1.random", "explained"}
    assert {row["served"] for row in means if row["score"] == "f1"} == {1.0}
    assert csv.read_csv(tmp_path / "features.csv").num_rows == 9 * 41


def test_the_command(made, tmp_path, undrawn):
    runs = [tmp_path / kind for kind in ("local", "e2e")]
    sections = {"model": {"name": str(made / "model")}, "data": data(made).model_dump(exclude_unset=True)}
    for run in runs:
        train(RunConfig.build({**recipe(run, run.name).model_dump(exclude_unset=True), **sections}), display=False)
        evaluate(run)
    asked = ["patterns", *map(str, runs), "--contexts", "4", "--longest", "3", "--substitutes", "3", "--random", "5"]
    done = CliRunner().invoke(app, [*asked, "--quiet", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "The page, figures and tables" in done.output and (tmp_path / "out" / "patterns.html").exists()
    done = CliRunner().invoke(app, [*asked, "--quiet", "--json", "--out", str(tmp_path / "out")])
    printed = json.loads(done.stdout)
    assert Path(printed["page"]).name == "patterns.html"
    assert {Path(row["run"]).name for row in printed["means"]} == {"local", "e2e"}
    refused = CliRunner().invoke(app, [*asked[:3], "--contexts", "0"])
    assert refused.exit_code and "must be a whole number from 1 to 10,000; given 0" in refused.output
