"""JumpReLU against its formulas in float64, against what rivals computed, and through whole runs."""

import json

import pytest
import torch
from torch.nn.functional import normalize

import endwise
from endwise import SAE
from endwise.common.errors import ConfigError
from endwise.common.processes import ALONE
from endwise.config.dictionary import ARCHITECTURES
from endwise.config.method import COEFFICIENT, Knob, Method
from endwise.config.run import RunConfig
from endwise.dictionaries import JumpReLUSAE, SparseLatents, TrainingPass
from endwise.dictionaries.jumprelu import JumpReLUConfig
from meeting import Meeting, of_process
from rivals import batches, rival, rivals

D, F = 12, 90
TARGETS = {"quadratic": 6.0}
PENALTIES = ("l0", "quadratic", "tanh", "tanh_quadratic")
MASK = torch.rand(3, 20, generator=torch.Generator().manual_seed(2)) < 0.7


def settings(penalty="l0", **more):
    return JumpReLUConfig(size=F, penalty=penalty, target_l0=TARGETS.get(penalty), bandwidth=0.6, **more)


def dictionary(config, share=0.0):
    """With some features at their thresholds, and thresholds of many heights."""
    sae = JumpReLUSAE.build(config, D, seed=1).double().train()
    with torch.no_grad():
        sae.b_enc -= 0.2
        sae.b_enc[4] = -100.0
        sae.threshold.copy_(torch.linspace(0, 1.2, F))
        sae.decoder *= torch.linspace(0.1, 3.0, F)[:, None]
    sae.sparse_below = share
    return sae


def by_formula(sae, x, weight=0.7):
    """Loss and gradients of Σ ‖2x − x̂‖² + λ·penalty over the counted rows, every derivative written out."""
    c, both = sae.config, sae.config.straight_through == "both"
    W, b, theta, raw = (each.detach() for each in (sae.encoder, sae.b_enc, sae.threshold, sae.decoder))
    eps = c.bandwidth * float(sae.unit)
    length = raw.norm(dim=1) if sae.unit_norm else torch.ones(F, dtype=raw.dtype)
    direction = raw / length[:, None]
    norms = direction.norm(dim=1)
    rows, counted = x.reshape(-1, D), MASK.flatten()[:, None].double()
    z = rows @ W.T + b
    H = (z > theta).double()
    near = ((z - theta).abs() < eps / 2).double() / eps
    f = z * H
    error = (f @ direction + sae.b_dec.detach() - 2 * rows) * counted
    g_f, g_H, g_norm = 2 * error @ direction.T, torch.zeros_like(z), torch.zeros(F, dtype=z.dtype)
    if c.penalty in PENALTIES[:2]:
        count = H.sum(1, keepdim=True)
        value, slope = count, torch.ones_like(count)
        if c.penalty == "quadratic":
            value, slope = 2 / c.target_l0 * (count - c.target_l0) ** 2, 4 / c.target_l0 * (count - c.target_l0)
        g_H = weight * counted * slope.expand_as(z)
        penalty = (value * counted).sum()
    else:
        t = torch.tanh(c.tanh_scale * f * norms)
        outer = counted.expand_as(z)
        if c.penalty == "tanh":
            penalty = (t * counted).sum()
        else:
            p = (t * counted).sum(0) / counted.sum()
            penalty = counted.sum() * (p * (1 + p / c.rare)).sum()
            outer = counted * (1 + 2 * p / c.rare)
        slope = weight * outer * (1 - t**2) * c.tanh_scale
        g_f, g_norm = g_f + slope * norms, (slope * f).sum(0)
    through = (g_f * theta + g_H) * near
    d_z = g_f * H + (through if both else 0)
    d_direction = f.T @ (2 * error) + (0 if sae.unit_norm else g_norm[:, None] * direction / norms[:, None])
    if sae.unit_norm:  # less its part along the direction
        d_direction = (d_direction - (d_direction * direction).sum(1, keepdim=True) * direction) / length[:, None]
    gradients = {
        "encoder": d_z.T @ rows,
        "b_enc": d_z.sum(0),
        "threshold": -through.sum(0),
        "decoder": d_direction,
        "b_dec": 2 * error.sum(0),
    }
    return (error**2).sum() + weight * penalty, gradients


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["dense", "sparse"])
@pytest.mark.parametrize("norm", ["unit", "free"])
@pytest.mark.parametrize("through", ["threshold", "both"])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_straight_through_gradients_are_the_stated_ones(penalty, through, norm, share):
    sae = dictionary(settings(penalty, straight_through=through, decoder_norm=norm), share)
    x = torch.randn(3, 20, D, dtype=torch.float64)
    latents = sae.encode(x, MASK)
    assert isinstance(latents, SparseLatents) == (share == 1.0)
    out = sae.reconstruct(latents, x)
    loss = ((out - 2 * x).square().sum(-1) * MASK).sum() + 0.7 * latents.penalty(1.0, MASK).sum()
    loss.backward()
    expected, gradients = by_formula(sae, x)
    torch.testing.assert_close(loss.detach(), expected)
    torch.testing.assert_close({name: p.grad for name, p in sae.named_parameters()}, gradients)
    assert gradients["threshold"].abs().max() > 0 and 0 < float(latents.l0().mean()) < F / 2
    kept = latents.dense()
    assert torch.equal(latents.l0(), (kept != 0).sum(-1).float())
    assert torch.equal(latents.firings(MASK), (kept[MASK] != 0).sum(0))


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("share", [0.0, 1.0], ids=["dense", "sparse"])
def test_rows_that_do_not_count_change_nothing(penalty, share):
    sae = dictionary(settings(penalty), share)
    x = torch.randn(3, 20, D, dtype=torch.float64)

    def numbers(x):
        sae.zero_grad()
        penalty = sae.encode(x, MASK).penalty(1.0, MASK)
        assert not penalty[~MASK].any()
        penalty.sum().backward()
        return penalty.sum().detach(), sae.threshold.grad, sae.encoder.grad

    torch.testing.assert_close(numbers(x), numbers(x.where(MASK[..., None], 1e4 * torch.randn(3, 20, D).double())))


