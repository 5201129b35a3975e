"""Recording, splicing and replaying against plain hooks on the Hugging Face model, for every family."""

import re
from collections import Counter
from contextlib import contextmanager
from functools import cache

import pytest
import torch
import transformers as hf
from torch import nn

from endwise import LanguageModel, Site, spliced
from endwise.common.errors import ModelError, SiteError
from endwise.models.sites import Part
from tiny_models import (
    ALTERNATING,
    CONTEXT,
    FAMILIES,
    GPT_2_LIKE,
    GROUPED,
    LAYERS,
    LLAMA_LIKE,
    VOCAB,
    WIDTH,
    WINDOW,
    block,
    build,
    hooked,
    parts,
    patched_logits,
    randomize,
    tiny,
    tokens,
    values_at,
    width,
)

BOUNDARIES = [0, LAYERS // 2, LAYERS - 1]
PRE, Z, ATTN, MIDDLE, MLP_IN, MLP, POST = Part
SITES = [Site(layer, part) for layer in BOUNDARIES for part in Part]
every_family = pytest.mark.parametrize("family", FAMILIES)
every_site = pytest.mark.parametrize("site", SITES, ids=str)


SOME_FAMILIES = ["gpt2", "gpt_neo", "pythia", "llama", "gemma2", "gptj"]
# One of each way a block returns its result and orders its parts.
some_families = pytest.mark.parametrize("family", SOME_FAMILIES)


def sample(family, site):
    """In every family each part of a block and both ends of the stream; in two, one of whose blocks alternate, each
    part of the first and the last block.
    """
    return site.layer == LAYERS // 2 or site in (Site(0, PRE), Site(LAYERS - 1, POST)) or family in ("gpt2", "gemma2")


def some_ways(family, *sites):
    """Every site in one family of each way; in the others, a branch."""
    return family in SOME_FAMILIES or sites[0] in (Site(1, MLP), Site(2, MLP))


def some_of_sample(family, site):
    """Of `sample`, every site in one family of each way; in the others, what their MLP adds."""
    return sample(family, site) and some_ways(family, site)


def cases(families, sites, often):
    """Every family with each of the sites, or tuples of sites, that it has; those not `often` are slow."""
    for family in families:
        for each in sites:
            of = each if isinstance(each, tuple) else (each,)
            if {site.part for site in of} <= {*parts(family)}:
                yield pytest.param(family, *of, marks=[] if often(family, *of) else pytest.mark.slow)


def at_sites(sites, families=FAMILIES, often=sample):
    return pytest.mark.parametrize(("family", "site"), cases(families, sites, often), ids=str)


def noise_like(value, seed=3):
    return torch.randn(value.shape, generator=torch.Generator().manual_seed(seed)).to(value.dtype)


def moved(value):
    """A change that depends on the value and couples positions and dimensions."""
    return 0.5 * value.roll(1, -1) + 0.2 * value.flip(1) - 0.3


@cache
def reference(family):
    """Every site's value in a plain full pass on `tokens()`, and its logits."""
    hugging, ids = tiny(family).model, tokens()
    values = values_at(family, hugging, ids, [Site(layer, part) for layer in range(LAYERS) for part in parts(family)])
    with torch.no_grad():
        return values, hugging(input_ids=ids, use_cache=False).logits


def random_patch(family, site):
    value = reference(family)[0][site]
    return value + value.std() * noise_like(value)


# What is recorded


@at_sites(SITES)
def test_recorded_values_are_those_of_a_full_pass(family, site):
    model, ids = tiny(family), tokens()
    expected = reference(family)[0][site]
    assert expected.std() > 0.01
    clean = model.clean(ids, [site])
    assert torch.equal(clean.activations[site], expected)
    assert clean.final is None
    assert model.width(site) == expected.shape[-1] == width(family, site.part)


@every_family
def test_residual_sites_are_the_models_hidden_states(family):
    model, ids = tiny(family), tokens()
    with torch.no_grad():
        hidden = model.model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    recorded = model.clean(ids, [Site(layer, part) for layer in range(LAYERS) for part in (PRE, POST)], final=True)
    assert len(hidden) == LAYERS + 1
    for layer in range(LAYERS):
        assert torch.equal(recorded.activations[Site(layer, PRE)], hidden[layer])
        if layer < LAYERS - 1:
            assert torch.equal(recorded.activations[Site(layer, POST)], hidden[layer + 1])
    # The last hidden state that the model returns has passed the final norm.
    norm = model.model.get_submodule(FAMILIES[family].final_norm)
    assert torch.equal(norm(recorded.activations[Site(LAYERS - 1, POST)]), hidden[-1])
    assert torch.equal(recorded.final, hidden[-1])


@every_family
@pytest.mark.parametrize("layer", BOUNDARIES)
def test_what_the_branches_add_is_what_the_block_adds(family, layer):
    model = tiny(family)
    at = model.clean(tokens(), [Site(layer, part) for part in (PRE, ATTN, MLP, POST)], final=True).activations
    added = at[Site(layer, ATTN)].double() + at[Site(layer, MLP)].double()
    post = at[Site(layer, POST)].double()
    torch.testing.assert_close(at[Site(layer, PRE)].double() + added, post, rtol=1e-5, atol=1e-5)
    for part in (ATTN, MLP):  # neither is negligible, so the sum would notice
        assert at[Site(layer, part)].std() > 0.01 * post.std()


@every_family
def test_the_readout_of_the_final_state_gives_the_models_logits(family):
    model, ids = tiny(family), tokens()
    expected = reference(family)[1]
    assert expected.std() > 0.2
    assert torch.equal(model.logits(ids), expected)
    ours = model.readout.logits(model.clean(ids, final=True).final)
    assert torch.equal(ours, expected)


@every_family
def test_sites_are_listed_in_the_order_of_computation(family):
    assert tiny(family).sites() == [Site(layer, part) for layer in range(LAYERS) for part in parts(family)]
    assert tiny(family).n_layers == LAYERS
    assert tiny(family).d_model == WIDTH
    assert tiny(family).vocab_size == VOCAB
    assert tiny(family).context == CONTEXT


# Splicing and replaying


@at_sites(SITES, often=some_of_sample)
def test_an_identity_splice_changes_no_bit(family, site):
    model, ids = tiny(family), tokens()
    expected = reference(family)[1]
    seen = []
    with model.patched({site: lambda value: seen.append(value) or value.clone()}):
        assert torch.equal(model.logits(ids), expected)
    assert len(seen) == 1
    clean = model.clean(ids, [site], final=True)
    patches = [clean.activations[site].clone()] + [lambda value: value.clone()] * (family == "gpt2")
    for patch in patches:
        replayed = model.replay(clean, {site: patch})
        assert torch.equal(replayed.final, clean.final)
        assert torch.equal(model.readout.logits(replayed.final), expected)


@at_sites(SITES)
@torch.no_grad()
def test_a_replayed_tail_equals_the_patched_full_pass_bit_for_bit(family, site):
    model, ids = tiny(family), tokens()
    patch = random_patch(family, site)
    expected = patched_logits(family, model.model, ids, {site: lambda _: patch})
    assert not torch.allclose(expected, reference(family)[1], atol=1e-2)
    replayed = model.replay(model.clean(ids, [site]), {site: patch})
    assert torch.equal(model.readout.logits(replayed.final), expected)
    with model.patched({site: patch}):
        assert torch.equal(model.logits(ids), expected)


PAIRS = [
    (Site(1, ATTN), Site(1, MLP)),
    (Site(1, MLP), Site(3, POST)),
    (Site(1, POST), Site(2, PRE)),
    (Site(3, MLP), Site(3, POST)),
    (Site(1, Z), Site(1, MIDDLE)),
    (Site(1, MIDDLE), Site(1, MLP_IN)),
    (Site(1, MLP_IN), Site(1, MLP)),
    (Site(0, MLP), Site(2, Z)),
]


@pytest.mark.parametrize(("family", "first", "later"), cases(FAMILIES, PAIRS, some_ways), ids=str)
@torch.no_grad()
def test_two_sites_at_once(family, first, later):
    model, ids = tiny(family), tokens()
    patch = random_patch(family, first)
    acts = {first: lambda _: patch, later: moved}
    record = [later, Site(LAYERS - 1, POST)]
    expected = patched_logits(family, model.model, ids, acts)
    only_first = patched_logits(family, model.model, ids, {first: lambda _: patch})
    assert not torch.allclose(expected, only_first, atol=1e-3)
    clean = model.clean(ids, first.name)  # a name for a list of one
    both_orders = [{first: patch, later: moved}, {later: moved, first: lambda _: patch}]
    for mapping in both_orders[: 2 if family == "gpt2" else 1]:
        replayed = model.replay(clean, mapping, record=record)
        assert torch.equal(model.readout.logits(replayed.final), expected)
    with hooked(family, model.model, acts):
        inner = values_at(family, model.model, ids, record)
    for site in record:
        assert torch.equal(replayed.activations[site], inner[site])


@every_family
@torch.no_grad()
def test_later_sites_are_recorded_as_spliced(family):
    model, ids = tiny(family), tokens()
    first = Site(1, MLP)
    record = [Site(1, POST), *(Site(layer, part) for layer in (2, 3) for part in parts(family))]
    patch = random_patch(family, first)
    with hooked(family, model.model, {first: lambda _: patch}):
        expected = values_at(family, model.model, ids, record)
    replayed = model.replay(model.clean(ids, [first]), {first: patch}, record=record, final=False)
    assert replayed.final is None
    assert replayed.activations.keys() == set(record)
    for site in record:
        assert torch.equal(replayed.activations[site], expected[site])


def test_a_function_at_the_first_site_receives_the_clean_value():
    model, ids, site = tiny("llama"), tokens(), Site(2, ATTN)
    clean = model.clean(ids, [site])
    with torch.no_grad():
        expected = patched_logits("llama", model.model, ids, {site: moved})
    assert torch.equal(model.readout.logits(model.replay(clean, {site: moved}).final), expected)


# Gradients


@at_sites([Site(0, MLP), *(Site(2, part) for part in Part), Site(LAYERS - 1, POST)], often=some_ways)
def test_gradients_of_the_replay_are_those_of_the_full_patched_model(family, site):
    model, ids = tiny(family), tokens()
    start = random_patch(family, site)
    direction = noise_like(reference(family)[1], seed=5)

    leaf = start.clone().requires_grad_()
    (patched_logits(family, model.model, ids, {site: lambda _: leaf}) * direction).sum().backward()
    ours = start.clone().requires_grad_()
    final = model.replay(model.clean(ids, [site]), {site: ours}).final
    (model.readout.logits(final) * direction).sum().backward()

    assert leaf.grad.abs().max() > 1e-2
    torch.testing.assert_close(ours.grad, leaf.grad, rtol=1e-4, atol=1e-5 * float(leaf.grad.abs().max()))
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.model.parameters())


