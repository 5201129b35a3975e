"""SAEs by name: on a hub that runs here, of SAELens's registry, in the cache; and what is said where there is none."""

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from typer.testing import CliRunner

from endwise import SAE, train, train_places
from endwise.cli import app
from endwise.common.digests import of_file
from endwise.common.errors import HubError
from endwise.common.hub import shown
from endwise.dictionaries import ReluSAE
from endwise.evaluation.inspecting import inspect
from endwise.evaluation.provenance import pinned
from endwise.formats import at_commit, format_at, here, metadata_at, naming, on_hub, registry_of_saelens, weights_file
from endwise.runs.folder import RunFolder
from hub_server import TOKEN, asked, hub_server
from made_formats import X, one_of_each
from small_gpt2 import SITE, WIDTH, recipe


@pytest.fixture
def hub(tmp_path):
    with hub_server() as served, asked(served, tmp_path / "cache"):
        yield served


def saved(folder, seed=0, **metadata):
    ReluSAE(4, 8, seed=seed).save(folder, metadata)
    return folder


def load(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SAE.load(name)


def refused(name):
    with pytest.raises(HubError) as error:
        SAE.load(name)
    message = str(error.value)
    assert "\n" not in message and TOKEN not in message and len(message) < 700
    return message


@one_of_each(lambda kind: bool(kind.config_file))
def test_every_format_is_read_as_from_a_folder(tmp_path, hub, kind):
    """The repository is called as the folder that its path tells of, and holds others besides, which stay there."""
    local = kind.made(tmp_path / "made")
    inside = local.relative_to(tmp_path / "made").as_posix()
    files = {path.relative_to(tmp_path / "made").as_posix(): path.read_bytes() for path in files_of(tmp_path / "made")}
    hub.put("someone/some", {**files, "another/optimizer.pt": b"1", "README.md": b"it"})
    name = f"hf://someone/some/{inside}"
    torch.testing.assert_close(load(name)(X), load(local)(X), rtol=0, atol=0)
    assert metadata_at(Path(name)) == metadata_at(local) == kind.about
    assert format_at(here(name).path)[0].name == kind.format
    assert set(hub.sent) == set(files), "only this SAE's files are fetched"


def files_of(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_the_second_time_nothing_is_downloaded_and_a_new_commit_is_seen(tmp_path, hub):
    first = hub.put("someone/some", saved(tmp_path / "one"))
    one = SAE.load("hf://someone/some")
    sent = dict(hub.sent)
    assert sent == {"sae_weights.safetensors": 1, "cfg.json": 1}
    SAE.load("hf://someone/some")
    assert dict(hub.sent) == sent
    second = hub.put("someone/some", saved(tmp_path / "two", seed=1))
    assert not torch.equal(SAE.load("hf://someone/some").W_enc, one.W_enc)
    assert torch.equal(SAE.load(f"hf://someone/some@{first}").W_enc, one.W_enc)
    assert (here("hf://someone/some").commit, here(f"hf://someone/some@{first}").commit) == (second, first)


def test_branches_and_revisions_with_slashes(tmp_path, hub):
    hub.put("someone/some", saved(tmp_path / "one"))
    hub.put("someone/some", saved(tmp_path / "two", seed=1), ref="refs/pr/1")
    other = SAE.load("hf://someone/some@refs%2Fpr%2F1")
    assert torch.equal(other.W_enc, SAE.load(tmp_path / "two").W_enc)
    assert str(on_hub("hf://a/b@refs%2Fpr%2F1/x")) == "hf://a/b@refs%2Fpr%2F1/x"


def test_a_path_that_lost_a_slash_is_the_same_name(tmp_path, hub):
    hub.put("someone/some", {f"a/{file.name}": file.read_bytes() for file in files_of(saved(tmp_path / "one"))})
    assert weights_file(Path("hf://someone/some/a")).read_bytes() == weights_file(tmp_path / "one").read_bytes()
    assert shown(Path("hf://someone/some/a")) == "hf://someone/some/a" and shown("runs/x") == "runs/x"
    assert at_commit(Path("hf://someone/some/a"), "c" * 40) == Path("hf://someone/some@" + "c" * 40 + "/a")
    assert at_commit(Path("runs/x"), "c" * 40) == Path("runs/x")


def several(tmp_path, hub):
    made = saved(tmp_path / "made")
    files = {f"layer_{n}/{file.name}": file.read_bytes() for n in range(12) for file in files_of(made)}
    hub.put("someone/some", files | {"README.md": b"", "layer_0/endwise/evaluation_sums.safetensors": b"1"})


def test_one_that_is_alone_is_found_below_and_several_are_listed(tmp_path, hub):
    several(tmp_path, hub)
    message = refused("hf://someone/some")
    assert "holds 12 SAEs. Name one. There are layer_0, layer_1," in message and "4 more" in message
    hub.put("someone/other", {f"a/b/{file.name}": file.read_bytes() for file in files_of(tmp_path / "made")})
    assert here("hf://someone/other").path.name == "b" and SAE.load("hf://someone/other/a").d_sae == 8
    hub.put("someone/none", {"README.md": b""})
    assert "holds no file of an SAE. There is README.md" in refused("hf://someone/none")


def test_a_path_that_is_not_there_is_told_with_its_neighbours(tmp_path, hub):
    several(tmp_path, hub)
    message = refused("hf://someone/some/layer_13")
    assert "no such path there. There are " in message and "layer_1," in message
    assert "must read hf://owner/name" in refused("hf://someone/some/../x")
    assert "must read hf://owner/name" in refused("hf://someone")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("hf://someone/nothing", "is not on the hub, or is private"),
        ("hf://someone/private", "is not on the hub, or is private"),
        ("hf://someone/gated", "is gated"),
        ("hf://someone/open@nowhere", "has no such branch, tag or commit"),
        ("hf://some--one/x", "is not a repository's name"),
    ],
)
def test_what_the_hub_refuses_is_one_line(tmp_path, hub, name, told):
    made = saved(tmp_path / "made")
    hub.put("someone/open", made)
    hub.put("someone/private", made, private=True)
    hub.put("someone/gated", made, gated=True)
    message = refused(name)
    assert told in message and name in message
    with asked(hub, tmp_path / "cache", token="hf_wrongwrongwrong"):
        assert "hf_wrong" not in refused(name)
    result = CliRunner().invoke(app, ["inspect", name])
    assert result.exit_code == 10 and told in result.stderr


