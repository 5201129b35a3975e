"""First minutes of a new user: a recipe for a model, its first run, and the messages about both."""

import json
import math
from dataclasses import replace

import pytest
import yaml
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from bad_input import ran, refused, write_place
from endwise.cli import app
from endwise.common.doctor import examine
from endwise.common.extras import version_of
from endwise.common.files import write_atomic, write_json
from endwise.common.remarks import diverged
from endwise.config.objective import loss_of
from endwise.config.run import EvaluationConfig, RunConfig
from endwise.evaluation.listing import list_runs
from endwise.models.loading import DEVICE
from endwise.sweeps import tuning
from endwise.sweeps.tuning import RateTrial, tune
from endwise.training.planning import proposal
from endwise.training.planning.outline import Sites
from small_gpt2 import SITE, recipe
from word_tokenizer import VOCAB, make_tokenizer

pytestmark = pytest.mark.usefixtures("loaded_once")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def trained(place):
    """A run, made by options in place of dotted keys."""
    out = place / "runs" / "one"
    options = ("--seed", 3, "--tokens", 320, "--device", "cpu", "--out", out, "--quiet")
    assert ran("train", place / "recipe.yaml", *options).exit_code == 0
    return out


def as_json(*arguments):
    result = ran(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_options_of_train_are_keys_of_its_recipe(trained, place):
    kept = yaml.safe_load((trained / "config.yaml").read_text())
    assert (kept["seed"], kept["training"]["tokens"], kept["model"]["device"]) == (3, 320, "cpu")
    assert "seed: what a run computes" in refused("train", "--resume", trained, "--seed", 4)
    said = ran("train", "--resume", trained, "--quiet").stdout
    assert said.startswith("Already trained")
    assert "'/nowhere'" in refused("train", place / "recipe.yaml", "--model", "/nowhere")
    assert "with data.colum=x is not valid" in refused("plan", place / "recipe.yaml", "data.colum=x")
    assert ran("--version").stdout == ran("version").stdout


@pytest.mark.parametrize("command", ["evaluate", "harvest"])
def test_a_device_of_the_command_stands_in_place_of_the_recipes(trained, command):
    assert "'cuda:77' cannot be used" in refused(command, trained, "--device", "cuda:77", "--tokens", 64)
    assert DEVICE.get() is None


def test_runs_are_listed_with_their_state(trained, place):
    (listed,) = as_json("runs", place / "runs")
    assert (listed["state"], listed["place"], listed["seed"], listed["l0"]) == ("trained", SITE, 3, None)
    evaluated = as_json("evaluate", place / "runs", "--tokens", 64)
    assert [each["run"] for each in evaluated] == [str(trained)]
    (again,) = list_runs([trained])
    assert (again.state, again.l0, again.ce_increase) == ("measured", evaluated[0]["l0"], evaluated[0]["ce_increase"])
    (trained / "config.yaml").rename(trained / "kept")
    (trained / "config.yaml").write_text("site: 3")
    try:
        assert list_runs([trained])[0].state == "unreadable"
        assert "is not valid" in ran("runs", trained).stdout
    finally:
        (trained / "kept").replace(trained / "config.yaml")
    assert "holds no run folder" in refused("runs", place / "model")
    for command in (["train", "--resume"], ["inspect"], ["steer", "--prompt", "a", "--keep", "1"]):
        assert f"one run is needed here. Name it: {trained}" in refused(*command, place / "runs")


TAKE_RUNS = {
    **{name: (name,) for name in ("evaluate", "pareto", "harvest", "dashboard", "serve", "inspect", "track")},
    **{name: (name,) for name in ("export-neuronpedia", "compare-explanations")},
    "resume": ("train", "--resume"),
    "steer": ("steer", "--prompt", "a", "--keep", 1),
    "explain": ("explain", "--endpoint", "http://127.0.0.1:9", "--model", "m"),
}


@pytest.mark.parametrize("command", TAKE_RUNS)
def test_where_runs_are_taken_what_else_is_given_is_named(trained, place, command):
    empty, given = place / "empty", TAKE_RUNS[command]
    empty.mkdir(exist_ok=True)
    write_json(empty.parent / "harvested" / "harvest.json", {})
    said = {
        place
        / "recipe.yaml": f"is needed here. Train it first: endwise train {place / 'recipe.yaml'}; then give its run",
        trained / "checkpoints": f"is a part of the run {trained}",
        place / "harvested": "is a harvest",
        place / "model": "is a language model",
        empty: "is an empty folder",
        place / "none": "There is no",
    }
    for path, words in said.items():
        message = refused(*given, path, code=2)
        assert str(path) in message and words in message and "\n" not in message


@pytest.mark.parametrize("command", [["train"], ["plan"], ["tune", "--l0", 3], ["sweep"]])
def test_where_recipes_are_taken_what_else_is_given_is_named(trained, place, command):
    wanted, sweep = "sweep" if command == ["sweep"] else "recipe", place / "swept"
    write_atomic(sweep / "sweep.yaml", b"recipe: recipe.yaml\ngrids: []\n")
    for path, words in {
        trained: f"is a run folder, and a {wanted} is needed here.",
        trained / "sae": f"is a part of the run {trained}",
        sweep: f"Its file is {sweep / 'sweep.yaml'}.",
        place / "model": "is a language model",
        place / "none": f"There is no {wanted}",
    }.items():
        message = refused(*command, path, code=2)
        assert str(path) in message and words in message and "\n" not in message
    kept = {f"Its recipe is {trained / 'config.yaml'}", f"endwise train --resume {trained}"}
    assert all(words in refused(*command, trained) for words in kept) == (wanted == "recipe")


def test_tables_are_printed_as_json_too(trained, place, undrawn):
    assert as_json("sites", place / "model")["sites"][SITE] == 16
    ran("evaluate", trained, "--tokens", 64)
    compared = as_json("pareto", trained)
    (listed,), (point,) = as_json("runs", trained), compared["points"]
    assert (listed["kind"], listed["label"], listed["place"]) == (point["kind"], point["method"], point["site"])
    assert point["l0"] == as_json("evaluate", trained, "--tokens", 64)[0]["l0"]
    assert as_json("inspect", trained / "sae")["d_sae"] == list_runs([trained])[0].d_sae
    resumed = as_json("train", "--resume", trained, "--quiet")
    assert (resumed["run"], resumed["place"], resumed["diverged"]) == (str(trained), SITE, False)
    written = as_json("convert", trained, place / "converted", "--to", "saelens")
    assert written["path"] == str(place / "converted") and written["apart"] < 1e-5
    pushed = as_json("push", trained, "someone/some", "--dry-run")
    assert pushed["repo"] == "hf://someone/some" and pushed["commit"] is None and pushed["files"]


def test_a_doctor_names_what_is_there_and_what_is_wrong(monkeypatch, tmp_path):
    found = examine()
    assert found.to_json()["facts"]["packages"].startswith("torch ")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ENDWISE_CACHE", str(tmp_path / "file" / "cache"))
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1
    assert any("ENDWISE_CACHE" in problem for problem in json.loads(result.stdout)["problems"])
    versions = {"pytest": "0.1", "rich": "0.1"}
    monkeypatch.setattr("endwise.common.doctor.version_of", lambda name: versions.get(name) or version_of(name))
    problems = " ".join(examine().problems)
    assert "rich is 0.1, and endwise asks for" in problems and "pytest is 0.1" not in problems


def test_defaults_are_lowered_to_the_text_there_is(place, tmp_path):
    """A number that a recipe gives itself is never lowered; in place of a default, a run keeps what it measured on."""
    values = yaml.safe_load((place / "recipe.yaml").read_text())
    own = {key: value for key, value in values["evaluation"].items() if "tokens" not in key}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**values, "evaluation": own, "out": str(tmp_path / "run")}))
    assert ran("train", tmp_path / "recipe.yaml").exit_code == 0
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["evaluation"]
    assert (kept["tokens"], kept["during_training_tokens"]) == (512, 512)
    assert ran("train", tmp_path / "recipe.yaml", "--or-resume").stdout.startswith("Already trained")
    assert "512 held-out tokens" in ran("evaluate", tmp_path / "run").stdout
    message = refused("train", tmp_path / "recipe.yaml", "evaluation.tokens=520", f"out={tmp_path / 'other'}", code=4)
    assert "Lower evaluation.tokens" in message
    assert EvaluationConfig(tokens=600).within(500).tokens == 600
    assert EvaluationConfig(skip=100).within(500).needed == 500


