"""Dictionaries at several places trained for one loss: against autograd by hand, and as runs."""

import copy
import json
import shutil

import pytest
import torch
import yaml
from typer.testing import CliRunner

import endwise
from endwise import RunConfig, Site, spliced, train
from endwise.cli import app
from endwise.common.errors import ConfigError, NotFinite, RunFolderError
from endwise.config.places import PlacesConfig, read_recipe
from endwise.config.run import TrainingConfig
from endwise.dictionaries.relu import ReluSAE
from endwise.kernels import standing_in
from endwise.models.sites import Place
from endwise.runs.checkpoints import read_checkpoint
from endwise.runs.folder import RunFolder
from endwise.tokens import TokenBatch
from endwise.training.joint import JointTrainee
from endwise.training.making import new_joint_trainee
from endwise.training.objectives import KL, DownstreamMSE, FeatureMSE, LocalMSE, Objective, Sparsity
from endwise.training.planning.dry_run import STEP, DryRun
from endwise.training.planning.plan import count_flops, plan
from endwise.training.step import take_step
from endwise.training.trainee import Trainee
from joint_runs import LATER, MLPS, RESIDUAL, files, in_double, lines, several, some_masked, start
from own_kernels import HeldKernels, OwnKernels
from small_gpt2 import CONTEXT, LAYERS, recipe, small_corpora, small_model, write_tokens
from spread import assert_close, launch
from tiny_models import hooked, tokens

WEIGHTS = {"kl": 1.0, "downstream": 0.7, "feature": 0.3, "local": 0.5, "sparsity": 0.2}


# The loss and its gradient, by hand


def dictionaries(names):
    made = {}
    for seed, name in enumerate(names):
        sae = ReluSAE(16, 24, seed=seed)
        with torch.no_grad():
            for parameter in sae.parameters():
                parameter += 0.4 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        made[Place.parse(name)] = sae.double()
    return made


def values_by_hand(model, ids, mask, made):
    """One whole pass with hooks: the logits, what each place reads, finds and writes, and the value at `LATER`."""
    read, found, written, acts, kept = {}, {}, {}, {}, {}

    def act_at(place):
        def act(value):
            read.setdefault(place, value)
            found[place] = value
            sae = made[place]
            x = read[place]
            written[place] = torch.relu(x @ sae.W_enc + sae.b_enc) @ sae.W_dec + sae.b_dec
            return torch.where(mask[..., None], written[place], value)

        return act

    for place in made:
        acts[place.writes] = act_at(place)
        if place.reads != place.writes:
            acts[place.reads] = lambda value, place=place: read.__setitem__(place, value) or value
    acts[LATER] = lambda value: kept.__setitem__("later", value) or value
    with hooked("gpt2", model.model, acts):
        logits = model.model(input_ids=ids, use_cache=False).logits
    return logits, read, found, kept["later"]


def loss_by_hand(model, ids, mask, made, inputs):
    """All terms, of which those at the places let no gradient through to what they read."""
    nothing = torch.zeros_like(mask)
    with torch.no_grad():
        clean, read, found, later = values_by_hand(model, ids, nothing, made)
    logits, spliced_read, spliced_found, spliced_later = values_by_hand(model, ids, mask, made)
    count, terms = mask.sum(), {}
    log_p = clean.log_softmax(-1)
    terms["kl"] = (log_p.exp() * (log_p - logits.log_softmax(-1))).sum(-1)[mask].sum()
    terms["downstream"] = (spliced_later - later)[mask].square().mean(-1).sum()

    def latents(place, x):
        return torch.relu(x @ made[place].W_enc + made[place].b_enc)

    _, *after = sorted(made)
    errors = [
        (latents(place, spliced_read[place]) - latents(place, read[place]).detach())[mask].square().sum() / 16
        for place in after
    ]
    terms["feature"] = torch.stack(errors).mean()
    terms["local"] = terms["sparsity"] = torch.zeros((), dtype=torch.float64)
    for place, sae in made.items():
        x, y = (read, found) if inputs == "clean" else (spliced_read, spliced_found)
        c = latents(place, x[place].detach())
        estimate = c @ sae.W_dec + sae.b_dec
        terms["local"] = terms["local"] + (estimate - y[place].detach())[mask].square().mean(-1).sum()
        terms["sparsity"] = terms["sparsity"] + c[mask].sum() / 16
    return sum(WEIGHTS[name] * total for name, total in terms.items()) / count, terms