def test_with_a_token_private_and_gated_ones_are_read(tmp_path, hub):
    hub.put("someone/private", saved(tmp_path / "made"), private=True)
    hub.put("someone/gated", tmp_path / "made", gated=True)
    with asked(hub, tmp_path / "cache", token=TOKEN):
        assert SAE.load("hf://someone/private").d_sae == SAE.load("hf://someone/gated").d_sae == 8


@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
def test_other_failures_are_one_line_without_what_the_server_says(tmp_path, hub, status):
    hub.put("someone/some", saved(tmp_path / "made"))
    hub.misbehave = lambda handler: handler.refuse(status) or True
    message = refused("hf://someone/some")
    assert f"(HTTP {status})" in message and "no None" not in message and hub.url not in message


def test_offline_and_broken_networks_read_the_cache_and_say_what_is_missing(tmp_path, hub, monkeypatch):
    commit = hub.put("someone/some", saved(tmp_path / "made", hook_name="blocks.1.hook_resid_pre"))
    whole = SAE.load("hf://someone/some")
    for name, value in (("HF_HUB_OFFLINE", True), ("ENDPOINT", "http://user:secret@127.0.0.1:9")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(constants, name, value)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                assert torch.equal(SAE.load("hf://someone/some").W_enc, whole.W_enc)
                assert here("hf://someone/some").commit == commit
            assert any("does not answer" in str(each.message) for each in said) == (name == "ENDPOINT")
            message = refused("hf://someone/other")
            assert ("HF_HUB_OFFLINE" if name == "HF_HUB_OFFLINE" else "Check the network") in message
            assert "secret" not in message
    hub.misbehave = lambda handler: handler.refuse(502) or True
    with pytest.warns(UserWarning, match="does not answer"):
        SAE.load("hf://someone/some")


def test_a_download_that_breaks_is_one_line_and_continues_the_next_time(tmp_path, hub):
    hub.put("someone/some", saved(tmp_path / "made"))

    def broken(handler):
        if handler.command == "GET" and handler.path.endswith("sae_weights.safetensors"):
            handler.send_response(500)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return True
        return False

    hub.misbehave = broken
    assert "HTTP 500" in refused("hf://someone/some")
    hub.misbehave = None
    assert SAE.load("hf://someone/some").d_sae == 8


def test_the_registry_names_a_repository_and_adds_what_the_file_leaves_open(tmp_path, hub, monkeypatch):
    """A made-up release; that of the package is read in the next test."""
    release = {"repo": "someone/some", "model": "gpt2-small", "saes": {"blocks.5.hook_resid_pre": ["a", 32.0]}}
    release["overrides"] = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    monkeypatch.setattr(naming, "shipped", lambda: {"some-release": release})
    hub.put("someone/some", {f"a/{file.name}": file.read_bytes() for file in files_of(saved(tmp_path / "made"))})
    name = Path("some-release/blocks.5.hook_resid_pre")
    told = metadata_at(name)
    assert (told["model_name"], told["hook_name"], told["stated_l0"]) == ("gpt2-small", "blocks.5.hook_resid_pre", 32.0)
    assert type(SAE.load(name)).__name__ == "NormedSAE", "the model's writing weights were centred, the registry says"
    result = CliRunner().invoke(app, ["inspect", str(name)])
    assert "place: blocks.5.hook_resid_pre of gpt2-small" in result.stdout and "states: L0 32" in result.stdout
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / name, seed=5)
    assert type(SAE.load(name)) is ReluSAE, "what is there locally comes first"
    assert "no SAE 'blocks.6'. There are 1, e.g. blocks.5.hook_resid_pre" in refused("some-release/blocks.6")
    release["overrides"] = {"normalize_activations": "constant_norm_rescale"}
    monkeypatch.chdir("/")
    assert inspect(name).stored.norm == "constant_norm_rescale"


