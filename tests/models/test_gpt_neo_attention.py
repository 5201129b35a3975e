"""GPT-Neo's fused attention against transformers' eager one and, in float64, against its definition."""

import copy
import inspect
import pickle
from functools import cache, partial

import pytest
import torch
import transformers as hf
from transformers.models.gpt_neo import modeling_gpt_neo

from endwise import LanguageModel, Site, load_model, spliced
from endwise.common.errors import ModelError
from endwise.models import gpt_neo_attention
from endwise.models.gpt_neo_attention import FusedSelfAttention, use_sdpa
from endwise.models.sites import Part
from tiny_models import (
    CONTEXT,
    FUSED,
    GPT_NEO,
    HEADS,
    LAYERS,
    VOCAB,
    WIDTH,
    assert_as_exact,
    build,
    patched_logits,
    relative,
    tokens,
    values_at,
)

EAGER = modeling_gpt_neo.GPTNeoSelfAttention
FAMILY = "gpt_neo"
LENGTH = 12
ALL_AT_ONCE = 10**6


def some(often, others):
    """Each kind of case, and others alike, which are slow."""
    return [*often, *(pytest.param(each, marks=pytest.mark.slow) for each in others)]


# Of nothing before, of some, of all but the first, and of all; in pieces and at once.
windows = pytest.mark.parametrize("window", some([1, 5, LENGTH - 1, LENGTH], [LENGTH + 1, 40]))
rows = pytest.mark.parametrize("at_once", some([3, 128], [4, ALL_AT_ONCE]))


def pair(at_once=FusedSelfAttention.cpu_rows, **changes):
    """The same model with eager and with fused attention, of so many queries in one call."""
    eager = build(hf.GPTNeoConfig(**(GPT_NEO | changes))).eval()
    fused = copy.deepcopy(eager)
    assert use_sdpa(fused)
    for module in attentions(fused):
        module.cpu_rows = at_once
    return eager, fused


def in_float64(eager):
    """The eager model with its scores in float64, too, which transformers computes in fp32 whatever the dtype."""

    def attend(module, query, key, value, attention_mask=None):
        length = key.shape[-2]
        visible = module.bias[:, :, length - query.shape[-2] : length, :length]
        scores = (query @ key.transpose(-1, -2)).masked_fill(~visible, torch.finfo(query.dtype).min)
        weights = (scores if attention_mask is None else scores + attention_mask).softmax(-1)
        return weights @ value, weights

    exact = copy.deepcopy(eager).double()
    for module in attentions(exact):
        module._attn = partial(attend, module)
    return exact


def attentions(model):
    return [block.attn.attention for block in model.transformer.h]


@pytest.fixture
def no_eager(monkeypatch):
    """The fused modules' way to the eager computation is blocked, so that a test of theirs cannot pass through it."""

    def never(*_args, **_kwargs):
        raise AssertionError("computed by the eager implementation")

    monkeypatch.setattr(FusedSelfAttention, "_attn", never, raising=False)


@pytest.fixture(autouse=True, scope="module")
def _checked():
    """Once, as it ships: before a test changes anything of what the check runs through."""
    assert gpt_neo_attention._agrees()


def by_definition(module, hidden, visible=None):
    """Causal, unscaled, windowed attention, one query at a time; `visible[batch key]` leaves out the padding."""
    batch, length, _ = hidden.shape
    split = (batch, length, module.num_heads, module.head_dim)
    q, k, v = (project(hidden).view(split) for project in (module.q_proj, module.k_proj, module.v_proj))
    window = module.config.window_size if module.attention_type == "local" else length
    rows = []
    for i in range(length):
        first = max(0, i - window + 1)
        scores = torch.einsum("bhd,bkhd->bhk", q[:, i], k[:, first : i + 1])
        if visible is not None:
            scores = scores.masked_fill(~visible[:, None, first : i + 1], -torch.inf)
        rows.append(torch.einsum("bhk,bkhd->bhd", scores.softmax(-1), v[:, first : i + 1]).flatten(1))
    return module.out_proj(torch.stack(rows, 1))


# The numbers


