"""Site names: both ways, their order, and what is refused."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from endwise import Site
from endwise.common.errors import ModelError, SiteError
from endwise.models.sites import Part

ORDER = [
    "hook_resid_pre",
    "attn.hook_z",
    "hook_attn_out",
    "hook_resid_mid",
    "mlp_in",
    "hook_mlp_out",
    "hook_resid_post",
]
sites = st.builds(Site, st.integers(0, 999_999), st.sampled_from(Part))


@given(st.integers(0, 999_999), st.sampled_from(ORDER))
def test_a_name_is_read_and_written_alike(layer, part):
    name = f"blocks.{layer}.{part}"
    site = Site.parse(name)
    assert (site.layer, site.part.value) == (layer, part)
    assert site.name == str(site) == name
    assert Site.parse(name) == site
    assert len({site, Site.parse(name)}) == 1


@given(st.lists(sites, min_size=2, max_size=12), st.randoms(use_true_random=False))
def test_sites_sort_in_the_order_of_computation(drawn, shuffler):
    shuffled = drawn.copy()
    shuffler.shuffle(shuffled)
    in_order = [(site.layer, ORDER.index(site.part.value)) for site in sorted(shuffled)]
    assert in_order == sorted(in_order)
    assert sorted(drawn) == sorted(shuffled)
    first = min(drawn)
    assert not any(site < first for site in drawn)


def test_order_within_and_between_blocks():
    expected = [f"blocks.{layer}.{part}" for layer in (1, 2, 10) for part in ORDER]
    shuffled = [Site.parse(name) for name in expected]
    random.Random(0).shuffle(shuffled)
    assert [site.name for site in sorted(shuffled)] == expected


@pytest.mark.parametrize(
    "name",
    [
        "",
        "blocks.1",
        "blocks.1.",
        "blocks.-1.hook_resid_pre",
        "blocks.one.hook_resid_pre",
        "blocks.1.0.hook_resid_pre",
        "blocks.1.hook_resid_pre.hook_scale",
        "blocks.1.hook_z",
        "blocks.1.attn",
        "blocks.1.attn.hook_z.0",
        "blocks.1.attn.mlp_in",
        "block.1.hook_resid_pre",
        "blocks[1].hook_resid_pre",
        " blocks.1.hook_resid_pre",
        "blocks.1.hook_resid_pre\n",
        "Blocks.1.hook_resid_pre",
        "blocks.9999999.hook_resid_pre",
        "hook_embed",
    ],
)
def test_other_names_are_refused_with_the_rule_and_the_name(name):
    with pytest.raises(SiteError, match=re.escape(repr(name))) as error:
        Site.parse(name)
    assert isinstance(error.value, ModelError)
    assert "blocks.<layer>." in str(error.value)
    assert all(part in str(error.value) for part in ORDER)


@pytest.mark.parametrize(
    ("given_name", "meant"),
    [
        ("blocks.1.resid_pre", "hook_resid_pre"),
        ("blocks.1.hook_resid_pst", "hook_resid_post"),
        ("blocks.1.mlp_out", "hook_mlp_out"),
        ("blocks.1.hook_atn_out", "hook_attn_out"),
        ("blocks.hook_mlp_out", "hook_mlp_out"),
        ("blocks.1.hook_z", "attn.hook_z"),
        ("blocks.1.resid_mid", "hook_resid_mid"),
    ],
)
def test_the_nearest_part_is_named(given_name, meant):
    with pytest.raises(SiteError, match=rf"Did you mean {meant}\?"):
        Site.parse(given_name)


@pytest.mark.parametrize("other", ["hook_mlp_in", "ln2.hook_normalized"])
def test_what_other_tools_call_the_mlps_input_is_not_taken_for_ours(other):
    with pytest.raises(SiteError, match=rf"'blocks\.3\.{re.escape(other)}' .* before the norm.* blocks\.3\.mlp_in is"):
        Site.parse(f"blocks.3.{other}")


def test_nothing_is_suggested_for_a_name_like_no_other():
    with pytest.raises(SiteError) as error:
        Site.parse("transformer.h.1")
    assert "Did you mean" not in str(error.value)


@given(st.text(max_size=40))
def test_any_text_is_a_site_or_a_site_error(text):
    try:
        site = Site.parse(text)
    except SiteError:
        return
    assert re.fullmatch(r"blocks\.\d+\.(attn\.)?\w+", text)
    assert int(text.split(".")[1]) == site.layer


@given(st.text(alphabet="0123456789٣५²", min_size=1, max_size=4))
def test_only_plain_digits_count_layers(digits):
    name = f"blocks.{digits}.hook_resid_pre"
    if digits.isascii() and str(int(digits)) == digits:
        assert Site.parse(name).name == name
    elif not digits.isascii():
        with pytest.raises(SiteError):
            Site.parse(name)