def test_gradients_reach_a_later_function_and_the_first_tensor():
    model, ids = tiny("gemma2"), tokens()
    first, later = Site(0, MLP), Site(2, PRE)
    start, direction = random_patch("gemma2", first), noise_like(model.logits(ids), seed=5)
    gradients = []
    for replay in (True, False):
        leaf, scale = start.clone().requires_grad_(), torch.ones(WIDTH, requires_grad=True)
        if replay:
            clean = model.clean(ids, [first])
            final = model.replay(clean, {first: leaf, later: lambda value, scale=scale: value * scale}).final
            logits = model.readout.logits(final)
        else:
            acts = {first: lambda _, leaf=leaf: leaf, later: lambda value, scale=scale: value * scale}
            logits = patched_logits("gemma2", model.model, ids, acts)
        gradients.append(torch.autograd.grad((logits * direction).sum(), [leaf, scale]))
    for ours, expected in zip(*gradients, strict=True):
        assert expected.abs().max() > 1e-2
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_a_clean_pass_keeps_no_graph():
    clean = tiny("gpt2").clean(tokens(), [Site(1, ATTN)], final=True)
    assert not any(value.requires_grad for value in (*clean.activations.values(), clean.final))


# Rows


@at_sites([Site(2, part) for part in Part], SOME_FAMILIES)
def test_microbatches_give_what_the_whole_batch_gives(family, site):
    model, ids = tiny(family), tokens()
    patch = random_patch(family, site)
    clean = model.clean(ids, [site], final=True)
    record = [Site(3, MLP)]
    whole = model.replay(clean, {site: patch}, record=record)
    parts = [slice(0, 1), slice(1, 4)]
    replayed = [model.replay(clean.rows(rows), {site: patch[rows]}, record=record) for rows in parts]
    torch.testing.assert_close(torch.cat([part.final for part in replayed]), whole.final, rtol=1e-4, atol=1e-5)
    recorded = torch.cat([part.activations[record[0]] for part in replayed])
    torch.testing.assert_close(recorded, whole.activations[record[0]], rtol=1e-4, atol=1e-5)


