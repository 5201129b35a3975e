"""Runs pushed to a hub that runs here and pulled from it: what goes up, what does not, and what comes back."""

import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from typer.testing import CliRunner

from endwise import SAE, evaluate, pareto, train, train_places
from endwise.cli import app
from endwise.common.errors import ConfigError, HubError, RunFolderError
from endwise.common.files import read_json, write_json
from endwise.common.text import minus
from endwise.dictionaries import ReluSAE
from endwise.runs.folder import RunFolder
from endwise.sharing.card import plain
from endwise.sharing.pulling import pull
from endwise.sharing.pushing import push
from hub_server import OWNER, TOKEN, asked, hub_server
from made_formats import KINDS
from small_gpt2 import SITE
from small_sweeps import complete

pytestmark = pytest.mark.usefixtures("loaded_once")

NAME = f"{OWNER}/saes"


@pytest.fixture(scope="module")
def runs(made, tmp_path_factory):
    """Two measured runs of a model and a text with absolute paths."""
    folder = tmp_path_factory.mktemp("runs")
    for name, coefficient in (("weak", 0.1), ("strong", 3.0)):
        train(complete(made, folder / name, {"objective.sparsity.coefficient": coefficient}), display=False)
        evaluate(folder / name)
    return folder


@pytest.fixture
def hub(tmp_path):
    with hub_server() as served, asked(served, tmp_path / "cache", token=TOKEN):
        yield served


def told(*arguments):
    return CliRunner().invoke(app, [str(each) for each in arguments])


def numbers(run):
    return {key: value for key, value in read_json(run / "evaluation.json").items() if key != "weights"}


def test_what_goes_up_and_what_does_not(runs, made, hub):
    result = told("push", runs / "weak", runs / "strong", NAME, "--licence", "mit")
    assert result.exit_code == 0, result.output
    files = hub.repositories[NAME].files
    own = {"config.yaml", "data.json", "digests.json", "environment.json", "evaluation.json"}
    own |= {"evaluation_sums.safetensors", "evaluation_firings.safetensors"}
    expected = {f"{run}/endwise/{name}" for run in ("weak", "strong") for name in own}
    expected |= {f"{run}/{name}" for run in ("weak", "strong") for name in ("cfg.json", "sae_weights.safetensors")}
    assert files.keys() - {".gitattributes"} == expected | {"README.md", "figures/pareto-1.png"}
    for name, content in files.items():
        for secret in (str(runs), str(made), str(made.parent), TOKEN, str(Path.home()) + "/"):
            assert secret.encode() not in content, f"{name} holds {secret}"
    recipe = yaml.safe_load(files["weak/endwise/config.yaml"])
    assert recipe["model"]["name"] == "model" and recipe["data"]["source"] == "train.npy" and "out" not in recipe
    assert TOKEN not in result.output + result.stderr
    assert f"Pushed 2 runs: hf://{NAME}, commit {hub.repositories[NAME].refs['main']}" in result.stdout


def test_the_card_says_what_was_measured(runs, hub):
    done = push([runs / "weak", runs / "strong"], NAME, licence="mit")
    header, body = re.match(r"---\n(.*?)---\n(.*)", done.card, re.DOTALL).groups()
    assert yaml.safe_load(header) == {
        "library_name": "saelens",
        "tags": ["endwise", "sae", "sparse-autoencoder"],
        "license": "mit",
    }
    for run in ("weak", "strong"):
        row = next(line for line in body.splitlines() if line.startswith(f"| {run} |"))
        record = read_json(runs / run / "evaluation.json")
        low, high = record["intervals"]["ce_increase"]
        assert minus(f"{record['ce_increase']:+.3f} [{low:.3f}, {high:.3f}]") in row
        assert f"{record['l0']:.1f} " in row and f"{record['alive']:,} of {record['d_sae']:,}" in row
    assert "CE increase over L0" in body and "(figures/pareto-1.png)" in body
    assert f'endwise.SAE.load("hf://{NAME}/' in body and f'SAE.from_pretrained("{NAME}", "' in body
    assert hub.repositories[NAME].files["README.md"].decode() == done.card


