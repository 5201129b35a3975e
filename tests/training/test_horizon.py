"""The dial from local to end-to-end training, and squared errors relative to the variance, against slow definitions."""

import json

import pytest
import torch

from endwise import RunConfig, train
from endwise.common.errors import ConfigError, DataError
from endwise.config.objective import ObjectiveConfig
from endwise.models.sites import Part, Site
from endwise.models.splicing import squared_error
from endwise.runs.folder import RunFolder
from endwise.tokens import BatchOrder
from endwise.training.error_scale import ErrorScale
from endwise.training.making import new_trainee
from endwise.training.objectives import build_objective, horizon_end
from endwise.training.step import clean_passes, take_step
from small_gpt2 import LAYERS, SITE, WIDTH, recipe
from tiny_models import tiny, tokens


def objective(**values):
    return ObjectiveConfig.build({"sparsity": {"coefficient": 0.3}, **values})


def sites_of(model, site, **values):
    return [each.name for each in build_objective(objective(**values), model, model.site(site)).sites]


@pytest.mark.parametrize(
    ("site", "horizon", "expected"),
    [
        ("blocks.1.hook_resid_pre", 1, ["2.hook_resid_pre"]),
        ("blocks.1.hook_resid_pre", 2, ["2.hook_resid_pre", "3.hook_resid_pre"]),
        ("blocks.1.hook_resid_pre", 3, ["2.hook_resid_pre", "3.hook_resid_pre", "3.hook_resid_post"]),
        ("blocks.0.hook_resid_post", 1, ["2.hook_resid_pre"]),
        ("blocks.1.hook_resid_mid", 1, ["2.hook_resid_pre", "3.hook_resid_pre"]),
        ("blocks.1.hook_mlp_out", 1, ["2.hook_resid_pre", "3.hook_resid_pre"]),
        ("blocks.3.hook_resid_pre", 1, ["3.hook_resid_post"]),
    ],
)
def test_a_horizon_reads_the_stream_after_each_block_within_it(model, site, horizon, expected):
    assert sites_of(model, site, kind="horizon", horizon=horizon) == [f"blocks.{name}" for name in expected]


def test_all_is_what_no_horizon_is(model):
    for kind in ({"kind": "e2e_ds", "downstream_mse": 2.0}, {"kind": "e2e"}):
        built = [build_objective(objective(**kind, horizon=h), model, model.site(SITE)) for h in (None, "all")]
        assert built[0] == built[1]
    ends = objective(kind="horizon", horizon="all", downstream_mse=2.0), objective(kind="horizon", horizon=0)
    assert (ends[0].name, ends[1].name) == ("e2e_ds", "local")
    assert ends[0].weights == objective(kind="e2e_ds", downstream_mse=2.0).weights
    assert ends[1].weights == objective(kind="local").weights


def test_a_horizon_past_the_last_block_ends_there_and_says_so(model):
    with pytest.warns(UserWarning, match=r"horizon 9 goes past the last block.*it ends after 3\."):
        assert horizon_end(9, model, model.site(SITE)) == Site(LAYERS, Part.RESID_PRE)
    with pytest.warns(UserWarning, match=r"from blocks\.3\.hook_mlp_out it ends after 0\."):
        assert sites_of(model, "blocks.3.hook_mlp_out", kind="horizon") == ["blocks.3.hook_resid_post"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"kind": "e2e", "horizon": 1}, r"horizon is 1, and kl reads the predictions"),
        ({"kind": "horizon", "kl": 0.5}, r"horizon is 1, and kl reads the predictions"),
        ({"kind": "local", "horizon": 0, "downstream_mse": 1}, "horizon is 0, which ends at the site"),
        ({"kind": "horizon", "horizon": -1}, "must be a number of blocks, 0 or more, or all"),
        ({"kind": "horizon", "horizon": True}, "must be a number of blocks"),
        ({"kind": "horizon", "horizon": "most"}, "must be a number of blocks"),
        ({"kind": "horizon", "horizon": [1]}, "must be a number of blocks"),
    ],
)
def test_what_a_horizon_cannot_be_is_refused(values, said):
    with pytest.raises(ConfigError, match=said):
        objective(**values)