def test_rows_are_views_of_every_field():
    site = Site(1, MLP)
    clean = tiny("gpt2").clean(tokens(), [site], final=True)
    rows = clean.rows(slice(1, 3))
    assert torch.equal(rows.tokens, clean.tokens[1:3])
    assert torch.equal(rows.final, clean.final[1:3])
    assert rows.activations.keys() == clean.activations.keys() >= {site}
    for at, value in rows.activations.items():
        assert torch.equal(value, clean.activations[at][1:3])
        assert value.untyped_storage().data_ptr() == clean.activations[at].untyped_storage().data_ptr()
    assert tiny("gpt2").clean(tokens(), [site]).rows(slice(0, 1)).final is None


# Work that is not done


@contextmanager
def counted(family, model):
    """Record which parts of which blocks a pass computes: `(layer, child)` of every innermost module with weights.

    Counted in the classes, because endwise may answer for an instance.
    """
    calls, parts = Counter(), {}
    for layer in range(LAYERS):
        for name, module in block(family, model, layer).named_modules():
            if not list(module.children()) and list(module.parameters()):
                parts[module] = (layer, name.partition(".")[0])
    with pytest.MonkeyPatch.context() as patch:
        for kind in {type(module) for module in parts}:

            def counting(module, *args, _forward=kind.forward, **kwargs):
                calls.update([parts[module]] if module in parts else [])
                return _forward(module, *args, **kwargs)

            patch.setattr(kind, "forward", counting)
        yield calls


def computing(calls):
    return {layer for layer, _ in calls}


@some_families
@pytest.mark.parametrize("layer", BOUNDARIES)
def test_a_clean_pass_stops_at_the_last_recorded_site(family, layer):
    model, ids = tiny(family), tokens()
    for part in parts(family):
        with counted(family, model.model) as calls:
            model.clean(ids, [Site(0, PRE), Site(layer, part)])
        last = layer - 1 if part is PRE else layer
        assert computing(calls) == set(range(last + 1))
        if part in (Z, ATTN, MIDDLE, MLP_IN):
            assert (layer, "mlp") not in calls
    with counted(family, model.model) as calls:
        model.clean(ids, [Site(layer, PRE)], final=True)
    assert computing(calls) == set(range(LAYERS))


