"""Dead features: terms against definitions in float64 and rivals; which features are dead."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from endwise import RunConfig, train
from endwise.common.errors import ConfigError
from endwise.config.dictionary import ARCHITECTURES
from endwise.dictionaries import DenseLatents, LinearSAE, ReluSAE, TokenLosses, TrainingPass
from endwise.dictionaries.linear import LinearConfig
from endwise.dictionaries.normed import NormedSAE
from endwise.runs.folder import RunFolder
from endwise.training.fitting import losses_of
from endwise.training.making import new_trainee
from endwise.training.step import clean_passes, take_step
from endwise.training.trainee import Trainee
from meeting import Meeting, of_process
from own_training import train_with
from rivals import rival
from small_gpt2 import CONTEXT, recipe

D, F = 8, 24
MASK = torch.rand(3, 10, generator=torch.Generator().manual_seed(1)) < 0.8
DEAD = torch.arange(F) % 3 == 1


def dictionary(norm="unit", **settings):
    config = LinearConfig(size=F, decoder_norm=norm, initialisation="transposed", **settings)
    sae = ReluSAE.build(config, D, 3).double()
    with torch.no_grad():
        sae.b_enc.normal_(generator=torch.Generator().manual_seed(5))
        sae.decoder *= torch.linspace(0.5, 2, F)[:, None]
    return sae


def a_pass(sae, gradient=None):
    x = torch.randn(3, 10, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    latents = sae.encode(x)
    return TrainingPass(x, x, latents, sae.decode(latents), MASK, DEAD, gradient)


def gradient_at_site():
    given = torch.randn(3, 10, D, dtype=torch.float64, generator=torch.Generator().manual_seed(7)) * 1e-9
    given[0, :4] = 0.0
    return given


def slowly(sae, seen, target_of, k, negative):
    """Row by row, feature by feature: Σ ‖t − Σ ẑ·d‖² ÷ (Σ ‖t − mean t‖² / rows), over rows that have a target."""
    directions = normalize(sae.decoder, dim=-1) if sae.unit_norm else sae.decoder
    targets, errors = [], []
    for place in MASK.nonzero().tolist():
        x, estimate = seen.x[tuple(place)], seen.reconstruction[tuple(place)].detach()
        target = target_of(x - estimate, None if seen.gradient is None else seen.gradient[tuple(place)])
        if target is None:
            continue
        z = {i: sae.encoder[i] @ x + sae.b_enc[i] for i in DEAD.nonzero()[:, 0].tolist()}
        predicted = torch.zeros(D, dtype=torch.float64)
        for i in sorted(z, key=lambda i: -float(z[i].detach()))[:k]:
            if negative or z[i] > 0:
                predicted = predicted + z[i] * directions[i]
        targets.append(target)
        errors.append((target - predicted).square().sum())
    t = torch.stack(targets)
    return torch.stack(errors).sum() / ((t - t.mean(0)).square().sum() / len(t))


def residual(error, gradient):
    return error


def asked_by_gradient(error, gradient):
    if not gradient.any():
        return None
    down = -gradient / gradient.norm()
    return (error @ down).clamp_min(0.0) * down


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("gradient", [None, gradient_at_site()], ids=["residual", "gradient"])
@pytest.mark.parametrize("empty", [False, True])
def test_processes_divide_by_the_variance_of_all(processes, gradient, empty):
    """Shares of other sizes, heights and numbers of rows that count, one of them with none."""
    alone = dictionary(aux=1 / 32)
    seen = a_pass(alone, gradient)
    counted = MASK & (torch.arange(3) > 0)[:, None] if empty else MASK
    x = seen.x * torch.tensor([1.0, 3.0, 0.2])[:, None, None]

    def terms(sae, own):
        latents = sae.encode(x[own])
        asks = None if gradient is None else gradient[own]
        found = sae.own_terms(TrainingPass(x[own], x[own], latents, sae.decode(latents), counted[own], DEAD, asks))
        weights = [sae.encoder, sae.b_enc, sae.decoder]
        term = found["dead_aux"]
        grads = torch.autograd.grad(term, weights) if term.requires_grad else [torch.zeros_like(w) for w in weights]
        return term.detach(), *grads

    def share(world):
        sae = dictionary(aux=1 / 32)
        sae.join(world)
        assert sae.sums_as_it_learns
        return terms(sae, of_process(world, 3))

    found = Meeting(processes).run(share)
    for expected, *parts in zip(terms(alone, slice(None)), *found, strict=True):
        torch.testing.assert_close(torch.stack(parts).sum(0), expected)
    assert float(found[-1][0]) > 0 and not dictionary(revive=0.1).sums_as_it_learns


@pytest.mark.parametrize("norm", ["unit", "free"])
@pytest.mark.parametrize(("k", "negative"), [(None, False), (3, True), (100, False)])
@pytest.mark.parametrize("target", ["residual", "gradient"])
def test_the_auxiliary_term_is_its_definition(norm, k, negative, target):
    sae = dictionary(norm, aux=1 / 32, aux_k=k, aux_negative=negative)
    seen = a_pass(sae, gradient_at_site() if target == "gradient" else None)
    found = sae.own_terms(seen)["dead_aux"]
    expected = slowly(sae, seen, {"residual": residual, "gradient": asked_by_gradient}[target], k or D // 2, negative)
    torch.testing.assert_close(found, expected)
    weights = [sae.encoder, sae.b_enc, sae.decoder]
    ours, theirs = (torch.autograd.grad(each, weights, retain_graph=True) for each in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
        assert not one[~DEAD].any()
    assert torch.autograd.grad(found, sae.b_dec, allow_unused=True)[0] is None


def test_where_nothing_is_predicted_the_term_is_the_second_moment_by_the_variance():
    """So whatever the scale of the residual, or of the gradient: about 1 per token."""
    sae = dictionary(aux=1.0)
    with torch.no_grad():
        sae.b_enc[DEAD] = -100.0
    for gradient in (None, gradient_at_site(), gradient_at_site() * 1e-200):
        seen = a_pass(sae, gradient)
        target = sae.dead.asked_for(seen).target
        expected = target.square().sum(-1).mean() / (target - target.mean(0)).square().sum(-1).mean()
        per_token = sae.own_terms(seen)["dead_aux"].detach() / len(target)
        torch.testing.assert_close(per_token, expected)
        assert 1 <= float(expected) < 1.6


def test_what_is_predicted_can_be_chosen():
    seen = {target: dictionary(aux=1.0, aux_target=target) for target in ("objective", "residual", "gradient")}
    found = {
        name: float(sae.own_terms(a_pass(sae, gradient_at_site()))["dead_aux"].detach()) for name, sae in seen.items()
    }
    assert found["objective"] == found["gradient"] != found["residual"]
    without = {name: float(sae.own_terms(a_pass(sae))["dead_aux"].detach()) for name, sae in seen.items()}
    assert without["objective"] == without["residual"] == found["residual"]
    assert without["gradient"] == 0.0


def test_without_a_gradient_or_a_dead_feature_nothing_is_asked():
    sae = dictionary(aux=1.0, revive=1.0)
    nowhere = sae.own_terms(a_pass(sae, torch.zeros(3, 10, D, dtype=torch.float64)))
    assert float(nowhere["dead_aux"].detach()) == 0.0
    seen = a_pass(sae)
    alive = TrainingPass(seen.x, seen.x, seen.latents, seen.reconstruction, MASK, torch.zeros_like(DEAD))
    assert {name: float(term.detach()) for name, term in sae.own_terms(alive).items()} == {
        "dead_aux": 0.0,
        "pre_activation": 0.0,
    }


@pytest.mark.parametrize("norm", ["unit", "free"])
@pytest.mark.parametrize("revives", ["dead", "all"])
def test_the_pre_activation_loss_of_features_without_thresholds(norm, revives):
    sae = dictionary(norm, revive=3e-6, revives=revives)
    seen = a_pass(sae)
    norms = sae.W_dec.norm(dim=-1)
    each = torch.relu(-(seen.x @ sae.W_enc + sae.b_enc)) * norms * (DEAD if revives == "dead" else 1.0)
    assert sae.own_weights == {"pre_activation": 3e-6}
    torch.testing.assert_close(sae.own_terms(seen)["pre_activation"], each[MASK].sum() / D)


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk", "jumprelu"])
def test_the_pre_activation_loss_reaches_up_to_the_threshold(architecture):
    """A feature whose pre-activations are positive, but below what makes it active, is pulled too."""
    config = ARCHITECTURES[architecture].Config(size=F, revive=1.0, **({"k": 2} if "topk" in architecture else {}))
    sae = ARCHITECTURES[architecture].build(config, D, 0).double()
    sae.take_threshold(0.7)
    seen = a_pass(sae)
    z = seen.x @ sae.encoder.T + sae.b_enc
    missing = torch.relu(0.7 - z) * DEAD
    torch.testing.assert_close(sae.own_terms(seen)["pre_activation"], missing[MASK].sum() / D)
    assert ((z > 0) & (z < 0.7) & DEAD)[MASK].any()


@pytest.mark.parametrize("dense", [False, True])
def test_a_topk_feature_is_pulled_up_to_the_smallest_of_the_rows_k(dense, monkeypatch):
    config = ARCHITECTURES["topk"].Config(size=F, revive=1.0, k=3)
    sae = ARCHITECTURES["topk"].build(config, D, 0).double()
    monkeypatch.setattr(sae, "sparse_below", 0.0 if dense else 1.0)
    with torch.no_grad():
        sae.b_enc[:-2] = torch.linspace(-1, 1, F - 2)
    seen = a_pass(sae)
    assert isinstance(seen.latents, DenseLatents) == dense
    total = 0.0
    for row in MASK.nonzero().tolist():
        z = sae.encoder @ seen.x[tuple(row)] + sae.b_enc
        active = z[z > 0].sort(descending=True).values[:3]
        bar = active[-1].detach() if len(active) == 3 else 0.0
        total = total + torch.relu(bar - z)[DEAD].sum() / D
    found = sae.own_terms(seen)["pre_activation"]
    torch.testing.assert_close(found, total)
    for one, other in zip(
        *(torch.autograd.grad(each, [sae.encoder, sae.b_enc]) for each in (found, total)), strict=True
    ):
        torch.testing.assert_close(one, other)


def with_weights_of(stored, names, **settings):
    """Our dictionary with a rival's weights, and the pass that it made."""
    sae = ReluSAE.build(LinearConfig(size=F, decoder_norm="free", **settings), D, 0)
    start = stored.under("start")
    with torch.no_grad():
        for own, (name, turned) in names.items():
            getattr(sae, own).copy_(start[name].T if turned else start[name])
    x, out = stored.tensors["x"], stored.tensors["out"]
    rows = torch.ones(len(x), dtype=torch.bool)
    latents = DenseLatents(stored.tensors["latents"])
    return sae, TrainingPass(x - sae.b_dec, x, latents, out, rows, stored.tensors["dead.mask"])


