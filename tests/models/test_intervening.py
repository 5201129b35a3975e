"""`intervene`: features edited in whole passes and in generation, against plain hooks and slow definitions."""

import math
from dataclasses import replace

import pyarrow as pa
import pytest
import torch

from endwise import Ablate, Clamp, Keep, LanguageModel, ReluSAE, Site, Steer, intervene, spliced
from endwise.common.errors import ConfigError, ModelError, SiteError
from endwise.dictionaries import BatchTopKSAE, NormedSAE, TopKSAE
from endwise.dictionaries.selection import Annealed
from endwise.features.harvest.results import Harvest
from endwise.models.positions import Passes
from tiny_models import CONTEXT, VOCAB, WIDTH, build, count_hooks, hooked, sae, tiny, tokens

PRE, MID, OUT = "blocks.1.hook_resid_pre", "blocks.2.hook_resid_mid", "blocks.3.hook_mlp_out"
TRANSCODER = "blocks.2.mlp_in -> blocks.2.hook_mlp_out"
F = 3 * WIDTH
EDITS = [Steer(5, 2.5), Clamp([7, 8], 1.5), Ablate([5, 11]), Steer(9, -0.75)]


def edited(z, edits):
    """Feature by feature, in turn."""
    z = z.clone()
    for edit in edits:
        for feature in range(z.shape[-1]):
            named = feature in ([edit.feature] if isinstance(edit.feature, int) else edit.feature)
            if (isinstance(edit, Keep) and not named) or (isinstance(edit, Ablate) and named):
                z[..., feature] = 0
            elif isinstance(edit, Steer) and named:
                z[..., feature] += edit.by
            elif isinstance(edit, Clamp) and named:
                z[..., feature] = edit.to
    return z


def slowly(dictionary, edits, error, where):
    """Make the hook at the place of a dictionary, from the field's names of its weights."""

    def act(x, own=None):
        own = x if own is None else own
        z = (x @ dictionary.W_enc + dictionary.b_enc).relu()
        after = edited(z, edits)
        changed = own + (after - z) @ dictionary.W_dec
        if error == "drop":
            changed = after @ dictionary.W_dec + dictionary.b_dec
        return torch.where(where[: len(x), : x.shape[1], None], changed, own)

    return act


def padded(side, lengths=(9, 4, 6)):
    ids, mask = tokens(len(lengths), max(lengths)), torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, -length:] = 1
    return (ids, mask) if side == "left" else (ids, mask.flip(1))


@pytest.mark.parametrize("error", ["keep", "drop"])
@pytest.mark.parametrize(("family", "side"), [("llama", "left"), ("gpt2", "right"), ("gemma3", "left")])
@torch.no_grad()
def test_a_padded_batch_at_several_places_is_that_of_plain_hooks(family, side, error):
    model, (ids, mask), where = tiny(family), *[(p := padded(side)), p[1].bool()]
    pre, out, mlp = sae(1), sae(2), sae(3)
    at_mlp = [Keep([1, 2, 30], place=TRANSCODER)]
    own = {PRE: [replace(each, place=PRE) for each in EDITS], OUT: [Clamp(3, 4.0, place=Site.parse(OUT))]}
    seen = {}

    def read(x):
        seen["x"] = x

    acts = {Site.parse(place): slowly(d, own[place], error, where) for place, d in ((PRE, pre), (OUT, out))}
    transcode = slowly(mlp, at_mlp, error, where)
    acts |= {
        Site.parse("blocks.2.mlp_in"): read,
        Site.parse("blocks.2.hook_mlp_out"): lambda y: transcode(seen["x"], y),
    }
    with hooked(family, model.model, acts):
        expected = model.model(input_ids=ids, attention_mask=mask).logits
    saes = {OUT: out, TRANSCODER: mlp, PRE: pre}
    with intervene(model, saes, [*at_mlp, *own[PRE], *own[OUT]], error=error) as inside:
        assert inside is model
        found = model.model(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)
    clean = model.model(input_ids=ids, attention_mask=mask).logits
    assert not torch.allclose(found[mask.bool()], clean[mask.bool()], atol=1e-2)


@torch.no_grad()
def test_without_edits_it_is_the_model_itself_or_what_spliced_makes_of_it():
    model, ids, dictionary = tiny("llama"), tokens(), sae()
    clean, before = model.model(ids).logits, count_hooks(model.model)
    with intervene(model, {PRE: dictionary, MID: sae(1)}, []):
        assert torch.equal(model.model(ids).logits, clean)
        assert count_hooks(model.model) == before
    with spliced(model, {PRE: dictionary, MID: sae(1)}):
        expected = model.model(ids).logits
    with intervene(model, {PRE: dictionary, MID: sae(1)}, error="drop"):
        assert torch.equal(model.model(ids).logits, expected)
        assert "generate" in vars(model.model)
    assert torch.equal(model.model(ids).logits, clean)
    assert count_hooks(model.model) == before
    assert "generate" not in vars(model.model)