@some_families
@pytest.mark.parametrize("layer", BOUNDARIES)
def test_a_replay_computes_only_what_follows_the_site(family, layer):
    model, ids = tiny(family), tokens()
    attention, mlp = FAMILIES[family].attention, FAMILIES[family].mlp
    with counted(family, model.model) as calls:
        model.clean(ids, [Site(layer, PRE)], final=True)
    children = {child for at, child in calls if at == layer}
    assert {mlp, attention} <= children
    whole = calls
    for part in parts(family):
        clean = model.clean(ids, [Site(layer, part)])
        with counted(family, model.model) as calls:
            model.replay(clean, {Site(layer, part): clean.activations[Site(layer, part)]})
        after = set(range(layer + 1, LAYERS))
        inside = {child for at, child in calls if at == layer}
        assert computing(calls) - {layer} == after
        if part is PRE:
            assert inside == children
        if part is Z:  # the projection alone, and in a block with post-norms attention's norm
            of_attention = [at for at in whole if at[0] == layer and at[1] in (attention, "self_attn", "attn")]
            assert 0 < sum(calls[at] for at in of_attention) <= sum(whole[at] for at in of_attention) - 1
            assert "mlp" in inside
        if part in (ATTN, MIDDLE, MLP_IN):
            assert not inside & {attention, "self_attn", "attn"}
            assert "mlp" in inside
        if part is MLP:
            assert not inside & {attention, mlp, "self_attn", "attn", "mlp"}
        if part is POST:
            assert not inside


def test_a_replay_without_the_final_state_stops_at_the_last_recorded_site():
    model, ids = tiny("llama"), tokens()
    clean = model.clean(ids, [Site(1, PRE)])
    with counted("llama", model.model) as calls:
        spliced_pass = model.replay(clean, {Site(1, PRE): moved}, record=[Site(2, ATTN)], final=False)
    assert computing(calls) == {1, 2}
    assert (2, "mlp") not in calls
    assert spliced_pass.final is None


# Nothing is left behind