def test_what_is_there_is_not_sent_again(runs, hub):
    first = push([runs / "weak"], NAME)
    hub.requests.clear()
    again = push([runs / "weak"], NAME)
    assert again.commit == first.commit and not [each for each in hub.requests if each.startswith("PUT")]
    push([runs / "strong"], NAME)
    assert len([each for each in hub.requests if each.startswith("PUT")]) == 4, "three files of the run, one figure"
    files = hub.repositories[NAME].files
    assert "weak/cfg.json" in files and "| weak |" in files["README.md"].decode(), "the card is over all runs"


def test_files_that_a_run_no_longer_has_are_removed_and_other_files_stay(runs, hub, tmp_path):
    shutil.copytree(runs / "weak", tmp_path / "weak")
    write_json(tmp_path / "weak/start.json", {"seed": 0})
    push([tmp_path / "weak"], NAME)
    repository = hub.repositories[NAME]
    repository.commit(repository.files | {"other/notes.txt": b"mine"})
    assert "weak/endwise/start.json" in repository.files
    push([runs / "weak"], NAME)
    assert "weak/endwise/start.json" not in repository.files and repository.files["other/notes.txt"] == b"mine"


@pytest.mark.usefixtures("undrawn")
def test_what_users_write_in_the_card_stays(runs, hub):
    push([runs / "weak"], NAME, licence="mit")
    repository = hub.repositories[NAME]
    card = (
        repository.files["README.md"].decode().replace("# saes\n", "# My SAEs\n\nRead this.\n") + "\nThanks to all.\n"
    )
    card = card.replace("library_name: saelens", "library_name: saelens\nlanguage: en")
    repository.commit(repository.files | {"README.md": card.encode()})
    written = push([runs / "strong"], NAME).card
    assert "# My SAEs\n\nRead this.\n" in written and written.endswith("\nThanks to all.\n")
    assert "language: en" in written and "license: mit" in written and written.count("| strong |") == 1
    repository.commit(repository.files | {"README.md": b"Only mine.\n"})
    written = push([runs / "strong"], NAME).card
    assert "Only mine.\n" in written and "| strong |" in written


def test_a_push_that_breaks_leaves_nothing_and_continues_from_there(runs, hub):
    def broken(handler):
        if handler.command == "PUT" and len(hub.objects) >= 2:
            handler.refuse(403)
            return True
        return False

    hub.misbehave = broken
    with pytest.raises(HubError, match=r"hf://someone/saes .*\(HTTP 403\)") as refused:
        push([runs / "weak", runs / "strong"], NAME)
    assert TOKEN not in str(refused.value)
    assert hub.repositories[NAME].files.keys() == {".gitattributes"}
    sent, hub.misbehave = set(hub.objects), None
    hub.requests.clear()
    push([runs / "weak", runs / "strong"], NAME)
    puts = [each.rpartition("/")[2] for each in hub.requests if each.startswith("PUT")]
    assert sent and not sent & set(puts) and len(puts) == 7 - len(sent)


def test_a_dry_run_asks_nobody_and_shows_all(runs, hub):
    result = told("push", runs / "weak", NAME, "--dry-run")
    assert result.exit_code == 0 and not hub.requests and not hub.repositories
    assert "weak/sae_weights.safetensors" in result.stdout and "| weak |" in result.stdout
    assert "Nothing was sent" in result.stdout


def test_private_and_branches(runs, hub):
    push([runs / "weak"], NAME, private=True, revision="tried")
    repository = hub.repositories[NAME]
    assert repository.private and repository.files.keys() == {".gitattributes"}
    assert "weak/cfg.json" in repository.at("tried")[1]
    assert SAE.load(f"hf://{NAME}@tried/weak").d_sae == 40


def test_without_a_right_to_write_it_is_one_line(runs, hub, tmp_path):
    result = told("push", runs / "weak", "another/saes")
    assert result.exit_code == 10 and "(HTTP 403)" in result.stderr and TOKEN not in result.stderr
    with asked(hub, tmp_path / "cache"):
        result = told("push", runs / "weak", NAME)
    assert result.exit_code == 10 and "HF_TOKEN" in result.stderr and "\n" not in result.stderr.strip()


@pytest.mark.parametrize("repo", ["saes", "someone/saes/weak", "someone/saes@main", "some one/saes"])
def test_a_name_that_is_none_is_refused(runs, hub, repo):
    with pytest.raises((ConfigError, HubError), match=r"owner/name|must read"):
        push([runs / "weak"], repo)