THEIRS = {"encoder": ("encoder.weight", False), "decoder": ("decoder.weight", True)}
THEIRS |= {"b_enc": ("encoder.bias", False), "b_dec": ("b_dec", False)}


def test_dictionary_learning_computes_the_same():
    stored = rival("dictionary_learning/topk")
    sae, seen = with_weights_of(stored, THEIRS, aux=0.5)
    found = sae.own_terms(seen)["dead_aux"] / len(seen.x)
    torch.testing.assert_close(found, stored.tensors["dead.loss.auxk_loss"])
    found.backward()
    for own, (name, turned) in THEIRS.items():
        theirs = stored.tensors[f"dead.grad_of.auxk_loss.{name}"]
        torch.testing.assert_close(getattr(sae, own).grad, theirs.T if turned else theirs, rtol=1e-4, atol=1e-6)


def test_sae_lens_computes_the_same_times_the_residuals_variance():
    """It is not divided by the variance there, and pre-activations below 0 take part."""
    stored = rival("sae_lens/topk")
    names = {
        "encoder": ("W_enc", True),
        "decoder": ("W_dec", False),
        "b_enc": ("b_enc", False),
        "b_dec": ("b_dec", False),
    }
    sae, seen = with_weights_of(stored, names, aux=1.0, aux_negative=True)
    left = stored.tensors["x"] - stored.tensors["out"]
    variance = (left - left.mean(0)).square().sum(-1).mean()
    assert int(seen.dead.sum()) >= D // 2  # otherwise theirs is scaled down
    weight = stored.settings["config"]["aux_loss_coefficient"]
    theirs = stored.tensors["dead.loss.auxiliary_reconstruction_loss"]
    torch.testing.assert_close(weight * variance * sae.own_terms(seen)["dead_aux"] / len(seen.x), theirs)