def test_a_site_past_the_horizon_and_a_horizon_without_sites_are_refused(model):
    with pytest.raises(ConfigError, match=r"blocks\.3\.hook_resid_pre lies past the horizon.*ends at blocks\.2"):
        sites_of(model, SITE, kind="horizon", downstream_sites=["blocks.3.hook_resid_pre"])
    assert sites_of(model, SITE, kind="horizon", downstream_sites=["blocks.1.hook_resid_mid"]) == [
        "blocks.1.hook_resid_mid"
    ]
    with (
        pytest.raises(ConfigError, match=r"must come after.*there is none"),
        pytest.warns(UserWarning, match=r"it ends after 0\."),
    ):
        sites_of(model, "blocks.3.hook_resid_post", kind="horizon")


@pytest.mark.parametrize("horizon", [0, 1, 2, "all"])
def test_passes_go_no_further_than_the_horizon(model, corpora, tmp_path, horizon):
    values = recipe(tmp_path).model_dump(exclude_unset=True)
    values["objective"] = {"kind": "horizon", "horizon": horizon, "sparsity": {"coefficient": 0.3}}
    trainee = new_trainee(RunConfig.build(values), model, 10)
    run, read = [], []
    hooks = [
        block.register_forward_hook(lambda *_, number=number: run.append(number))
        for number, block in enumerate(model.model.transformer.h)
    ]
    hooks.append(model.model.lm_head.register_forward_hook(lambda *_: read.append(True)))
    for scale in trainee.course.scales:
        scale.measure(torch.randn(64, WIDTH))
    try:
        take_step(model, [trainee], corpora.train.batch(range(4)))
    finally:
        for hook in hooks:
            hook.remove()
    last = {0: 0, 1: 1, 2: 2, "all": LAYERS - 1}[horizon]
    # A pass that is stopped at a site stops inside the block that follows, whose own hook is then never reached.
    assert max(run) == last and not read


def slow_relative(estimate, truth, mask, reference):
    """By a loop over positions, in float64."""
    reference, total = reference.double(), 0.0
    squares = sorted(float((row**2).mean()) for row in reference)
    limit = 100 * squares[(len(squares) - 1) // 2]
    ordinary = torch.stack([row for row in reference if float((row**2).mean()) <= limit])
    variance = float(((ordinary - ordinary.mean(0)) ** 2).mean())
    for b, p in mask.nonzero().tolist():
        size = float((truth[b, p].double() ** 2).mean())
        total += float(((estimate[b, p] - truth[b, p]).double() ** 2).mean()) / (size if size > limit else variance)
    return total


@pytest.mark.parametrize("sink", [1.0, 300.0])
def test_relative_errors_are_those_of_the_definition(sink):
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(101, 8, generator=generator) + 2
    reference[7] *= sink
    truth = torch.randn(3, 5, 8, generator=generator) + 2
    truth[0, 0] *= sink
    estimate = (truth + 0.3 * torch.randn(3, 5, 8, generator=generator)).requires_grad_()
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1, 2] = mask[2] = False
    scale = ErrorScale(Site(0, Part.RESID_PRE))
    scale.measure(reference)
    found = squared_error(estimate, truth, mask, scale)
    assert float(found.detach()) == pytest.approx(slow_relative(estimate.detach(), truth, mask, reference), rel=1e-5)
    (gradient,) = torch.autograd.grad(found, estimate)
    assert gradient.isfinite().all() and (gradient[~mask] == 0).all() and (gradient[0, 0] != 0).all()
    if sink > 1:  # a sink's error would be all there is; its share is that of any position
        assert float(found.detach()) < 10


def test_the_mean_as_estimate_has_an_error_of_one():
    reference = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) * 3 - 1
    scale = ErrorScale(Site(0, Part.RESID_PRE))
    scale.measure(reference)
    estimate, mask = reference.mean(0).expand(1, 64, 8), torch.ones(1, 64, dtype=torch.bool)
    assert float(squared_error(estimate, reference[None], mask, scale)) / 64 == pytest.approx(1, rel=1e-5)