def test_nan_is_seen_and_zero_thresholds_are_relus():
    sae = dictionary(settings())
    with torch.no_grad():
        sae.threshold.zero_()
    x = torch.randn(5, D, dtype=torch.float64)
    for share in (0.0, 1.0):
        sae.sparse_below = share
        for training in (True, False):
            latents = sae.train(training).encode(x)
            torch.testing.assert_close(latents.dense(), torch.relu(sae.before(x)))
            assert sae.encode(x.index_fill(0, torch.tensor([2]), float("nan"))).dense()[2].isnan().any()


def test_training_and_inference_are_one_function():
    sae = dictionary(settings())
    x = torch.randn(3, 20, D, dtype=torch.float64)
    for share in (0.0, 1.0):
        sae.sparse_below = share
        torch.testing.assert_close(sae.train().encode(x).dense(), sae.eval().encode(x).dense())
        assert (sae.eval().encode(x).dense() != 0).sum() == sae.encode(x).l0().sum()


def test_bfloat16_products_count_and_sum_in_float32():
    sae = JumpReLUSAE.build(settings("tanh"), D, seed=1).train()
    x = torch.randn(300, D)
    exact = sae.encode(x)
    with torch.autocast("cpu", torch.bfloat16):
        rough = sae.encode(x)
    assert rough.dense().dtype == torch.bfloat16 and rough.penalty().dtype == torch.float32
    torch.testing.assert_close(rough.penalty(), exact.penalty(), rtol=0.05, atol=0.2)
    rough.penalty().sum().backward()
    assert sae.threshold.grad.dtype == torch.float32 and sae.threshold.grad.isfinite().all()


def test_thresholds_stay_at_or_above_0():
    sae = dictionary(settings())
    with torch.no_grad():
        sae.threshold -= 0.5
    sae.after_step()
    assert (float(sae.threshold.detach().min()), float(sae.threshold.detach().max())) == (0, pytest.approx(0.7))


def test_thresholds_and_bandwidth_scale_with_the_input():
    """Inputs (and biases) of a thousand times the size have a thousand times the thresholds: the same features fire."""
    x, found = torch.randn(500, D), []
    for scale in (1.0, 1000.0):
        sae = JumpReLUSAE.build(settings(threshold_init=0.5), D, seed=1).train()
        with torch.no_grad():
            sae.b_enc *= scale
            sae.see_first(x * scale, x * scale)
        latents = sae.encode(x * scale)
        latents.penalty().sum().backward()
        found.append(
            (float(sae.unit) / scale, latents.l0(), sae.threshold.detach() / scale, sae.threshold.grad * scale)
        )
    torch.testing.assert_close(found[0], found[1])
    z = sae.before(x * 1000.0).detach()
    assert float(sae.unit) == pytest.approx(float(z.square().mean().sqrt()), rel=1e-5)