def linear_architectures():
    return [name for name in ARCHITECTURES.names() if issubclass(ARCHITECTURES[name], LinearSAE)]


@pytest.mark.parametrize("name", linear_architectures())
def test_every_architecture_of_two_matrices_has_the_terms(name):
    architecture = ARCHITECTURES[name]
    needed = {key: 4 for key, field in architecture.Config.model_fields.items() if field.is_required()}
    plain = architecture.build(architecture.Config(size=F, **needed), D, 0)
    assert not {"dead_aux", "pre_activation"} & set(plain.own_weights)
    config = architecture.Config(size=F, aux=0.1, revive=0.2, dead_window=7, **needed)
    assert config.batchwise
    for sae in (architecture.build(config, D, 0), plain.to_train(config)):
        sae.train()
        assert {"dead_aux": 0.1, "pre_activation": 0.2}.items() <= sae.own_weights.items()
        assert sae.dead_window == 7
        x = torch.randn(12, D, generator=torch.Generator().manual_seed(0))
        latents, rows = sae.encode(x), torch.ones(12, dtype=torch.bool)
        terms = sae.own_terms(TrainingPass(x, x, latents, sae.reconstruct(latents, x), rows, DEAD))
        assert set(terms) == set(sae.own_weights)
        assert float(terms["dead_aux"].detach()) > 0


