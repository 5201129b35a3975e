"""Mixed precision against exact: the same gradient to a per cent, and the same end of a run to a stated band."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from endwise import LanguageModel, RunConfig, measure, step, train
from endwise.errors import ConfigError
from endwise.step import tail_model, take_step
from endwise.training import new_trainee
from small_gpt2 import SITE, recipe, small_corpora, small_model, write_tokens

pytestmark = pytest.mark.filterwarnings("ignore:training.precision=mixed on a processor")
BAND = 0.02
"""Largest difference at the end of a run: of L0 and KL relative to themselves, of the CE increase relative to the KL
(it may be near 0 here, where text is random)."""


@pytest.fixture
def corpora(tmp_path):
    return small_corpora(write_tokens(tmp_path))


def gradient(config, model, batch):
    trainee = new_trainee(config, model, steps=10)
    trainee.optimizer.step = lambda: None
    take_step(model, [trainee], batch, tail=tail_model(model, config.training))
    return trainee, {name: parameter.grad.flatten() for name, parameter in trainee.sae.named_parameters()}


@pytest.mark.parametrize("kind", ["local", "e2e", "e2e_ds"])
@pytest.mark.parametrize("part", ["resid_pre", "attn_out", "mlp_out", "resid_post"])
def test_the_gradient_is_the_exact_one_to_rounding(kind, part, tmp_path, corpora):
    model, batch = small_model(), corpora.train.batch(range(16))
    config = recipe(tmp_path / "run", kind).model_copy(update={"site": f"blocks.1.hook_{part}"})
    mixed = config.model_copy(update={"training": config.training.model_copy(update={"precision": "mixed"})})
    exact_trainee, exact = gradient(config, model, batch)
    mixed_trainee, approximate = gradient(mixed, model, batch)
    for name, expected in exact.items():
        error = float((approximate[name] - expected).norm() / expected.norm())
        assert error <= (0.0 if kind == "local" else 0.03), (name, error)
        assert float(cosine_similarity(approximate[name], expected, dim=0)) > 0.999
    assert mixed_trainee.report()["l0"] == exact_trainee.report()["l0"]  # the head is fp32: no feature flips


def test_the_tail_is_in_bfloat16_and_the_model_stays_as_it_is():
    model = small_model()
    tail = model.in_bfloat16()
    assert tail.dtype == torch.bfloat16 and tail.readout.unembedding.weight.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.model.parameters()} == {torch.float32}


def test_nothing_is_compared_with_the_other_precision(corpora):
    """The clean side of every term is the tail's own: splicing the identity leaves no KL and no error at all."""
    from endwise.step import clean_passes

    model, batch = small_model(), corpora.train.batch(range(4))
    trainee = new_trainee(recipe("run", "e2e_ds"), model, steps=10)
    tail = model.in_bfloat16()
    site = model.site(SITE)
    clean = clean_passes(model, tail, [trainee], batch.tokens)[site]
    assert clean.activations[site].dtype == torch.float32
    same = tail.replay(clean, {site: clean.activations[site]}, record=trainee.objective.sites)
    assert torch.equal(same.final, clean.final)
    for later in trainee.objective.sites:
        assert torch.equal(same.activations[later], clean.activations[later])


@pytest.mark.parametrize("kind", ["e2e", "e2e_ds"])
def test_a_run_ends_alike(kind, tmp_path):
    """On so much text that of two SAEs which are alike the CE is, too, where next tokens are random."""
    model, ends, heldout = small_model(), {}, 8192
    corpora = small_corpora(write_tokens(tmp_path, heldout=heldout), heldout)
    for precision in ("exact", "mixed"):
        config = recipe(tmp_path / precision, kind, precision=precision)
        run = train(config, model=model, corpora=corpora, display=False)
        settings = config.evaluation.model_copy(update={"tokens": heldout, "batch": 64})
        ends[precision] = measure(model, {"": (model.site(SITE), run.sae)}, corpora.heldout, settings)[""]
    for metric in ("l0", "kl"):
        assert ends["mixed"][metric] == pytest.approx(ends["exact"][metric], rel=BAND), metric
    assert ends["mixed"]["ce_increase"] == pytest.approx(ends["exact"]["ce_increase"], abs=BAND * ends["exact"]["kl"])
    assert ends["mixed"]["kl"] != ends["exact"]["kl"]  # or nothing was in bf16


def test_exact_refuses_half_precision(tmp_path, corpora):
    with pytest.raises(ConfigError, match=r"precision.*mixed"):
        RunConfig.build({**recipe(tmp_path).model_dump(), "model": {"dtype": "bfloat16"}})
    half: LanguageModel = small_model().in_bfloat16()
    with pytest.raises(ConfigError, match="exact"):
        train(recipe(tmp_path / "run"), model=half, corpora=corpora, display=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("error")
def test_a_processor_without_bfloat16_is_told_of(tmp_path, monkeypatch):
    mixed = recipe(tmp_path, precision="mixed").training
    monkeypatch.setattr(step, "has_fast_bfloat16", lambda device: False)
    with pytest.warns(UserWarning, match="exact"):
        tail_model(small_model(), mixed)
    monkeypatch.setattr(step, "has_fast_bfloat16", lambda device: True)
    tail_model(small_model(), mixed)