@pytest.mark.parametrize("revives", ["dead", "all"])
@pytest.mark.parametrize("norm", ["unit", "free"])
def test_the_pre_activation_loss(revives, norm):
    sae = dictionary(settings(revive=0.1, revives=revives, decoder_norm=norm))
    x, dead = torch.randn(3, 20, D, dtype=torch.float64), torch.arange(F) % 3 == 0
    latents = sae.encode(x)
    own = sae.own_terms(TrainingPass(x, x, latents, x, MASK, dead))
    z, norms = sae.before(x).detach(), sae.W_dec.detach().norm(dim=1)
    each = torch.relu(sae.threshold.detach() - z) * norms * (dead if revives == "dead" else 1)
    assert sae.own_weights == {"pre_activation": 0.1}
    torch.testing.assert_close(own["pre_activation"].detach(), each[MASK].sum() / D)
    own["pre_activation"].backward()
    assert bool((sae.threshold.grad[~dead] != 0).any()) == (revives == "all")


RIVALS = [name for name in rivals("sae_lens") if "jumprelu" in name]


def of_sae_lens(stored):
    """Our dictionary with SAELens's weights and settings; its input is less `b_dec`, which the caller subtracts."""
    c = stored.settings["config"]
    mode = {"step": "l0"}.get(c["jumprelu_sparsity_loss_mode"], c["jumprelu_sparsity_loss_mode"])
    config = JumpReLUConfig(
        size=c["d_sae"],
        decoder_norm="free",
        penalty=mode,
        target_l0=c["target_l0"] if mode == "quadratic" else None,
        tanh_scale=c["jumprelu_tanh_scale"],
        bandwidth=c["jumprelu_bandwidth"],
        straight_through="both" if c["jumprelu_ste_to_input"] else "threshold",
        revive=c["pre_act_loss_coefficient"] or 0.0,
    )
    sae = JumpReLUSAE.build(config, c["d_in"], 0).train()
    sae.fill(stored.under("start"))
    return sae, c["l0_coefficient"]


def loss_of(sae, x, coefficient, dead):
    seen = x - sae.b_dec
    latents = sae.encode(seen)
    out = sae.reconstruct(latents, seen)
    rows = torch.ones(len(x), dtype=torch.bool)
    own = sae.own_terms(TrainingPass(seen, x, latents, out, rows, dead)).get("pre_activation", x.new_zeros(()))
    error, penalty = (out - x).square().sum(-1).mean(), coefficient * latents.penalty(1.0, rows).mean()
    return latents, out, error, penalty, sae.config.revive * own * sae.d_in / len(x)


NAMES = {"encoder": "W_enc", "decoder": "W_dec"}


def as_theirs(sae, tensors):
    return {NAMES.get(name, name): t.T if name == "encoder" else t for name, t in tensors.items()}


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["dense", "sparse"])
@pytest.mark.parametrize("name", RIVALS)
def test_sae_lens_computes_the_same(name, share):
    """Latents, outputs, each loss, and the gradient of their sum, without dead features and with some."""
    stored = rival(name)
    with_dead = [("dead.", stored.tensors["dead.mask"])] if "dead.mask" in stored.tensors else []
    for prefix, dead in [("", torch.zeros(24, dtype=torch.bool)), *with_dead]:
        sae, coefficient = of_sae_lens(stored)
        sae.sparse_below = share
        latents, out, error, penalty, revived = loss_of(sae, stored.tensors["x"], coefficient, dead)
        torch.testing.assert_close(latents.dense().detach(), stored.tensors["latents"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out.detach(), stored.tensors["out"], rtol=1e-5, atol=1e-5)
        theirs, none = stored.under(f"{prefix}loss"), torch.zeros(())  # a term of weight 0 is not there
        for ours, key in ((error, "mse_loss"), (penalty, "l0_loss"), (revived, "pre_act_loss")):
            torch.testing.assert_close(ours.detach(), theirs.get(key, none), rtol=1e-5, atol=1e-5)
        (error + penalty + revived).backward()
        gradients = as_theirs(sae, {name: p.grad for name, p in sae.named_parameters()})
        for key, gradient in stored.under(f"{prefix}grad").items():
            torch.testing.assert_close(gradients[key], gradient, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", RIVALS)
def test_twenty_steps_end_in_sae_lens_weights(name):
    stored = rival(name)
    sae, coefficient = of_sae_lens(stored)
    adam = torch.optim.Adam(sae.parameters(), lr=stored.settings["learning_rate"], betas=stored.settings["betas"])
    none = torch.zeros(24, dtype=torch.bool)
    for x in batches():
        adam.zero_grad()
        sum(loss_of(sae, x, coefficient, none)[2:]).backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), stored.settings["clip_grad_norm"])
        adam.step()
        sae.after_step()
    weights = as_theirs(sae, dict(sae.named_parameters()))
    for key, after in stored.under("after_20").items():
        after = after.clamp(min=0) if key == "threshold" else after  # theirs is clamped before the next pass
        torch.testing.assert_close(weights[key].detach(), after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["jumprelu", "trained_batchtopk", "trained_batchtopk_rescaled", "trained_matryoshka"])