def joint_trainee(made, inputs, terms=("kl", "downstream", "feature"), microbatch=1):
    of_pass = {
        "kl": KL(WEIGHTS["kl"]),
        "downstream": DownstreamMSE(WEIGHTS["downstream"], (LATER,)),
        "feature": FeatureMSE(WEIGHTS["feature"]),
    }
    objective = Objective.of(of_pass[name] for name in terms)
    own = Objective.of([LocalMSE(WEIGHTS["local"]), Sparsity(WEIGHTS["sparsity"])])
    training = TrainingConfig(tokens=1000)
    parts = [Trainee(sae, place, own, training, 10) for place, sae in made.items()]
    return JointTrainee(parts, objective, inputs, microbatch)


@pytest.mark.parametrize(
    ("names", "inputs", "kernels"),
    [
        *((names, inputs, OwnKernels()) for names in (MLPS, RESIDUAL) for inputs in ("clean", "spliced")),
        (RESIDUAL, "spliced", HeldKernels()),
    ],
    ids=["MLPs-clean", "MLPs-spliced", "residual-clean", "residual-spliced", "in_slots"],
)
def test_gradients_are_those_of_one_loss(names, inputs, kernels):
    """KL in float32 within; everything else, and the backward pass, in float64."""
    model, ids = in_double(), tokens(4)
    mask, made = some_masked(ids), dictionaries(names)
    weights = [weight for place in sorted(made) for weight in made[place].parameters()]
    loss, terms = loss_by_hand(model, ids, mask, made, inputs)
    expected = torch.autograd.grad(loss, weights)
    trainee = joint_trainee(dict(reversed(made.items())), inputs)
    for sae in made.values() if kernels.holds else ():
        sae.sparse_below = 1.0
    gradients = []
    trainee.finish_step = lambda *_: gradients.extend(weight.grad for weight in weights)
    with standing_in("cpu", kernels):
        take_step(model, [trainee], TokenBatch(ids, mask), accumulation=2)  # two passes, each of two microbatches
    sizes = [len(part.rooms._known) for part in trainee.parts]
    assert not kernels.holds or sizes == [1, 2, 2]  # the later ones encode microbatches too
    for ours, theirs in zip(gradients, expected, strict=True):
        assert theirs.abs().max() > 1e-4
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    values = {"kl": "kl", "downstream": "downstream_mse", "feature": "feature_mse"}
    for name, ours in values.items():
        torch.testing.assert_close(trainee._sums[ours].double(), terms[name].detach(), rtol=1e-5, atol=1e-6)
    for name, ours in {"local": "local_mse", "sparsity": "sparsity"}.items():
        total = sum(part._sums[ours] for part in trainee.parts)
        torch.testing.assert_close(total.double(), terms[name].detach(), rtol=1e-6, atol=0)


def test_the_gradient_is_the_difference_of_the_loss():
    """At the first dictionary's decoder bias, whose effect goes through three later dictionaries."""
    model, ids = in_double(), tokens(3)
    mask, made = some_masked(ids), dictionaries(MLPS)
    trainee = joint_trainee(made, "clean", terms=("downstream", "feature"))
    kept = {}
    first = trainee.parts[0].sae
    trainee.finish_step = lambda *_: kept.setdefault("gradient", first.b_dec.grad.clone())
    take_step(model, [trainee], TokenBatch(ids, mask))

    def loss():
        _, terms = loss_by_hand(model, ids, mask, made, "clean")
        named = ("downstream", "feature", "local", "sparsity")
        return float(sum(WEIGHTS[name] * terms[name].detach() for name in named) / mask.sum())

    for number in range(3):
        with torch.no_grad():
            first.b_dec[number] += 1e-6
            above = loss()
            first.b_dec[number] -= 2e-6
            below = loss()
            first.b_dec[number] += 1e-6
        assert float(kept["gradient"][number]) == pytest.approx((above - below) / 2e-6, rel=1e-4)