@windows
@rows
def test_the_logits_are_those_of_the_eager_implementation(window, at_once, no_eager):
    eager, fused = pair(at_once, window_size=window)
    ids = tokens(length=LENGTH)
    with torch.no_grad():
        expected, logits, truth = (m(ids, use_cache=False).logits for m in (eager, fused, in_float64(eager)))
    assert_as_exact(logits, expected, truth, FUSED)
    if window < LENGTH:  # a window that were left out would show
        _, wide = pair(window_size=LENGTH)
        with torch.no_grad():
            assert relative(wide(ids, use_cache=False).logits, expected) > 1e-3


@windows
@rows
@pytest.mark.parametrize("layer", [0, 1])
def test_one_layer_and_its_gradient_in_float64_are_the_definitions(window, at_once, layer, no_eager):
    module = attentions(pair(at_once, window_size=window)[1].double())[layer]
    assert module.attention_type == ("global", "local")[layer]
    generator = torch.Generator().manual_seed(4)
    hidden, back = (torch.randn(2, LENGTH, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    results = []
    for attend in (lambda x: module(x)[0], lambda x: by_definition(module, x)):
        leaf = hidden.clone().requires_grad_()
        output = attend(leaf)
        results.append((output, *torch.autograd.grad(output, leaf, back)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_a_long_sequence_with_the_rows_that_ship(no_eager):
    length = 2 * FusedSelfAttention.cpu_rows + 37
    eager, fused = pair(window_size=50, max_position_embeddings=length)
    ids, results = tokens(batch=2, length=length), []
    for model in (eager, fused, in_float64(eager)):
        embedded = model.transformer.wte(ids).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits
        results.append((logits, *torch.autograd.grad(logits.sin().sum(), embedded)))
    for theirs, ours, truth in zip(*results, strict=True):
        assert_as_exact(ours, theirs, truth, FUSED)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_it_is_as_exact_as_the_eager_implementation(dtype, no_eager):
    """Scores and softmax are in fp32 in both: with scores rounded to bf16 the error is some ten times as large."""
    eager, fused = (model.to(dtype) for model in pair())
    hidden = 2 * torch.randn(4, CONTEXT, WIDTH, generator=torch.Generator().manual_seed(5))
    for theirs, ours in zip(attentions(eager), attentions(fused), strict=True):
        truth = by_definition(copy.deepcopy(theirs).double(), hidden.to(dtype).double())
        with torch.no_grad():
            assert ours(hidden.to(dtype))[0].dtype == dtype
            assert_as_exact(ours(hidden.to(dtype))[0], theirs(hidden.to(dtype))[0], truth)


# Masks


def padded(side):
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    if side == "left":
        mask[1, :4] = mask[2, : LENGTH - 1] = 0
    elif side == "right":
        mask[1, -4:] = mask[2, 1:] = 0
    else:
        mask[1, 3:6] = mask[2, ::2] = 0
    return mask


@pytest.mark.parametrize("window", some([5, LENGTH], [1, LENGTH - 1, LENGTH + 1, 40]))
@pytest.mark.parametrize("at_once", [5, 128])
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_padding_is_not_seen(side, window, at_once, no_eager):
    mask, ids, results = padded(side), tokens(length=LENGTH), []
    real = mask.bool()
    eager, fused = pair(at_once, window_size=window)
    for model in (eager, fused, in_float64(eager)):
        embedded = model.transformer.wte(ids).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, attention_mask=mask, use_cache=False).logits
        assert logits.isfinite().all()
        results.append((logits[real], *torch.autograd.grad(logits[real].sin().sum(), embedded)))
    for theirs, ours, truth in zip(*results, strict=True):
        assert ours.isfinite().all()
        assert_as_exact(ours, theirs, truth, FUSED)


@pytest.mark.parametrize("at_once", [5, 128])
@pytest.mark.parametrize("side", ["left", "right", "holes"])
@pytest.mark.parametrize("layer", [0, 1])
def test_padding_in_float64_is_the_definitions(layer, side, at_once, no_eager):
    module = attentions(pair(at_once)[1].double())[layer]
    visible = padded(side).bool()
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    hidden = torch.randn(3, LENGTH, WIDTH, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    with torch.no_grad():
        ours = module(hidden, attention_mask=causal & visible[:, None, None])[0]
        expected = by_definition(module, hidden, visible)
    sees = expected.isfinite().all(-1)
    assert sees[visible].all()
    torch.testing.assert_close(ours[sees], expected[sees], rtol=1e-11, atol=1e-12)
    assert torch.equal(ours[~sees], module.out_proj.bias.expand_as(ours)[~sees])
    assert bool((~sees).any()) == (side != "right" or layer == 1)


def test_documents_that_the_positions_part_are_not_mixed(no_eager):
    eager, fused = pair()
    positions = torch.cat([torch.arange(7), torch.arange(LENGTH - 7)])[None]
    ids = tokens(length=LENGTH)
    with torch.no_grad():
        models = (eager, fused, in_float64(eager))
        expected, logits, truth = (m(ids, position_ids=positions, use_cache=False).logits for m in models)
        alone = fused(ids[:, 7:], use_cache=False).logits
    assert_as_exact(logits, expected, truth, FUSED)
    assert_as_exact(logits[:, 7:], alone, truth[:, 7:], FUSED)


def test_no_mask_is_kept_whatever_lengths_pass():
    _, fused = pair()
    before = [sorted(vars(module)) + sorted(dict(module.named_buffers())) for module in fused.modules()]
    sizes = [sum(value.numel() for value in module.buffers()) for module in fused.modules()]
    for length in range(1, CONTEXT + 1):
        fused(tokens(length=length), attention_mask=torch.ones(3, length), use_cache=False)
    assert [sorted(vars(module)) + sorted(dict(module.named_buffers())) for module in fused.modules()] == before
    assert [sum(value.numel() for value in module.buffers()) for module in fused.modules()] == sizes


# Caches


@pytest.mark.parametrize("window", some([5], [2, 40]))
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("side", [None, "left"])
def test_generation_gives_the_same_tokens(options, window, side, no_eager):
    prompt = tokens(length=7)
    mask = torch.ones_like(prompt)
    if side:
        mask[1, :3] = mask[2, :6] = 0
    steps = CONTEXT - 7
    options |= {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, "pad_token_id": 0}
    expected, ours = (model.generate(prompt, attention_mask=mask, **options) for model in pair(window_size=window))
    assert torch.equal(ours, expected)
    assert ours.shape == (3, CONTEXT)


@pytest.mark.parametrize("at_once", [2, 128])
@pytest.mark.parametrize("lengths", [[4, 8], [9, 1, 2], [1, 1, 10], [6, 3, 3]], ids=str)
def test_pieces_with_a_cache_are_the_whole_without(lengths, at_once, no_eager):
    eager, fused = pair(at_once)
    ids, cache = tokens(length=LENGTH), hf.DynamicCache()
    with torch.no_grad():
        parts = [fused(part, past_key_values=cache, use_cache=True).logits for part in ids.split(lengths, 1)]
        expected, truth = (model(ids, use_cache=False).logits for model in (eager, in_float64(eager)))
    assert_as_exact(torch.cat(parts, 1), expected, truth, FUSED)


def test_a_static_cache_gives_the_same_tokens():
    eager, fused = pair(window_size=CONTEXT)  # transformers' own attention mistakes a narrower window there
    prompt = tokens(length=7)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(prompt)
    expected = eager.generate(prompt, **options)
    assert torch.equal(fused.generate(prompt, cache_implementation="static", **options), expected)
    options |= {"output_attentions": True, "return_dict_in_generate": True}
    theirs, ours = (model.generate(prompt, cache_implementation="static", **options) for model in (eager, fused))
    assert torch.equal(ours.sequences, expected)
    for mine, its in zip(ours.attentions, theirs.attentions, strict=True):
        assert all(torch.equal(*layers) for layers in zip(mine, its, strict=True))


def test_generation_on_a_reconstruction():
    eager, fused = pair()
    prompt, results = tokens(length=7), []
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(prompt)
    for model in (eager, fused):
        with spliced(LanguageModel(model), {"blocks.1.hook_resid_pre": lambda x: 0.5 * x.flip(-1)}):
            results.append(model.generate(prompt, **options))
    assert torch.equal(*results)
    assert not torch.equal(results[0], eager.generate(prompt, **options))


# What is left to the eager implementation


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_attention_weights_are_the_eager_ones(side):
    eager, fused = pair()
    mask = padded(side) if side else None
    given = {"input_ids": tokens(length=LENGTH), "attention_mask": mask, "use_cache": False, "output_attentions": True}
    with torch.no_grad():
        theirs, ours = eager(**given), fused(**given)
    assert torch.equal(ours.logits, theirs.logits)
    assert len(ours.attentions) == LAYERS
    for mine, its in zip(ours.attentions, theirs.attentions, strict=True):
        assert mine.shape == (3, HEADS, LENGTH, LENGTH)
        assert torch.equal(mine, its)


def test_dropout_on_attention_weights_in_training_is_the_eager_one():
    eager, fused = pair(attention_dropout=0.5)
    ids, results = tokens(length=LENGTH), []
    for model in (eager.train(), fused.train()):
        torch.manual_seed(3)
        results.append(model(ids, use_cache=False).logits)
    assert torch.equal(*results)
    with torch.no_grad():
        assert relative(fused.eval()(ids, use_cache=False).logits, results[0]) > 0.01


def test_dropout_that_is_off_is_no_reason_to_fall_back(no_eager):
    eager, fused = pair(attention_dropout=0.5)
    ids = tokens(length=LENGTH)
    with torch.no_grad():
        expected, logits, truth = (m(ids, use_cache=False).logits for m in (eager, fused, in_float64(eager)))
    assert_as_exact(logits, expected, truth, FUSED)


def test_dropout_elsewhere_is_no_reason_to_fall_back(no_eager):
    eager, fused = pair(resid_dropout=0.5)
    ids, results = tokens(length=LENGTH), []
    for model, modules in ((eager.train(), EAGER), (fused.train(), FusedSelfAttention)):
        assert all(type(module) is modules for module in attentions(model))
        torch.manual_seed(3)
        results.append(model(ids, use_cache=False).logits)
    with torch.no_grad():
        rounding = relative(*(m.eval()(ids, use_cache=False).logits for m in (eager, in_float64(eager))))
    assert relative(*results) <= 2 * (1 + FUSED) * rounding  # dropout doubles what it leaves


def test_a_mask_to_be_added_is_added_as_the_eager_implementation_does():
    eager, fused = pair()
    bias = torch.randn(3, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(6))
    ids = tokens(length=LENGTH)
    with torch.no_grad():
        theirs, ours = (model(ids, attention_mask=bias, use_cache=False).logits for model in (eager, fused))
        assert torch.equal(ours, theirs)
        assert relative(eager(ids, use_cache=False).logits, theirs) > 0.01


# Where it is installed


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "gpt_neo"
    build(FAMILY).save_pretrained(folder)
    return str(folder)


def kinds(model):
    return {type(module) for module in attentions(model)}


@pytest.mark.parametrize("asked", [None, "sdpa"])
def test_a_loaded_model_has_it(saved, asked):
    model = load_model(saved, attention=asked).model
    assert kinds(model) == {FusedSelfAttention}
    assert model.config._attn_implementation == model.transformer.config._attn_implementation == "sdpa"


def test_eager_is_eager(saved):
    model = load_model(saved, attention="eager")
    assert kinds(model.model) == {EAGER}
    assert model.model.config._attn_implementation == "eager"


def test_a_model_that_is_handed_over_stays_as_it_is():
    hugging = build(FAMILY)
    LanguageModel(hugging)
    assert kinds(hugging) == {EAGER}


@pytest.fixture
def _agrees_again():
    """Transformers is compared once per process."""
    gpt_neo_attention._agrees.cache_clear()
    yield
    gpt_neo_attention._agrees.cache_clear()


@pytest.mark.usefixtures("_agrees_again")
def test_where_transformers_computes_otherwise_a_model_stays_eager(saved, monkeypatch):
    monkeypatch.setattr(EAGER, "_attn", scaled)
    assert kinds(load_model(saved).model) == {EAGER}
    with pytest.raises(ModelError, match="scaled_dot_product_attention"):
        load_model(saved, attention="sdpa")


def scaled(self, query, key, value, attention_mask=None, plain=EAGER._attn):
    return plain(self, query / 2, key, value, attention_mask)


def unmasked(self, query, key, value, attention_mask=None, plain=EAGER._attn):
    return plain(self, query, key, value, None)


def broken(self, *_args, **_kwargs):
    raise AttributeError("bias")


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (EAGER, "_attn", scaled),
        (EAGER, "_attn", unmasked),
        (FusedSelfAttention, "_split_heads", broken),
        (modeling_gpt_neo.GPTNeoModel, "forward", broken),
        (hf.GPTNeoForCausalLM, "__init__", broken),
    ],
)
def test_a_change_in_transformers_is_noticed(monkeypatch, owner, name, value):
    compute = gpt_neo_attention._agrees.__wrapped__
    assert compute()
    monkeypatch.setattr(owner, name, value, raising=False)
    assert not compute()


def test_a_narrower_window_in_transformers_is_noticed(monkeypatch):
    """The mask is the module's own; only the keys that are left out follow from what we take the window to be."""
    plain = gpt_neo_attention._Eager.__init__

    def wider(self, config, attention_type, layer_id=None):
        plain(self, config, "global", layer_id)
        self.attention_type = attention_type

    monkeypatch.setattr(gpt_neo_attention._Eager, "__init__", wider)
    monkeypatch.setattr(modeling_gpt_neo.GPTNeoPreTrainedModel, "_init_weights", lambda self, module: None)
    assert not gpt_neo_attention._agrees.__wrapped__()


def test_the_check_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    assert gpt_neo_attention._agrees.__wrapped__()
    assert torch.equal(torch.get_rng_state(), state)


def test_other_models_are_not_touched():
    for family in ("gpt2", "llama", "gptj"):
        model = build(family)
        implementation = model.config._attn_implementation
        assert not use_sdpa(model)
        assert model.config._attn_implementation == implementation


def test_a_module_that_somebody_changed_is_left_alone():
    replaced, subclassed, exchanged = build(FAMILY), build(FAMILY), build(FAMILY)
    attentions(replaced)[1].forward = attentions(replaced)[1].forward
    attentions(subclassed)[1].__class__ = type("Other", (EAGER,), {})
    exchanged.transformer.h[1].attn.attention = torch.nn.Identity()
    for model in (replaced, subclassed, exchanged):
        before = kinds(model)
        assert not use_sdpa(model)
        assert kinds(model) == before
        assert model.config._attn_implementation == "eager"


def test_it_is_this_instance_only_and_once():
    config = hf.GPTNeoConfig(**GPT_NEO)
    one, other = hf.GPTNeoForCausalLM(config), hf.GPTNeoForCausalLM(config)
    assert use_sdpa(one)
    assert kinds(one) == {FusedSelfAttention}
    assert kinds(other) == {EAGER}
    assert other.config._attn_implementation == "eager"
    own = one.config
    assert use_sdpa(one)
    assert one.config is own is one.transformer.config is attentions(one)[0].config
    assert use_sdpa(other)


def test_copies_and_files_of_such_a_model(tmp_path):
    _, fused = pair()
    ids = tokens()
    with torch.no_grad():
        expected = fused(ids, use_cache=False).logits
        for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            assert kinds(copied) == {FusedSelfAttention}
            assert torch.equal(copied(ids, use_cache=False).logits, expected)
        fused.save_pretrained(tmp_path)
        plain = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert kinds(plain) == {EAGER}
        logits, truth = (model(ids, use_cache=False).logits for model in (plain, in_float64(plain)))
    assert_as_exact(expected, logits, truth, FUSED)


def test_the_forward_takes_what_the_eager_one_takes():
    ours, theirs = (inspect.signature(kind.forward).parameters for kind in (FusedSelfAttention, EAGER))
    assert list(ours) == list(theirs)


# The replay of the tail


@cache
def spliceable():
    return LanguageModel(pair()[1])


@pytest.mark.parametrize("site", [Site(layer, part) for layer in range(LAYERS) for part in Part], ids=str)
def test_the_tail_gives_the_bits_of_a_full_pass(site):
    model, ids = spliceable(), tokens()
    clean = model.clean(ids, [site], final=True)
    assert torch.equal(clean.activations[site], values_at(FAMILY, model.model, ids, [site])[site])
    value = clean.activations[site] + torch.randn(3, CONTEXT, WIDTH, generator=torch.Generator().manual_seed(7))
    leaf = value.requires_grad_()
    expected = patched_logits(FAMILY, model.model, ids, {site: lambda _: leaf})
    logits = model.readout.logits(model.replay(clean, {site: leaf}).final)
    assert torch.equal(logits, expected)
    weights = torch.randn(3, CONTEXT, VOCAB, generator=torch.Generator().manual_seed(8))
    (ours,), (theirs,) = (torch.autograd.grad((output * weights).sum(), leaf) for output in (logits, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