SCOPES = ["all", "prompt", "last", "generated", slice(-2, None), slice(1, -1), slice(2, 9, 3)]


def mask_of(positions, index, length):
    """Mask of a text's positions that are meant, one by one; its first `length` are the prompt."""
    if isinstance(positions, slice):
        start, stop = (
            (end + length if end is not None and end < 0 else end) for end in (positions.start, positions.stop)
        )
        return index in range(start or 0, 1000 if stop is None else stop, positions.step or 1)
    named = {"all": True, "prompt": index < length, "last": index == length - 1, "generated": index >= length}
    return named[positions]


def whole_pass(family, model, sequences, mask, lengths, dictionary, positions, error):
    """Logits of one pass over finished sequences with a plain hook, which knows where the prompts end."""
    where = torch.zeros_like(mask, dtype=torch.bool)
    for row, length in enumerate(lengths):
        for index, column in enumerate(mask[row].nonzero()[:, 0].tolist()):
            where[row, column] = mask_of(positions, index, length)
    with hooked(family, model, {Site.parse(PRE): slowly(dictionary, EDITS, error, where)}):
        positions_of = (mask.cumsum(1) - 1).clamp_min(0)
        return model(input_ids=sequences, attention_mask=mask, position_ids=positions_of).logits


OPTIONS = {"do_sample": False, "pad_token_id": 0, "eos_token_id": VOCAB + 1, "return_dict_in_generate": True}
OPTIONS |= {"output_logits": True, "max_new_tokens": 6, "min_new_tokens": 6}


def check_generation(family, positions, error="keep", **more):
    model, (prompt, mask), dictionary = tiny(family), padded("left"), sae(4)
    with torch.no_grad(), intervene(model, {PRE: dictionary}, EDITS, positions=positions, error=error):
        made = model.model.generate(prompt, attention_mask=mask, **OPTIONS, **more)
    whole = torch.cat([mask, torch.ones(len(mask), 6, dtype=torch.long)], 1)
    with torch.no_grad():
        expected = whole_pass(
            family, model.model, made.sequences, whole, mask.sum(1).tolist(), dictionary, positions, error
        )
    logits = torch.stack(list(made.logits), 1)
    torch.testing.assert_close(logits, expected[:, prompt.shape[1] - 1 : -1], rtol=1e-5, atol=1e-5)
    return made.sequences


@pytest.mark.parametrize("positions", SCOPES, ids=str)
def test_generation_with_a_cache_equals_whole_passes_wherever_a_text_is_changed(positions):
    with_cache = check_generation("llama", positions)
    without = check_generation("llama", positions, use_cache=False)
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("gpt2", {}),
        ("gemma3", {}),
        ("mistral_sliding", {}),
        ("llama", {"cache_implementation": "static"}),
        ("gemma3", {"cache_implementation": "static"}),
        ("llama", {"prefill_chunk_size": 4}),
    ],
    ids=str,
)
def test_other_caches_and_families_too(family, more):
    for positions, error in (("all", "drop"), (slice(-2, None), "keep")):
        check_generation(family, positions, error, **more)


@torch.no_grad()
def test_a_loop_of_ones_own_and_beams_are_continued_from_their_caches():
    model, dictionary, (prompt, mask) = tiny("llama"), sae(4), padded("left")
    edits = {"positions": "generated"}
    with intervene(model, {PRE: dictionary}, EDITS, **edits):
        expected = model.model.generate(prompt, attention_mask=mask, **OPTIONS).sequences
        beams = [
            model.model.generate(prompt, attention_mask=mask, **OPTIONS, num_beams=2, use_cache=cache).sequences
            for cache in (True, False)
        ]
        for _ in range(2):  # the second text begins where the first ended
            ids, whole, cache = prompt, mask, None
            for _ in range(6):
                new = ids if cache is None else ids[:, -1:]
                out = model.model(new, attention_mask=whole, past_key_values=cache, use_cache=True)
                ids, cache = torch.cat([ids, out.logits[:, -1:].argmax(-1)], 1), out.past_key_values
                whole = torch.cat([whole, torch.ones_like(whole[:, :1])], 1)
            assert torch.equal(ids, expected)
    assert torch.equal(*beams)
    assert not torch.equal(model.model.generate(prompt, attention_mask=mask, **OPTIONS).sequences, expected)