def test_runs_that_cannot_be_pushed_are_told(runs, hub, tmp_path):
    for folder in ("a b", "other/weak", "unmeasured"):
        shutil.copytree(runs / "weak", tmp_path / folder)
    (tmp_path / "unmeasured/evaluation.json").unlink()
    with pytest.raises(ConfigError, match="Rename the folder"):
        push([tmp_path / "a b"], NAME)
    with pytest.raises(ConfigError, match="Two runs are called weak"):
        push([runs / "weak", tmp_path / "other/weak"], NAME)
    with pytest.raises(RunFolderError, match="not measured yet"):
        push([tmp_path / "unmeasured"], NAME)
    with pytest.raises(RunFolderError, match="There is no "):
        push([tmp_path / "nothing"], NAME)
    record = read_json(tmp_path / "other/weak/evaluation.json")
    write_json(tmp_path / "other/weak/evaluation.json", {**record, "note": f"it is in {Path.home()}/secret"})
    with pytest.raises(RunFolderError, match=r"evaluation\.json of weak holds the path"):
        push([tmp_path / "other/weak"], NAME)
    assert not hub.repositories


@pytest.mark.usefixtures("undrawn")
def test_it_comes_back_as_the_run_that_it_was(runs, hub, tmp_path, model, corpora):
    push([runs / "weak", runs / "strong"], NAME)
    result = told("pull", NAME, tmp_path / "back")
    assert result.exit_code == 0, result.output
    back = tmp_path / "back"
    assert f"Next: endwise evaluate {back / 'weak'}" in result.stdout
    x = torch.randn(20, 16)
    for run in ("weak", "strong"):
        assert numbers(back / run) == numbers(runs / run)
        torch.testing.assert_close(SAE.load(back / run)(x), SAE.load(runs / run)(x), rtol=0, atol=0)
    ours, theirs = (pareto([folder])[0] for folder in (runs, back))
    assert [run.ce_increase for run in theirs.runs] == [run.ce_increase for run in ours.runs]
    origin = read_json(back / "weak/hub.json")
    assert origin == {"repository": NAME, "path": "", "commit": hub.repositories[NAME].refs["main"]}
    before = numbers(back / "weak")
    measured = evaluate(back / "weak", model=model, corpora=corpora, tokens=before["tokens"])
    assert measured[back / "weak"]["ce_increase"] == pytest.approx(before["ce_increase"], rel=1e-5)
    assert told("inspect", back / "weak").exit_code == 0


@pytest.mark.usefixtures("undrawn")
def test_one_run_is_pulled_alone_and_never_over_another(runs, hub, tmp_path):
    push([runs / "weak", runs / "strong"], NAME)
    assert pull(f"{NAME}/weak", tmp_path / "one") == [tmp_path / "one"]
    with pytest.raises(RunFolderError, match=f"hf://{NAME}/weak is not a run folder .*endwise pull hf://{NAME}/weak"):
        evaluate(f"hf://{NAME}/weak")
    assert RunFolder(tmp_path / "one").has_run() and not any("strong" in each for each in hub.sent)
    with pytest.raises(RunFolderError, match="is there already"):
        pull(f"{NAME}/weak", tmp_path / "one")
    result = told("pull", f"{NAME}/nothing", tmp_path / "two")
    assert result.exit_code == 10 and "no such path" in result.stderr and not (tmp_path / "two").exists()


