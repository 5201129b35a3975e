"""Places: a transcoder that lives in the tests alone is trained, measured, spliced and drawn as an SAE is."""

import json

import pytest
import torch

import counting_sae  # noqa: F401  registers an architecture of one width
import endwise
from endwise import Site, spliced
from endwise.analysis.directions.measure import measure_directions
from endwise.analysis.importance.measure import measure_importance
from endwise.common.errors import ConfigError, FormatError, ModelError, SiteError
from endwise.config.run import RunConfig
from endwise.features.spliced import SplicedBatch
from endwise.models.sites import Part, Place
from endwise.tokens import TokenBatch
from endwise.training.making import new_trainee
from endwise.training.setup import default_folder
from endwise.training.step import take_step
from own_transcoder import OwnConfig, OwnTranscoder
from tiny_models import hooked, patched_logits, tiny, tokens, values_at, width

READS, WRITES = "blocks.2.mlp_in", "blocks.2.hook_mlp_out"
NAME = f"{READS} -> {WRITES}"
KINDS = {"local": {}, "e2e": {}, "e2e_ds": {"downstream_mse": 1.0}}


def recipe(out, kind="local", **changes):
    return {
        "site": READS,
        "writes": WRITES,
        "dictionary": {"architecture": "own_transcoder", "size": 24},
        "objective": {"kind": kind, "sparsity": {"coefficient": 0.1}, **KINDS[kind]},
        "data": {"context": 32},
        "training": {"tokens": 768, "batch": 4, "learning_rate": 1e-2, "log_every": 1, "checkpoint_every": 4},
        "evaluation": {"tokens": 256, "during_training_tokens": 64, "bootstrap": 5},
        "out": str(out),
        **changes,
    }


# Names


def test_a_place_is_read_and_written_alike():
    place = Place.parse(NAME)
    assert (place.reads.name, place.writes.name, str(place)) == (READS, WRITES, NAME)
    assert Place.parse(str(place)) == place and place.sites == (place.reads, place.writes)
    alone = Place.parse(READS)
    assert alone == Place.at(Site.parse(READS)) == Place.of(Site.parse(READS)) and str(alone) == READS
    assert alone.sites == (alone.reads,) and sorted([place, alone]) == [alone, place]


@pytest.mark.parametrize("name", [f"{WRITES} -> {READS}", "blocks.3.mlp_in -> blocks.2.hook_mlp_out"])
def test_what_is_computed_later_cannot_be_read(name):
    with pytest.raises(SiteError, match=r"cannot write blocks\.2\.\w+ from what it reads at blocks"):
        Place.parse(name)


@pytest.mark.parametrize("name", ["", " -> ", f"{READS} -> ", f"{READS}->{WRITES}", f"{NAME} -> {WRITES}"])
def test_other_names_are_refused(name):
    with pytest.raises(SiteError, match="A site is named"):
        Place.parse(name)


def test_a_recipe_writes_what_it_reads_unless_told():
    one = RunConfig.build({key: value for key, value in recipe("x").items() if key != "writes"})
    assert one.place == one.written == READS
    assert RunConfig.build(recipe("x", writes=READS)).place == READS
    two = RunConfig.build(recipe("x"))
    assert two.place == NAME and f"{READS}-to-{WRITES}" in str(default_folder(two))


# Runs


@pytest.fixture(scope="module")
def model():
    return endwise.load_model("embedded")


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory):
    """One run of each kind, measured."""
    folder = tmp_path_factory.mktemp("places")
    runs = {kind: endwise.train(recipe(folder / kind, kind), model=model, display=False) for kind in KINDS}
    endwise.evaluate([run.folder for run in runs.values()], model=model)
    return runs


