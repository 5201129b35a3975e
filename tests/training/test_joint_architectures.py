"""Architectures with state of their own where several are spliced jointly: what is counted, once a step, of which
latents; and runs of theirs."""

import json

import pytest
import torch

import endwise
from endwise import spliced
from endwise.config.run import TrainingConfig
from endwise.dictionaries.batchtopk import BatchTopKSAE
from endwise.dictionaries.gated import GatedSAE
from endwise.dictionaries.matryoshka import MatryoshkaSAE
from endwise.dictionaries.normed import NormedSAE
from endwise.models.sites import Place
from endwise.runs.checkpoints import read_checkpoint
from endwise.runs.folder import RunFolder
from endwise.tokens import TokenBatch
from endwise.training.joint import JointTrainee
from endwise.training.objectives import DownstreamMSE, FeatureMSE, LocalMSE, Objective
from endwise.training.step import take_step
from endwise.training.trainee import Trainee
from joint_runs import LATER, MLPS, RESIDUAL, files, in_double, lines, several, some_masked, start
from small_gpt2 import small_corpora, small_model, write_tokens
from spread import assert_close, launch
from tiny_models import hooked, tokens
from topk_family import fitted_on_few, largest_of_step

K, STEPS, RATE = 3, 4, 0.2
SECTIONS = {
    "standard": {"aux": 0.1, "aux_negative": True, "revive": 0.1, "dead_window": 64},
    "gated": {"revive": 0.1, "dead_window": 64},
    "jumprelu": {"bandwidth": 1.0, "aux": 0.1, "revive": 0.1, "dead_window": 64},
    "topk": {"k": K, "aux": 0.1, "dead_window": 64},
    "batchtopk": {"k": K, "k_start": 9, "aux": 0.1, "dead_window": 64},
    "matryoshka_batchtopk": {"k": K, "random_prefixes": 3, "aux": 0.1},
}


# Thresholds and firing, by hand


def chosen(sae, x, mask):
    """The latents of a step by the definition, and the smallest value that is kept."""
    inner = sae.inner if isinstance(sae, NormedSAE) else sae
    if inner is not sae:
        x = sae.norm.of(x)
    z = torch.relu(x @ inner.encoder.T + inner.b_enc).detach()
    latents, smallest = largest_of_step(z.flatten(0, 1), K, mask.flatten())
    return latents.view(z.shape), smallest


def met_by_hand(model, ids, mask, made, prefixes):
    """Compute what each place reads in a pass with all in place, and in one with none.

    Args:
        prefixes: whether a nested dictionary puts a prefix there, as where terms train it.
    """
    read, clean, kept = {}, {}, {}

    def acts(seen, put):
        def write(place):
            def act(value):
                seen.setdefault(place, kept.get(place, value).detach())
                return torch.where(mask[..., None], put(place, seen[place]), value) if put else value

            return act

        own = {place.reads: lambda value, place=place: kept.__setitem__(place, value) or value for place in made}
        return own | {place.writes: write(place) for place in made}

    def value(place, x):
        sae = made[place]
        latents, _ = chosen(sae, x, mask)
        inner = sae.inner if isinstance(sae, NormedSAE) else sae
        if prefixes and isinstance(inner, MatryoshkaSAE):
            lengths = inner.lengths(len(x))
            latents = latents.where(torch.arange(inner.d_sae) < lengths[:, None, None], 0.0)
        y = latents @ inner.W_dec + inner.b_dec
        return sae.norm.back(y, x) if inner is not sae else y

    with torch.no_grad():
        for seen, put in ((clean, None), (read, value)):
            kept.clear()
            with hooked("gpt2", model.model, acts(seen, put)):
                model.model(input_ids=ids, use_cache=False)
    return read, clean


def dictionary(kind, seed):
    architecture = MatryoshkaSAE if kind == "matryoshka" else BatchTopKSAE
    config = architecture.Config(size=40, k=K, threshold_rate=RATE)
    sae = architecture.build(config, 16, seed)
    return (NormedSAE(sae, "layer_norm") if kind == "normed" else sae).double()