def traces(model):
    """Everything that a call could leave in the model's modules."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        name: (*(len(getattr(module, kind)) for kind in hooks), module.__dict__.get("forward"), module.training)
        for name, module in model.named_modules()
    }


@every_family
def test_nothing_is_left_in_the_model(family):
    model, ids = tiny(family), tokens()
    before, weights = traces(model.model), {k: v.clone() for k, v in model.model.state_dict().items()}
    for site in [Site(0, PRE), *(Site(2, part) for part in parts(family)), Site(LAYERS - 1, POST)]:
        clean = model.clean(ids, [site])
        model.replay(clean, {site: moved}, record=[Site(LAYERS - 1, POST)])
        assert traces(model.model) == before
        with model.patched({site: moved}):
            assert traces(model.model) != before
        assert traces(model.model) == before
    assert torch.equal(model.logits(ids), reference(family)[1])
    assert all(torch.equal(value, weights[name]) for name, value in model.model.state_dict().items())


class Failure(Exception):
    pass


def fails(value):
    raise Failure


@at_sites([Site(0, PRE), *(Site(2, part) for part in Part)], SOME_FAMILIES)
def test_nothing_is_left_after_a_patch_that_fails(family, site):
    model, ids = tiny(family), tokens()
    before = traces(model.model)
    clean = model.clean(ids, [site])
    with pytest.raises(Failure):
        model.replay(clean, {site: fails})
    with pytest.raises(Failure):
        model.replay(clean, {site: clean.activations[site], Site(LAYERS - 1, POST): fails, Site(3, MLP): moved})
    with pytest.raises(Failure), model.patched({site: fails, Site(LAYERS - 1, POST): moved}):
        model.logits(ids)
    assert traces(model.model) == before
    assert torch.equal(model.logits(ids), reference(family)[1])


def test_a_stopped_pass_does_not_disturb_the_models_own_recording():
    model, ids = tiny("llama"), tokens()
    expected = model.model(input_ids=ids, output_hidden_states=True).hidden_states
    model.model.config.output_hidden_states = True
    try:
        recorded = model.clean(ids, [Site(1, PRE)])
    finally:
        model.model.config.output_hidden_states = False
    assert torch.equal(recorded.activations[Site(1, PRE)], expected[1])
    assert model.model(input_ids=ids).hidden_states is None
    again = model.model(input_ids=ids, output_hidden_states=True).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


@pytest.mark.parametrize("site", [Site(2, part) for part in Part], ids=str)
def test_a_forward_that_others_put_on_a_module_stays(site):
    """As accelerate does to move weights between devices."""
    hugging = build("llama")
    for layer in range(LAYERS):
        for module in (block("llama", hugging, layer), block("llama", hugging, layer).self_attn):
            module.forward = module.forward
    model, ids = LanguageModel(hugging), tokens()
    before = traces(hugging)
    model.replay(model.clean(ids, [site]), {site: moved})
    assert traces(hugging) == before


# Refusals


def test_an_unknown_site_is_an_error_that_lists_the_sites():
    model = tiny("gpt2")
    for layer in (LAYERS, 999999):
        with pytest.raises(SiteError, match=rf"gpt2 has no site blocks\.{layer}\.hook_mlp_out") as error:
            model.site(f"blocks.{layer}.hook_mlp_out")
        assert all(part.value in str(error.value) for part in Part)
        assert f"blocks.0 to blocks.{LAYERS - 1}" in str(error.value)
        assert "endwise sites gpt2" in str(error.value)
    with pytest.raises(SiteError, match="Did you mean hook_resid_pre"):
        model.site("blocks.1.resid_pre")
    assert model.site("blocks.1.hook_resid_pre") == model.site(Site(1, PRE)) == Site(1, PRE)


@pytest.mark.parametrize("family", [family for family in FAMILIES if FAMILIES[family].middle is None])
def test_a_parallel_block_has_no_stream_between_its_parts_and_says_so(family):
    with pytest.raises(SiteError, match=r"no site blocks\.1\.hook_resid_mid: its blocks are parallel: .* It has"):
        tiny(family).clean(tokens(), [Site(1, MIDDLE)])


def test_a_block_whose_result_takes_more_than_its_parts_is_not_divided():
    """Its attention leaves something behind for the end, besides what it adds."""

    class Leaving(UnknownBlock):
        def forward(self, hidden):
            added = self.self_attention(hidden)
            middle = hidden + added
            return middle + self.feed_forward(middle + hidden)

    hugging = unknown(nn.ModuleList(Leaving() for _ in range(3)), num_hidden_layers=3)
    model = LanguageModel(hugging, name="mine")
    with pytest.raises(SiteError, match=r"no site blocks\.1\.hook_resid_mid: a block that is run in two halves"):
        model.site(Site(1, MIDDLE))
    assert Site(1, MLP_IN) in model.sites()


def test_every_door_checks_the_site():
    model, ids, absent = tiny("gpt2"), tokens(), Site(LAYERS, PRE)
    clean = model.clean(ids, [Site(0, PRE)])
    calls = [
        lambda: model.clean(ids, [absent]),
        lambda: model.replay(clean, {absent: moved}),
        lambda: model.replay(clean, {Site(0, PRE): moved, absent: moved}),
        lambda: model.replay(clean, {Site(0, PRE): moved}, record=[absent]),
        lambda: model.patched({absent: moved}).__enter__(),
        lambda: model.width(absent),
    ]
    before = traces(model.model)
    for call in calls:
        with pytest.raises(SiteError):
            call()
    assert traces(model.model) == before


def test_a_replay_from_a_site_that_was_not_recorded_is_an_error_that_says_so():
    model, ids = tiny("gpt2"), tokens()
    for patch in (moved, torch.zeros(3, CONTEXT, WIDTH)):
        with pytest.raises(ModelError, match=r"blocks\.2\.hook_attn_out"):
            model.replay(model.clean(ids, [Site(1, PRE)]), {Site(2, ATTN): patch})


@pytest.mark.parametrize("record", [Site(0, POST), Site(2, PRE), Site(2, ATTN)], ids=str)
def test_a_replay_does_not_record_what_it_skips(record):
    model, ids, site = tiny("gpt2"), tokens(), Site(2, MLP)
    with pytest.raises(ModelError, match=re.escape(str(record))):
        model.replay(model.clean(ids, [site]), {site: moved}, record=[record])


@every_site
def test_a_replay_may_record_its_first_site(site):
    model, ids = tiny("gpt2"), tokens()
    patch = random_patch("gpt2", site)
    replayed = model.replay(model.clean(ids, [site]), {site: patch}, record=[site])
    assert torch.equal(replayed.activations[site], patch)


def test_a_model_without_an_unembedding_is_refused():
    with pytest.raises(ModelError, match="GPT2Model has no output embedding"):
        LanguageModel(hf.GPT2Model(hf.GPT2Config(**GPT_2_LIKE)))


class Doubled(hf.GPT2LMHeadModel):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


def test_a_model_whose_logits_are_not_its_unembedding_is_refused():
    model = Doubled(hf.GPT2Config(**GPT_2_LIKE))
    randomize(model)
    with pytest.raises(ModelError, match="logits are not the unembedding"):
        LanguageModel(model)


class Uncapped(hf.Gemma2ForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 3.0 * torch.atanh(output.logits / 3.0)
        return output


def test_a_soft_cap_that_the_model_does_not_apply_is_refused():
    model = Uncapped(FAMILIES["gemma2"].config())
    randomize(model)
    assert model.config.final_logit_softcapping == 3.0
    with pytest.raises(ModelError, match="logits are not the unembedding"):
        LanguageModel(model)


# Models that endwise does not know


class Part2(nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden):
        return torch.tanh(self.linear(hidden)).cumsum(1) / 4


class UnknownBlock(nn.Module):
    def __init__(self, attention="self_attention", mlp="feed_forward", scale=1.0):
        super().__init__()
        self.names, self.scale = (attention, mlp), scale
        for name in self.names:
            self.add_module(name, Part2(0))

    def forward(self, hidden):
        for name in self.names:
            hidden = hidden + self.scale * getattr(self, name)(hidden)
        return hidden


class UnknownConfig(hf.PretrainedConfig):
    model_type = "unknown-to-endwise"


class UnknownModel(hf.PreTrainedModel):
    config_class = UnknownConfig

    def __init__(self, config, stack):
        super().__init__(config)
        self.embed, self.stack = nn.Embedding(VOCAB, WIDTH), stack
        self.aside = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.head = nn.Linear(WIDTH, VOCAB)
        self.post_init()
        randomize(self)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, **_):
        hidden = self.embed(input_ids)
        for layer in self.stack:
            hidden = layer(hidden)
        return hf.modeling_outputs.CausalLMOutput(logits=self.head(hidden))


def unknown(stack, **config):
    return UnknownModel(UnknownConfig(**config), stack)


def test_an_unknown_model_is_read_by_structure():
    hugging = unknown(nn.ModuleList(UnknownBlock() for _ in range(3)), num_hidden_layers=3)
    model, ids = LanguageModel(hugging, name="mine"), tokens()
    assert model.sites() == [Site(layer, part) for layer in range(3) for part in Part if part is not Z]
    clean = model.clean(ids, [Site(1, MLP)])
    attention = {}
    handle = hugging.stack[1].self_attention.register_forward_hook(lambda *args: attention.update(value=args[2]))
    expected = model.logits(ids)
    handle.remove()
    assert torch.equal(clean.activations[Site(1, ATTN)], attention["value"])
    final = model.replay(clean, {Site(1, MLP): clean.activations[Site(1, MLP)]}).final
    assert torch.equal(model.readout.logits(final), expected)


@pytest.mark.parametrize("names", [{"attention": "mixer"}, {"mlp": "expert"}, {"scale": 0.5}], ids=str)
def test_branches_that_are_not_found_or_do_not_add_up_are_not_offered(names):
    hugging = unknown(nn.ModuleList(UnknownBlock(**names) for _ in range(3)), num_hidden_layers=3)
    model, ids = LanguageModel(hugging, name="mine"), tokens()
    assert model.sites() == [Site(layer, part) for layer in range(3) for part in (PRE, POST)]
    with pytest.raises(SiteError, match=r"each with hook_resid_post, hook_resid_pre\."):
        model.site("blocks.1.hook_attn_out")
    clean = model.clean(ids, [Site(1, POST)])
    final = model.replay(clean, {Site(1, POST): clean.activations[Site(1, POST)]}).final
    assert torch.equal(model.readout.logits(final), model.logits(ids))


def test_scaled_branches_and_scaled_logits():
    config = hf.GraniteConfig(**GROUPED, residual_multiplier=0.4, logits_scaling=3.0, embedding_multiplier=2.0)
    model, ids = LanguageModel(build(config)), tokens()
    assert {site.part for site in model.sites()} == {PRE, POST}
    logits = model.readout.logits(model.clean(ids, final=True).final)
    torch.testing.assert_close(logits, model.logits(ids), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("stack", "said"),
    [
        (nn.Sequential(UnknownBlock(), UnknownBlock(), UnknownBlock()), r"aside \(2\)"),
        (nn.ModuleList(UnknownBlock() for _ in range(4)), r"stack \(4\), aside \(2\)"),
    ],
)
def test_a_model_whose_blocks_are_not_found_is_refused(stack, said):
    with pytest.raises(ModelError, match=rf"UnknownModel has no list of 3 blocks .* module lists: {said}"):
        LanguageModel(unknown(stack, num_hidden_layers=3))


def test_blocks_of_several_kinds_offer_what_each_has():
    """As of a hybrid model: attention in some, a state space in others."""
    stack = nn.ModuleList([UnknownBlock(), UnknownBlock("mixer"), UnknownBlock()])
    stack[1].__class__ = type("OtherBlock", (UnknownBlock,), {})
    model, ids = LanguageModel(unknown(stack, num_hidden_layers=3), name="mine"), tokens()
    parts = [[site.part for site in model.sites() if site.layer == layer] for layer in range(3)]
    assert parts == [[part for part in Part if part is not Z], [PRE, POST], [part for part in Part if part is not Z]]
    clean = model.clean(ids, model.sites(), final=True)
    for site in model.sites():
        assert torch.equal(model.replay(clean, {site: clean.activations[site]}).final, clean.final)


def test_blocks_that_the_model_does_not_run_are_refused():
    hugging = unknown(nn.ModuleList(UnknownBlock() for _ in range(3)), num_hidden_layers=3)
    hugging.forward = lambda input_ids, **_: hf.modeling_outputs.CausalLMOutput(
        logits=hugging.head(hugging.embed(input_ids))
    )
    with pytest.raises(ModelError, match="does not go through its blocks"):
        LanguageModel(hugging)


# What a short pass at the start finds out

PER_LAYER = {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 4, "head_dim": 8}
SHARED = GROUPED | PER_LAYER | {"layer_types": ALTERNATING, "num_kv_shared_layers": 2, "sliding_window": WINDOW}


def test_a_stream_that_is_none_is_refused():
    """Gemma 3n's blocks pass on several streams at once."""
    config = hf.Gemma3nTextConfig(**SHARED, laurel_rank=4, activation_sparsity_pattern=[0.0] * LAYERS)
    with pytest.raises(ModelError, match=r"Gemma3nTextDecoderLayer\) pass on has the shape \[4, 1, 8, 16\]"):
        LanguageModel(build(config))