def test_without_terms_of_the_pass_spliced_inputs_are_still_met():
    model, ids = in_double(), tokens(3)
    mask, made = some_masked(ids), dictionaries(MLPS)
    _, terms = loss_by_hand(model, ids, mask, made, "spliced")
    found = {}
    for inputs in ("clean", "spliced"):
        trainee = joint_trainee(copy.deepcopy(made), inputs, terms=())
        take_step(model, [trainee], TokenBatch(ids, mask))
        found[inputs] = trainee.report()
    places = found["spliced"]["places"]
    total = sum(each["local_mse"] for each in places.values()) * int(mask.sum())
    assert total == pytest.approx(float(terms["local"].detach()), rel=1e-6)
    assert places[MLPS[0]] == found["clean"]["places"][MLPS[0]] and places[MLPS[2]] != found["clean"]["places"][MLPS[2]]


def test_a_number_that_is_not_finite_at_one_place_keeps_the_weights_of_all():
    model, ids = in_double(), tokens(3)
    made = dictionaries(MLPS)
    trainee = joint_trainee(made, "clean")
    batch = TokenBatch(ids, some_masked(ids))
    take_step(model, [trainee], batch)
    before = [copy.deepcopy(part.sae.state_dict()) for part in trainee.parts]
    plain = trainee.parts[2].encode
    trainee.parts[2].encode = lambda read, target, mask: plain(read, target * torch.nan, mask)
    take_step(model, [trainee], batch)
    trainee.parts[2].encode = plain
    take_step(model, [trainee], batch)
    with pytest.raises(NotFinite, match=r"At step 2 the term local_mse at blocks\.2\.mlp_in -> .* was not finite"):
        trainee.report()
    assert trainee.step == 1 and all(part.step == 1 for part in trainee.parts)
    for part, state in zip(trainee.parts, before, strict=True):
        for name, tensor in part.sae.state_dict().items():
            assert torch.equal(tensor, state[name])


# Runs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = write_tokens(tmp_path_factory.mktemp("tokens"))
    small_model().model.save_pretrained(folder / "model")
    return folder


def brief(*given, **changes):
    """A recipe of 10 steps, of which the fifth is saved."""
    values = several(*given, **changes)
    values["training"] |= {"tokens": 320}
    return values


@pytest.mark.parametrize(
    ("inputs", "kind"),
    [
        *(("clean", "local"), ("clean", "e2e_ds"), ("spliced", "local"), ("spliced", "e2e")),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("clean", "e2e"), ("spliced", "e2e_ds"))),
    ],
)
def test_with_one_place_it_is_an_ordinary_run(made, tmp_path, kind, inputs):
    place = [{"site": "blocks.1.hook_resid_pre"}]
    joint = start(made, brief(tmp_path / "joint", place, kind, inputs=inputs))
    config = RunConfig.build(
        {key: value for key, value in brief(tmp_path / "alone", place, kind).items() if key != "places"} | place[0]
    )
    alone = train(config, model=small_model(), corpora=small_corpora(made), display=False)
    (folder,) = joint.folders.values()
    assert files(folder)["sae/sae_weights.safetensors"] == files(alone.folder)["sae/sae_weights.safetensors"]
    for ours, theirs in zip(lines(joint.folder), lines(alone.folder), strict=True):
        (own,) = ours.pop("places").values()
        assert {**own, **ours, "heldout": 0} == {**theirs, "heldout": 0}
        for name, value in ours.get("heldout", {}).items():
            assert value == pytest.approx(theirs["heldout"][name], rel=1e-5)


@pytest.fixture(scope="module")
def run(made, tmp_path_factory):
    run = start(made, several(tmp_path_factory.mktemp("joint") / "run"))
    endwise.evaluate(run.folder, model=small_model(), corpora=small_corpora(made))
    return run