@torch.no_grad()
def test_what_is_not_changed_keeps_its_bits():
    """Padding, other positions, special tokens, outliers; and what an edit leaves as it is."""

    class Tokenizer:
        all_special_ids, added_tokens_decoder = (3, 4), {}

    model, (ids, mask), dictionary = LanguageModel(build("llama")), padded("right"), sae()
    model.tokenizer = Tokenizer()
    ids[:, 2] = 3
    seen = {}

    def pass_once(key):
        with spliced(model, {PRE: lambda x: seen.setdefault(key, x)}):
            model.model(ids, attention_mask=mask)
        return seen[key]

    own = pass_once("own")
    norms = own.norm(dim=-1)
    limit = float(norms[mask.bool()].median())
    dictionary.leave_out_above(limit)
    for key, edit in enumerate((Steer(5, 3.0), Ablate(5))):
        with intervene(model, {PRE: dictionary}, [edit], positions=slice(1, 7), skip_special_tokens=True):
            pass_once(key)
    where = mask.bool() & (torch.arange(9) >= 1) & (torch.arange(9) < 7) & ~torch.isin(ids, torch.tensor([3, 4]))
    where &= norms <= limit
    assert torch.equal((seen[0] != own).any(-1), where)
    active = (own @ dictionary.W_enc + dictionary.b_enc)[..., 5] > 0
    assert torch.equal((seen[1] != own).any(-1), where & active)
    assert (where & active).any()
    assert (where & ~active).any()
    refuse(ConfigError, r"has no tokenizer", [Ablate(1)], skip_special_tokens=True)


def read_at(dictionary, edits, x, error="keep"):
    """Return the value at the site, where the model has x there."""
    model, seen = tiny("llama"), []
    changing = intervene(model, {PRE: dictionary}, edits, error=error)
    keeping = spliced(model, {PRE: lambda value: seen.append(value) or value})
    with torch.no_grad(), spliced(model, {PRE: lambda _: x}), changing, keeping:
        model.model(tokens(2, 5))
    return seen[0]


def test_edits_come_after_the_selection_and_go_back_through_the_norm():
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(9))
    relu = sae(6)
    tensors = relu.export().tensors
    topk, batch = TopKSAE(WIDTH, F, k=Annealed(4.0)), BatchTopKSAE(WIDTH, F, k=Annealed(4.0))
    for each in (topk, batch):
        each.fill({**tensors, "threshold": torch.full((F,), 0.9)})
    batch.train()
    before = x @ tensors["W_enc"] + tensors["b_enc"]
    chosen = {topk: before >= before.topk(4).values[..., -1:], batch: before > 0.9}
    for dictionary, kept in chosen.items():
        z = before.relu() * kept
        expected = x + (edited(z, EDITS) - z) @ dictionary.W_dec
        torch.testing.assert_close(read_at(dictionary, EDITS, x), expected, rtol=1e-4, atol=1e-4)
    assert batch.training
    normed = NormedSAE(relu, "layer_norm")
    scale = x.std(-1, keepdim=True)
    z = ((x - x.mean(-1, keepdim=True)) / (scale + 1e-5) @ tensors["W_enc"] + tensors["b_enc"]).relu()
    expected = x + scale * ((edited(z, EDITS) - z) @ tensors["W_dec"])
    torch.testing.assert_close(read_at(normed, EDITS, x), expected, rtol=1e-4, atol=1e-4)


def harvest_of(greatest, folder):
    values = pa.array([None if each is None else float(each) for each in greatest], type=pa.float32())
    return Harvest(folder, {"d_sae": len(greatest), "tokens": 10}, pa.table({"max_active": values}))


def test_amounts_in_multiples_of_the_greatest_activation(tmp_path):
    x, dictionary = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(9)), sae(6)
    harvest = harvest_of([0.5, 2.0, None, *[1.0] * (F - 3)], tmp_path)
    relative = [Steer([0, 1], -1.5, relative_to=harvest), Clamp(1, 0.5, relative_to=harvest)]
    given = [Steer(0, -0.75), Steer(1, -3.0), Clamp(1, 1.0)]
    torch.testing.assert_close(read_at(dictionary, relative, x), read_at(dictionary, given, x))
    assert not torch.allclose(read_at(dictionary, given, x), x)
    for edit in (Steer(2, 1.0, relative_to=harvest), Clamp([1, 2], 1.0, relative_to=harvest)):
        refuse(ConfigError, r"feature 2 never fired.*give an activation", [edit])
    refuse(ConfigError, r"is of 3 features.*has 48", [Steer(1, 1.0, relative_to=harvest_of([1, 1, 1], tmp_path))])


