"""Training that starts from an SAE: the function is the loaded one's, and what follows is a run like any other."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import mse_loss

from endwise import SAE, train, train_places, train_together
from endwise.common.errors import ConfigError, FormatError, RunFolderError
from endwise.runs.folder import RunFolder
from endwise.tokens import BatchOrder
from endwise.training.making import new_trainee
from endwise.training.planning.plan import plan
from endwise.training.step import take_step
from small_gpt2 import SITE, WIDTH, recipe
from small_sweeps import complete

FEATURES = 40
DEAD = 7
"""A feature without a direction, in the foreign SAE."""


def foreign_tensors(dtype=torch.float32):
    """An SAE as others train them: directions of many lengths, one of none."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    lengths = torch.rand(FEATURES, 1, generator=generator) * 3 + 0.2
    lengths[DEAD] = 0
    tensors = {
        "W_enc": draw(WIDTH, FEATURES) / 4,
        "b_enc": draw(FEATURES) / 4,
        "W_dec": draw(FEATURES, WIDTH) / 4 * lengths,
        "b_dec": draw(WIDTH),
    }
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def write_foreign(folder, dtype=torch.float32, **cfg):
    """A folder in SAELens's layout; `apply_b_dec_to_input` is true there unless it says otherwise."""
    folder.mkdir()
    save_file(foreign_tensors(dtype), folder / "sae_weights.safetensors")
    content = {"architecture": "standard", "d_in": WIDTH, "d_sae": FEATURES, "apply_b_dec_to_input": True, **cfg}
    (folder / "cfg.json").write_text(json.dumps(content))
    return folder


def foreign_output(x):
    """Output that SAELens computes with it, in float64."""
    w = {name: tensor.double() for name, tensor in foreign_tensors().items()}
    return torch.relu((x.double() - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) @ w["W_dec"] + w["b_dec"]


@pytest.fixture(scope="module")
def ours(model, corpora, tmp_path_factory):
    """A run of ours, trained for twenty steps."""
    out = tmp_path_factory.mktemp("ours") / "run"
    return train(recipe(out, "local"), model=model, corpora=corpora, display=False)


@pytest.fixture
def started(ours, tmp_path):
    """SAEs to start from by name, and the output of each."""
    foreign = write_foreign(tmp_path / "foreign")
    return {
        "a run": (ours.folder, ours.sae),
        "its SAE": (ours.folder / "sae", ours.sae),
        "a foreign one": (foreign, foreign_output),
    }


NAMES = ("a run", "its SAE", "a foreign one")


def starting_from(folder, out, kind="local", **training):
    return recipe(out, kind, **training).model_copy(update={"init_from": folder})


@pytest.mark.parametrize("name", NAMES)
def test_training_starts_from_the_same_function(model, started, tmp_path, name):
    folder, function = started[name]
    sae = new_trainee(starting_from(folder, tmp_path), model, steps=10).sae
    x = torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(0)) * 2
    torch.testing.assert_close(sae(x).detach().double(), function(x).detach().double(), rtol=1e-5, atol=1e-5)
    norms = sae.W_dec.norm(dim=-1).detach()
    assert torch.allclose(norms[norms > 0], torch.ones(1)) and int((norms == 0).sum()) == (name == "a foreign one")
    assert all(parameter.requires_grad for parameter in sae.parameters())
    torch.testing.assert_close(SAE.load(folder)(x).detach(), sae(x).detach(), rtol=1e-4, atol=1e-4)