@pytest.mark.parametrize("begins", [True, False])
def test_the_text_of_a_first_recipe_is_read_as_the_model_reads_it(tmp_path, begins):
    """Its column by name, and BOS where the model's tokenizer begins every text with it."""
    tokenizer = make_tokenizer(PreTrainedTokenizerFast)
    if begins:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
        )
    tokenizer.save_pretrained(tmp_path / "model")
    shape = GPT2Config(vocab_size=VOCAB, n_layer=2, n_embd=16, n_head=2, n_positions=16)
    GPT2LMHeadModel(shape).save_pretrained(tmp_path / "model")
    texts = (json.dumps({"body": f"w{n % 7} w{n % 40} w{n % 5} w{n % 11}"}) for n in range(2000))
    (tmp_path / "texts.jsonl").write_text("\n".join(texts))
    asked = ("init", tmp_path / "model", "--data", tmp_path / "texts.jsonl", "--out", tmp_path / "it.yaml")
    asked += () if begins else ("--tokens", 2048)  # which are planned for once
    assert "body" in refused(*asked, code=4)
    assert ran(*asked, "--column", "body").exit_code == 0
    data = RunConfig.read(tmp_path / "it.yaml").data
    assert (data.column, data.prepend_bos) == ("body", begins)
    assert "which is not given" in refused("init", "--column", "body", "--out", tmp_path / "other.yaml", code=2)