@pytest.mark.parametrize(
    ("kind", "inputs", "terms", "names"),
    [
        *(("plain", inputs, terms, MLPS) for inputs in ("clean", "spliced") for terms in (True, False)),
        ("plain", "clean", True, RESIDUAL),
        ("matryoshka", "clean", True, MLPS),
        ("matryoshka", "spliced", False, RESIDUAL),
        ("normed", "spliced", True, RESIDUAL),
    ],
)
def test_a_threshold_counts_once_a_step_what_is_spliced(names, inputs, terms, kind):
    """Count the latents of the pass where one is run, and firing by those that a place's own terms are computed on."""
    model = in_double()
    made = {Place.parse(name): dictionary(kind, seed) for seed, name in enumerate(names)}
    of_pass = Objective.of([DownstreamMSE(1.0, (LATER,)), FeatureMSE(0.1)] if terms else [])
    training = TrainingConfig(tokens=1000, learning_rate=1e-2)
    parts = [Trainee(sae, place, Objective.of([LocalMSE(1.0)]), training, STEPS) for place, sae in made.items()]
    trainee = JointTrainee(parts, of_pass, inputs, microbatch=3)
    averages, fired = dict.fromkeys(made, 0.0), {place: torch.full((40,), -1) for place in made}
    for step in range(STEPS):
        ids = tokens(3, seed=step)
        mask = some_masked(ids)
        for sae in made.values():
            sae.begin_step(step / STEPS)
        read, clean = met_by_hand(model, ids, mask, made, prefixes=terms)
        put, own = (read if terms or inputs == "spliced" else clean), (read if inputs == "spliced" else clean)
        for place, sae in made.items():
            smallest = chosen(sae, put[place], mask)[1]
            averages[place] = (1 - RATE) * averages[place] + RATE * smallest
            active = (chosen(sae, own[place], mask)[0] > 0)[mask].any(0)
            fired[place] = fired[place].where(~active, (step + 1) * ids.numel())
        take_step(model, [trainee], TokenBatch(ids, mask))
    trainee.report()
    for part in trainee.parts:
        inner = part.sae.inner if kind == "normed" else part.sae
        expected = averages[part.place] / (1 - (1 - RATE) ** STEPS)
        assert float(inner.threshold) == pytest.approx(expected, rel=1e-6)
        assert torch.equal(part.last_fired, fired[part.place])


def pass_by_hand(model, ids, mask, made):
    """A pass with all in place and its graph: what each place reads, what is put there, and the value at `LATER`."""
    read, put, later = {}, {}, []

    def write(place):
        def act(value):
            put[place] = made[place](read[place])
            return torch.where(mask[..., None], put[place], value)

        return act

    acts = {place.reads: lambda value, place=place: read.__setitem__(place, value) or value for place in made}
    acts |= {place.writes: write(place) for place in made} | {LATER: lambda value: later.append(value) or value}
    with hooked("gpt2", model.model, acts):
        model.model(input_ids=ids, use_cache=False)
    return read, put, later[0]


@pytest.mark.parametrize("inputs", ["clean", "spliced"])
def test_own_terms_are_given_once_a_step_what_the_places_terms_are_of(inputs):
    """With the gradient of the pass at what each puts there, by autograd."""
    model, ids = in_double(), tokens(3)
    mask, seen = some_masked(ids), []
    config = GatedSAE.Config(size=24)
    made = {Place.parse(name): GatedSAE.build(config, 16, seed).double() for seed, name in enumerate(MLPS)}
    clean = model.clean(ids, record=[LATER, *(site for place in made for site in place.sites)]).activations
    read, put, later = pass_by_hand(model, ids, mask, made)
    loss = 0.7 * (later - clean[LATER])[mask].square().mean(-1).sum()
    gradients = torch.autograd.grad(loss, [put[place] for place in made])
    x = [clean[place.reads] if inputs == "clean" else read[place].detach() for place in made]
    expected = [made[place](each).detach() for place, each in zip(made, x, strict=True)]
    for sae in made.values():
        sae.own_terms = lambda given, plain=sae.own_terms: seen.append(given) or plain(given)
    training, terms = TrainingConfig(tokens=1000), Objective.of([DownstreamMSE(0.7, (LATER,))])
    parts = [Trainee(sae, place, Objective.of([LocalMSE(1.0)]), training, 10) for place, sae in made.items()]
    take_step(model, [JointTrainee(parts, terms, inputs)], TokenBatch(ids, mask))
    for given, *theirs in zip(seen, x, expected, gradients, strict=True):
        ours = (given.x, given.reconstruction, given.gradient)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one[mask], other[mask], rtol=1e-5, atol=1e-7)
        assert given.gradient[mask].abs().max() > 1e-5 and not given.gradient[~mask].any()


# Runs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("tokens"))


def of(architecture, out, kind="e2e", **changes):
    """A run of four places."""
    penalised = architecture in ("standard", "gated", "jumprelu")
    values = several(out, kind=kind, **changes)
    values["objective"] = {"kind": kind, **({"sparsity": {"coefficient": 0.3}} if penalised else {})}
    return values | {"dictionary": {"architecture": architecture, "size": 40, **SECTIONS[architecture]}}


def short(architecture, out, kind="e2e", places=("blocks.1.hook_resid_pre", "blocks.3.hook_resid_pre"), **changes):
    """A run of two places, or others, and of 6 steps, of which the third is saved."""
    values = of(architecture, out, kind, places=[{"site": place} for place in places], **changes)
    values["training"] |= {"tokens": 192, "checkpoint_every": 3}
    return values