def test_latents_count_as_those_of_directions_of_length_one(model, started, tmp_path):
    """|c|·‖d‖ of the foreign SAE is what the penalty must see, whatever its scales."""
    folder, _ = started["a foreign one"]
    sae = new_trainee(starting_from(folder, tmp_path), model, steps=10).sae
    x = torch.randn(50, WIDTH)
    w = {name: tensor.double() for name, tensor in foreign_tensors().items()}
    c = torch.relu((x.double() - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * w["W_dec"].norm(dim=-1)
    torch.testing.assert_close(sae.encode(x).penalty().double(), c.sum(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_sae_stored_in_half_precision_is_read_in_single(tmp_path, dtype):
    sae = SAE.load(write_foreign(tmp_path / "half", dtype))
    assert {parameter.dtype for parameter in sae.parameters()} == {torch.float32}
    w = {name: tensor.double() for name, tensor in foreign_tensors(dtype).items()}
    x = torch.randn(50, WIDTH)
    expected = torch.relu((x.double() - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) @ w["W_dec"] + w["b_dec"]
    torch.testing.assert_close(sae(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_first_steps_loss_is_the_loaded_ones(model, corpora, started, tmp_path, name):
    folder, function = started[name]
    config = starting_from(folder, tmp_path / "run", log_every=1)
    run = train(config, model=model, corpora=corpora, display=False)
    first = RunFolder(run.folder).metrics()[0]
    batch = corpora.train.batch(BatchOrder(corpora.train, 4, 0, 1)[0])
    x = model.clean(batch.tokens, record=[model.site(SITE)]).activations[model.site(SITE)]
    assert first["step"] == 1
    assert first["local_mse"] == pytest.approx(float(mse_loss(function(x).detach().double(), x.double())), rel=1e-5)
    latents = SAE.load(folder).encode(x)
    assert first["l0"] == pytest.approx(float(latents.l0().mean()), abs=0.04)  # one of 32 tokens' features at its edge
    latents = run.sae.encode(x)
    after = mse_loss(run.sae.decode(latents), x) + 0.3 * latents.penalty().mean() / WIDTH
    assert float(after.detach()) < first["loss"]  # of the same batch: another one may be harder


@pytest.mark.parametrize("kind", ["e2e", "e2e_ds"])
def test_every_kind_can_start_from_a_local_one(model, corpora, ours, tmp_path, kind):
    fresh = train(recipe(tmp_path / "fresh", kind, log_every=1, tokens=64), model=model, corpora=corpora, display=False)
    config = starting_from(ours.folder, tmp_path / "run", kind, log_every=1, tokens=64)
    run = train(config, model=model, corpora=corpora, display=False)
    first, random = (RunFolder(each.folder).metrics()[0] for each in (run, fresh))
    assert first["kl"] != random["kl"] and first["learning_rate"] == random["learning_rate"]
    assert first["tokens"] == random["tokens"] == 32
    assert RunFolder(run.folder).config().init_from == ours.folder


def test_a_feature_without_a_direction_stays_as_it_is(model, corpora, started, tmp_path):
    """It has no direction to normalise; nothing of it may become NaN."""
    folder, _ = started["a foreign one"]
    trainee = new_trainee(starting_from(folder, tmp_path), model, steps=10)
    for step in range(3):
        take_step(model, [trainee], corpora.train.batch(range(4 * step, 4 * step + 4)))
    trainee.report()
    assert not trainee.sae.W_dec[DEAD].any()
    assert all(parameter.isfinite().all() for parameter in trainee.sae.parameters())


def test_the_seed_changes_nothing_then(model, corpora, ours, tmp_path):
    runs = [
        train(
            starting_from(ours.folder, tmp_path / str(seed), tokens=128).model_copy(update={"seed": seed}),
            model=model,
            corpora=corpora,
            display=False,
        )
        for seed in (0, 1)
    ]
    for one, other in zip(*(run.sae.parameters() for run in runs), strict=True):
        assert torch.equal(one, other)


def assert_same(run, other):
    for one, two in zip(run.sae.parameters(), other.sae.parameters(), strict=True):
        assert torch.equal(one, two)
    assert RunFolder(run.folder).metrics_file.read_bytes() == RunFolder(other.folder).metrics_file.read_bytes()


def test_it_continues_exactly_though_what_it_started_from_is_gone(model, corpora, ours, tmp_path):
    start = tmp_path / "start"
    shutil.copytree(ours.folder, start)
    settings = {"model": model, "corpora": corpora, "display": False}
    configs = [
        starting_from(start, tmp_path / name, tokens=256, log_every=1, checkpoint_every=2, keep_checkpoints=9)
        for name in ("whole", "cut off", "one", "other")
    ]
    whole = train(configs[0], **settings)
    for config in configs[1:]:
        shutil.copytree(whole.folder, config.out)
        for step in (6, 8):
            RunFolder(config.out).checkpoint(step).unlink()
    shutil.rmtree(start)
    assert_same(train(configs[1], resume=True, **settings), whole)
    assert_same(train(configs[1], resume=True, from_step=2, **settings), whole)
    for run in train_together(configs[2:], resume=True, **settings):
        assert_same(run, whole)
    with pytest.raises(FormatError, match=r"init_from: There is no "):
        train(configs[1], resume=True, from_step=0, **settings)
    shutil.copytree(ours.folder, start)
    assert_same(train(configs[1], resume=True, from_step=0, **settings), whole)


def test_several_places_begin_again_from_what_they_began_with_alone(model, corpora, ours, tmp_path):
    """Jointly or apart; once a checkpoint is there, what one of them started from may be gone."""
    start = tmp_path / "start"
    shutil.copytree(ours.folder, start)
    base = recipe(tmp_path / "x", "e2e", tokens=128, checkpoint_every=2).model_dump(mode="json")
    values = {key: value for key, value in base.items() if key not in ("site", "writes", "init_from")}
    values |= {"places": [{"site": "blocks.0.hook_resid_pre"}, {"site": SITE, "init_from": str(start)}]}
    settings = {"model": model, "corpora": corpora, "display": False}
    for joint in (True, False):
        given = values | {"joint": joint, "out": str(tmp_path / f"{joint}")}
        whole = train_places(given, **settings).saes[SITE].b_enc
        assert torch.equal(train_places(given, resume=True, from_step=0, **settings).saes[SITE].b_enc, whole)
        start.rename(tmp_path / "gone")
        assert torch.equal(train_places(given, resume=True, from_step=2, **settings).saes[SITE].b_enc, whole)
        write_foreign(start)
        with pytest.raises(RunFolderError, match=rf"places/{SITE} was started on other SAE that it started from"):
            train_places(given, resume=True, from_step=0, **settings)
        shutil.rmtree(start)
        (tmp_path / "gone").rename(start)


def test_another_start_is_another_run(model, corpora, ours, started, tmp_path):
    config = starting_from(ours.folder, tmp_path / "run", tokens=64)
    train(config, model=model, corpora=corpora, display=False)
    other = config.model_copy(update={"init_from": started["a foreign one"][0]})
    with pytest.raises(RunFolderError, match="another recipe"):
        train(other, model=model, corpora=corpora, display=False, resume=True)


def test_a_start_of_another_shape_is_refused_before_anything_is_written(model, corpora, ours, tmp_path):
    config = starting_from(ours.folder, tmp_path / "run")
    larger = config.model_copy(update={"dictionary": config.dictionary.model_copy(update={"size": 41})})
    message = r"has 40 features of width 16, but dictionary and site ask for 41 of width 16\. Set dictionary\.size=40"
    with pytest.raises(ConfigError, match=message):
        train(larger, model=model, corpora=corpora, display=False)
    folder = write_foreign(tmp_path / "wide")
    tensors = load_file(folder / "sae_weights.safetensors")
    wide = {"W_enc": tensors["W_enc"].repeat(2, 1), "W_dec": tensors["W_dec"].repeat(1, 2)}
    save_file(tensors | wide | {"b_dec": tensors["b_dec"].repeat(2)}, folder / "sae_weights.safetensors")
    cfg = json.loads((folder / "cfg.json").read_text()) | {"d_in": 2 * WIDTH}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(ConfigError, match=r"of width 32.*of width 16"):
        train(starting_from(folder, tmp_path / "run"), model=model, corpora=corpora, display=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (shutil.rmtree, "There is no|holds no cfg.json"),
        (lambda folder: (folder / "cfg.json").unlink(), "There is no|holds no cfg.json"),
        (lambda folder: (folder / "sae_weights.safetensors").unlink(), "holds no sae_weights"),
        (lambda folder: (folder / "cfg.json").write_text('{"architecture": "topk"}'), "d_in"),
        (lambda folder: (folder / "sae_weights.safetensors").write_bytes(b"no"), "not a valid safetensors"),
    ],
    ids=("no folder", "no cfg", "no weights", "another cfg", "damaged"),
)
def test_what_holds_no_sae_is_refused_by_the_keys_name(model, corpora, tmp_path, harm, words):
    folder = write_foreign(tmp_path / "foreign")
    harm(folder)
    with pytest.raises(FormatError, match=words) as refused:
        train(starting_from(folder, tmp_path / "run"), model=model, corpora=corpora, display=False)
    assert str(refused.value).startswith("init_from: ")
    assert not (tmp_path / "run").exists()


def test_an_architecture_that_cannot_be_trained(model, corpora, tmp_path):
    folder = write_foreign(tmp_path / "foreign", architecture="temporal")
    with pytest.raises(FormatError, match=r"init_from: .*'temporal' is not one of .*standard"):
        train(starting_from(folder, tmp_path / "run"), model=model, corpora=corpora, display=False)


def test_beside_others_it_starts_as_alone(model, corpora, ours, started, tmp_path):
    configs = [
        recipe(tmp_path / "fresh", "local", tokens=256),
        starting_from(ours.folder, tmp_path / "from ours", tokens=256),
        starting_from(started["a foreign one"][0], tmp_path / "from a foreign one", "e2e", tokens=256),
    ]
    runs = train_together(configs, model=model, corpora=corpora, display=False)
    for run, config in zip(runs, configs, strict=True):
        alone = config.model_copy(update={"out": tmp_path / "alone" / config.out.name})
        assert_same(run, train(alone, model=model, corpora=corpora, display=False))


def test_a_plan_is_that_of_a_new_sae(made, ours, tmp_path):
    fresh = complete(made, tmp_path / "run", {})
    config = complete(made, tmp_path / "run", {"init_from": str(ours.folder)})
    assert config.init_from == ours.folder
    planned, expected = plan(config).to_json(), plan(fresh).to_json()
    for one in (planned, expected):
        one.pop("needs")  # of the process and the machine, which change from one moment to the next
    assert planned == expected
    assert planned["stages"] and planned["d_sae"] == FEATURES