def changed(config, **dictionary):
    values = config.model_dump(mode="json")
    return RunConfig.build(values | {"dictionary": values["dictionary"] | dictionary})


@pytest.mark.parametrize("kind", ["local", "e2e"])
def test_training_wakes_what_is_dead(kind, model, corpora, tmp_path):
    """Features that cannot fire are dead after the window, and only then are their weights changed by the term."""
    window = 2 * 4 * CONTEXT
    config = changed(recipe(tmp_path, kind), aux=1.0, aux_negative=True, dead_window=window)
    trainee = new_trainee(config, model, 10)
    silent = torch.arange(40) < 5
    with torch.no_grad():
        trainee.sae.b_enc[silent] = -1e4
    start = trainee.sae.encoder.detach().clone()
    for step in range(3):
        assert (trainee.sae.encoder[silent] == start[silent]).all()
        take_step(model, [trainee], corpora.train.batch(range(4 * step, 4 * step + 4)))
    assert (trainee.sae.encoder[silent] != start[silent]).any(1).all()
    assert trainee.report()["dead_aux"] > 0


def test_a_window_follows_the_length_of_training(model, corpora, tmp_path):
    config = recipe(tmp_path, alive_window=10_000)
    trainee = new_trainee(config, model, 10)
    trainee.last_fired[:] = torch.arange(40) - 1
    trainee.tokens = 45
    at = (45 - trainee.last_fired.clamp_min(0)) >= config.training.tokens // 20
    assert 0 < int(at.sum()) < 40
    assert torch.equal(trainee.dead(), at)
    trainee.config = config.training.model_copy(update={"alive_window": 20})
    assert torch.equal(trainee.dead(), (45 - trainee.last_fired.clamp_min(0)) >= 20)


def test_resumed_with_the_terms_it_ends_in_the_same_bits(model, corpora, tmp_path):
    def saved(out, **how):
        config = recipe(out, checkpoint_every=5, keep_checkpoints=9)
        settings = {"aux": 0.5, "revive": 0.1, "dead_window": 32}
        return train(changed(config, **settings), model=model, corpora=corpora, display=False, **how).sae

    whole = saved(tmp_path / "a")
    saved(tmp_path / "b")
    again = saved(tmp_path / "b", resume=True, from_step=5)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert "dead_aux" in RunFolder(tmp_path / "a").metrics_file.read_text().splitlines()[-1]


def test_more_than_one_pass_a_step_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"training\.accumulation is 2"):
        changed(recipe(tmp_path, accumulation=2), aux=0.1)
    changed(recipe(tmp_path, accumulation=2), revive=0.1)


# Resampling


def test_resampled_features_are_directions_of_tokens_drawn_by_squared_loss():
    sae = dictionary("free", resample_at=(0.5,))
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    rng = torch.Generator().manual_seed(4)
    x, target = (torch.randn(50, D, dtype=torch.float64, generator=rng) + 3 for _ in range(2))
    losses = torch.zeros(50, dtype=torch.float64)
    chosen = torch.arange(50) % 6 == 0  # 9 tokens, of which 8 are drawn
    losses[chosen] = torch.arange(1.0, 10.0, dtype=torch.float64)
    features = sae.see_losses(TokenLosses(x, target, losses, DEAD, np.random.default_rng(0)))
    assert torch.equal(features, DEAD.nonzero()[:, 0])
    for name in ("encoder", "b_enc", "decoder"):
        assert torch.equal(getattr(sae, name)[~DEAD], before[name][~DEAD])
    reads = normalize(x - x.mean(0), dim=-1)
    tokens = (normalize(sae.encoder[DEAD], dim=-1) @ reads.T).argmax(1)
    assert chosen[tokens].all() and len(tokens.unique()) == 8
    norm = 0.2 * before["encoder"][~DEAD].norm(dim=-1).mean()
    torch.testing.assert_close(sae.encoder[DEAD].detach(), norm * reads[tokens])
    torch.testing.assert_close(sae.before(x.mean(0, keepdim=True))[0, DEAD].detach(), torch.zeros(8).double())
    writes = normalize(target - target.mean(0), dim=-1)[tokens] * before["decoder"][~DEAD].norm(dim=-1).mean()
    torch.testing.assert_close(sae.decoder[DEAD].detach(), writes)