@torch.no_grad()
def test_sites_that_a_replay_cannot_enter_at_are_not_offered():
    """Gemma 4's later blocks read keys and values of earlier ones, which a replay would skip."""
    hugging = build(hf.Gemma4TextConfig(**SHARED, global_head_dim=8))
    model, ids = LanguageModel(hugging, name="gemma4"), tokens()
    usable = [Site(0, PRE), Site(LAYERS - 1, POST)]
    assert not model.unspliceable.keys() & set(model.sites())
    assert [site for site in model.sites() if site.part in (PRE, POST)] == usable
    for site in (Site(0, POST), Site(2, PRE)):
        with pytest.raises(SiteError, match=rf"cannot be spliced at {site.name}: .* the residual stream .*KeyError"):
            model.site(site)
        with pytest.raises(SiteError, match=r"blocks\.0\.hook_resid_pre"):
            model.replay(model.clean(ids, [site]), {site: moved})
    later = Site(2, PRE)
    for site in usable:
        clean = model.clean(ids, [site, later])  # what cannot be spliced at can be read
        patch = clean.activations[site] + noise_like(clean.activations[site])
        with spliced(model, {site: lambda _, patch=patch: patch}):
            expected = model.logits(ids)
        replayed = model.replay(clean, {site: patch}, record=[later] if site < later else [])
        assert torch.equal(model.readout.logits(replayed.final), expected)


