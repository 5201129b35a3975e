"""The export against Neuronpedia's documented format: its folders, and the columns of the tables behind them."""

import gzip
import json
import math
import re
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from endwise import harvest, read_harvest, train
from endwise.cli import app
from endwise.common.errors import ConfigError, RunFolderError
from endwise.features.harvest.gathering import Kept
from endwise.features.harvest.neuronpedia import BARS, bars, export
from endwise.features.harvest.results import TOP
from small_gpt2 import data, recipe

# apps/webapp/prisma/schema.prisma of github.com/hijohnnylin/neuronpedia, relations aside. `!`: neither a default nor
# null. `id` of an activation defaults to a cuid that Prisma makes; the database, into which they go directly, does not.
SCHEMA = """
Model: id String!, displayNameShort String, displayName String, creatorId String!, tlensId String?,
  openRouterId String?, dimension Int?, thinking Boolean, visibility Visibility, defaultSourceSetName String?,
  defaultSourceId String?, inferenceEnabled Boolean, instruct Boolean, layers Int!, neuronsPerLayer Int!,
  createdAt DateTime, owner String!, updatedAt DateTime, website String?
SourceRelease: name String!, visibility Visibility, isNewUi Boolean, featured Boolean, description String!,
  descriptionShort String?, urls String[], creatorEmail String?, creatorName String!, creatorNameShort String?,
  creatorId String!, defaultSourceSetName String?, defaultSourceId String?, createdAt DateTime
SourceSet: modelId String!, name String!, hasDashboards Boolean, allowInferenceSearch Boolean, visibility Visibility,
  description String!, type String, creatorName String!, urls String[], creatorEmail String?, creatorId String!,
  releaseName String?, defaultRange Int, defaultShowBreaks Boolean, showDfa Boolean, createdAt DateTime
Source: id String!, modelId String!, hasDashboards Boolean, inferenceEnabled Boolean, saelensRelease String?,
  saelensSaeId String?, hfRepoId String?, hfFolderId String?, visibility Visibility, setName String!, creatorId String!,
  hasUmap Boolean, num_prompts Int?, num_tokens_in_prompt Int?, dataset String?, notes String?, createdAt DateTime
Neuron: modelId String!, layer String!, index String!, sourceSetName String?, creatorId String?, createdAt DateTime,
  maxActApprox Float?, hasVector Boolean, vector Float[], hookName String?, neg_str String[], neg_values Float[],
  pos_str String[], pos_values Float[], frac_nonzero Float, freq_hist_data_bar_heights Float[],
  freq_hist_data_bar_values Float[], logits_hist_data_bar_heights Float[], logits_hist_data_bar_values Float[]
Activation: id String!, tokens String[], dataIndex String?, index String!, layer String!, modelId String!,
  dataSource String?, maxValue Float!, maxValueTokenIndex Int!, minValue Float!, values Float[], dfaValues Float[],
  creatorId String!, createdAt DateTime, lossValues Float[], binMin Float?, binMax Float?, binContains Float?,
  qualifyingTokenIndex Int?
"""
COLUMNS = {
    name: dict(re.findall(r"(\w+) ([A-Z]\w+[\[\]!?]*)", columns))
    for name, columns in re.findall(r"^(\w+): ((?:.|\n  )+)", SCHEMA, re.MULTILINE)
}
KINDS = {
    "String": lambda value: isinstance(value, str) and "\0" not in value,
    "Int": lambda value: type(value) is int and abs(value) < 2**31,
    "Float": lambda value: type(value) in (int, float) and math.isfinite(value),
    "Boolean": lambda value: type(value) is bool,
    "Visibility": lambda value: value in ("PUBLIC", "UNLISTED", "PRIVATE"),
}
KEPT = Kept(top=3, groups=2, per_group=2, before=3, after=2, tokens=4)