def test_behind_a_norm_features_are_resampled_in_the_norms_space():
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(4)) * torch.linspace(1, 9, D) + 3
    config = LinearConfig(size=F, initialisation="transposed", resample_at=(0.5,))
    sae = NormedSAE(ReluSAE.build(config, D, 3), "whitening")
    with torch.no_grad():
        sae.see_first(x, x)
    assert sae.wants_losses(10) == {5: 8192}
    inside = deepcopy(sae.inner)
    made = [TokenLosses(each, each, torch.ones(50), DEAD, np.random.default_rng(0)) for each in (x, sae.norm.of(x))]
    assert torch.equal(sae.see_losses(made[0]), inside.see_losses(made[1]))
    assert torch.equal(sae.inner.encoder, inside.encoder) and torch.equal(sae.inner.decoder, inside.decoder)
    assert {id(each) for each in sae.per_feature()} == {id(each) for each in sae.inner.per_feature()}


def test_a_token_is_drawn_as_often_as_its_squared_loss_says():
    config = LinearConfig(size=2, initialisation="transposed")
    x, losses = torch.eye(D)[:3] * 5, torch.tensor([1.0, 2.0, 3.0])
    dead, counts = torch.tensor([True, False]), np.zeros(3)
    for seed in range(600):
        sae = ReluSAE.build(config, D, 0)
        sae.see_losses(TokenLosses(x, x, losses, dead, np.random.default_rng(seed)))
        counts[int((normalize(x - x.mean(0), dim=-1) @ sae.encoder[0].detach()).argmax())] += 1
    expected = 600 * np.array([1, 4, 9]) / 14
    assert (np.abs(counts - expected) < 4 * np.sqrt(expected)).all()


def test_without_alive_features_or_losses_nothing_is_resampled():
    sae, x = dictionary(resample_at=(0.5,)), torch.randn(6, D, dtype=torch.float64)
    for dead, losses in ((torch.ones_like(DEAD), torch.ones(6)), (DEAD, torch.zeros(6))):
        before = sae.encoder.detach().clone()
        assert not len(sae.see_losses(TokenLosses(x, x, losses, dead, np.random.default_rng(0))))
        assert torch.equal(sae.encoder, before)


@pytest.mark.parametrize("kind", ["local", "e2e_ds"])
def test_losses_of_tokens_add_up_to_the_objective(kind, model, corpora, tmp_path):
    trainee = new_trainee(recipe(tmp_path, kind), model, 10)
    batch = corpora.train.batch(range(1))
    mask = torch.rand(batch.mask.shape, generator=torch.Generator().manual_seed(0)) < 0.7
    clean = clean_passes(model, model, [trainee], batch.tokens)[trainee.site]
    with torch.no_grad():
        read, written, losses = losses_of(trainee, model, clean, mask)
    assert torch.equal(read, clean.activations[trainee.site][mask]) and torch.equal(written, read)
    trainee.begin_step()
    trainee.accumulate(model, clean, mask, mask.sum())
    trainee.finish_step(mask.sum(), mask.numel())
    assert float(losses.mean()) == pytest.approx(trainee.report()["loss"], rel=1e-4)


@pytest.mark.parametrize("kind", ["local", "e2e"])
def test_resampling_comes_at_its_steps_and_continues_in_the_same_bits(kind, model, corpora, tmp_path):
    resampled = []

    class SomeDead(Trainee):
        def dead(self):
            dead = super().dead().clone()
            dead[:6] = True
            return dead

        def begin_step(self):
            moments = [self.optimizer.state[p]["exp_avg"][:6] for p in self.sae.per_feature()] if self.step else []
            if moments and not any(moment.any() for moment in moments):
                resampled.append(self.step)
            super().begin_step()

    def saved(out, **how):
        config = recipe(out, kind, tokens=320, checkpoint_every=1, keep_checkpoints=99)
        config = changed(config, resample_at=[0.3, 0.6], resample_tokens=40)
        return train_with(SomeDead, [config], model, corpora, **how)[0].sae

    whole = saved(tmp_path / "run")
    steps = 320 // (4 * CONTEXT)
    assert resampled == [round(0.3 * steps), round(0.6 * steps)]
    for step in (round(0.3 * steps), round(0.3 * steps) - 1):
        again = saved(tmp_path / "run", resume=True, from_step=step)
        for name, tensor in whole.state_dict().items():
            assert torch.equal(tensor, again.state_dict()[name]), name