def test_a_recipe_is_written_for_a_model(place, tmp_path):
    out = tmp_path / "first.yaml"
    made = as_json("init", "--out", out, "--tokens", 2048)
    text = out.read_text()
    assert made["plan"]["fits"] and made["recipe"] == str(out) and text.count("  # ") > 10
    config = RunConfig.read(out)
    assert config.site == "blocks.3.hook_resid_pre" and config.training.tokens == 2048
    assert config.dictionary.k == 16 and config.in_phases[0].objective.name == "local"
    assert "--again" in refused("init", "--out", out)
    assert ran("plan", out).exit_code == 0
    assert "vocabulary of 31" in refused("init", place / "model", "--out", tmp_path / "other.yaml", code=4)


@pytest.mark.parametrize(
    ("blocks", "layer", "phases"), [(1, 0, "finetune"), (2, 0, "staged"), (3, 1, "staged"), (12, 6, "staged")]
)
def test_a_recipe_keeps_later_activations_where_there_are_some(monkeypatch, blocks, layer, phases):
    names = [f"blocks.{number}.{part}" for number in range(blocks) for part in ("hook_resid_pre", "hook_resid_post")]
    monkeypatch.setattr(proposal, "sites_of", lambda _: Sites(dict.fromkeys(names, 8), {}))
    assert proposal._middle("any") == (f"blocks.{layer}.hook_resid_pre", 8, phases)


def trial(rate, score, miss=0.0, failed=""):
    return RateTrial(rate, 1000, 0.1, 16.0, 0.5, score - 0.1, score + 0.1, miss, score, failed)


def test_rates_are_ranked_near_the_target_first():
    trials = [trial(1.0, 0.1, miss=3.0), trial(2.0, 0.6), trial(3.0, 0.5, miss=0.2), trial(4.0, math.inf, failed="NaN")]
    assert [each.learning_rate for each in tuning._ranked(trials)] == [3, 2, 1, 4]


