"""The ReLU dictionary's penalties: norms of free directions, powers that fall, warm-up; as rivals train with them."""

import json

import pytest
import torch
from torch.nn.functional import normalize

import endwise
from endwise.config.run import RunConfig
from endwise.dictionaries import ReluSAE, SparseLatents
from endwise.training.objectives import Objective, Sparsity
from endwise.training.sparsity import SparsitySchedule
from on_embedded import recipe
from rivals import batches, rival

ROWS = torch.ones(1, 16, dtype=torch.bool)
LINEAR = {"encoder.weight": ("W_enc", True), "encoder.bias": ("b_enc", False), "decoder.weight": ("W_dec", True)}
OURS = {"encoder": "W_enc", "decoder": "W_dec"}


def by_our_names(tensors):
    named = {"bias": ("b_dec", False), "decoder.bias": ("b_dec", False), "b_dec": ("b_dec", False), **LINEAR}
    found = {key: named.get(key, (key, False)) for key in tensors}
    return {name: tensors[key].T if turned else tensors[key] for key, (name, turned) in found.items()}


def of_rival(stored, norm):
    sae = ReluSAE(8, 24, unit_norm=norm == "unit", initialisation=None).train()
    sae.fill(by_our_names(stored.under("start")))
    return sae


def train(sae, stored, schedule, *, subtracts=True, clip=None):
    """Twenty steps as rivals take them: errors summed over the width; rows of norm 1 after each if ours are so."""
    settings = stored.settings
    adam = torch.optim.Adam(sae.parameters(), lr=settings["learning_rate"], betas=settings["betas"])
    used = []
    for step, x in enumerate(batches()[:, None]):
        adam.zero_grad()
        term = schedule.term(step)
        seen = x - sae.b_dec if subtracts else x
        latents = sae.encode(seen)
        schedule.see(step, latents, ROWS)
        out = sae.reconstruct(latents, seen)
        penalty = term.coefficient * 8 * term.total(x, out, latents, ROWS) / 16  # ours is divided by the width
        ((out - x).square().sum(-1).mean() + penalty).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(sae.parameters(), clip)
        adam.step()
        used.append((term.p, term.coefficient * float(term.scale)))
        schedule.after_step(step, {}, 1.0, torch.tensor(True))
        if sae.unit_norm:
            with torch.no_grad():
                sae.decoder.copy_(normalize(sae.decoder, dim=-1))
    return used


def close_after(sae, stored, tolerance=2e-4):
    for key, expected in by_our_names(stored.under("after_20")).items():
        own = dict(sae.named_parameters())[{ours: name for name, ours in OURS.items()}.get(key, key)].detach()
        torch.testing.assert_close(own.T if key == "W_enc" else own, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["dense", "sparse"])
@pytest.mark.parametrize(("name", "subtracts"), [("standard", True), ("standard_no_b_dec", False)])
def test_decoder_norms_count_as_sae_lens_counts_them(name, subtracts, share):
    stored = rival(f"sae_lens/{name}")
    sae, c = of_rival(stored, "free"), stored.settings["config"]["l1_coefficient"]
    sae.sparse_below = share
    x = stored.tensors["x"][None]
    latents = sae.encode(x - sae.b_dec if subtracts else x)
    assert isinstance(latents, SparseLatents) == (share == 1.0)
    penalty = c * latents.penalty(1.0, ROWS).mean()
    torch.testing.assert_close(penalty.detach(), stored.under("loss")["l1_loss"], rtol=1e-5, atol=1e-5)
    schedule = SparsitySchedule(Sparsity(c), [1.0], [0])
    train(sae, stored, schedule, subtracts=subtracts, clip=stored.settings["clip_grad_norm"])
    close_after(sae, stored)


def test_decoder_norms_count_as_dictionary_learning_counts_them():
    stored = rival("dictionary_learning/standard_april")
    sae, c = of_rival(stored, "free"), stored.settings["settings"]["l1_penalty"]
    subtracts = "bias" in stored.under("start")
    train(sae, stored, SparsitySchedule(Sparsity(c), [1.0], [0]), subtracts=subtracts, clip=1.0)
    close_after(sae, stored)