def refuse(kind, message, edits=(), saes=None, **options):
    model = tiny("llama")
    before = count_hooks(model.model)
    with pytest.raises(kind, match=message), intervene(model, saes or {PRE: sae()}, edits, **options):
        raise AssertionError("entered")
    assert count_hooks(model.model) == before


def test_what_makes_no_sense_is_refused_before_any_pass():
    nan, silent = (ReluSAE(WIDTH, F, unit_norm=False).requires_grad_(False) for _ in range(2))
    silent.decoder[4], nan.decoder[4] = 0, math.nan
    for edit in (Steer, Clamp):
        for number in (math.nan, math.inf, -math.inf, True):
            refuse(ConfigError, r"takes a finite number", [edit(1, number)])
        for amount in (1e30, -1e200):
            refuse(ConfigError, r"feature 1 moves the model.*overflows", [edit(1, amount)])
        for dictionary in (silent, nan):
            refuse(ConfigError, r"direction of feature 4 has the length", [edit(4, 1.0)], {PRE: dictionary})
    for number in (F, -1, [0, F], 10**12):
        for edit in (Steer(number, 1.0), Clamp(number, 1.0), Ablate(number), Keep(number)):
            refuse(ConfigError, rf"there is no feature .* from 0 to {F - 1}", [edit])
    refuse(ConfigError, r"number of a feature", [Ablate([True])])
    both = {PRE: sae(), OUT: sae()}
    refuse(ConfigError, rf"does not say whose.*{PRE}, {OUT}", [Ablate(1)], both)
    refuse(ConfigError, r"without an SAE", [Ablate(1, place=MID)], both)
    refuse(SiteError, r"no site blocks\.9", [Ablate(1, place="blocks.9.hook_resid_pre")], both)
    refuse(SiteError, r"no site blocks\.9", [], {"blocks.9.hook_resid_pre": sae()})
    refuse(ModelError, rf"{WIDTH}.*{WIDTH + 4}", [Ablate(1)], {PRE: sae(width=WIDTH + 4)})
    for positions in (slice(0, 4, 0), slice(0, 4, -1), slice(0.5, None)):
        refuse(ConfigError, r"positions are all, prompt, last, generated, or a slice", [Ablate(1)], positions=positions)


@torch.no_grad()
def test_a_plain_hugging_face_model_in_bfloat16():
    hugging, ids, dictionary = build("llama").to(torch.bfloat16), tokens(), sae()
    clean = hugging(ids).logits
    with intervene(hugging, {PRE: dictionary}) as inside:
        assert inside.model is hugging
        assert torch.equal(hugging(ids).logits, clean)
    act = slowly(dictionary, EDITS, "keep", torch.ones(3, CONTEXT, dtype=torch.bool))
    with hooked("llama", hugging, {Site.parse(PRE): lambda x: act(x.float()).bfloat16()}):
        expected = hugging(ids).logits
    with intervene(hugging, {PRE: dictionary}, EDITS):
        found = hugging(ids).logits
    torch.testing.assert_close(found.float(), expected.float(), rtol=3e-2, atol=3e-2 * float(expected.abs().max()))


def test_gradients_flow_through_edits():
    """To the model's input embeddings: at a steered position as at any other."""
    model, dictionary, ids = tiny("llama"), sae(), tokens(1, 6)
    embedded = model.model.get_input_embeddings()(ids).detach()

    def loss(x):
        with intervene(model, {PRE: dictionary}, [Steer(5, 2.0)], positions=slice(2, 4)):
            return model.model(inputs_embeds=x).logits[0, -1].square().sum()

    leaf = embedded.clone().requires_grad_()
    loss(leaf).backward()
    step = 1e-2 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        difference = float(loss(embedded + step) - loss(embedded - step)) / 2
    assert float((leaf.grad * step).sum()) == pytest.approx(difference, rel=5e-2)


class Body(torch.nn.Module):
    """Takes a cache by a name that nobody knows."""

    def forward(self, input_ids, attention_mask=None, memory=None):
        return input_ids


def test_a_cache_is_found_whatever_its_name():
    class Cache:
        def get_seq_length(self):
            return 3

    body, mask = Body(), torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    with Passes(body).followed() as passes:
        body(torch.zeros(2, 1, dtype=torch.long), attention_mask=mask, memory=Cache())
        assert passes.now.index.tolist() == [[3], [2]]
        for shape in ((2, 4), (2, 1, 1, 4)):  # of a cache that is not seen
            with pytest.raises(ModelError, match="attention mask"):
                body(torch.zeros(2, 1, dtype=torch.long), attention_mask=torch.ones(shape))