@pytest.mark.parametrize("kind", [*KINDS][:: max(1, len(KINDS) // 12)])
def test_other_saes_are_pulled_as_they_are(hub, tmp_path, kind):
    made = KINDS[kind].made(tmp_path / "made")
    hub.put("someone/foreign", tmp_path / "made")
    inside = made.relative_to(tmp_path / "made").as_posix()
    (path,) = pull(f"hf://someone/foreign/{inside}", tmp_path / "runs" / "foreign" / inside)
    x = torch.randn(5, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(SAE.load(path)(x), SAE.load(made)(x), rtol=0, atol=0)


@pytest.mark.usefixtures("undrawn")
def test_a_recipe_from_elsewhere_runs_no_code_and_tells_nobody(runs, hub, tmp_path):
    push([runs / "weak"], NAME)
    repository, file = hub.repositories[NAME], "weak/endwise/config.yaml"
    recipe = yaml.safe_load(repository.files[file])
    recipe["model"]["trust_remote_code"] = True
    recipe |= {"trackers": ["wandb"], "out": "/tmp/elsewhere"}
    repository.commit(repository.files | {file: yaml.safe_dump(recipe).encode()})
    (run,) = pull(f"{NAME}/weak", tmp_path / "one")
    read = RunFolder(run).recipe()
    assert (read.model.trust_remote_code, read.trackers, read.out) == (False, (), None)
    repository.commit(repository.files | {file: b"- [broken"})
    assert told("pull", f"{NAME}/weak", tmp_path / "two").exit_code == 6
    assert [each.name for each in tmp_path.iterdir() if "two" in each.name] == []


def test_a_run_of_several_places(hub, tmp_path, model, corpora):
    base = {"dictionary": {"size": 24}, "objective": {"kind": "e2e", "sparsity": {"coefficient": 0.3}}}
    base |= {"training": {"tokens": 320, "batch": 4}, "evaluation": {"tokens": 64, "during_training_tokens": 32}}
    base |= {"places": [{"site": "blocks.0.hook_resid_pre"}, {"site": SITE}], "out": tmp_path / "both"}
    train_places(base, model=model, corpora=corpora, display=False)
    evaluate(tmp_path / "both", model=model, corpora=corpora)
    push([tmp_path / "both"], NAME)
    files = hub.repositories[NAME].files
    assert f"both/{SITE}/cfg.json" in files and f"both/{SITE}/endwise/part.json" in files
    assert SAE.load(f"hf://{NAME}/both/{SITE}").d_sae == 24
    card = files["README.md"].decode()
    assert f"| {plain(f'both/{SITE}')} |" in card and "| both |" in card
    (back,) = pull(f"{NAME}/both", tmp_path / "back")
    assert RunFolder(back).measured()["ce_increase"] == RunFolder(tmp_path / "both").measured()["ce_increase"]
    assert len(pareto([back])) == len(pareto([tmp_path / "both"]))


@pytest.mark.usefixtures("undrawn")
def test_an_adopted_sae_goes_up_and_comes_back(made, hub, tmp_path):
    """Remove the folder from the record of where it was adopted from."""
    from endwise.evaluation.adopting import adopt

    ReluSAE(16, 40).save(tmp_path / "theirs" / "sae_of_others", {"hook_name": SITE})
    options = {"model": str(made / "model"), "data": str(made / "train.npy"), "context": 8, "tokens": 64}
    run = adopt(tmp_path / "theirs" / "sae_of_others", out=tmp_path / "adopted", **options)
    evaluate(run)
    push([run], NAME)
    for name, content in hub.repositories[NAME].files.items():
        assert str(tmp_path).encode() not in content, name
    (back,) = pull(f"{NAME}/adopted", tmp_path / "back")
    assert RunFolder(back).recipe().adopted.path == "sae_of_others"
    assert pareto([back])[0].runs[0].ce_increase == pareto([run])[0].runs[0].ce_increase


def test_the_weights_tell_of_no_folder_and_stay_the_same_numbers(runs, hub):
    """The metadata inside a safetensors file name the text, which lies in a folder of this machine."""
    push([runs / "weak"], NAME)
    files = hub.repositories[NAME].files
    weights, before = files["weak/sae_weights.safetensors"], runs / "weak/sae/sae_weights.safetensors"
    size = int.from_bytes(weights[:8], "little")
    told = json.loads(json.loads(weights[8 : 8 + size])["__metadata__"]["metadata"])
    assert told["dataset_path"] == "train.npy" and told["model_name"] == "model"
    with safe_open(before, "pt") as file:
        assert "/" in json.loads(file.metadata()["metadata"])["dataset_path"]
    start = int.from_bytes(before.read_bytes()[:8], "little") + 8
    assert weights[8 + size :] == before.read_bytes()[start:]


def test_text_in_a_card_stands_as_it_is():
    assert plain("a|b <i>*x*</i>\n[y](z)") == "a&#124;b &lt;i&gt;&#42;x&#42;&lt;/i&gt; &#91;y&#93;(z)"
    assert plain("hook_resid_pre _x_") == "hook_resid_pre &#95;x&#95;"
    assert plain('the model\'s "own" CE') == 'the model\'s "own" CE'