class Noting(Part2):
    """Notes its result, or adds what was noted to what it reads."""

    def __init__(self, notes, reads):
        super().__init__(0)
        self.notes, self.reads = notes, reads

    def forward(self, hidden):
        if self.reads:
            return super().forward(hidden + self.notes[-1])
        self.notes.append(super().forward(hidden))
        return self.notes[-1]


@pytest.mark.parametrize(
    ("noting", "reading", "lost"),
    [
        ((1, "self_attention"), (1, "feed_forward"), [Site(1, part) for part in (ATTN, MIDDLE, MLP_IN)]),
        (
            (1, "feed_forward"),
            (2, "feed_forward"),
            [Site(1, part) for part in Part if part not in (PRE, Z)]
            + [Site(2, part) for part in Part if part not in (Z, MLP, POST)],
        ),
    ],
    ids=["in a block", "between blocks"],
)
def test_only_what_lies_between_what_shares_more_is_not_offered(noting, reading, lost):
    notes, stack = [], nn.ModuleList(UnknownBlock() for _ in range(4))
    for reads, (layer, name) in enumerate((noting, reading)):
        stack[layer].add_module(name, Noting(notes, bool(reads)))
    hugging = unknown(stack, num_hidden_layers=4)
    hugging.embed.register_forward_pre_hook(lambda *_: notes.clear())
    model = LanguageModel(hugging, name="noting")
    assert sorted(model.unspliceable) == lost
    assert {site.layer for site in model.sites()} == {0, 1, 2, 3}


LOOKING_AHEAD = {
    "bert": lambda: hf.BertConfig(**LLAMA_LIKE),
    "roberta": lambda: hf.RobertaConfig(**LLAMA_LIKE | {"pad_token_id": 1, "max_position_embeddings": CONTEXT + 2}),
    "electra": lambda: hf.ElectraConfig(**LLAMA_LIKE, embedding_size=WIDTH),
    "llama": lambda: hf.LlamaConfig(**LLAMA_LIKE, is_causal=False),
}


