"""The joint pass against one written by hand: hooks on the Hugging Face model in float64, and finite differences."""

import copy

import pytest
import torch

from endwise import LanguageModel, Site
from endwise.common.errors import ModelError
from endwise.dictionaries.relu import ReluSAE
from endwise.models.joint_pass import JointPass
from endwise.models.sites import Part, Place
from tiny_models import hooked, parts, tiny, tokens, width

PLACES = {
    "residual": ["blocks.0.hook_resid_pre", "blocks.2.hook_resid_pre", "blocks.3.hook_resid_post"],
    "within a block": ["blocks.1.hook_resid_pre", "blocks.1.attn.hook_z", "blocks.1.hook_attn_out", "blocks.1.mlp_in"],
    "all MLPs": [f"blocks.{layer}.mlp_in -> blocks.{layer}.hook_mlp_out" for layer in range(4)],
    "read where another writes": [
        "blocks.1.hook_resid_pre",
        "blocks.1.hook_resid_pre -> blocks.1.hook_mlp_out",
        "blocks.2.hook_attn_out",
    ],
    "the middle": ["blocks.1.hook_attn_out", "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"],
}
LATER = Site.parse("blocks.3.hook_mlp_out")


def places(name):
    return [Place.parse(each) for each in PLACES[name]]


def dictionaries(family, placed, dtype=torch.float64):
    """Far from the identity, so that each result depends on its input."""
    made = {}
    for seed, place in enumerate(placed):
        sae = ReluSAE(width(family, place.reads.part), 24, width(family, place.writes.part), seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in sae.parameters():
                parameter += 0.4 * torch.randn(parameter.shape, generator=generator)
        made[place] = sae.to(dtype)
    return made


def in_double(family):
    return LanguageModel(copy.deepcopy(tiny(family).model).double(), name=family)


def by_hand(family, model, ids, mask, made):
    """Logits and the value at `LATER` of a whole pass: hooks that keep what is read and replace what is written."""
    kept, acts, later = {}, {}, {}

    def chained(site, act):
        before = acts.get(site)
        acts[site] = act if before is None else lambda value: act(before(value))

    def keep(place):
        return lambda value: kept.__setitem__(place, value) or value

    def write(place):
        sae = made[place]

        def act(value):
            x = value if place.reads == place.writes else kept[place]
            latents = torch.relu(x @ sae.W_enc + sae.b_enc)
            return torch.where(mask[..., None], latents @ sae.W_dec + sae.b_dec, value)

        return act

    for place in made:  # first all that is written, so that who reads there is given the reconstruction
        chained(place.writes, write(place))
    for place in made:
        if place.reads != place.writes:
            chained(place.reads, keep(place))
    chained(LATER, lambda value: later.__setitem__("value", value) or value)
    last_first = sorted(acts, key=lambda site: site.part is Part.RESID_MID)  # its hook reads what the MLP's ends with
    with hooked(family, model.model, {site: acts[site] for site in last_first}):
        logits = model.model(input_ids=ids, use_cache=False).logits
    return logits, later["value"]


def loss_by_hand(family, model, ids, mask, made):
    """KL(clean ‖ spliced) summed over the mask's tokens, and half the squared norm of a later activation."""
    with torch.no_grad():
        clean = model.model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    logits, later = by_hand(family, model, ids, mask, made)
    kl = (clean.exp() * (clean - logits.log_softmax(-1))).sum(-1)
    return (kl + later.square().sum(-1) / 2).where(mask, 0.0).sum()


def ours(model, part):
    """The same loss of a part of a joint pass."""
    logits = part.spliced.final @ model.model.get_output_embeddings().weight.T
    clean = (part.clean.final @ model.model.get_output_embeddings().weight.T).log_softmax(-1)
    kl = (clean.exp() * (clean - logits.log_softmax(-1))).sum(-1)
    return (kl + part.spliced.activations[LATER].square().sum(-1) / 2).where(part.mask, 0.0).sum()


def some_masked(ids):
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, 0] = mask[1, 5:8] = mask[2, -1] = False
    return mask


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("family", ["gpt2", "gemma3", "pythia"])
def test_value_and_gradients_are_those_of_one_whole_pass(family, name):
    placed = places(name)
    if any(site.part not in parts(family) for place in placed for site in place.sites):
        pytest.skip("this family's blocks have no such site")
    model, ids = in_double(family), tokens()
    mask, made = some_masked(ids), dictionaries(family, placed)
    weights = [weight for sae in made.values() for weight in sae.parameters()]
    truth = loss_by_hand(family, model, ids, mask, made)
    expected = torch.autograd.grad(truth, weights, allow_unused=True, materialize_grads=True)
    clean = model.clean(ids, {site for place in placed for site in place.sites} | {LATER}, final=True)
    functions = {place: lambda x, _, sae=sae: sae(x) for place, sae in made.items()}
    total = []

    def loss(part):
        total.append(value := ours(model, part))
        return value

    joint = JointPass(model, functions, [LATER], microbatch=2)
    found = joint.gradients(clean, {}, mask, loss, weights)
    assert len(total) == 2  # three sequences, two at a time
    torch.testing.assert_close(sum(total), truth, rtol=1e-9, atol=0)
    assert any(gradient.abs().max() > 1e-3 for gradient in expected)
    for ours_, theirs in zip(found.parameters, expected, strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-6, atol=1e-9)


