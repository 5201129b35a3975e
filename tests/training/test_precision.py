"""Mixed precision against exact: a gradient as near as rounding lets it be, and runs that end no differently."""

import copy

import numpy as np
import pytest
import torch

from endwise import LanguageModel, RunConfig, measure, train, train_together
from endwise.common.errors import ConfigError
from endwise.common.statistics import student_t
from endwise.training.making import new_trainee
from endwise.training.step import tail_model, take_step
from small_gpt2 import CONTEXT, SITE, VOCAB, recipe, small_corpora, small_model, write_tokens

pytestmark = pytest.mark.filterwarnings("ignore:training.precision=mixed on a processor")
ROUNDINGS = 6
"""Factor by which bf16 may move a gradient further than rounding the tail's weights alone. A block has 4 products
with weights; its activations and their gradients are rounded some 30 times (10 operations, forward on the clean and on
the spliced side, and backward), independently: √(30 / 4) = 2.7 times as far, and twice that is allowed."""
SEEDS = 8
BAND = 0.01
"""Largest difference between the ends of mixed and of exact runs that is as good as none, relative to L0 and to KL."""


@pytest.fixture
def corpora(tmp_path):
    return small_corpora(write_tokens(tmp_path))


def gradient(config, model, batch, tail=None):
    trainee = new_trainee(config, model, steps=10)
    trainee.optimizer.step = lambda: None
    take_step(model, [trainee], batch, tail=tail or tail_model(model, config.training))
    return trainee, {name: parameter.grad.flatten() for name, parameter in trainee.sae.named_parameters()}


def with_weights_rounded(model):
    """The model in fp32, every weight of which is a bf16 number."""
    rounded = copy.deepcopy(model.model)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.bfloat16())
    return LanguageModel(rounded, None)


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        pytest.param(part, kind, marks=() if part == "resid_pre" or kind == "e2e_ds" else pytest.mark.slow)
        for part in ("resid_pre", "attn_out", "mlp_out", "resid_post")
        for kind in ("local", "e2e", "e2e_ds")
    ],
)
def test_the_gradient_is_the_exact_one_to_rounding(kind, part, tmp_path, corpora):
    model, batch = small_model(), corpora.train.batch(range(16))
    config = recipe(tmp_path / "run", kind).model_copy(update={"site": f"blocks.1.hook_{part}"})
    mixed = config.model_copy(update={"training": config.training.model_copy(update={"precision": "mixed"})})
    exact_trainee, exact = gradient(config, model, batch)
    mixed_trainee, approximate = gradient(mixed, model, batch)
    _, rounded = gradient(config, model, batch, tail=with_weights_rounded(model))
    for name, expected in exact.items():
        error, least = ((other[name] - expected).norm() / expected.norm() for other in (approximate, rounded))
        assert error <= ROUNDINGS * least, (name, error, least)
        assert bool(error) == (kind != "local")  # which has no tail
    assert mixed_trainee.report()["l0"] == exact_trainee.report()["l0"]  # the head is fp32: no feature flips


def test_the_tail_is_in_bfloat16_and_the_model_stays_as_it_is():
    model = small_model()
    tail = model.in_bfloat16()
    assert tail.dtype == torch.bfloat16 and tail.readout.unembedding.weight.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.model.parameters()} == {torch.float32}


def test_nothing_is_compared_with_the_other_precision(corpora):
    """The clean side of every term is the tail's own: splicing the identity leaves no KL and no error at all."""
    from endwise.training.step import clean_passes

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


def write_own_text(model, path, tokens):
    """Write text drawn from the model itself: an SAE's CE increase is then its KL in expectation."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCAB, (tokens // CONTEXT, 1), generator=generator)
    while ids.shape[1] < CONTEXT:
        following = model.logits(ids)[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(following, 1, generator=generator)], 1)
    np.save(path, ids.flatten().numpy().astype(np.uint16))


@pytest.mark.parametrize("kind", [pytest.param("e2e", marks=pytest.mark.slow), "e2e_ds"])
def test_a_run_ends_alike(kind, tmp_path):
    """Rounding pushes each run a little aside, to either side. Over several runs, each paired with the exact one of its
    seed, the differences are compared with what they scatter: chance finds one beyond the band once in 10,000 times.
    """
    model, heldout, ends = small_model(), 2048, {}
    write_own_text(model, write_tokens(tmp_path) / "heldout.npy", heldout)
    corpora = small_corpora(tmp_path, heldout)
    for precision in ("exact", "mixed"):
        settings = {"precision": precision, "tokens": 12 * 4 * CONTEXT}
        configs = [recipe(tmp_path / f"{precision}-{seed}", kind, seed, **settings) for seed in range(SEEDS)]
        runs = train_together(configs, model=model, corpora=corpora, display=False)
        saes = {run.folder.name: (model.site(SITE), run.sae) for run in runs}
        settings = configs[0].evaluation.model_copy(update={"tokens": heldout, "batch": 64})
        ends[precision] = list(measure(model, saes, corpora.heldout, settings, baselines=False).values())
    for metric, scale in (("l0", "l0"), ("kl", "kl"), ("ce_increase", "kl")):
        whole = np.mean([run[scale] for run in ends["exact"]])
        pairs = zip(ends["mixed"], ends["exact"], strict=True)
        differences = np.array([mixed[metric] - exact[metric] for mixed, exact in pairs]) / whole
        chance = student_t(1 - 0.5e-4, SEEDS - 1) * differences.std(ddof=1) / SEEDS**0.5
        assert abs(differences.mean()) <= BAND + chance, (metric, differences)
        assert 0 < chance < 0.05, metric  # mixed is not exact; and a difference of 6 % would be found


def test_exact_refuses_half_precision(tmp_path, corpora):
    with pytest.raises(ConfigError, match=r"precision.*mixed"):
        RunConfig.build({**recipe(tmp_path).model_dump(), "model": {"dtype": "bfloat16"}})
    half: LanguageModel = small_model().in_bfloat16()
    with pytest.raises(ConfigError, match="exact"):
        train(recipe(tmp_path / "run"), model=half, corpora=corpora, display=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("error")
def test_a_processor_without_bfloat16_is_told_of(tmp_path):
    mixed = recipe(tmp_path, precision="mixed").training
    with pytest.warns(UserWarning, match="exact"):
        tail_model(small_model(), mixed, lambda device: False)
    tail_model(small_model(), mixed, lambda device: True)