def test_the_table_that_ships():
    found = on_hub("gemma-scope-2b-pt-res-canonical/layer_12/width_16k/canonical")
    assert (found.repo, found.inside) == ("google/gemma-scope-2b-pt-res", "layer_12/width_16k/average_l0_82")
    assert on_hub("gpt2-small-res-jb/blocks.8.hook_resid_pre").overrides["model_from_pretrained_kwargs"]
    assert on_hub("no-such-release/x") is None and on_hub("/gpt2-small-res-jb/x") is None
    with pytest.raises(HubError, match="temporal SAE"):
        on_hub("temporal-sae-gemma-2-2b/blocks.12.hook_resid_post")
    with pytest.raises(HubError, match="cross-layer"):
        on_hub("mntss-gemma-2-2b-2.5m-clt-as-per-layer/layer_0")
    assert registry_of_saelens.TABLE_FILE.stat().st_size < 100_000
    assert sum(len(each["saes"]) for each in registry_of_saelens.shipped().values()) > 13_000


def test_releases_that_the_table_lacks_are_those_of_an_installed_sae_lens(tmp_path, monkeypatch):
    """Its file is read, and none of its code is run."""
    package = tmp_path / "site" / "sae_lens"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    release = {"conversion_func": None, "model": "m", "repo_id": "o/r", "saes": [{"id": "one", "path": 3, "l0": 7}]}
    (package / "pretrained_saes.yaml").write_text(json.dumps({"a-new-one": release}))
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "sae_lens", raising=False)
    registry_of_saelens.installed.cache_clear()
    try:
        found = on_hub("a-new-one/one")
    finally:
        registry_of_saelens.installed.cache_clear()
    assert (str(found), found.facts) == ("hf://o/r/3", {"model_name": "m", "stated_l0": 7.0})


def test_what_is_local_asks_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(naming, "fetched", lambda *_: pytest.fail("the hub was asked"))
    SAE.load(saved(tmp_path / "made"))
    with pytest.raises(Exception, match=r"There is no .*hf://"):
        SAE.load(tmp_path / "nothing")


def test_training_starts_from_it_and_pins_the_commit(tmp_path, hub, model, corpora):
    """Later commits of the branch change nothing in a resumed run, even one resumed from its first step."""
    first = hub.put("someone/some", wide(tmp_path / "one", 0))
    config = recipe(tmp_path / "run", "local").model_copy(update={"init_from": Path("hf://someone/some")})
    run = train(config, model=model, corpora=corpora, display=False)
    digests = RunFolder(run.folder).digests()
    assert digests["init_from_commit"] == first and digests["init_from"] == of_file(weights_file(tmp_path / "one"))
    assert "init_from: hf://someone/some\n" in (run.folder / "config.yaml").read_text()
    weights = (run.folder / "sae/sae_weights.safetensors").read_bytes()
    hub.put("someone/some", wide(tmp_path / "two", 1))
    kept = RunFolder(run.folder).recipe()
    assert kept == config
    train(kept, model=model, corpora=corpora, display=False, resume=True, from_step=0)
    assert (run.folder / "sae/sae_weights.safetensors").read_bytes() == weights
    hub.repositories.clear()
    train(kept, model=model, corpora=corpora, display=False, resume=True)  # whose checkpoint holds the weights
    missing = config.model_copy(update={"out": tmp_path / "other", "init_from": Path("hf://someone/nothing")})
    with pytest.raises(HubError, match="init_from: hf://someone/nothing is not on the hub"):
        train(missing, model=model, corpora=corpora, display=False)


def wide(folder, seed):
    ReluSAE(WIDTH, 40, seed=seed).save(folder)
    return folder


def test_each_place_pins_its_own(tmp_path, hub, model, corpora):
    first = hub.put("someone/some", wide(tmp_path / "one", 0))
    base = recipe(tmp_path / "run", "local").model_dump(mode="json")
    values = {key: value for key, value in base.items() if key not in ("site", "writes", "init_from")}
    values |= {"places": [{"site": "blocks.0.hook_resid_pre"}, {"site": SITE, "init_from": "hf://someone/some"}]}
    values["joint"] = True
    run = train_places(values, model=model, corpora=corpora, display=False)
    hub.put("someone/some", wide(tmp_path / "two", 1))
    recipes = pinned(run.folder, RunFolder(run.folder).recipe()).recipes
    assert [shown(each.init_from or "none") for each in recipes] == ["none", f"hf://someone/some@{first}"]
    files = [folder / "sae/sae_weights.safetensors" for folder in run.folders.values()]
    before = [file.read_bytes() for file in files]
    train_places(RunFolder(run.folder).recipe(), model=model, corpora=corpora, display=False, resume=True, from_step=0)
    assert [file.read_bytes() for file in files] == before