def check(table, row):
    """Check that Postgres would take the row."""
    columns = COLUMNS[table]
    assert set(row) <= set(columns), f"{table} has no {set(row) - set(columns)}"
    assert {name for name, kind in columns.items() if kind.endswith("!")} <= set(row)
    for name, value in row.items():
        kind = columns[name]
        holds = KINDS[kind.rstrip("[]!?")]
        if kind.endswith("[]"):
            assert isinstance(value, list) and all(map(holds, value)), f"{table}.{name}: {value!r:.80} is no {kind}"
        else:
            assert holds(value) or (value is None and kind.endswith("?")), f"{table}.{name}: {value!r:.80} is no {kind}"


def test_the_check_sees_what_the_database_would_refuse():
    good = {"id": "a", "creatorId": "b", "layers": 1, "neuronsPerLayer": 0, "owner": ""}
    check("Model", good)
    for bad in ({"more": 1}, {"layers": "1"}, {"layers": True}, {"owner": None}, {"visibility": "OPEN"}, {"id": "\0"}):
        with pytest.raises(AssertionError):
            check("Model", good | bad)
    with pytest.raises(AssertionError):
        check("Model", {"id": "a"})
    assert len(COLUMNS) == 6 and COLUMNS["Activation"]["binMax"] == "Float?"


@pytest.fixture(scope="module")
def run(tmp_path_factory, token_files, model, corpora):
    config = recipe(tmp_path_factory.mktemp("runs") / "run").model_copy(update={"data": data(token_files)})
    folder = train(config, model=model, corpora=corpora, display=False).folder
    harvest([folder], tokens=256, kept=KEPT, importance=False, model=model, corpora=corpora)
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    return export(run, tmp_path_factory.mktemp("out"), model_id="small-gpt2", creator="Someone", release="first")[0]


def rows(path):
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    assert content.endswith(b"\n")
    return [json.loads(line) for line in content.decode().splitlines()]


TABLES = {
    "model.jsonl": "Model",
    "release.jsonl": "SourceRelease",
    "sourceset.jsonl": "SourceSet",
    "source.jsonl": "Source",
    "features/batch-0.jsonl.gz": "Neuron",
    "activations/batch-0.jsonl.gz": "Activation",
}


def test_every_file_is_there_and_of_the_format(exported):
    folder = exported.folder
    assert folder.parts[-2:] == ("small-gpt2", "1-res-pre-e2e-40")
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == set(TABLES)
    for name, table in TABLES.items():
        found = rows(folder / name)
        assert found and {tuple(row) for row in found} == {tuple(found[0])}  # the importer reads the first line's
        for row in found:
            check(table, row)


def test_rows_refer_to_each_other(exported):
    found = {table: rows(exported.folder / name) for name, table in TABLES.items()}
    ((model,), (release,), (source_set,), (source,)) = (found[t] for t in list(TABLES.values())[:4])
    assert source_set["modelId"] == source["modelId"] == model["id"] == "small-gpt2"
    assert source_set["releaseName"] == release["name"] == "first" and release["creatorName"] == "Someone"
    assert source["setName"] == source_set["name"] and source["id"] == f"1-{source['setName']}"
    for row in found["Neuron"]:
        for side in ("pos", "neg"):
            assert len(row[f"{side}_str"]) == len(row[f"{side}_values"])
    for row in found["Neuron"] + found["Activation"]:
        assert (row["modelId"], row["layer"]) == (model["id"], source["id"])
    assert [row["index"] for row in found["Neuron"]] == [str(feature) for feature in range(40)]
    assert {row["index"] for row in found["Activation"]} <= {row["index"] for row in found["Neuron"]}
    ids = [row["id"] for row in found["Activation"]]
    assert len(set(ids)) == len(ids) == exported.activations
    assert {row["creatorId"] for each in found.values() for row in each} == {model["creatorId"]}