def test_files_of_sae_lens_are_the_same_function(name, tmp_path):
    stored = rival(f"sae_lens/inference/{name}")
    sae = SAE.load(stored.folder)
    x = stored.tensors["inputs"]
    torch.testing.assert_close(sae.encode(x).dense(), stored.tensors["latents"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(x), stored.tensors["outputs"], rtol=1e-5, atol=1e-5)
    sae.save(tmp_path)
    torch.testing.assert_close(SAE.load(tmp_path)(x), sae(x), rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "cfg.json").read_text())["architecture"] == "jumprelu"


def test_dictionary_learning_infers_the_same():
    stored = rival("dictionary_learning/jumprelu")
    sae = JumpReLUSAE(8, 24, unit_norm=False, initialisation=None)
    sae.fill(stored.under("after_20"))
    x = stored.tensors["x"]
    torch.testing.assert_close(sae.eval().encode(x).dense().detach(), stored.tensors["infer.latents"])
    torch.testing.assert_close(sae(x).detach(), stored.tensors["infer.out"], rtol=1e-5, atol=1e-5)


def test_dictionary_learnings_error_moves_thresholds_the_same_way():
    """Its penalty does not: it takes the step function of f, not of z, and squares after the mean over the batch."""
    stored = rival("dictionary_learning/jumprelu")
    c = stored.settings["settings"]
    config = JumpReLUConfig(size=24, decoder_norm="free", bandwidth=c["bandwidth"])
    sae = JumpReLUSAE.build(config, 8, 0).train()
    sae.fill(stored.under("start"))
    x = stored.tensors["x"]
    (sae(x) - x).square().sum(-1).mean().backward()
    gradients = as_theirs(sae, {name: p.grad for name, p in sae.named_parameters()})
    for key, gradient in stored.under("grad_without_sparsity").items():
        torch.testing.assert_close(gradients[key], gradient, rtol=2e-5, atol=2e-5)


def test_taken_over_with_unit_norms_it_is_the_same_function():
    sae = dictionary(settings(decoder_norm="free")).float().eval()
    x = torch.randn(400, D)
    taken = JumpReLUSAE.continuing(sae, settings()).eval()
    torch.testing.assert_close(taken.W_dec.norm(dim=1).detach(), torch.ones(F))
    torch.testing.assert_close(taken(x), sae(x), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        taken.see_first(x, x)
    torch.testing.assert_close(taken(x), sae(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"penalty": "quadratic"}, "give target_l0"),
        ({"target_l0": 5.0}, "give target_l0"),
        ({"penalty": "l1"}, "penalty"),
        ({"bandwidth": 0.0}, "bandwidth"),
    ],
)
def test_settings_that_do_not_fit_are_refused(given, says):
    with pytest.raises(ConfigError, match=says):
        RunConfig.build(recipe("x", **given))


KINDS = {"local": {}, "e2e": {}, "e2e_ds": {"downstream_mse": 1.0}}


