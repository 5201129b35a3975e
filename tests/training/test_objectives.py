"""Every term against its definition in plain Python, its gradient against finite differences of that definition."""

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from endwise import LanguageModel
from endwise.common.errors import ConfigError, SiteError
from endwise.config.objective import ObjectiveConfig
from endwise.dictionaries import DenseLatents
from endwise.models.language_model import Clean, Spliced
from endwise.models.readout import Readout
from endwise.models.sites import Site
from endwise.training.objectives import KL, DownstreamMSE, LocalMSE, Sparsity, build_objective

BATCH, POS, WIDTH, VOCAB, FEATURES, LAYERS = 2, 4, 3, 7, 5, 4
SITES = tuple(
    Site.parse(name) for name in ("blocks.2.hook_resid_pre", "blocks.2.hook_mlp_out", "blocks.3.hook_resid_post")
)
SEEDS = (0, 1, 2)


@pytest.fixture(params=SEEDS)
def draw(request):
    """Random tensors of one seed, float32."""
    generator = torch.Generator().manual_seed(request.param)

    def drawn(*shape):
        return torch.randn(shape, generator=generator)

    drawn.mask = torch.rand(BATCH, POS, generator=generator) < 0.6
    drawn.mask[0, 0], drawn.mask[1, -1] = True, False
    return drawn


def tokens_in(mask):
    return [(b, t) for b in range(len(mask)) for t in range(len(mask[b])) if mask[b][t]]


def slow_kl(clean, spliced, mask, readout):
    """Σ over tokens of Σ over words of P·log(P/Q), from hidden states in nested lists."""
    unembedding = readout.unembedding
    cap, weight = unembedding.softcap, unembedding.weight.double().tolist()
    bias = [0.0] * len(weight) if unembedding.bias is None else unembedding.bias.double().tolist()

    def probabilities(hidden):
        logits = []
        for row, offset in zip(weight, bias, strict=True):
            logit = unembedding.scale * (sum(w * h for w, h in zip(row, hidden, strict=True)) + offset)
            logits.append(logit if cap is None else cap * math.tanh(logit / cap))
        whole = sum(math.exp(logit) for logit in logits)
        return [math.exp(logit) / whole for logit in logits]

    total = 0.0
    for b, t in tokens_in(mask):
        for p, q in zip(probabilities(clean[b][t]), probabilities(spliced[b][t]), strict=True):
            total += p * math.log(p / q)
    return total


def slow_squared_error(estimate, truth, mask):
    total = 0.0
    for b, t in tokens_in(mask):
        differences = [(e - x) ** 2 for e, x in zip(estimate[b][t], truth[b][t], strict=True)]
        total += sum(differences) / len(differences)
    return total


def slow_sparsity(latents, mask, p, width):
    total = 0.0
    for b, t in tokens_in(mask):
        for latent in latents[b][t]:
            total += abs(latent) ** p / width
    return total


def finite_differences(function, at, step=1e-5):
    """Central differences of a function of nested lists, one coordinate after another."""
    flat = at.double().flatten()
    gradient = torch.empty_like(flat)
    for index in range(len(flat)):
        ends = []
        for sign in (1, -1):
            moved = flat.clone()
            moved[index] += sign * step
            ends.append(function(moved.view(at.shape).tolist()))
        gradient[index] = (ends[0] - ends[1]) / (2 * step)
    return gradient.view(at.shape)