@pytest.mark.parametrize(("name", "warm"), [("standard", 0), ("standard_warm", 10)])
def test_a_warm_coefficient_is_dictionary_learnings(name, warm):
    stored = rival(f"dictionary_learning/{name}")
    sae, c = of_rival(stored, "unit"), stored.settings["settings"]["l1_penalty"]
    with torch.no_grad():
        sae.decoder.copy_(normalize(sae.decoder, dim=-1))
    used = train(sae, stored, SparsitySchedule(Sparsity(c), [1.0], [0], warm))
    assert [value for _, value in used] == pytest.approx([c * (min(1, i / warm) if warm else 1) for i in range(20)])
    close_after(sae, stored)


def test_falling_powers_are_dictionary_learnings():
    """p after steps 4, 8, 12 and 16 (counted from 0), and a coefficient that holds the mean penalty of three steps."""
    stored = rival("dictionary_learning/p_anneal_power")
    sae, c = of_rival(stored, "unit"), stored.settings["settings"]["initial_sparsity_penalty"]
    powers = [1.0, 1 - 0.8 / 3, 1 - 1.6 / 3, 0.2]
    used = train(sae, stored, SparsitySchedule(Sparsity(c), powers, [0, 9, 13, 17], window=3))
    torch.testing.assert_close(torch.tensor([p for p, _ in used]), stored.tensors["steps.p"].float())
    coefficients = torch.tensor([value for _, value in used])
    torch.testing.assert_close(coefficients, stored.tensors["steps.sparsity_coeff"].float(), rtol=1e-3, atol=1e-4)
    close_after(sae, stored, 1e-3)


def test_powers_fall_when_the_recipe_says():
    term = Sparsity(2.0, 1.0, warmup=0.1, p_end=0.5, p_steps=0.5, p_changes=5)
    schedule = SparsitySchedule.of(Objective.of([term]), 100, torch.device("cpu"))
    terms = [schedule.term(step) for step in range(100)]
    assert [each.p for each in terms[::10]] == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.5, 0.5, 0.5, 0.5])
    assert [each.coefficient for each in terms[:12]] == pytest.approx([0.2 * i for i in range(10)] + [2.0, 2.0])
    assert SparsitySchedule.of(Objective.of([Sparsity(2.0, 0.5)]), 100, torch.device("cpu")) is None


def test_no_change_of_p_moves_the_mean_penalty():
    sae, x = ReluSAE(8, 24, seed=0).train(), torch.randn(1, 16, 8)
    schedule = SparsitySchedule(Sparsity(1.0), [1.0, 0.6, 0.2], [0, 4, 8], window=2)
    totals = []
    for step in range(10):
        latents = sae.encode(x)
        schedule.see(step, latents, ROWS)
        totals.append(float(schedule.term(step).total(x, x, latents, ROWS).detach()))
        schedule.after_step(step, {}, 1.0, torch.tensor(True))
    assert totals == pytest.approx([totals[0]] * 10, rel=1e-5)


CHECKPOINTS = {"checkpoint_every": 5, "keep_checkpoints": 9}


def test_a_run_whose_penalty_changes_resumes_to_the_same_bits(tmp_path):
    model = endwise.load_model("embedded")
    config = RunConfig.build(recipe(tmp_path / "run", warmup=0.25, p_end=0.4, p_steps=0.9, p_changes=3))
    run = endwise.train(config, model=model, display=False)
    written = [(run.folder / name).read_bytes() for name in ("metrics.jsonl", "sae/sae_weights.safetensors")]
    lines = [json.loads(line) for line in written[0].splitlines()]
    for step, line in enumerate(lines):
        weight = 0.3 * min(1, step / 4)
        assert line["loss"] == pytest.approx(line["kl"] + weight * line["sparsity"], rel=1e-5)
    for step in (5, 10):  # in the middle of a window, and where p has changed
        endwise.train(config, model=model, resume=True, from_step=step, display=False)
        files = [(run.folder / name).read_bytes() for name in ("metrics.jsonl", "sae/sae_weights.safetensors")]
        assert files == written


def test_methods_that_differ_in_their_penalty_are_two():
    plain, falling = (RunConfig.build(recipe("x", **more)) for more in ({}, {"p_end": 0.2, "warmup": 0.1}))
    assert "p_end" not in plain.objective.method and falling.objective.method["p_end"] == 0.2
    assert "coefficient" not in falling.objective.method