def recipe(out, kind="local", **dictionary):
    return {
        "site": "blocks.4.hook_resid_pre",
        "dictionary": {"architecture": "jumprelu", "size": 200, **dictionary},
        "objective": {"kind": kind, "sparsity": {"coefficient": 0.3}, **KINDS[kind]},
        "data": {"context": 32},
        "training": {"tokens": 1024, "batch": 4, "learning_rate": 1e-2, "log_every": 1, "checkpoint_every": 4},
        "evaluation": {"tokens": 512, "during_training_tokens": 128, "bootstrap": 20},
        "out": str(out),
    }


@pytest.fixture(scope="module")
def model():
    return endwise.load_model("embedded")


@pytest.mark.parametrize("kind", ["local", pytest.param("e2e", marks=pytest.mark.slow), "e2e_ds"])
def test_it_trains_resumes_and_is_measured(model, kind, tmp_path):
    config = RunConfig.build(recipe(tmp_path / "run", kind, penalty="tanh_quadratic", revive=0.01))
    run = endwise.train(config, model=model, display=False)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"] and {"sparsity", "pre_activation"} <= set(lines[0])
    weights = (run.folder / "sae" / "sae_weights.safetensors").read_bytes()
    endwise.train(config, model=model, resume=True, from_step=4, display=False)
    assert (run.folder / "sae" / "sae_weights.safetensors").read_bytes() == weights
    (found,) = endwise.evaluate(run.folder, model=model).values()
    sae = SAE.load(run.folder)
    assert isinstance(sae, ARCHITECTURES["jumprelu"]) and found["l0"] > 0
    x = torch.randn(50, sae.d_in)
    torch.testing.assert_close(sae(x), run.sae(x))
    torch.testing.assert_close(sae.W_dec, normalize(sae.W_dec, dim=-1))


def test_a_power_of_its_penalty_is_left_out():
    values = recipe("x")
    values["objective"]["sparsity"]["p"] = 0.5
    with pytest.warns(UserWarning, match=r"objective\.sparsity\.p and p_end are left out"):
        config = RunConfig.build(values)
    assert config == RunConfig.build(recipe("x"))


def test_a_target_is_the_knob_and_its_coefficient_a_part_of_the_method():
    given = {"penalty": "quadratic", "target_l0": 20.0}
    one, other = RunConfig.build(recipe("x", **given)), RunConfig.build(recipe("x", **given | {"target_l0": 40.0}))
    assert Knob.of(one) == Knob(20.0, "dictionary.target_l0", "target L0", sparser=False)
    assert Knob.of(one).set_in(one, 40.0).dictionary == other.dictionary
    assert Method.of(one).digest == Method.of(other).digest
    stronger = recipe("x", **given)
    stronger["objective"]["sparsity"]["coefficient"] = 0.9
    assert Method.of(RunConfig.build(stronger)).digest != Method.of(one).digest
    assert Knob.of(RunConfig.build(recipe("x"))).name == COEFFICIENT


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["dense", "sparse"])
@pytest.mark.parametrize("empty", [False, True])
def test_processes_have_one_mean_of_each_feature(share, empty):
    """Compare their sum with the penalty of all tokens, and its gradient."""
    x = torch.randn(3, 20, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x *= torch.tensor([1.0, 3.0, 0.3])[:, None, None]
    counted = MASK & (torch.arange(3) > 0)[:, None] if empty else MASK

    def penalty(own, world=ALONE):
        sae = dictionary(settings("tanh_quadratic", decoder_norm="free"), share)
        sae.join(world)
        assert sae.sums_as_it_learns
        total = sae.encode(x[own], counted[own]).penalty(1.0, counted[own]).sum()
        return total.detach(), *torch.autograd.grad(total, [sae.encoder, sae.b_enc, sae.decoder])

    found = Meeting(2).run(lambda world: penalty(of_process(world, 3), world))
    for expected, *parts in zip(penalty(slice(None)), *found, strict=True):
        torch.testing.assert_close(torch.stack(parts).sum(0), expected)
    assert not dictionary(settings("tanh")).sums_as_it_learns


def test_a_penalty_over_the_pass_refuses_several_passes_a_step():
    values = recipe("x", penalty="tanh_quadratic")
    values["training"]["accumulation"] = 2
    with pytest.raises(ConfigError, match=r"training\.accumulation"):
        RunConfig.build(values)
    values["dictionary"]["penalty"] = "tanh"
    assert RunConfig.build(values).training.accumulation == 2