def architectures(*slow):
    """All, less those in the quick tier whose state or code another's that stays includes."""
    return [pytest.param(each, marks=pytest.mark.slow if each in slow else ()) for each in SECTIONS]


@pytest.mark.parametrize("architecture", architectures("topk", "batchtopk"))
@fitted_on_few(512)
def test_a_resumed_run_ends_in_the_same_bits(made, tmp_path, architecture):
    joint = short(architecture, tmp_path / "joint")
    joint["objective"] |= {"local_mse": 0.5, "terms": {"feature_mse": 0.1}}
    for values in (joint, short(architecture, tmp_path / "apart", joint=False)):
        folder = start(made, values).folder
        whole = files(folder)
        start(made, values, resume=True, from_step=3)
        assert files(folder) == whole and any("step-" in name for name in whole)


@pytest.mark.parametrize("architecture", architectures("jumprelu", "batchtopk"))
@fitted_on_few(512)
def test_alone_or_without_a_pass_each_is_as_apart(made, tmp_path, architecture):
    """One place spliced is an ordinary run, and so is each of several without terms of the pass."""
    for kind, places in (("e2e", {"places": ("blocks.2.hook_resid_pre",)}), ("local", {})):
        made_by = {
            joint: start(made, short(architecture, tmp_path / f"{kind} {joint}", kind, joint=joint, **places))
            for joint in (True, False)
        }
        for place, folder in made_by[True].folders.items():
            apart = files(made_by[False].folders[place])["sae/sae_weights.safetensors"]
            assert files(folder)["sae/sae_weights.safetensors"] == apart
        own = {place: lines(folder)[-1] for place, folder in made_by[False].folders.items()}
        for place, line in lines(made_by[True].folder)[-1]["places"].items():
            assert line.items() <= own[place].items()


def test_at_the_end_k_features_are_active_where_all_are_in_place(made, tmp_path):
    """Over the text that thresholds are fitted to, here the whole of it."""
    run, model, corpora = start(made, of("batchtopk", tmp_path / "run")), small_model(), small_corpora(made)
    saes = {place: endwise.SAE.load(folder) for place, folder in run.folders.items()}
    batch = corpora.train.batch(range(len(corpora.train)))

    def active(place, x):
        return float((saes[place].encode(x).dense() > 0).sum(-1).double().mean())

    found = {}
    acts = {place: lambda x, place=place: found.update({place: active(place, x)}) or saes[place](x) for place in saes}
    with torch.no_grad(), spliced(model, acts):
        model.logits(batch.tokens)
    for place in saes:
        assert found[place] == pytest.approx(K, abs=0.01)
    last = list(saes)[-1]
    with torch.no_grad():
        alone = active(last, model.clean(batch.tokens, [model.site(last)]).activations[model.site(last)])
    assert abs(alone - K) > 0.05


# Processes


@pytest.mark.parametrize("places", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_two_processes_give_the_curve_of_one(made, tmp_path, places):
    """Train one place as an ordinary run, and three jointly."""
    small_model().model.save_pretrained(made / "model")
    folders = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        sites = [{"site": f"blocks.{layer}.hook_resid_pre"} for layer in (1, 2, 3)[:places]]
        values = of("batchtopk", folder, places=sites)
        values["objective"] |= {"local_mse": 0.5} | ({"terms": {"feature_mse": 0.1}} if places > 1 else {})
        values["dictionary"] |= {"k_start": None, "aux": 0.0}  # each process divides `aux` by its own rows' variance
        values["model"] |= {"name": str(made / "model"), "device": "cpu"}
        values["data"] |= {"source": str(made / "train.npy"), "heldout": str(made / "heldout.npy"), "context": 8}
        values["data"] |= {"mask_first_position": True}
        values["training"] |= {"batch": 5, "tokens": 800, "evaluate_every": 5, "keep_checkpoints": 9}
        if places == 1:
            values |= sites[0]
            values = {key: value for key, value in values.items() if key not in ("places", "joint", "inputs")}
        file = folder.with_suffix(".yaml")
        file.write_text(json.dumps(values, default=str))
        code, told, errors = launch(processes, "train", file, "--quiet")
        assert code == 0 and told.count("Trained e2e") == 1, errors
        folders.append(folder)
    alone, together = map(lines, folders)
    assert len(alone) == len(together) == 20
    for one, other in zip(together, alone, strict=True):
        assert_close(one, other, f"step {other['step']}")
    for steps in (5, 20):  # while the threshold is the moving average, and as it is at the end
        ours, theirs = (read_checkpoint(RunFolder(each).checkpoint(steps)).tensors for each in folders)
        kept = [name for name in ours if "sae." in name or "last_fired" in name]
        assert sum(name.endswith("average") for name in kept) == places
        for name in kept:
            torch.testing.assert_close(theirs[name], ours[name], rtol=1e-4, atol=1e-4)