@pytest.mark.parametrize("family", LOOKING_AHEAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_looks_ahead_is_refused(family, dtype):
    with pytest.raises(ModelError, match=r"mine looks ahead: .* needs a causal model"):
        LanguageModel(build(LOOKING_AHEAD[family]()).to(dtype), name="mine")


@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
def test_an_encoder_that_is_made_a_decoder_is_taken(family):
    config = LOOKING_AHEAD[family]()
    config.is_decoder = True
    assert len(LanguageModel(build(config)).sites()) >= 2 * LAYERS


class PrefixBlock(nn.Module):
    """Sees the first tokens whole, and is causal after them: the last token changes nothing before it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden):
        return hidden + torch.tanh(self.linear(hidden[:, :4].mean(1, keepdim=True)))


def test_a_model_that_looks_ahead_within_a_prefix_is_refused():
    stack = nn.ModuleList(PrefixBlock() for _ in range(3))
    with pytest.raises(ModelError, match="before position 1 changes with the token at 1"):
        LanguageModel(unknown(stack, num_hidden_layers=3))


def test_lists_of_parts_are_no_blocks():
    """XLM keeps its attention, its norms and its MLPs in a list each."""
    config = hf.XLMConfig(vocab_size=VOCAB, emb_dim=WIDTH, n_layers=LAYERS, n_heads=4, causal=True)
    with pytest.raises(ModelError, match="modules that look like its blocks are not"):
        LanguageModel(build(config))


class BesideModel(UnknownModel):
    """Model that adds each block's output to its input outside the block, where no hook sees it."""

    def forward(self, input_ids, **_):
        hidden = self.embed(input_ids)
        for layer in self.stack:
            hidden = hidden + layer(hidden)
        return hf.modeling_outputs.CausalLMOutput(logits=self.head(hidden))


@pytest.mark.parametrize("layers", [1, 3])
def test_branches_are_no_blocks(layers):
    stack = nn.ModuleList(Part2(0) for _ in range(layers))
    with pytest.raises(ModelError, match="modules that look like its blocks are not"):
        LanguageModel(BesideModel(UnknownConfig(num_hidden_layers=layers), stack))


class LoopedModel(UnknownModel):
    def forward(self, input_ids, **_):
        hidden = self.embed(input_ids)
        for layer in (*self.stack, *self.stack):
            hidden = layer(hidden)
        return hf.modeling_outputs.CausalLMOutput(logits=self.head(hidden))


def test_blocks_that_run_twice_are_refused():
    stack = nn.ModuleList(UnknownBlock() for _ in range(3))
    with pytest.raises(ModelError, match=r"runs its blocks \(UnknownBlock\) 2 times"):
        LanguageModel(LoopedModel(UnknownConfig(num_hidden_layers=3), stack))


class MixingModel(UnknownModel):
    def forward(self, input_ids, **_):
        hidden = first = self.embed(input_ids)
        for layer in self.stack:
            hidden = layer(hidden + 0.1 * first)
        return hf.modeling_outputs.CausalLMOutput(logits=self.head(hidden))


def test_a_stream_that_is_changed_between_blocks_is_spliced_where_a_block_reads_it():
    stack = nn.ModuleList(UnknownBlock() for _ in range(3))
    model, ids = LanguageModel(MixingModel(UnknownConfig(num_hidden_layers=3), stack)), tokens()
    residual = [site for site in model.sites() if site.part in (PRE, POST)]
    assert residual == [Site(0, PRE), Site(1, PRE), Site(2, PRE), Site(2, POST)]
    with pytest.raises(SiteError, match=r"blocks\.1\.hook_resid_post: the model changes it before the next block"):
        model.site(Site(1, POST))
    clean = model.clean(ids, [Site(1, PRE)], final=True)
    assert torch.equal(model.replay(clean, {Site(1, PRE): clean.activations[Site(1, PRE)]}).final, clean.final)


# Modes


def test_a_model_is_frozen_and_its_dropout_off():
    hugging = build("gpt2").train()
    model, ids = LanguageModel(hugging), tokens()
    assert not hugging.training
    assert not any(parameter.requires_grad for parameter in hugging.parameters())
    assert torch.equal(model.logits(ids), model.logits(ids))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_bfloat16(family):
    hugging = build(family).to(torch.bfloat16)
    model, ids = LanguageModel(hugging), tokens()
    assert model.dtype == torch.bfloat16
    assert len(model.sites()) == 7 * LAYERS
    for site in (Site(0, PRE), *(Site(2, part) for part in (ATTN, MIDDLE, MLP_IN, MLP)), Site(LAYERS - 1, POST)):
        patch = (2 * noise_like(torch.empty(3, CONTEXT, WIDTH))).bfloat16()
        with torch.no_grad(), hooked(family, hugging, {site: lambda _, patch=patch: patch}):
            states = []
            head = hugging.get_output_embeddings()
            handle = head.register_forward_pre_hook(lambda _, args, states=states: states.append(args[0]))
            hugging(input_ids=ids, use_cache=False)
            handle.remove()
        replayed = model.replay(model.clean(ids, [site]), {site: patch})
        assert replayed.final.dtype == torch.bfloat16
        assert torch.equal(replayed.final, states[0])
    assert model.readout.logits(replayed.final).dtype == torch.float32
    with spliced(model, {Site(1, PRE): lambda value: value}):
        assert model.logits(ids).dtype in (torch.bfloat16, torch.float32)


def test_eager_attention_gives_the_same_promises():
    config = FAMILIES["gemma2"].config()
    hugging = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    randomize(hugging)
    model, ids, site = LanguageModel(hugging), tokens(), Site(2, MLP)
    patch = noise_like(torch.empty(3, CONTEXT, WIDTH))
    with torch.no_grad():
        expected = patched_logits("gemma2", hugging, ids, {site: lambda _: patch})
    assert torch.equal(model.readout.logits(model.replay(model.clean(ids, [site]), {site: patch}).final), expected)