def test_tuning_reads_its_budget_and_writes_what_it_found(model, corpora, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tuning, "LEAST_STEPS", 50)
    values = recipe(tmp_path / "unused", "local", learning_rate=1e-3).model_dump(mode="json")
    values["objective"]["sparsity"] = {"coefficient": 0.3}
    values["training"]["tokens"], values["data"]["epochs"] = 6400, 2
    budget = {"target": {"l0": 6}}  # unset, it is the least possible
    values["data"]["leave_out_norms"] = 1.1
    found = tune(values, budget, model=model, corpora=corpora)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("!")]
    assert any(not trial.is_near for trials in found.trials for trial in trials)  # which is in the table
    told = {line.split()[1] for line in said}  # of the recipe and its text, once for ten trials in three rounds
    assert told == {"data.leave_out_norms", "The"} and len(said) == 2
    assert sum(max(each.tokens for each in trials) for trials in found.trials) <= 9600
    assert [len(trials) for trials in found.trials] == [5, 3, 2]
    best = min((t for t in found.trials[-1] if t.is_near), key=lambda t: t.score)
    assert math.isclose(found.learning_rate, best.learning_rate, rel_tol=0.06)
    assert math.isclose(found.coefficient or 0, best.coefficient, rel_tol=0.01)
    written = RunConfig.build(yaml.safe_load(found.text))
    assert written.objective.sparsity is not None and written.objective.sparsity.target_l0 == 6
    assert written.training.learning_rate == found.learning_rate
    assert written.objective.coefficient == found.coefficient
    assert written.training.tokens == values["training"]["tokens"]  # of the recipe, not of its trials
    comments = [line for line in found.text.splitlines() if line.startswith("# ")]
    assert comments[1:] == [f"# {remark}" for remark in found.remarks]
    for tokens in (100, 10**6):
        with pytest.raises(tuning.ConfigError, match="must be from 9,600"):
            tune(values, {**budget, "tokens": tokens}, model=model, corpora=corpora)


def test_a_lambda_at_its_bound_is_no_end(tmp_path):
    steered = recipe(tmp_path / "unused", "local").model_dump(mode="json")
    steered["objective"]["sparsity"] = {"coefficient": 2.0, "target_l0": 30.0}
    config = RunConfig.build(steered)
    assert config.objective.coefficient == 2
    bound = [tuning._is_bound(2.0, last) for last in (2e-4, 2e4, 2.1e-4, 1.9e4, 2.0)]
    assert bound == [True, True, False, False, False]
    for is_bound in (True, False):
        ended = replace(trial(1e-3, 0.1), coefficient=2e-4, is_bound=is_bound)
        said = tuning._remarks(config, [[ended]], tuning.Target(l0=16), True)
        assert any("Raise --budget" in line for line in said) == is_bound


def test_tuning_aims_where_the_dictionary_sets_its_l0(tmp_path):
    values = {
        **recipe(tmp_path, "local").model_dump(mode="json"),
        "dictionary": {"architecture": "topk", "size": 32, "k": 4},
    }
    values["objective"] = {"kind": "local"}
    assert tuning._aimed(values, tuning.Target(l0=7))["dictionary"]["k"] == 7
    with pytest.raises(tuning.ConfigError, match=r"dictionary\.k sets how many"):
        tuning._aimed(values, tuning.Target(ce_increase=0.1))


def test_a_loss_that_rises_with_its_penalty_has_not_diverged():
    """A line of a run whose λ rose to a target: all terms but the penalty fell."""
    first = {"loss": 10.0, "kl": 9.0, "sparsity": 10.0, "sparsity_coefficient": 0.1}
    last = {"loss": 31.0, "kl": 1.0, "sparsity": 0.1, "sparsity_coefficient": 300.0}
    assert (loss_of(first), loss_of(last)) == (9.0, 1.0)
    assert loss_of({"loss": 3.0, "sparsity": 2.0}) == 3.0  # of one weight, it is the objective
    assert diverged({"loss": {"first": loss_of(first), "last": loss_of(last)}}) is None