def check(total, slow, inputs, rtol=1e-5, atol=1e-6):
    """`total` of leaf tensors against `slow` of nested lists: its value, and its gradient in every input."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    value = total(*leaves)
    value.backward()
    assert value.dtype == torch.float32
    lists = [tensor.double().tolist() for tensor in inputs]
    assert float(value.detach()) == pytest.approx(slow(*lists), rel=rtol, abs=atol)
    for index, leaf in enumerate(leaves):

        def of_one(moved, index=index):
            return slow(*lists[:index], moved, *lists[index + 1 :])

        expected = finite_differences(of_one, inputs[index])
        torch.testing.assert_close(leaf.grad.double(), expected, rtol=1e-4, atol=1e-5)
        assert expected.abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["plain", "bias", "scaled and capped"])
def test_kl(draw, kind):
    bias = None if kind == "plain" else draw(VOCAB)
    scale, softcap = (0.5, 2.0) if kind == "scaled and capped" else (1.0, None)
    readout = Readout(draw(VOCAB, WIDTH), bias, scale, softcap)
    clean = draw(BATCH, POS, WIDTH)
    tokens = torch.zeros(BATCH, POS, dtype=torch.int64)

    def total(spliced):
        return KL(1.0).total(readout, Clean(tokens, {}, clean), Spliced({}, spliced), draw.mask)

    check(total, lambda s: slow_kl(clean.tolist(), s, draw.mask.tolist(), readout), [draw(BATCH, POS, WIDTH)])


def test_kl_is_zero_with_zero_gradient_where_nothing_was_changed(draw):
    readout, hidden = Readout(draw(VOCAB, WIDTH)), draw(BATCH, POS, WIDTH)
    clean = Clean(torch.zeros(BATCH, POS, dtype=torch.int64), {}, hidden)
    leaf = hidden.clone().requires_grad_()
    value = KL(1.0).total(readout, clean, Spliced({}, leaf), draw.mask)
    value.backward()
    assert float(value.detach()) == 0.0
    assert not leaf.grad.any()


def test_kl_without_final_states_is_refused(draw):
    hidden, tokens = draw(BATCH, POS, WIDTH), torch.zeros(BATCH, POS, dtype=torch.int64)
    for clean, spliced in ((None, hidden), (hidden, None)):
        with pytest.raises(ValueError, match="final hidden state of both passes"):
            KL(1.0).total(Readout(draw(VOCAB, WIDTH)), Clean(tokens, {}, clean), Spliced({}, spliced), draw.mask)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_downstream_mse_is_the_mean_over_its_sites(draw, count):
    sites = SITES[:count]
    truths = [draw(BATCH, POS, WIDTH) for _ in sites]
    clean = Clean(torch.zeros(BATCH, POS, dtype=torch.int64), dict(zip(sites, truths, strict=True)), None)
    term = DownstreamMSE(1.0, sites)

    def total(*estimates):
        spliced = Spliced(dict(zip(sites, estimates, strict=True)), None)
        return term.total(Readout(draw(VOCAB, WIDTH)), clean, spliced, draw.mask)

    def slow(*estimates):
        pairs = zip(estimates, truths, strict=True)
        return sum(slow_squared_error(e, truth.double().tolist(), draw.mask.tolist()) for e, truth in pairs) / count

    check(total, slow, [draw(BATCH, POS, WIDTH) for _ in sites])


def test_local_mse(draw):
    activation, latents = draw(BATCH, POS, WIDTH), DenseLatents(draw(BATCH, POS, FEATURES))
    check(
        lambda reconstruction: LocalMSE(1.0).total(activation, reconstruction, latents, draw.mask),
        lambda reconstruction: slow_squared_error(reconstruction, activation.double().tolist(), draw.mask.tolist()),
        [draw(BATCH, POS, WIDTH)],
    )


def test_squared_errors_of_low_precision_activations_are_summed_in_float32(draw):
    activation, reconstruction = draw(BATCH, POS, WIDTH).bfloat16(), draw(BATCH, POS, WIDTH).bfloat16()
    latents = DenseLatents(draw(BATCH, POS, FEATURES))
    value = LocalMSE(1.0).total(activation, reconstruction, latents, draw.mask)
    lists = [tensor.double().tolist() for tensor in (reconstruction, activation)]
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(slow_squared_error(*lists, draw.mask.tolist()), rel=1e-5)


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0])
def test_sparsity(draw, p):
    """Half the latents are 0, where for p < 1 the symmetric difference is 0 too, though the derivative is infinite."""
    activation, latents = draw(BATCH, POS, WIDTH), torch.relu(draw(BATCH, POS, FEATURES))
    latents[(latents > 0) & (latents < 0.01)] = 0.01  # finite differences of a square root need room
    assert (latents == 0).any()
    check(
        lambda values: Sparsity(1.0, p).total(activation, activation, DenseLatents(values), draw.mask),
        lambda values: slow_sparsity(values, draw.mask.tolist(), p, WIDTH),
        [latents],
    )


def test_an_empty_mask_gives_nothing(draw):
    nowhere = torch.zeros(BATCH, POS, dtype=torch.bool)
    readout, tokens = Readout(draw(VOCAB, WIDTH)), torch.zeros(BATCH, POS, dtype=torch.int64)
    activation, latents = draw(BATCH, POS, WIDTH), DenseLatents(draw(BATCH, POS, FEATURES))
    leaf = draw(BATCH, POS, WIDTH).requires_grad_()
    clean, spliced = Clean(tokens, {SITES[0]: activation}, activation), Spliced({SITES[0]: leaf}, leaf)
    values = [
        KL(1.0).total(readout, clean, spliced, nowhere),
        DownstreamMSE(1.0, SITES[:1]).total(readout, clean, spliced, nowhere),
        LocalMSE(1.0).total(activation, leaf, latents, nowhere),
        Sparsity(1.0, 0.5).total(activation, leaf, latents, nowhere),
    ]
    assert [float(value.detach()) for value in values] == [0.0] * 4
    sum(values).backward()
    assert not leaf.grad.any()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "n_positions": 8, "n_embd": 8, "n_layer": LAYERS, "n_head": 2}
    return LanguageModel(GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)))


def config(kind, **fields):
    return ObjectiveConfig.build({"kind": kind, "sparsity": {"coefficient": 0.3}, **fields})


def built(model, kind, site="blocks.1.hook_resid_pre", **fields):
    return build_objective(config(kind, **fields), model, model.site(site))


def weights(objective):
    return {term.name: term.coefficient for term in objective.terms}


@pytest.mark.parametrize(
    ("kind", "fields", "expected"),
    [
        ("local", {}, {"local_mse": 1.0, "sparsity": 0.3}),
        ("e2e", {}, {"kl": 1.0, "sparsity": 0.3}),
        ("e2e_ds", {"downstream_mse": 2.5}, {"kl": 0.5, "downstream_mse": 2.5, "sparsity": 0.3}),
        ("local", {"kl": 0.25}, {"kl": 0.25, "local_mse": 1.0, "sparsity": 0.3}),
        ("local", {"local_mse": 0, "kl": 2}, {"kl": 2.0, "sparsity": 0.3}),
        ("e2e", {"kl": 3, "local_mse": 0.5}, {"kl": 3.0, "local_mse": 0.5, "sparsity": 0.3}),
        ("e2e_ds", {"downstream_mse": 2, "kl": 0}, {"downstream_mse": 2.0, "sparsity": 0.3}),
    ],
)
def test_presets_and_overrides(model, kind, fields, expected):
    objective = built(model, kind, **fields)
    assert weights(objective) == expected
    assert objective.final == ("kl" in expected)
    assert bool(objective.sites) == ("downstream_mse" in expected)
    assert bool(objective.spliced_terms) == bool({"kl", "downstream_mse"} & set(expected))


def test_sparsity_is_kept_as_the_recipe_says(model):
    for sparsity, expected in (({"coefficient": 0, "p": 0.5}, (0.0, 0.5)), ({"coefficient": 7}, (7.0, 1.0))):
        term = built(model, "local", sparsity=sparsity).site_terms[-1]
        assert (term.coefficient, term.p) == expected


@pytest.mark.parametrize(
    ("site", "layers"),
    [
        ("blocks.0.hook_resid_pre", [1, 2, 3]),
        ("blocks.1.hook_attn_out", [2, 3]),
        ("blocks.1.hook_resid_post", [3]),  # the input of block 2 is the site itself
        ("blocks.2.hook_mlp_out", [3]),
    ],
)
def test_downstream_sites_are_by_default_the_inputs_of_all_later_blocks(model, site, layers):
    objective = built(model, "e2e_ds", site, downstream_mse=1)
    assert [str(later) for later in objective.sites] == [f"blocks.{layer}.hook_resid_pre" for layer in layers]


def test_named_downstream_sites_are_recorded_in_the_order_of_the_model(model):
    names = ["blocks.3.hook_resid_post", "blocks.1.hook_mlp_out", "blocks.2.hook_resid_pre", "blocks.1.hook_resid_post"]
    objective = built(model, "e2e_ds", "blocks.1.hook_attn_out", downstream_mse=1, downstream_sites=names)
    assert [str(site) for site in objective.sites] == [names[1], names[3], names[2], names[0]]
    assert set(objective.spliced_terms[-1].sites) == set(objective.sites)


@pytest.mark.parametrize(
    ("site", "later"),
    [
        ("blocks.1.hook_resid_pre", "blocks.1.hook_resid_pre"),
        ("blocks.1.hook_resid_pre", "blocks.0.hook_resid_post"),
        ("blocks.1.hook_mlp_out", "blocks.1.hook_attn_out"),
        ("blocks.1.hook_resid_post", "blocks.1.hook_mlp_out"),
        ("blocks.2.hook_resid_pre", "blocks.1.hook_resid_post"),
    ],
)
def test_downstream_sites_that_do_not_come_later_are_refused(model, site, later):
    with pytest.raises(ConfigError) as refused:
        built(model, "e2e_ds", site, downstream_mse=1, downstream_sites=["blocks.3.hook_resid_pre", later])
    assert f"own site {site} (not later: {later})" in str(refused.value)


@pytest.mark.parametrize("fields", [{}, {"downstream_sites": []}], ids=["default", "empty"])
def test_nothing_downstream_is_refused(model, fields):
    with pytest.raises(ConfigError, match=r"blocks\.3\.hook_resid_pre.*none.*blocks\.3\.hook_resid_post.*kind=e2e"):
        built(model, "e2e_ds", "blocks.3.hook_resid_pre", downstream_mse=1, **fields)


@pytest.mark.parametrize("later", ["blocks.4.hook_resid_pre", "blocks.2.hook_nowhere", "blocks.2.hook_resid_prr"])
def test_unknown_downstream_sites_are_refused(model, later):
    with pytest.raises(SiteError) as refused:
        built(model, "e2e_ds", downstream_mse=1, downstream_sites=[later])
    assert later in str(refused.value)
    assert "hook_resid_pre" in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "fields", "named"),
    [
        ("e2e_ds", {}, "downstream_mse"),
        ("e2e_ds", {"downstream_mse": 0}, "downstream_mse"),
        ("e2e", {"kl": -1}, "kl"),
        ("local", {"local_mse": -0.1}, "local_mse"),
        ("e2e_ds", {"downstream_mse": -2}, "downstream_mse"),
        ("local", {"sparsity": {"coefficient": -1}}, "sparsity.coefficient"),
        ("local", {"sparsity": {"coefficient": 1, "p": 0}}, "sparsity.p"),
        ("local", {"sparsity": {}}, "sparsity.coefficient"),
        ("e2e", {"kl": float("nan")}, "kl"),
        ("local", {"local_mse": 0}, "every weight of the objective but sparsity is 0"),
        ("e2e", {"kl": 0, "local_mse": 0, "downstream_mse": 0}, "every weight of the objective but sparsity is 0"),
        ("end_to_end", {}, "kind"),
    ],
)
def test_recipes_that_break_a_rule_are_refused(kind, fields, named):
    with pytest.raises(ConfigError) as refused:
        config(kind, **fields)
    assert named in str(refused.value)
