"""The training step against its slow definition, and the promises of the loop around it."""

import copy
import json
import math
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from endwise import SAE, LanguageModel, RunConfig, train
from endwise.common.errors import ConfigError, DataError, FormatError, RunFolderError, TrainingStopped
from endwise.evaluation.measure import residuals_after
from endwise.models.splicing import later_residuals
from endwise.runs.checkpoints import read_checkpoint
from endwise.runs.folder import RunFolder
from endwise.training.course import rate_factor
from endwise.training.making import new_trainee
from endwise.training.step import take_step
from endwise.training.trainee import Trainee
from own_training import acting, reading, stopping, train_with
from small_gpt2 import CONTEXT, LAYERS, SITE, WIDTH, recipe, small_corpora, write_tokens


@pytest.fixture(scope="module")
def whole(model, corpora, tmp_path_factory):
    return train(recipe(tmp_path_factory.mktemp("whole") / "run"), model=model, corpora=corpora, display=False)


@pytest.fixture
def copied(whole, tmp_path):
    """The recipe of a run that has ended, and its folder to work on."""
    return recipe(Path(shutil.copytree(whole.folder, tmp_path / "run")))


def slow_gradients(model, sae, kind, batch, coefficient=0.3, beta=2.0):
    """The paper's loss by plain means: full forward passes, whole logits, float64, autograd from end to end."""
    gpt2 = GPT2LMHeadModel(model.model.config).double().eval()
    gpt2.load_state_dict({name: value.double() for name, value in model.model.state_dict().items()})
    weights = {name: p.detach().double().requires_grad_() for name, p in sae.named_parameters()}
    seen = {}

    def splice(block, arguments):
        x = arguments[0]
        seen["x"] = x
        seen["c"] = torch.relu(x @ weights["encoder"].T + weights["b_enc"])
        rows = weights["decoder"] / weights["decoder"].norm(dim=-1, keepdim=True)
        seen["y"] = seen["c"] @ rows + weights["b_dec"]
        return (torch.where(batch.mask[..., None], seen["y"], x), *arguments[1:])

    clean = gpt2(batch.tokens, output_hidden_states=True)
    handle = gpt2.transformer.h[1].register_forward_pre_hook(splice)
    spliced = gpt2(batch.tokens, output_hidden_states=True)
    handle.remove()
    log_p, log_q = clean.logits.log_softmax(-1), spliced.logits.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[batch.mask].mean()
    later = [(spliced.hidden_states[k] - clean.hidden_states[k])[batch.mask].square().mean() for k in range(2, LAYERS)]
    loss = {
        "local": (seen["y"] - seen["x"])[batch.mask].square().mean(),
        "e2e": kl,
        "e2e_ds": 0.5 * kl + beta / len(later) * sum(later),
    }[kind] + coefficient * seen["c"].sum(-1)[batch.mask].mean() / WIDTH
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in weights.items()}


