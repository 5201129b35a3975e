"""Every architecture trained on as every other one, by `init_from` and an override: kept where it can be, said where
not; and behind a scale or a whitening, with the draws of the run's own seed.
"""

import itertools
import json

import pytest
import torch

import endwise
from endwise import SAE
from endwise.common.errors import ConfigError
from endwise.config.dictionary import ARCHITECTURES
from endwise.config.run import RunConfig
from endwise.dictionaries import NormedSAE
from endwise.runs.folder import RunFolder
from endwise.training.making import new_trainee
from endwise.training.taking_over import SAME, TakenOver
from finished_dictionaries import NAMES, ONE_THRESHOLD, SIZE, WIDTH, drawn, finished, x_of

BY_THRESHOLDS = {"jumprelu", "gated"}
SCALED = {"standard", "topk"}
"""Sources that become all others behind a scale: one that is kept, and one whose thresholds are fitted."""


def kept(source, architecture):
    """Return whether an architecture's function can be taken over by another.

    Files of batchtopk are features above thresholds that are all the same.
    """
    if source == architecture or architecture in BY_THRESHOLDS:
        return source != "topk" or architecture == "topk"
    return architecture in ONE_THRESHOLD and source in {"standard", *ONE_THRESHOLD}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    for name in NAMES:
        finished(name).save(folder / name)
    return folder


def recipe(architecture, start, out="x", **dictionary):
    k = {} if ARCHITECTURES[architecture].Config.penalised else {"k": 6}
    return RunConfig.build(
        {
            "site": "blocks.1.hook_resid_pre",
            "dictionary": {"architecture": architecture, "size": SIZE, **k, **dictionary},
            "objective": {"kind": "local", **({} if k else {"sparsity": {"coefficient": 0.3}})},
            "data": {"source": "unused"},
            "training": {"tokens": 640, "batch": 4, "learning_rate": 1e-3, "log_every": 1},
            "evaluation": {"tokens": 64, "during_training_tokens": 64, "bootstrap": 5},
            "init_from": str(start),
            "out": str(out),
        }
    )


def taken(model, sources, source, architecture, **dictionary):
    """The dictionary that a run starts with, and what the run says of it."""
    before = SAE.load(sources / source)
    after = new_trainee(recipe(architecture, sources / source, **dictionary), model, steps=10).sae
    with torch.no_grad():
        if after.first_tokens:
            after.see_first(x_of(), x_of())
    return after.eval(), TakenOver.of(before, after, x_of(seed=10), x_of(seed=10))


@pytest.mark.parametrize(
    ("source", "architecture", "norm"),
    [
        pytest.param(*each, marks=pytest.mark.slow if each[2] == "scalar" and each[0] not in SCALED else ())
        for each in itertools.product(NAMES, NAMES, ("none", "scalar", "whitening"))
    ],
)
def test_every_architecture_becomes_every_other_one(model, sources, source, architecture, norm):
    sae, found = taken(model, sources, source, architecture, normalize=norm)
    assert isinstance(sae, NormedSAE) == (norm != "none")
    assert found.architecture == architecture and found.l0 > 0
    by_norm = norm == "whitening" and architecture in {"topk", *ONE_THRESHOLD}
    if by_norm and source != "standard":  # unit norms behind a whitening are others, and what they choose by with them
        assert not found.kept and found.change < 1.5
    else:
        assert found.kept == kept(source, architecture), found
        assert found.kept == (found.change <= SAME)
    if source == "topk" and architecture in BY_THRESHOLDS | ONE_THRESHOLD:
        assert found.l0 == pytest.approx(found.l0_before, rel=0.05)  # a threshold is fitted
    assert f"L0 {found.l0_before:.4g} -> {found.l0:.4g}" in str(found)