def test_activations_without_variance_are_refused():
    with pytest.raises(DataError, match=r"blocks\.0\.hook_resid_pre are alike at all of 5 positions"):
        ErrorScale(Site(0, Part.RESID_PRE)).measure(torch.ones(5, 3))


def test_a_run_measures_the_variance_of_its_text_once(model, corpora, tmp_path):
    values = recipe(tmp_path / "run").model_dump(exclude_unset=True)
    values["objective"] = {"kind": "horizon", "horizon": 2, "local_mse": 0.5, "sparsity": {"coefficient": 0.3}}
    run = train(RunConfig.build(values), model=model, corpora=corpora, display=False)
    kept = json.loads(RunFolder(run.folder).start_file.read_text())["error_scales"]
    assert list(kept) == [SITE, "blocks.2.hook_resid_pre", "blocks.3.hook_resid_pre"]
    order = BatchOrder(corpora.train, run.config.training.batch, run.config.data.seed)
    text = corpora.train.batch([row for step in range(len(order)) for row in order[step]]).tokens
    found = model.clean(text, [model.site(SITE)]).activations[model.site(SITE)].reshape(-1, WIDTH).double()
    assert kept[SITE]["variance"] == pytest.approx(float(found.var(0, correction=0).mean()), rel=1e-5)


@pytest.mark.parametrize("scale_of_model", [1.0, 50.0])
def test_relative_losses_do_not_depend_on_the_size_of_activations(corpora, tmp_path, scale_of_model):
    """Unlike absolute errors: those of Gemma are a million times those of GPT-2."""
    model = tiny("gpt2")
    site = model.site("blocks.1.hook_resid_pre")
    ids = tokens()
    clean = model.clean(ids, [site]).activations[site]
    scale = ErrorScale(site)
    scale.measure(scale_of_model * clean.reshape(-1, clean.shape[-1]))
    truth, estimate = scale_of_model * clean, scale_of_model * clean * 0.9
    mask = torch.ones(clean.shape[:2], dtype=torch.bool)
    alone = ErrorScale(site)
    alone.measure(clean.reshape(-1, clean.shape[-1]))
    expected = squared_error(clean * 0.9, clean, mask, alone)
    torch.testing.assert_close(squared_error(estimate, truth, mask, scale), expected)


@pytest.mark.parametrize("balance", [None, "loss", "gradient"])
def test_relative_errors_downstream_and_their_balance(model, corpora, tmp_path, balance):
    """One step's gradient against the definition as one graph."""
    values = recipe(tmp_path, gradient_clip=None, warmup=0).model_dump(exclude_unset=True)
    values["objective"] = {"kind": "horizon", "horizon": 1, "balance": balance, "sparsity": {"coefficient": 0.0}}
    trainee = new_trainee(RunConfig.build(values), model, 10)
    later = model.site("blocks.2.hook_resid_pre")
    batch = corpora.train.batch(range(4))
    clean = clean_passes(model, model, [trainee], batch.tokens)[trainee.site]
    of_sites = {}
    for scale in trainee.course.scales:
        scale.measure(clean.activations[scale.site].reshape(-1, WIDTH))
        of_sites[scale.site] = float(scale.state[0])
    trainee.begin_step()
    trainee.accumulate(model, clean, batch.mask, batch.mask.sum())
    x = clean.activations[trainee.site]
    estimate = trainee.sae.reconstruct(trainee.sae.encode(x), x)
    replay = model.replay(clean, {trainee.site: estimate}, record=[later], final=False)
    downstream = (replay.activations[later] - clean.activations[later]).square().mean() / of_sites[later]
    local = (estimate - x).square().mean() / of_sites[trainee.site]
    at = [torch.autograd.grad(loss, estimate, retain_graph=True)[0].norm() for loss in (local, downstream)]
    factor = {None: 1.0, "loss": float((local / downstream).detach()), "gradient": float(at[0] / at[1])}[balance]
    expected = torch.autograd.grad(factor * downstream, list(trainee.sae.parameters()), allow_unused=True)
    for own, slow in zip(trainee.sae.parameters(), expected, strict=True):
        torch.testing.assert_close(own.grad, torch.zeros_like(own) if slow is None else slow, rtol=1e-4, atol=1e-7)