def test_numbers_are_the_harvests(exported, run):
    harvested = read_harvest(run)
    contexts = dict(harvested.all_contexts())
    activations = rows(exported.folder / "activations/batch-0.jsonl.gz")
    for row in rows(exported.folder / "features/batch-0.jsonl.gz"):
        feature = int(row["index"])
        ours = harvested.features.slice(feature, 1).to_pylist()[0]
        assert row["frac_nonzero"] == ours["density"]
        assert row["pos_str"] == [str(token) for token in ours["boosted"]]
        assert row["neg_values"] == pytest.approx(ours["suppressed_logits"], rel=1e-5) and len(row["neg_values"]) == 4
        assert len(row["freq_hist_data_bar_values"]) == len(row["freq_hist_data_bar_heights"])
        assert sum(row["freq_hist_data_bar_heights"]) == pytest.approx(ours["firings"], rel=1e-4)
        assert row["maxActApprox"] == pytest.approx(ours["max_active"] or 0.0, rel=1e-5)
        mine = [each for each in activations if each["index"] == row["index"]]
        for each, context in zip(mine, contexts.get(feature, []), strict=True):
            assert each["minValue"] == min(each["values"])
            assert each["tokens"] == [str(token) for token in context.tokens]
            assert each["values"] == pytest.approx(context.activations, rel=1e-5)
            assert each["qualifyingTokenIndex"] == context.peak and each["values"][context.peak] > 0
            assert each["values"][each["maxValueTokenIndex"]] == max(each["values"]) == each["maxValue"]
            if context.group == TOP:
                assert (each["binMin"], each["binContains"]) == (-1, -1) and each["maxValueTokenIndex"] == context.peak
            else:
                inside = each["binMin"] <= each["values"][context.peak] <= each["binMax"]
                assert inside and each["binContains"] == 1 / 2


def test_bars_keep_every_firing():
    values = np.random.default_rng(0).exponential(size=4000)
    edges = np.array([0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0])
    counts, _ = np.histogram(values, edges)
    last = np.flatnonzero(counts)[-1] + 1
    middles, heights = bars(edges[: last + 1], counts[:last], values.max())
    assert len(middles) == len(heights) == BARS and heights.sum() == pytest.approx(4000)
    assert middles[0] == pytest.approx(values.max() / BARS / 2)
    exact, _ = np.histogram(values, np.linspace(0, values.max(), BARS + 1))
    assert np.abs(heights.cumsum() - exact.cumsum()).max() < 0.05 * 4000
    assert [len(part) for part in bars(np.zeros(0), np.zeros(0, np.int64), 0.0)] == [0, 0]
    one_value = bars(np.array([1.0, 1.25]), np.array([7]), 1.0)
    assert one_value[1].sum() == 7


def test_an_export_is_repeatable_and_replaces_an_older_one(exported, run):
    before = {path: path.read_bytes() for path in exported.folder.rglob("*") if path.is_file()}
    (exported.folder / "features" / "batch-7.jsonl.gz").write_bytes(b"of a larger dictionary")
    export(run, exported.folder.parents[1], model_id="small-gpt2", creator="Someone", release="first")
    assert {path: path.read_bytes() for path in exported.folder.rglob("*") if path.is_file()} == before


def test_bad_requests(run, tmp_path):
    with pytest.raises(ConfigError, match="--model-id must be lower-case"):
        export(run, tmp_path, model_id="../up")
    with pytest.raises(RunFolderError, match="is an empty folder, and a run folder is needed"):
        export(tmp_path, tmp_path / "out")
    assert not any(tmp_path.iterdir())
    copied = shutil.copytree(run, tmp_path / "copied")
    with pytest.raises(ConfigError, match="would both be"):
        export([run, copied], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command(run, tmp_path):
    options = ["--out", str(tmp_path), "--set", "mine", "--json"]
    result = CliRunner().invoke(app, ["export-neuronpedia", str(run.parent), *options])  # of all runs there
    assert result.exit_code == 0 and json.loads(result.output)[0]["features"] == 40
    assert list(tmp_path.glob("*/1-mine/features/batch-0.jsonl.gz"))
