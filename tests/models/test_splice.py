"""`spliced`: the Hugging Face model itself, forward and generating, on reconstructions."""

import pytest
import torch

from endwise import LanguageModel, Site, spliced
from endwise.common.errors import EndwiseError, SiteError
from endwise.models.sites import Part
from tiny_models import (
    CONTEXT,
    FAMILIES,
    LAYERS,
    VOCAB,
    WIDTH,
    build,
    count_hooks,
    parts,
    patched_logits,
    sae,
    tiny,
    tokens,
)
from tiny_models import width as width_of

PRE, ATTN, POST = "blocks.1.hook_resid_pre", "blocks.2.hook_attn_out", "blocks.3.hook_resid_post"
SITES = [f"blocks.1.{part}" for part in Part] + ["blocks.0.hook_resid_pre", "blocks.3.hook_resid_post"]
OFTEN = ("gpt2", "mistral_sliding", "gemma2")
"""One of each kind of cache: of all positions, of a window, and of both by turns."""
some_families = pytest.mark.parametrize(
    "family", [*OFTEN, *(pytest.param(each, marks=pytest.mark.slow) for each in ("pythia", "llama", "gemma3"))]
)


def by_hand(dictionary):
    """The reconstruction by the field's names of the weights."""
    return lambda x: (x @ dictionary.W_enc + dictionary.b_enc).relu() @ dictionary.W_dec + dictionary.b_dec


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_forward_pass_is_that_of_a_model_patched_by_hand(family):
    model, ids = tiny(family), tokens()
    clean = model.logits(ids)
    for site in map(Site.parse, SITES):
        if site.part not in parts(family):
            continue
        dictionary = sae(width=width_of(family, site.part))
        expected = patched_logits(family, model.model, ids, {site: by_hand(dictionary)})
        with spliced(model, {site: dictionary}) as inside:
            assert inside is model
            logits = model.model(input_ids=ids).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(logits, clean, atol=1e-2)
    assert torch.equal(model.logits(ids), clean)


@torch.no_grad()
def test_several_sites_feed_each_other():
    model, ids = tiny("llama"), tokens()
    one, two = sae(1), sae(2)
    seen = {}
    with spliced(model, {Site.parse(POST): lambda x: seen.setdefault("late", x), PRE: one, ATTN: two}):
        logits = model.logits(ids)
    acts = {Site.parse(PRE): by_hand(one), Site.parse(ATTN): by_hand(two)}
    expected = patched_logits("llama", model.model, ids, acts)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    with spliced(model, {PRE: one, ATTN: two}):
        assert torch.equal(seen["late"], model.clean(ids, [Site.parse(POST)]).activations[Site.parse(POST)])


@torch.no_grad()
def test_nested_contexts_are_one_with_both_sites_and_end_one_by_one():
    model, ids = tiny("gpt2"), tokens()
    one, two = sae(1), sae(2)
    clean = model.logits(ids)
    with spliced(model, {PRE: one, ATTN: two}):
        both = model.logits(ids)
    with spliced(model, {PRE: one}):
        outer = model.logits(ids)
        with spliced(model, {ATTN: two}):
            assert torch.equal(model.logits(ids), both)
        assert torch.equal(model.logits(ids), outer)
    assert torch.equal(model.logits(ids), clean)
    assert not torch.allclose(outer, both, atol=1e-3)
    assert not torch.allclose(outer, clean, atol=1e-3)


def greedy(family, model, ids, acts, steps):
    """Generation without `generate` and without a cache: every step is a full pass."""
    for _ in range(steps):
        with torch.no_grad():
            logits = patched_logits(family, model, ids, acts)
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


@some_families
@pytest.mark.parametrize("site", [PRE, "blocks.0.hook_attn_out"])
def test_generation_runs_on_the_reconstruction_with_and_without_cache(family, site):
    model, prompt, dictionary = tiny(family), tokens(batch=2, length=9), sae()
    steps = CONTEXT - 9
    options = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, "pad_token_id": 0}
    options |= {"eos_token_id": VOCAB + 1, "attention_mask": torch.ones_like(prompt)}
    expected = greedy(family, model.model, prompt, {Site.parse(site): by_hand(dictionary)}, steps)
    plain = greedy(family, model.model, prompt, {}, steps)
    assert not torch.equal(expected, plain)
    widths = []
    with spliced(model, {site: lambda x: widths.append(x.shape[1]) or dictionary(x)}):
        for cache in (True, False):
            assert torch.equal(model.model.generate(prompt, use_cache=cache, **options), expected)
    assert widths == [9, *[1] * (steps - 1), *range(9, CONTEXT)]  # with a cache only new positions pass the SAE
    assert torch.equal(model.model.generate(prompt, **options), plain)


def test_the_splice_is_removed_also_after_an_exception():
    model, ids = tiny("gpt2"), tokens()
    before, clean = count_hooks(model.model), model.logits(ids)

    def failing(x):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), spliced(model, {PRE: sae(), ATTN: failing}):
        model.logits(ids)
    with spliced(model, {PRE: sae()}):
        assert count_hooks(model.model) != before
    with pytest.raises(KeyboardInterrupt), spliced(model, {PRE: sae()}):
        raise KeyboardInterrupt
    assert count_hooks(model.model) == before
    assert torch.equal(model.logits(ids), clean)


@pytest.mark.parametrize("name", ["blocks.1.hook_z", f"blocks.{LAYERS}.hook_resid_pre"])
def test_an_unknown_site_is_refused_before_anything_is_spliced(name):
    model = tiny("gpt2")
    before = count_hooks(model.model)
    with pytest.raises(SiteError, match=r"hook_resid_pre"), spliced(model, {PRE: sae(), name: sae()}):
        raise AssertionError("entered")
    assert count_hooks(model.model) == before


def test_an_sae_of_another_width_is_refused_with_both_widths():
    model, wide = tiny("gpt2"), sae(width=WIDTH + 4)
    before = count_hooks(model.model)
    with (
        pytest.raises(EndwiseError, match=rf"blocks\.1\.hook_resid_pre.*{WIDTH}.*{WIDTH + 4}"),
        spliced(model, {PRE: wide}),
    ):
        model.logits(tokens())
    assert count_hooks(model.model) == before


@torch.no_grad()
def test_a_bfloat16_model_runs_on_a_float32_sae():
    hugging = build("llama").to(torch.bfloat16)
    model, ids, dictionary = LanguageModel(hugging), tokens(), sae()
    by_float = by_hand(dictionary)
    expected = patched_logits("llama", hugging, ids, {Site.parse(PRE): lambda x: by_float(x.float()).bfloat16()})
    with spliced(model, {PRE: dictionary}):
        logits = model.logits(ids)
    torch.testing.assert_close(logits.float(), expected.float(), rtol=3e-2, atol=3e-2 * float(expected.abs().max()))