@pytest.mark.parametrize("norm", ["scalar", "whitening"])
@pytest.mark.parametrize("free", ["free", "unit"])
def test_a_skip_connection_and_two_widths_behind_a_norm(norm, free):
    from endwise.dictionaries.normed import taken_over

    tensors = {"W_enc": drawn(WIDTH, SIZE) / 3, "b_enc": drawn(SIZE, seed=1), "W_dec": drawn(SIZE, 5, seed=2)}
    tensors |= {"b_dec": drawn(5, seed=3), "W_skip": drawn(5, WIDTH, seed=4)}
    section, sizes = ARCHITECTURES["standard"].Config, {"d_in": WIDTH, "d_sae": SIZE, "d_out": 5}
    sae = ARCHITECTURES["standard"].from_tensors(tensors, sizes).eval()
    config = section(size=SIZE, normalize=norm, decoder_norm=free, skip=True)
    after = taken_over(sae, config, seed=0)
    x = x_of()
    with torch.no_grad():
        after.see_first(x, 3 * x[:, :5] + 1)
        found = TakenOver.of(sae, after, x, x[:, :5])
        assert found.kept and found.l0 == found.l0_before
        after.see_first(2 * x, x[:, :5])  # of what is behind it already, another fit is another function
    assert not TakenOver.of(sae, after, x, x[:, :5]).kept


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale", "centred"])
def test_a_norm_of_each_token_is_kept_and_cannot_be_added(model, tmp_path, norm):
    NormedSAE(finished("standard"), norm).save(tmp_path / "with")
    finished("standard").save(tmp_path / "without")
    for wants, start in ((norm, "without"), ("none", "with"), ("scalar", "with")):
        with pytest.raises(ConfigError, match=rf"{start}: its input has the norm .* Set dictionary\.normalize="):
            new_trainee(recipe("jumprelu", tmp_path / start, normalize=wants), model, steps=10)
    sae = new_trainee(recipe("jumprelu", tmp_path / "with", normalize=norm), model, steps=10).sae.eval()
    torch.testing.assert_close(sae(x_of()), SAE.load(tmp_path / "with")(x_of()), rtol=1e-4, atol=1e-4)


def test_a_run_behind_a_whitening_starts_where_the_other_ended(model, corpora, tmp_path):
    settings = {"model": model, "corpora": corpora, "display": False}
    shared = {"normalize": "whitening"}
    first = recipe("jumprelu", "x", tmp_path / "first", **shared).model_copy(update={"init_from": None})
    endwise.train(first, **settings)
    whole = recipe("jumprelu", tmp_path / "first", tmp_path / "whole", **shared)
    whole = whole.model_copy(
        update={"training": whole.training.model_copy(update={"checkpoint_every": 5, "keep_checkpoints": 9})}
    )
    assert_resumes(whole, settings, tmp_path)
    record = json.loads((tmp_path / "whole" / "start.json").read_text())
    assert record["kept"] and record["l0"] == pytest.approx(record["l0_before"], abs=0.01)


def assert_resumes(config, settings, folder):
    """Cut off at half its steps, it ends in the same bits."""
    import shutil

    run = endwise.train(config, **settings)
    again = config.model_copy(update={"out": folder / "again"})
    shutil.copytree(run.folder, again.out)
    steps = RunFolder(again.out).saved_steps()
    assert len(steps) > 1
    for step in steps[1:]:
        RunFolder(again.out).checkpoint(step).unlink()
    resumed = endwise.train(again, resume=True, **settings)
    for one, two in zip(run.sae.state_dict().values(), resumed.sae.state_dict().values(), strict=True):
        assert torch.equal(one, two)


def test_random_prefixes_are_those_of_the_runs_seed(model, corpora, sources, tmp_path):
    config = recipe("matryoshka_batchtopk", sources / "batchtopk", tmp_path / "run", random_prefixes=4)
    saes = [new_trainee(config.model_copy(update={"seed": seed}), model, steps=10).sae for seed in (0, 7, 7)]
    for sae in saes:
        sae.begin_step(0.5)
    assert saes[0].prefixes != saes[1].prefixes == saes[2].prefixes
    config = config.model_copy(
        update={
            "seed": 7,
            "training": config.training.model_copy(update={"checkpoint_every": 5, "keep_checkpoints": 9}),
        }
    )
    assert_resumes(config, {"model": model, "corpora": corpora, "display": False}, tmp_path)