@pytest.mark.parametrize("kind", ["local", "e2e", "e2e_ds"])
@pytest.mark.parametrize("cut", [{}, {"microbatch": 3}, {"accumulation": 2, "microbatch": 1}])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_equal_the_slow_definition(model, corpora, kind, cut, masked, tmp_path):
    config = recipe(tmp_path, kind, gradient_clip=None, learning_rate=1e-30, warmup=0, **cut)
    trainee = new_trainee(config, model, steps=10)
    batch = corpora.train.batch(range(4))
    if masked:  # a masked first position keeps its own activation, which every later position can see
        mask = batch.mask.clone()
        mask[:, 0] = mask[2, 5:] = False
        batch = replace(batch, mask=mask)
    loss, expected = slow_gradients(model, trainee.sae, kind, batch)
    take_step(model, [trainee], batch, config.training.accumulation)
    assert trainee.report()["loss"] == pytest.approx(loss, rel=1e-5)
    for name, parameter in trainee.sae.named_parameters():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(parameter.grad.double(), expected[name], rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("kind", ["local", "e2e", "e2e_ds"])
def test_a_model_in_bf16_trains_an_fp32_sae(model, corpora, kind, tmp_path):
    low = LanguageModel(copy.deepcopy(model.model).to(torch.bfloat16))
    gradients = []
    for each in (model, low):
        trainee = new_trainee(recipe(tmp_path, kind, gradient_clip=None), each, steps=10)
        take_step(each, [trainee], corpora.train.batch(range(4)))
        assert {p.dtype for p in trainee.sae.parameters()} == {torch.float32}
        gradients.append(torch.cat([p.grad.flatten() for p in trainee.sae.parameters()]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98


def test_schedule_warms_up_and_falls_to_the_floor():
    settings = recipe(Path("unused"), warmup=0.1, floor=0.1).training
    rates = [rate_factor(step, 1000, settings) for step in range(1000)]
    assert rates[:3] == pytest.approx([1 / 101, 2 / 101, 3 / 101])
    assert rates[100] == max(rates) == 1.0
    assert rates[550] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2)
    assert rates[-1] == pytest.approx(0.1, abs=1e-4)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_rate_falls_over_the_last_steps_alone(schedule):
    """A fifth of 1,000 steps: constant to step 800, then by definition."""
    settings = recipe(Path("unused"), warmup=0.1, floor=0.25, decay=0.2, schedule=schedule).training
    rates = torch.tensor([rate_factor(step, 1000, settings) for step in range(1000)], dtype=torch.float64)
    assert rates[:100].tolist() == pytest.approx([(step + 1) / 101 for step in range(100)])
    assert (rates[100:801] == 1).all()
    done = torch.arange(200, dtype=torch.float64) / 200
    fall = {"cosine": (1 + torch.cos(torch.pi * done)) / 2, "linear": 1 - done}[schedule]
    torch.testing.assert_close(rates[800:], 0.25 + 0.75 * fall)


def test_a_constant_rate_and_a_decay_that_has_no_place():
    settings = recipe(Path("unused"), warmup=0.1, schedule="constant").training
    assert all(rate_factor(step, 1000, settings) == 1 for step in range(100, 1000))
    with pytest.raises(ConfigError, match=r"decay is 0\.2, but schedule constant has none"):
        recipe(Path("unused"), decay=0.2, schedule="constant")
    with pytest.raises(ConfigError, match=r"warmup \(0\.3\) and decay \(0\.8\) are more than all steps"):
        recipe(Path("unused"), warmup=0.3, decay=0.8)


def test_betas_are_adams(model, tmp_path):
    settings = recipe(tmp_path, betas=[0.0, 0.9])
    trainee = new_trainee(settings, model, 10)
    assert trainee.optimizer.param_groups[0]["betas"] == (0.0, 0.9)
    assert new_trainee(recipe(tmp_path), model, 10).optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def test_run_folder_holds_what_it_promises(model, corpora, tmp_path):
    run = train(recipe(tmp_path / "run", "e2e_ds", checkpoint_every=7), model=model, corpora=corpora, display=False)
    folder = RunFolder(run.folder)
    assert folder.config() == run.config
    lines = folder.metrics()
    assert [line["step"] for line in lines] == [1, 3, 6, 7, 9, 12, 14, 15, 18, 20]
    assert {"kl", "downstream_mse", "sparsity", "loss", "l0", "alive", "gradient_norm"} <= set(lines[-1])
    assert set(lines[-1]["heldout"]) == {"ce_increase", "kl", "l0", "explained_variance.per_token"}
    assert not any("second" in key for line in lines for key in line)
    assert lines[-1]["loss"] < lines[0]["loss"]
    timings = [json.loads(line) for line in folder.timings_file.read_text().splitlines()]
    assert [line["step"] for line in timings] == [line["step"] for line in lines]
    x = torch.randn(3, WIDTH)
    torch.testing.assert_close(SAE.load(run.folder)(x), run.sae(x), rtol=1e-5, atol=1e-5)
    checkpoint = read_checkpoint(folder.latest_checkpoint())
    assert torch.equal(checkpoint.tensors["sae.decoder"], run.sae.decoder)
    assert not torch.allclose(checkpoint.tensors["sae.decoder"].norm(dim=-1), torch.ones(40))


def test_interrupted_and_resumed_ends_in_the_same_bits(model, corpora, whole, tmp_path):
    config = recipe(tmp_path / "cut", "e2e")
    with pytest.raises(TrainingStopped, match=r"step 8.*endwise train --resume"):
        train_with(acting(stopping(7)), [config], model, corpora)
    resumed = train(config, model=model, corpora=corpora, display=False, resume=True)
    for ours, theirs in zip(resumed.sae.parameters(), whole.sae.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert RunFolder(resumed.folder).metrics_file.read_text() == RunFolder(whole.folder).metrics_file.read_text()


def test_a_number_that_is_not_finite_stops_with_the_last_good_state(model, corpora, tmp_path):
    class Poisoned(Trainee):
        """Trainee whose penalty alone is NaN, in the fifth step."""

        def encode(self, *given):
            encoded = super().encode(*given)
            if self.step != 4:
                return encoded
            return replace(encoded, latents=replace(encoded.latents, norms=torch.full((self.sae.d_sae,), torch.nan)))

    with pytest.raises(TrainingStopped, match=r"step 5 the term sparsity.*saved"):
        train_with(Poisoned, [recipe(tmp_path / "bad")], model, corpora)
    kept = read_checkpoint(RunFolder(tmp_path / "bad").latest_checkpoint())
    assert kept.state["step"] == 4
    trainee = new_trainee(recipe(tmp_path / "unused"), model, steps=20)
    from endwise.tokens import BatchOrder

    order = BatchOrder(corpora.train, 4, 0, 1)
    for step in range(4):
        take_step(model, [trainee], corpora.train.batch(order[step]))
    for name, weight in trainee.sae.state_dict().items():
        assert torch.equal(kept.tensors[f"sae.{name}"], weight), name


def test_masked_positions_leave_no_trace(model, corpora, tmp_path):
    """A batch with padding trains exactly as its unpadded tokens would; in float64, where rounding hides nothing."""
    model = LanguageModel(copy.deepcopy(model.model).double())
    batch = corpora.train.batch(range(4))
    short = replace(batch, tokens=batch.tokens[:, :6], mask=batch.mask[:, :6])
    padded = replace(batch, mask=batch.mask & (torch.arange(CONTEXT) < 6))
    gradients = []
    for case in (short, padded):
        trainee = new_trainee(recipe(tmp_path, "e2e_ds", gradient_clip=None), model, steps=10)
        trainee.sae.double()
        take_step(model, [trainee], case)
        gradients.append({name: p.grad.clone() for name, p in trainee.sae.named_parameters()})
        numbers = trainee.report()
        assert numbers["l0"] > 0
    for name, gradient in gradients[0].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-12 * scale)


def test_alive_counts_a_window_of_tokens(model, corpora, tmp_path):
    trainee = new_trainee(recipe(tmp_path, alive_window=100), model, steps=10)
    trainee.tokens = 1000
    trainee.last_fired[:] = -1
    trainee.last_fired[0], trainee.last_fired[1], trainee.last_fired[2] = 1000, 901, 900
    assert int(trainee.alive()) == 2


def test_folders_in_use_and_too_few_tokens_are_refused(model, corpora, copied, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="not an empty folder"):
        train(recipe(tmp_path / "taken"), model=model, corpora=corpora, display=False)
    with pytest.raises(RunFolderError, match="holds a run already"):
        train(copied, model=model, corpora=corpora, display=False)
    with pytest.raises(RunFolderError, match="another recipe"):
        train(recipe(tmp_path / "run", seed=5), model=model, corpora=corpora, display=False, resume=True)
    with pytest.raises(ConfigError, match="one step alone takes 32"):
        train(recipe(tmp_path / "short", tokens=31), model=model, corpora=corpora, display=False)
    checkpoint = RunFolder(tmp_path / "run").latest_checkpoint()
    checkpoint.write_bytes(checkpoint.read_bytes()[:-5])
    with pytest.raises(FormatError, match="not a whole checkpoint"):
        train(recipe(tmp_path / "run"), model=model, corpora=corpora, display=False, resume=True)


def test_downstream_sites_must_come_later(model, tmp_path):
    values = recipe(tmp_path, "e2e_ds").model_dump()
    values["objective"]["downstream_sites"] = ["blocks.0.hook_resid_post"]
    with pytest.raises(ConfigError, match=r"must come after.*blocks\.0\.hook_resid_post"):
        new_trainee(RunConfig.build(values), model, steps=1)


def test_a_changed_corpus_is_noticed_on_resuming(model, copied, tmp_path):
    other = small_corpora(write_tokens(tmp_path, seed=1))
    with pytest.raises(RunFolderError, match=r"started on other training text.*new run"):
        train(copied, model=model, corpora=other, display=False, resume=True)


def test_a_line_cut_off_by_a_crash_does_not_stop_resuming(model, corpora, copied):
    metrics = RunFolder(copied.out).metrics_file
    before = metrics.read_text()
    metrics.write_text(before + '{"step": 21, "lo')
    train(copied, model=model, corpora=corpora, display=False, resume=True)
    assert metrics.read_text() == before


def test_too_little_text_to_evaluate_is_refused_before_training(model, corpora, tmp_path):
    values = recipe(tmp_path / "run").model_dump()
    values["evaluation"]["during_training_tokens"] = CONTEXT - 1
    with pytest.raises(ConfigError, match=r"evaluation\.during_training_tokens is 7.*one sequence alone has 8"):
        train(values, model=model, corpora=corpora, display=False)
    with pytest.raises(DataError, match=r"asks for 1280 steps.*has text for 128"):
        train(recipe(tmp_path / "run", tokens=40_960), model=model, corpora=corpora, display=False)
    assert not (tmp_path / "run").exists()


def test_an_error_nobody_foresaw_still_saves(model, corpora, tmp_path):
    folder = RunFolder(tmp_path / "run")

    def fails(indices):
        if folder.metrics_file.exists():
            raise ArithmeticError("no number for the evaluation")

    with pytest.raises(ArithmeticError):
        train(recipe(folder.path, tokens=64), model=model, corpora=reading(corpora, fails, "heldout"), display=False)
    assert read_checkpoint(folder.latest_checkpoint()).state["step"] == 2
    assert SAE.load(folder.path).d_sae == 40


def test_evaluations_do_not_count_as_training_time(model, corpora, tmp_path):
    slept = []

    def slow(indices):
        if RunFolder(tmp_path / "run").metrics_file.exists() and not slept:
            slept.append(time.sleep(0.5))

    started = time.monotonic()
    run = train(
        recipe(tmp_path / "run", tokens=64), model=model, corpora=reading(corpora, slow, "heldout"), display=False
    )
    assert slept and run.seconds <= time.monotonic() - started - 0.5


def test_metadata_tells_saelens_where_the_sae_belongs(whole):
    metadata = json.loads((whole.folder / "sae" / "cfg.json").read_text())["metadata"]
    assert (metadata["hook_name"], metadata["context_size"]) == (SITE, CONTEXT)
    assert metadata["model_class_name"] == "HookedTransformer"
    processing = metadata["model_from_pretrained_kwargs"]  # SAELens hands them to TransformerLens's loader
    assert processing["fold_ln"] is processing["center_writing_weights"] is processing["center_unembed"] is False
    assert not any(processing.values())
    assert metadata["endwise"]["step"] == 20


def test_a_residual_stream_is_not_downstream_of_itself(model):
    named = [site.name for site in later_residuals(model, model.site("blocks.1.hook_resid_post"))]
    assert named == ["blocks.3.hook_resid_pre"]
    assert named == [site.name for site in later_residuals(model, model.site("blocks.2.hook_resid_pre"))]
    last = model.site("blocks.3.hook_resid_post")
    assert residuals_after(model, last) == ()