def test_it_learns_and_says_so_place_by_place(run):
    told = lines(run.folder)
    assert told[-1]["loss"] < told[0]["loss"] and list(told[0]["places"]) == list(run.folders)
    assert {"kl", "downstream_mse", "l0", "alive"} < told[0].keys()
    last = told[-1]
    assert set(last["places"]["blocks.2.hook_resid_pre"]) == {"sparsity", "l0", "gradient_norm", "alive"}
    assert last["l0"] == pytest.approx(sum(each["l0"] for each in last["places"].values()))
    terms = last["kl"] * 0.5 + last["downstream_mse"] * 2.0 + 0.3 * sum(p["sparsity"] for p in last["places"].values())
    assert last["loss"] == pytest.approx(terms)
    assert {"ce_increase", "kl", "l0"} == last["heldout"].keys()


@pytest.mark.parametrize("changes", [{}, {"inputs": "spliced"}], ids=["clean", "spliced"])
def test_a_resumed_run_ends_in_the_same_bits(made, tmp_path, changes):
    values = brief(tmp_path / "run", **changes)
    start(made, values)
    whole = files(tmp_path / "run")
    start(made, values, resume=True, from_step=5)
    assert files(tmp_path / "run") == whole
    start(made, values, resume=True, from_step=0)
    assert files(tmp_path / "run") == whole


def test_each_place_is_a_run_to_all_that_reads_runs(run, made):
    for place, folder in run.folders.items():
        sae = endwise.SAE.load(folder)
        assert torch.equal(sae.W_dec, endwise.SAE.load(folder / "sae").W_dec)
        torch.testing.assert_close(sae.W_dec, run.saes[place].W_dec)
        assert RunFolder(folder).config().place == place
    folder = run.folders["blocks.2.hook_resid_pre"]
    harvested = endwise.importance([folder], model=small_model(), corpora=small_corpora(made))
    assert harvested is not None


def test_a_place_cannot_be_resumed_by_itself(run, made):
    folder = run.folders["blocks.2.hook_resid_pre"]
    with pytest.raises(RunFolderError, match=r"one place of the run run, trained jointly .* --resume .*/run$"):
        train(RunFolder(folder).config().model_copy(update={"out": folder}), model=small_model(), resume=True)
    with pytest.raises(RunFolderError, match=r"several places\. Name one of them: .*hook_resid_pre"):
        RunFolder(run.folder).config()