def test_a_value_at_the_first_site_and_functions_after_it_give_the_same():
    """The first reconstruction cut off from its graph: its gradient, led through the dictionary, is that of before."""
    family, placed = "gpt2", places("all MLPs")  # Llama's norms compute in float32
    model, ids = in_double(family), tokens()
    mask, made = some_masked(ids), dictionaries(family, placed)
    first, *later = placed
    clean = model.clean(ids, {site for place in placed for site in place.sites} | {LATER}, final=True)
    functions = {place: lambda x, _, sae=sae: sae(x) for place, sae in made.items()}
    weights = list(made[first].parameters())
    whole = JointPass(model, functions, [LATER]).gradients(clean, {}, mask, lambda part: ours(model, part), weights)
    value = made[first](clean.activations[first.reads])
    cut = JointPass(model, {place: functions[place] for place in later}, [LATER], microbatch=1)
    found = cut.gradients(clean, {first.writes: value}, mask, lambda part: ours(model, part))
    gradient = found.values[first.writes]
    assert (gradient[~mask] == 0).all() and (gradient[mask] != 0).any()
    for one, other in zip(torch.autograd.grad(value, weights, gradient), whole.parameters, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    for place in later:
        torch.testing.assert_close(found.at[place].value, whole.at[place].value)
        assert (found.at[place].value[~mask] == 0).all()


def test_gradients_are_the_differences_of_the_loss():
    """Differentiate a smooth function by the weights of a transcoder whose result four later ones read."""
    family, placed = "gpt2", places("all MLPs")  # Llama's norms compute in float32
    model, ids = in_double(family), tokens()
    mask = some_masked(ids)
    generator = torch.Generator().manual_seed(3)
    weights = {place: torch.randn(16, 16, generator=generator, dtype=torch.float64) / 4 for place in placed}
    clean = model.clean(ids, {site for place in placed for site in place.sites} | {LATER}, final=True)

    def loss(weight):
        used = weights | {placed[0]: weight}
        functions = {place: lambda x, _, w=w: torch.tanh(x @ w) for place, w in used.items()}
        joint = JointPass(model, functions, [LATER])
        return joint, joint.run(clean, {}, mask)

    weight = weights[placed[0]].clone().requires_grad_()
    joint, _ = loss(weight)
    (gradient,) = joint.gradients(clean, {}, mask, lambda part: ours(model, part), [weight]).parameters
    for number in range(3):
        direction = torch.randn(16, 16, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        step = 1e-5 * direction
        with torch.no_grad():
            ends = [ours(model, loss(weight + sign * step)[1]) for sign in (1, -1)]
        assert float((gradient * direction).sum()) == pytest.approx(float(ends[0] - ends[1]) / 2e-5, rel=1e-6)


def test_what_is_met_is_what_the_model_computes_with_the_earlier_ones_in_place():
    family, placed = "gpt2", places("all MLPs")
    model, ids = in_double(family), tokens()
    mask, made = some_masked(ids), dictionaries(family, placed)
    clean = model.clean(ids, {site for place in placed for site in place.sites}, final=True)
    functions = {place: lambda x, _, sae=sae: sae(x) for place, sae in made.items()}
    with torch.no_grad():
        part = JointPass(model, functions).run(clean, {}, mask)
        seen = {}
        first, second = placed[:2]
        keep = {
            first.writes: lambda value: torch.where(mask[..., None], made[first](part.at[first].read), value),
            second.reads: lambda value: seen.__setitem__("read", value),
            second.writes: lambda value: seen.__setitem__("found", value),
        }
        with hooked(family, model.model, keep):
            model.model(input_ids=ids, use_cache=False)
    torch.testing.assert_close(part.at[second].read, seen["read"])
    torch.testing.assert_close(part.at[second].found, seen["found"])
    assert torch.equal(part.at[first].read, clean.activations[first.reads])
    assert not torch.allclose(part.at[second].read, clean.activations[second.reads], atol=1e-2)


def test_two_reconstructions_at_one_site_are_refused():
    model, ids = tiny("gpt2"), tokens()
    place, other = Place.parse("blocks.1.hook_mlp_out"), Place.parse("blocks.1.mlp_in -> blocks.1.hook_mlp_out")
    clean, mask = model.clean(ids, place.sites), torch.ones_like(ids, dtype=torch.bool)
    with pytest.raises(ModelError, match=r"at one site"):
        JointPass(model, {place: lambda x, _: x, other: lambda x, _: x}).run(clean, {}, mask)
    with pytest.raises(ModelError, match=r"at one site \(blocks\.1\.hook_mlp_out\)"):
        JointPass(model, {place: lambda x, _: x}).run(clean, {place.writes: clean.activations[place.writes]}, mask)
