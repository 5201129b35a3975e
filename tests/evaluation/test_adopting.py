"""SAEs that are no runs of ours, taken by every command that takes runs."""

import csv
import json
import shutil
import subprocess
from urllib.request import urlopen

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

import endwise
from bad_input import ran, refused, write_place
from endwise import SAE, ReluSAE
from endwise.cli import app
from endwise.common.errors import RunFolderError
from endwise.config.adopted import AdoptedConfig
from endwise.evaluation.evaluate import read_sums
from endwise.evaluation.inspecting import inspect
from endwise.runs.folder import RunFolder
from hub_server import asked, hub_server
from made_saes import AT_SITE, FOREIGN, filled, gemma_scope, saelens
from small_gpt2 import SITE, WIDTH
from warm import Warm

pytestmark = pytest.mark.usefixtures("loaded_once")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, tokens and a measured run."""
    folder = write_place(tmp_path_factory.mktemp("place"))
    assert not ran("train", folder / "recipe.yaml", "--quiet").exit_code
    assert not ran("evaluate", folder / "run").exit_code
    return folder


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign")
    return {name: make(folder) for name, make in FOREIGN.items()}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ENDWISE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "adopted"


def where(place):
    """The options that say where an SAE belongs."""
    return ("--model", place / "model", "--data", place / "train.npy")


def went_well(*arguments):
    result = ran(*arguments)
    assert result.exit_code == 0, result.output
    return result


def the_only(cache):
    (found,) = [file.parent for file in cache.glob("*/*/config.yaml")]
    return found


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    "several",
    [("saelens", "sparsify", "gemma-scope"), pytest.param(tuple(FOREIGN), marks=pytest.mark.slow)],
    ids=["few", "all"],
)
def test_every_command_takes_them(place, foreign, tmp_path_factory, several):
    """One after the other, as a reader would: each finds what the one before left in the cache. There it is a run of
    endwise's own format, so that what takes long is done with one of each architecture.
    """
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("cache")
        patch.setenv("ENDWISE_CACHE", str(cache))
        given = [*foreign.values(), *where(place), "--site", SITE]
        said = went_well("evaluate", *given).output
        assert said.count("adopted as") == len(foreign)
        runs = {
            name: RunFolder(file.parent)
            for file in cache.glob("adopted/*/*/config.yaml")
            for name in [RunFolder(file.parent).config().adopted.path]
        }
        assert set(runs) == {str(path) for path in foreign.values()}
        out = cache / "out"
        said = went_well("pareto", *given, "--out", out / "pareto").output
        assert all(label in said for label in ("sparsify topk", "gemma-scope jumprelu", "dictionary_learning jumprelu"))
        assert "40 features, trained elsewhere" in said and "jumprelu           9      –" in said
        few = [foreign[name] for name in several]
        given = [*few, *where(place), "--site", SITE]
        went_well("geometry", *given, "--out", out / "geometry", "--quiet")
        went_well("importance", *given, "--tokens", 64, "--ablate", 2, "--out", out / "importance")
        went_well("directions", *given, "--tokens", 64, "--directions", 2, "--out", out / "directions")
        went_well("harvest", *given, "--tokens", 64, "--quiet")
        went_well("dashboard", *given, "--out", out / "dashboard", "--quiet")
        for path, run in runs.items():
            assert run.evaluation() and not run.metrics_file.exists()
            assert (run.path / "importance.safetensors").exists() == (path in map(str, few))
            assert (run.path / "harvest").is_dir() == (path in map(str, few))
        assert len(list(cache.glob("adopted/*/*/config.yaml"))) == len(foreign)


def test_it_is_measured_as_it_is_read(place, foreign, cache, tmp_path):
    """The numbers are those of the file itself, spliced in by hand; in the folder it is the same function."""
    model = endwise.load_model(str(place / "model"))
    for name, path in foreign.items():
        out = endwise.adopt(path, model=model, data=str(place / "train.npy"), site=SITE, out=tmp_path / name, tokens=64)
        config = RunFolder(out).config()
        measured = endwise.evaluate(out, model=model)[out]
        by_hand = endwise.measure(
            *(model, {"it": (model.site(SITE), SAE.load(path))}),
            endwise.corpora_for(model, config.data, training_tokens=1, evaluation_tokens=64).heldout,
            config.evaluation,
        )["it"]
        assert measured["l0"] == by_hand["l0"] and measured["ce_increase"] == by_hand["ce_increase"]
        np.testing.assert_array_equal(read_sums(out)["kl"], by_hand.sums["kl"])
        x = torch.randn(30, WIDTH)
        assert torch.equal(SAE.load(out)(x), SAE.load(path)(x))
    assert not cache.exists()


def test_what_stands_in_the_folder(place, foreign, tmp_path):
    said = went_well("adopt", foreign["gemma-scope"], *where(place), "--out", tmp_path / "run", "--tokens", 128)
    assert "Next: endwise evaluate" in said.stdout
    values = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (
        values["dictionary"] == {"architecture": "jumprelu", "size": 40}
        and values["site"] == "blocks.0.hook_resid_post"
    )
    assert not {"objective", "training"} & values.keys() and values["evaluation"]["tokens"] == 128
    origin = values["adopted"]
    assert origin["path"] == str(foreign["gemma-scope"]) and origin["format"] == "gemma-scope"
    assert origin["rule"] == inspect(foreign["gemma-scope"]).rule and origin["stated_l0"] == 12
    assert any("google/gemma-2-2b" in each for each in origin["remarks"])
    written = {file.name for file in (tmp_path / "run").iterdir()}
    assert written == {"config.yaml", "data.json", "digests.json", "environment.json", "sae"}
    assert RunFolder(tmp_path / "run").digests()["sae"]
    remarks = went_well("evaluate", tmp_path / "run").output
    assert "is read with" in remarks and "where 12 is stated" not in remarks


def test_beside_a_run_it_is_of_its_model_and_text(place, foreign, cache, tmp_path, undrawn):
    """Nothing need be said then; the figure has both on the same text, the foreign one without a seed."""
    given = (place / "run", foreign["saelens"])
    went_well("evaluate", *given)
    adopted = the_only(cache)
    said = went_well("pareto", *given, "--out", tmp_path / "pareto")
    assert "shown beside runs of 40 features, 640 training tokens" in said.stderr
    page = (tmp_path / "pareto" / "pareto.html").read_text()
    assert "saelens standard" in page and "e2e" in page and "trained elsewhere" in page
    rows = list(csv.DictReader((tmp_path / "pareto" / "points.csv").read_text().splitlines()))
    told_of = {row["kind"]: (row["seed"], row["training_tokens"]) for row in rows}
    assert told_of == {"e2e": ("0", "640"), "foreign0-standard-saelens-standard": ("", "")}
    own, its = RunFolder(place / "run"), RunFolder(adopted)
    assert own.evaluation()["text"] == its.evaluation()["text"]
    went_well("geometry", *given, "--pair", f"{place / 'run'},{foreign['saelens']}", "--quiet", "--out", tmp_path / "g")


def test_a_file_that_changed_is_adopted_again(place, cache, tmp_path):
    path = saelens(tmp_path)
    went_well("evaluate", path, *where(place))
    first = the_only(cache)
    went_well("evaluate", path, *where(place))
    assert the_only(cache) == first
    saelens(tmp_path, seed=1)
    went_well("evaluate", path, *where(place))
    assert len(list(cache.glob("*/*/config.yaml"))) == 2
    cfg = json.loads((path / "cfg.json").read_text())
    (path / "cfg.json").write_text(json.dumps(cfg | {"normalize_activations": "layer_norm"}))
    went_well("evaluate", path, *where(place))
    assert len(list(cache.glob("*/*/config.yaml"))) == 3


def test_what_is_missing_is_said(place, cache, tmp_path):
    unnamed = saelens(tmp_path / "a", {"hook_name": SITE})
    for arguments, says, code in (
        ((unnamed,), "names no model. Give one with --model", 2),
        ((unnamed, "--model", place / "model"), "Give one with --data", 2),
        ((saelens(tmp_path / "b", {}), *where(place)), "Name the place with --site", 2),
        ((saelens(tmp_path / "c"), "--data", place / "train.npy"), "names the model 'gpt2-tiny'", 3),
        ((saelens(tmp_path / "d", {"hook_name": "blocks.9.hook_resid_pre"}), *where(place)), "belongs elsewhere", 3),
        ((saelens(tmp_path / "e"), *where(place), "--site", "blocks.1.hook_no"), "A site is named", 3),
        ((place / "run", "--model", "embedded"), "--model: only runs are given", 2),
        ((place / "run" / "sae", *where(place)), "is the SAE of the run", 2),
        ((tmp_path / "nothing", *where(place)), "only runs are given", 2),
        ((place / "train.npy", *where(place)), "not an SAE in a format that endwise knows", 6),
    ):
        assert says in refused("evaluate", *arguments, code=code)
    narrow = tmp_path / "narrow"
    ReluSAE(5, 8).save(narrow, AT_SITE)
    assert "reads activations of width 5, and blocks.1" in refused("harvest", narrow, *where(place), code=3)
    with pytest.raises(RunFolderError, match="Make one of it: endwise adopt"):
        endwise.evaluate(unnamed)
    assert not list(cache.glob("*/*"))


def test_where_it_is_made_must_be_free(place, foreign, tmp_path):
    taken = tmp_path / "taken"
    went_well("adopt", foreign["saelens"], *where(place), "--out", taken)
    assert "holds a run already" in refused("adopt", foreign["saelens"], *where(place), "--out", taken, code=5)
    assert "is a run folder already" in refused("adopt", taken, *where(place), "--out", tmp_path / "b", code=2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert "not an empty folder" in refused(
        "adopt", foreign["saelens"], *where(place), "--out", tmp_path / "full", code=5
    )
    below = tmp_path / "full" / "mine.txt" / "run"
    assert "Cannot write" in refused("adopt", foreign["saelens"], *where(place), "--out", below, code=5)
    (tmp_path / "empty").mkdir()
    went_well("adopt", foreign["saelens"], *where(place), "--out", tmp_path / "empty")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["empty", "full", "taken"]


def test_it_is_not_trained_on_but_from(place, foreign, tmp_path):
    run = tmp_path / "run"
    went_well("adopt", foreign["saelens"], *where(place), "--out", run)
    for command in (("train", "--resume", run), ("train", run / "config.yaml"), ("plan", run / "config.yaml")):
        assert "was trained elsewhere" in refused(*command, code=2)
    went_well("train", place / "recipe.yaml", f"init_from={run}", f"out={tmp_path / 'on'}", "--quiet")
    config = yaml.safe_load((run / "config.yaml").read_text()) | {"objective": {"kind": "e2e"}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert "objective of an SAE that was trained elsewhere" in refused("evaluate", run, code=5)


def test_one_that_was_adopted_and_is_another_now_is_refused(place, foreign, tmp_path):
    run = tmp_path / "run"
    went_well("adopt", foreign["saelens"], *where(place), "--out", run)
    filled(ReluSAE(WIDTH, 40), seed=3).save(run / "sae", AT_SITE)
    assert "does not hold the weights" in refused("evaluate", run, code=6)
    shutil.rmtree(run)
    text = tmp_path / "text.npy"
    np.save(text, np.load(place / "train.npy"))
    went_well("adopt", foreign["saelens"], "--model", place / "model", "--data", text, "--out", run, "--tokens", 64)
    np.save(text, np.load(place / "train.npy") % 30 + 1)
    result = CliRunner().invoke(app, ["evaluate", str(run)])
    assert result.exit_code == 5 and f"remove {run}, and adopt again" in result.stderr


@pytest.mark.parametrize("source", ["file", "folder", "text", "embedded"])
def test_text_of_each_kind(foreign, place, cache, tmp_path, source):
    text = {
        "file": place / "train.npy",
        "folder": tmp_path / "texts",
        "text": tmp_path / "t.txt",
        "embedded": "embedded",
    }
    (tmp_path / "texts").mkdir()
    shutil.copy(place / "train.npy", tmp_path / "texts" / "part.npy")
    (tmp_path / "t.txt").write_text("once upon a time " * 40)
    arguments = ("evaluate", foreign["saelens"], "--model", place / "model", "--data", text[source])
    if source in ("file", "folder"):
        went_well(*arguments)
        return
    says = {"text": "tokenizer", "embedded": "vocabulary"}
    assert says[source] in refused(*arguments, code=4) and not cache.exists()


def test_a_transcoder(place, cache):
    sae = filled(ReluSAE(WIDTH, 40, WIDTH))
    two = {"hook_name": "blocks.1.mlp_in", "hook_name_out": "blocks.1.hook_mlp_out", "model_name": "gpt2-tiny"}
    path = cache.parent / "transcoder"
    sae.save(path, two)
    went_well("evaluate", path, *where(place))
    config = RunFolder(the_only(cache)).config()
    assert config.place == "blocks.1.mlp_in -> blocks.1.hook_mlp_out" and isinstance(config, AdoptedConfig)


def test_of_a_model_whose_weights_were_centred(place, cache, tmp_path):
    """The model's name is not one that is known to be centred; the SAE's own is, which says it."""
    path = saelens(tmp_path, {**AT_SITE, "model_from_pretrained_kwargs": {"center_writing_weights": True}})
    went_well("evaluate", path, *where(place))
    run = the_only(cache)
    config, x = RunFolder(run).config(), torch.randn(20, WIDTH) + 2
    assert config.dictionary.normalize == "centred" and "mean of x" in config.adopted.rule
    torch.testing.assert_close(SAE.load(run)(x), SAE.load(path)(x))
    assert not torch.allclose(SAE.load(run)(x), SAE.load(saelens(tmp_path / "plain"))(x))


def test_several_of_one_family_are_one_curve(place, cache, tmp_path):
    """Those that state an L0, whose paths differ in numbers alone; others are another's, and one that states none is a
    method of its own."""
    saes = [gemma_scope(tmp_path, l0) for l0 in (12, 20)] + [gemma_scope(tmp_path / "other", 12), saelens(tmp_path)]
    given = [*saes, *where(place), "--site", SITE]
    went_well("evaluate", *given)
    found = endwise.pareto(file.parent for file in cache.glob("*/*/config.yaml"))
    curves = {
        method.label: [run.knob.value for run in one.runs if run.method == method]
        for one in found
        for method in one.methods
    }
    names = {label.partition(", from")[0]: values for label, values in sorted(curves.items(), reverse=True)}
    assert len(curves) == 3 and any("other" in label for label in curves)
    assert names["gemma-scope jumprelu"] == [12, 20] and names[f"{tmp_path.name}/standard, saelens standard"] == [40]


def test_a_name_of_ones_own(place, foreign, tmp_path):
    went_well("adopt", foreign["saelens"], *where(place), "--out", tmp_path / "run", "--name", "mine")
    assert "mine, saelens standard" in went_well("evaluate", tmp_path / "run").output


def test_by_its_name_on_the_hub(place, cache, tmp_path):
    with hub_server() as hub, asked(hub, tmp_path / "hub"):
        hub.put("someone/some", saelens(tmp_path))
        said = went_well("evaluate", "hf://someone/some", *where(place)).output
    assert "hf://someone/some: not a run folder of endwise; adopted as" in said
    origin = RunFolder(the_only(cache)).config().adopted
    assert (origin.path, origin.name) == ("hf://someone/some", "someone/some")


def test_served_beside_its_model(cache, tmp_path):
    """The embedded model by the name that the file says."""
    model = endwise.load_model("embedded")
    about = {"hook_name": "blocks.2.hook_resid_pre", "model_name": "embedded", "context_size": 32}
    filled(ReluSAE(model.width(about["hook_name"]), 40)).save(tmp_path / "sae", about)
    given = (tmp_path / "sae", "--data", "embedded")
    went_well("harvest", *given, "--tokens", 128, "--quiet")
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with Warm("-m", "endwise", "serve", *given, "--port", "0", **streams) as server:
        try:
            line = server.stdout.readline()
            assert line.startswith("http://127.0.0.1:"), server.communicate()
            with urlopen(line.split()[0]) as page:
                assert "<title>" in page.read().decode()
        finally:
            server.terminate()
    assert len(list(cache.glob("*/*/dashboard"))) == 1