@torch.no_grad()
def test_all_together_is_what_the_spliced_model_computes(run, made):
    model, corpora = small_model(), small_corpora(made)
    found = endwise.evaluate(run.folder, model=model, corpora=corpora)
    assert list(found) == [*run.folders.values(), run.folder]
    batch = corpora.heldout.batch(range(256 // CONTEXT))
    clean = model.logits(batch.tokens).log_softmax(-1)
    saes = {place: endwise.SAE.load(folder) for place, folder in run.folders.items()}
    targets = batch.tokens[:, 1:, None]

    def increase(logits):
        return float((clean[:, :-1].gather(-1, targets) - logits[:, :-1].log_softmax(-1).gather(-1, targets)).mean())

    with spliced(model, saes):
        together = model.logits(batch.tokens)
    whole = found[run.folder]
    assert whole["ce_increase"] == pytest.approx(increase(together), rel=1e-4)
    kl = (clean.exp() * (clean - together.log_softmax(-1))).sum(-1).mean()
    assert whole["kl"] == pytest.approx(float(kl), rel=1e-4)
    for place, folder in run.folders.items():
        with spliced(model, {place: saes[place]}):
            assert found[folder]["ce_increase"] == pytest.approx(increase(model.logits(batch.tokens)), rel=1e-4)
    read, active = {}, {}
    acts = {place: lambda x, place=place: read.__setitem__(place, x) or saes[place](x) for place in saes}
    with spliced(model, acts):
        model.logits(batch.tokens)
    for place, x in read.items():
        active[place] = float((saes[place].encode(x).dense() > 0).sum(-1).float().mean())
        assert whole.places[place].metrics["l0"].estimate == pytest.approx(active[place], rel=1e-5)
        error = (saes[place](x) - x).square().sum()
        mean = model.clean(batch.tokens, [Site.parse(place)]).activations[Site.parse(place)].mean((0, 1))
        pooled = 1 - float(error / (x - mean).square().sum())
        assert whole.places[place].metrics["explained_variance.pooled"].estimate == pytest.approx(pooled, rel=1e-3)
    assert whole["l0"] == pytest.approx(sum(active.values()), rel=1e-5)
    sites = [Site.parse(place) for place in saes]
    at = model.clean(batch.tokens, sites).activations
    with spliced(model, {site: lambda x, site=site: at[site].mean((0, 1)).expand_as(x) for site in sites}):
        ablated = increase(model.logits(batch.tokens))
    assert whole.baselines.mean_ablated - whole.baselines.clean == pytest.approx(ablated, rel=1e-4)
    written = json.loads((run.folder / "evaluation.json").read_text())
    assert written["ce_increase"] == whole["ce_increase"] and set(written["places"]) == set(saes)
    assert written["site"] == " + ".join(saes) and set(written["weights"]) == set(saes)


def test_apart_each_is_as_it_would_be_alone_and_all_are_measured_together(made, tmp_path):
    apart = start(made, brief(tmp_path / "apart", kind="e2e", joint=False))
    for place, folder in apart.folders.items():
        config = RunFolder(folder).config().model_copy(update={"out": tmp_path / place})
        alone = train(config, model=small_model(), corpora=small_corpora(made), display=False)
        assert files(alone.folder) == files(folder)
    found = endwise.evaluate(apart.folder, model=small_model(), corpora=small_corpora(made))
    assert found[apart.folder]["kl"] > 0 and len(found[apart.folder].places) == LAYERS
    whole = files(tmp_path / "apart")
    start(made, brief(tmp_path / "apart", kind="e2e", joint=False), resume=True, from_step=5)
    assert files(tmp_path / "apart") == whole
    with pytest.raises(RunFolderError, match="another recipe than this one"):
        start(made, brief(tmp_path / "apart", kind="e2e", joint=False, seed=3), resume=True)


def test_the_command_line_trains_resumes_and_measures(made, tmp_path):
    values = several(tmp_path / "run")
    values["model"] |= {"name": str(made / "model"), "device": "cpu"}
    values["data"] |= {"source": str(made / "train.npy"), "heldout": str(made / "heldout.npy"), "context": CONTEXT}
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(values, default=str))

    def call(*arguments):
        told = CliRunner().invoke(app, [str(each) for each in arguments])
        assert told.exit_code == 0, (told.output, told.exception)
        return " ".join(told.output.split())

    assert "Trained e2e_ds at blocks.0.hook_resid_pre + blocks.1" in call("train", file, "--quiet")
    whole = files(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "places" / "blocks.1.hook_resid_pre" / "sae")
    call("train", "--resume", tmp_path / "run", "--quiet", "--from-step", 15, "training.microbatch=4")
    assert files(tmp_path / "run").keys() == whole.keys() | {"changes.jsonl"}
    told = call("evaluate", tmp_path / "run")
    assert "All 4 together: CE increase" in told and "L0 among all" in told


def test_two_processes_give_the_curve_of_one(made, tmp_path):
    folders = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        objective = {"kind": "e2e", "sparsity": {"coefficient": 0.3}, "terms": {"feature_mse": 0.1}}
        values = several(folder, kind="e2e", objective=objective)
        values["model"] |= {"name": str(made / "model"), "device": "cpu"}
        values["data"] |= {"source": str(made / "train.npy"), "heldout": str(made / "heldout.npy"), "context": CONTEXT}
        values["data"] |= {"mask_first_position": True}
        values["training"] |= {"batch": 5, "tokens": 800}
        file = folder.with_suffix(".yaml")
        file.write_text(json.dumps(values, default=str))
        code, told, errors = launch(processes, "train", file, "--quiet")
        assert code == 0 and told.count("Trained e2e") == 1, errors
        folders.append(folder)
    alone, together = map(lines, folders)
    assert len(alone) == len(together) == 20
    for one, other in zip(together, alone, strict=True):
        assert_close(one, other, f"step {other['step']}")
    for name, tensor in read_checkpoint(RunFolder(folders[0]).latest_checkpoint()).tensors.items():
        if ":sae." in name:
            ours = read_checkpoint(RunFolder(folders[1]).latest_checkpoint()).tensors[name]
            torch.testing.assert_close(ours, tensor, rtol=1e-4, atol=1e-4)


# Recipes


def test_what_stands_for_all_and_what_a_place_has_of_its_own():
    config = PlacesConfig.build(
        several(
            "x",
            [
                {"site": "blocks.1.hook_resid_pre"},
                {"site": "blocks.2.mlp_in", "writes": "blocks.2.hook_mlp_out", "dictionary": {"ratio": 3}, "seed": 4},
                {"site": "blocks.3.hook_resid_pre", "objective": {"sparsity": {"coefficient": 7.0}}},
            ],
        )
    )
    one, two, three = config.recipes
    assert (one.dictionary.size, two.dictionary.size, two.dictionary.ratio) == (40, None, 3)
    assert (one.seed, two.seed) == (0, 4) and two.place == "blocks.2.mlp_in -> blocks.2.hook_mlp_out"
    assert (one.objective.coefficient, three.objective.coefficient) == (0.3, 7.0)
    assert three.objective.downstream_mse == 2.0
    assert PlacesConfig.build(json.loads(config.model_dump_json())) == config


@pytest.mark.parametrize(
    ("places", "told"),
    [
        ([], "must hold at least 1"),
        ([{"site": "blocks.1.hook_resid_pre"}] * 2, "two places write one site"),
        ([{"site": "blocks.1.hook_resid_pre"}, {"site": "blocks.2.hook_resid_pre", "objective": {"kl": 9}}], "in kl"),
        ([{"site": "blocks.1.hook_resid_pre", "dictionary": {"sise": 3}}], "did you mean 'size'"),
    ],
)
def test_what_breaks_a_rule_is_refused(places, told):
    values = several("x", [{"site": "blocks.0.hook_resid_pre"}])
    with pytest.raises(ConfigError, match=told):
        PlacesConfig.build(values | {"places": places})


def test_a_place_may_have_another_loss_if_each_is_trained_apart():
    places = [{"site": "blocks.1.hook_resid_pre"}, {"site": "blocks.2.hook_resid_pre", "objective": {"kl": 9}}]
    assert [each.objective.kl for each in PlacesConfig.build(several("x", places, joint=False)).recipes] == [None, 9]


def test_an_override_that_no_place_would_follow_is_refused(tmp_path):
    """As on resuming: what a run folder keeps says everything at each place."""
    config = PlacesConfig.build(
        several("x", [{"site": "blocks.1.hook_resid_pre"}, {"site": "blocks.2.hook_resid_pre"}])
    )
    file = tmp_path / "kept.yaml"
    file.write_text(config.to_yaml())
    with pytest.raises(ConfigError, match=r"^dictionary\.size: every place has a value of its own.*places\.0\.dict"):
        read_recipe(file, ["dictionary.size=9"])
    assert [each.dictionary.size for each in read_recipe(file, ["places.1.dictionary.size=9"]).places] == [40, 9]
    with pytest.raises(ConfigError, match=r"'places\.2\.seed': the list has the entries 0 to 1, and no '2'"):
        read_recipe(file, ["places.2.seed=9"])
    file.write_text(yaml.safe_dump(several("x", [{"site": "blocks.1.hook_resid_pre"}])))
    assert read_recipe(file, ["seed=9"]).seed == 9


def test_resampling_by_the_losses_of_tokens_has_no_joint_form(made, tmp_path):
    places = [{"site": "blocks.1.hook_resid_pre"}, {"site": "blocks.2.hook_resid_pre"}]
    base = several(tmp_path / "x", places, dictionary={"size": 40, "resample_at": [0.5]})
    with pytest.raises(ConfigError, match=r"dictionary\.resample_at at .*joint: false"):
        start(made, base)


def test_a_recipe_for_several_is_not_one_for_one(made, tmp_path):
    with pytest.raises(ConfigError, match=r"endwise\.train_places"):
        train(several(tmp_path / "x"))


def test_a_term_of_later_places_needs_one(made, tmp_path):
    objective = {"kind": "e2e", "sparsity": {"coefficient": 0.1}, "terms": {"feature_mse": 0.5}}
    base = several(tmp_path / "x", [{"site": "blocks.1.hook_resid_pre"}], objective=objective)
    with pytest.raises(ConfigError, match=r"feature_mse .* not so at"):
        start(made, base)
    alone = RunConfig.build({**recipe(tmp_path / "y").model_dump(), "objective": objective})
    with pytest.raises(ConfigError, match=r"feature_mse compares latents at later places"):
        train(alone, model=small_model(), corpora=small_corpora(made), display=False)
    run = start(made, several(tmp_path / "z", objective=objective))
    told = lines(run.folder)
    assert told[-1]["feature_mse"] > 0 and told[-1]["loss"] > told[-1]["kl"] + 0.5 * told[-1]["feature_mse"]


# Plans


def test_a_plan_is_of_all_places(made, tmp_path):
    values = several(tmp_path / "x", kind="e2e")
    values["model"] |= {"name": str(made / "model"), "device": "cpu"}
    values["data"] |= {"context": CONTEXT}
    run = start(made, brief(tmp_path / "run", kind="e2e"))
    one = plan(PlacesConfig.build(values | {"places": values["places"][:1]}))
    config = PlacesConfig.build(values)
    four = plan(config)
    assert (four.d_sae, four.parameters.dictionary) == (4 * one.d_sae, 4 * one.parameters.dictionary)
    written = RunFolder(run.folder).latest_checkpoint().stat().st_size
    assert written == pytest.approx(four.checkpoint_bytes, rel=0.3) and written > 2 * one.checkpoint_bytes
    step = {stage.name: stage for stage in four.stages}["training step"]
    assert step.parts["SAE weights"] == 4 * one.stages[0].parts["SAE weights"]
    assert step.parts["optimiser"] == pytest.approx(4 * one.stages[0].parts["optimiser"], rel=0.05)
    assert four.flops.sae_forward == 7 * one.flops.sae_forward  # the later three encode inside the pass, and outside
    assert four.flops.tail_forward == one.flops.tail_forward
    dry_run = DryRun(PlacesConfig.build(values | {"joint": False}), torch.device("cpu"), 4)
    apart, _ = count_flops(dry_run, 4 * CONTEXT)
    assert apart.sae_forward == 4 * one.flops.sae_forward
    assert one.flops.tail_forward < apart.tail_forward < 4 * one.flops.tail_forward


def test_a_plan_says_what_a_microbatch_saves(made, tmp_path):
    values = several(tmp_path / "x", kind="e2e")
    values["model"] |= {"name": str(made / "model"), "device": "cpu"}
    values["data"] |= {"context": CONTEXT}
    values["training"] |= {"batch": 64, "tokens": 4096}
    values["places"] = values["places"][2:]
    held = []
    for microbatch in (1, 64):
        values["training"]["microbatch"] = microbatch
        dry_run = DryRun(PlacesConfig.build(values), torch.device("cpu"), 64)
        assert dry_run.microbatch == microbatch
        held.append(dry_run.stages(1, microbatch, only_step=True)[STEP].bytes)
    assert held[0] < held[1]


def test_a_dictionary_that_chooses_among_all_tokens_takes_the_pass_whole(tmp_path):
    values = several(tmp_path / "x")
    values["dictionary"] = {"architecture": "batchtopk", "size": 40, "k": 5}
    del values["objective"]["sparsity"]
    trainee = new_joint_trainee(PlacesConfig.build(values), small_model(), 10)
    assert trainee.microbatch == 4  # the batch
    one = several(tmp_path / "x", values["places"][:1])
    one["training"]["microbatch"] = values["training"]["microbatch"] = 2
    assert new_joint_trainee(PlacesConfig.build(one), small_model(), 10).microbatch == 2
    with pytest.raises(ConfigError, match=r"training\.microbatch is 2, but a dictionary that comes after another"):
        new_joint_trainee(PlacesConfig.build(values), small_model(), 10)