@pytest.fixture(scope="module")
def heldout(model):
    data = RunConfig.build(recipe("x")).data
    return endwise.corpora_for(model, data, training_tokens=768, evaluation_tokens=256).heldout


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns(runs, kind):
    lines = [json.loads(line) for line in (runs[kind].folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["local", "e2e"])
def test_it_is_measured_where_it_writes(runs, model, heldout, kind):
    found = endwise.evaluate(runs[kind].folder, model=model)[runs[kind].folder]
    sae, batch = endwise.SAE.load(runs[kind].folder), heldout.batch(range(256 // 32))
    reads, writes = Site.parse(READS), Site.parse(WRITES)
    at = model.clean(batch.tokens, [reads, writes]).activations
    x, y = at[writes][batch.mask], sae(at[reads])[batch.mask]
    explained = 1 - (x - y).square().sum() / (x - x.mean(0)).square().sum()
    assert found["explained_variance.pooled"] == pytest.approx(float(explained), rel=1e-4)
    clean = model.logits(batch.tokens).log_softmax(-1)
    with spliced(model, {NAME: sae}):
        ours = model.logits(batch.tokens).log_softmax(-1)
    kl = (clean.exp() * (clean - ours)).sum(-1)[batch.mask].mean()
    assert batch.mask.all() and found["kl"] == pytest.approx(float(kl), rel=1e-3)
    assert found.to_json()["site"] == NAME and found.site == writes and found.reads == reads


def test_its_importance_is_what_a_pass_without_the_feature_loses(runs, model, heldout):
    found = measure_importance([runs["e2e"].folder], ablate=3, model=model)[runs["e2e"].folder]
    assert len(found.importance.ce) == 24 and found.importance.alive > 0
    with torch.no_grad():
        _check_ablation(runs["e2e"].folder, model, heldout, int(found.ablations.features[0]))


def _check_ablation(folder, model, heldout, feature):
    sae, batch = endwise.SAE.load(folder), heldout.batch(range(4))
    place = model.place(NAME)
    clean = model.clean(batch.tokens, place.sites, final=True)
    whole = SplicedBatch.of(model, sae, clean, place, batch.mask)
    latents = sae.encode(clean.activations[place.reads]).dense()
    less = whole.reconstruction - latents[..., feature, None] * sae.W_dec[feature]
    ce, _ = whole.rises(model, less, torch.arange(4))
    without = latents.clone()
    without[..., feature] = 0
    logits = []
    for value in (latents, without):
        with model.patched({place.writes: value @ sae.W_dec + sae.b_dec}):
            logits.append(model.logits(batch.tokens)[:, :-1].log_softmax(-1))
    own = [-each.gather(-1, batch.tokens[:, 1:, None])[..., 0].sum(1) for each in logits]
    torch.testing.assert_close(torch.from_numpy(ce), (own[1] - own[0]).double(), rtol=1e-3, atol=1e-3)


def test_a_resumed_run_ends_in_the_same_bits(runs, model, tmp_path):
    config = RunConfig.build(recipe(tmp_path / "run", "e2e_ds"))
    endwise.train(config, model=model, display=False)
    endwise.train(config, model=model, resume=True, from_step=4, display=False)
    for name in ("sae/sae_weights.safetensors", "metrics.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (runs["e2e_ds"].folder / name).read_bytes()


def test_it_is_harvested_planned_and_compared(runs, model):
    from endwise.training.planning.plan import plan

    harvest = endwise.harvest([runs["local"].folder], model=model)[runs["local"].folder]
    assert len(harvest.features) == 24 and harvest.about["site"] == NAME
    assert plan(RunConfig.build(recipe("x", "e2e"))).site == NAME
    (compared,) = endwise.pareto([run.folder for run in runs.values()])
    assert compared.setting.site == NAME and len(compared.runs) == 3


@torch.no_grad()
def test_lengths_and_directions_are_of_what_it_writes(runs, model, heldout):
    folder = runs["local"].folder
    found = measure_directions([folder], tokens=256, directions=1, model=model)[folder].norms
    sae, batch = endwise.SAE.load(folder), heldout.batch(range(256 // 32))
    at = model.clean(batch.tokens, [Site.parse(READS), Site.parse(WRITES)]).activations
    x, y = at[Site.parse(WRITES)], sae(at[Site.parse(READS)])
    ratio = y.norm(dim=-1) / x.norm(dim=-1)
    assert found.ratio_at_0.estimate == pytest.approx(float(ratio[:, 0].mean()), rel=1e-4)


def test_runs_of_several_places_share_their_passes(model, tmp_path):
    """Side by side they end in the bits that each ends in alone."""
    short = {"training": {**recipe("x")["training"], "tokens": 512}}
    plain = {"dictionary": {"size": 24}, "writes": None, **short}
    changes = {"transcoder": short, "sae": {**plain, "site": READS}, "later": {**plain, "site": "blocks.3.attn.hook_z"}}
    together = [RunConfig.build(recipe(tmp_path / name, "e2e", **change)) for name, change in changes.items()]
    endwise.train_together(together, model=model, display=False)
    for name, change in changes.items():
        endwise.train(recipe(tmp_path / "alone" / name, "e2e", **change), model=model, display=False)
        one, other = (path / "sae" / "sae_weights.safetensors" for path in (tmp_path / name, tmp_path / "alone" / name))
        assert one.read_bytes() == other.read_bytes()


def test_a_standard_dictionary_between_two_sites_of_one_width(model, tmp_path):
    run = endwise.train(recipe(tmp_path / "run", dictionary={"size": 24}), model=model, display=False)
    found = endwise.evaluate(run.folder, model=model)[run.folder]
    assert found.place == Place.parse(NAME) and found["l0"] > 0
    (tmp_path / "run" / "config.yaml").write_text(RunConfig.build(recipe(tmp_path, writes="blocks.0.mlp_in")).to_yaml())
    with pytest.raises((SiteError, FormatError, ConfigError), match=r"cannot write blocks\.0\.mlp_in"):
        endwise.evaluate(run.folder, model=model)


# Two widths: the heads of this family are wider together than the stream

WIDE = Place(Site(1, Part.ATTN_Z), Site(1, Part.MLP_OUT))


def wide(dtype=torch.float32):
    assert width("qwen3", Part.ATTN_Z) == 24
    return OwnTranscoder.build(OwnConfig(size=20), 24, 0, d_out=16).to(dtype)


def wide_recipe(kind="e2e", **changes):
    own = {"architecture": "own_transcoder", "size": 20}
    return RunConfig.build(
        recipe("x", kind, **{"site": WIDE.reads.name, "writes": WIDE.writes.name, "dictionary": own} | changes)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_whole_model(kind):
    model, ids = tiny("qwen3"), tokens()
    trainee = new_trainee(wide_recipe(kind, seed=3), model, 4)
    sae, mask = trainee.sae, torch.ones_like(ids, dtype=torch.bool)
    mask[0, 9:] = False
    trainee.begin_step()
    clean = model.clean(ids, {*WIDE.sites, *trainee.objective.sites}, final=True)
    trainee.accumulate(model, clean, mask, mask.sum())
    ours = [parameter.grad.clone() for parameter in sae.parameters()]
    sae.zero_grad()

    at = values_at("qwen3", model.model, ids, [*WIDE.sites, *trainee.objective.sites])
    latents = torch.relu(at[WIDE.reads] @ sae.encoder + sae.b_enc)
    reconstruction = latents @ sae.decoder + sae.b_dec
    loss = 0.1 * latents[mask].sum() / 16
    if kind == "local":
        loss = loss + (reconstruction - at[WIDE.writes])[mask].square().mean(-1).sum()
    else:
        kept = {}
        acts = {WIDE.writes: lambda value: torch.where(mask[..., None], reconstruction, value)}
        acts |= {site: lambda value, site=site: kept.__setitem__(site, value) for site in trainee.objective.sites}
        spliced_logits = patched_logits("qwen3", model.model, ids, acts).log_softmax(-1)
        true = model.logits(ids).log_softmax(-1)
        kl = (true.exp() * (true - spliced_logits)).sum(-1)[mask].sum()
        loss = loss + (1.0 if kind == "e2e" else 0.5) * kl
        for site, value in kept.items():
            loss = loss + (value - at[site])[mask].square().mean(-1).sum() / len(kept)
    (loss / mask.sum()).backward()
    for parameter, gradient in zip(sae.parameters(), ours, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-6)


def test_steps_in_another_precision_of_the_tail():
    model, ids = tiny("qwen3"), tokens()
    trainee, tail = new_trainee(wide_recipe("e2e_ds"), model, 4), model.in_bfloat16()
    for _ in range(3):
        take_step(model, [trainee], TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool)), tail=tail)
    assert trainee.report()["loss"] < 100


def test_it_is_saved_with_both_widths(tmp_path):
    sae = wide()
    sae.save(tmp_path)
    read = endwise.SAE.load(tmp_path)
    assert (read.d_in, read.d_sae, read.d_out) == (24, 20, 16)
    x = torch.randn(2, 24)
    torch.testing.assert_close(read(x), sae(x))


def test_a_skip_connection_that_it_cannot_have_is_refused(tmp_path):
    """Rather than read without it, as another function."""
    wide().save(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    cfg["architecture"] = "own_transcoder_skip_transcoder"
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(FormatError, match="'own_transcoder_skip_transcoder' is not one of"):
        endwise.SAE.load(tmp_path)


def test_an_architecture_of_one_width_says_so():
    with pytest.raises(ConfigError, match=r"attn\.hook_z has width 24 and writes .* has width 16"):
        new_trainee(wide_recipe(dictionary={"size": 20, "architecture": "counting"}), tiny("qwen3"), 4)


@torch.no_grad()
def test_several_places_are_spliced_at_once():
    """A transcoder reads what an SAE before it, at the site that it reads, has written."""
    model, ids = tiny("qwen3"), tokens()
    first, transcoder = OwnTranscoder.build(OwnConfig(size=20), 24, 1, d_out=24), wide()
    later = OwnTranscoder.build(OwnConfig(size=20), 16, 2, d_out=16)
    kept = {}
    acts = {
        WIDE.reads: lambda value: kept.setdefault("z", first(value)),
        WIDE.writes: lambda value: transcoder(kept["z"]),
        Site(2, Part.RESID_MID): later,
    }
    expected = patched_logits("qwen3", model.model, ids, acts)
    with spliced(model, {str(WIDE): transcoder, Site(2, Part.RESID_MID): later, WIDE.reads: first}):
        torch.testing.assert_close(model.logits(ids), expected, rtol=1e-5, atol=1e-5)
    with hooked("qwen3", model.model, {}):
        assert not torch.allclose(model.logits(ids), expected, atol=1e-2)
    for place in (WIDE.writes, WIDE.reads):
        with (
            pytest.raises(ModelError, match=r"has width (16|24); the SAE given for it has (24|16)"),
            spliced(model, {place: transcoder}),
        ):
            pass
