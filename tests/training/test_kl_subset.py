"""The KL of some positions as an estimate of the KL of all."""

import json

import pytest
import torch

import endwise
from endwise.common.errors import ConfigError
from endwise.config.run import RunConfig
from endwise.models.splicing import SplicedPass
from endwise.tokens import corpora_for
from endwise.training import kl_subset
from endwise.training.kl_subset import KLSubset, offsets
from on_embedded import recipe


def estimated(out, **changes):
    values = recipe(out)
    values["objective"] |= {"kind": None, "terms": {"kl_subset": {"weight": 1.0, "stride": 3}}}
    values["training"] |= {"tokens": 8 * 4 * 32, **changes}
    return RunConfig.build(values)


@pytest.fixture(scope="module")
def model():
    return endwise.load_model("embedded")


@pytest.fixture(scope="module")
def passes(model):
    """A clean pass, what is put in place, and a mask with holes."""
    data = estimated("x").data
    batch = corpora_for(model, data, training_tokens=128, evaluation_tokens=512).heldout.batch([3, 5, 8, 13, 21])
    site = model.place("blocks.4.hook_resid_pre").writes
    clean = model.clean(batch.tokens, record={site}, final=True)
    value = clean.activations[site]
    mask = batch.mask.clone()
    mask[0, :7], mask[2, 11:] = False, False
    drawn = torch.Generator().manual_seed(0)
    return clean, site, value + 0.4 * torch.randn(value.shape, generator=drawn), mask


def total_and_gradient(model, passes, total, rows=slice(None)):
    clean, site, value, mask = passes
    leaf = value[rows].clone().requires_grad_()
    part = clean.rows(rows)
    found = total(part, SplicedPass(model, site).run(part, leaf, mask[rows]), mask[rows])
    (gradient,) = torch.autograd.grad(found, leaf)
    return found.detach(), gradient


@pytest.mark.parametrize("stride", [2, 3, 7])
def test_the_mean_over_all_offsets_is_the_kl_and_its_gradient(model, passes, stride, monkeypatch):
    exact = total_and_gradient(
        model, passes, lambda clean, spliced, mask: model.readout.kl(clean.final, spliced.final, mask)
    )
    found = []
    for offset in range(stride):
        monkeypatch.setattr(kl_subset, "offsets", lambda tokens, *_, at=offset: torch.full((len(tokens),), at))
        term = KLSubset(1.0, stride)
        found.append(total_and_gradient(model, passes, lambda *args, term=term: term.total(model.readout, *args)))
    totals, gradients = (torch.stack(each) for each in zip(*found, strict=True))
    torch.testing.assert_close(totals.mean(), exact[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients.mean(0), exact[1], rtol=1e-4, atol=1e-6)
    assert totals.std() > 0.01 * exact[0]


def test_offsets_are_even_over_steps_and_differ_between_sequences():
    tokens = torch.randint(4096, (40, 64), generator=torch.Generator().manual_seed(0))
    drawn = torch.stack([offsets(tokens, step, 4) for step in range(500)])
    for axis in (drawn.flatten()[:, None], drawn[:, 0:1], drawn[:1].T):  # all, one sequence, one step
        counts = torch.bincount(axis.flatten(), minlength=4).double()
        expected = len(axis) / 4
        assert float(((counts - expected) ** 2 / expected).sum()) < 16.3  # chi-squared, 3 degrees: 0.1 %
    together = torch.bincount(drawn[1:, 0] * 4 + drawn[:-1, 0], minlength=16).double()  # one step and the next
    assert float(((together - 499 / 16) ** 2 / (499 / 16)).sum()) < 37.7  # 15 degrees
    changed = tokens.clone()
    changed[:, 5] += 1
    assert 0.5 < float((torch.stack([offsets(changed, step, 4) for step in range(500)]) != drawn).float().mean()) < 0.95


def test_a_batch_may_be_cut_anywhere(model, passes):
    term = KLSubset(1.0, 3).at(7)
    whole, gradient = total_and_gradient(model, passes, lambda *args: term.total(model.readout, *args))
    parts = [
        total_and_gradient(model, passes, lambda *args: term.total(model.readout, *args), slice(start, start + 2))
        for start in (0, 2, 4)
    ]
    torch.testing.assert_close(torch.stack([total for total, _ in parts]).sum(), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat([each for _, each in parts]), gradient, rtol=1e-4, atol=1e-6)


def test_runs_draw_for_each_step_and_resume_to_the_same_bits(model, tmp_path):
    run = endwise.train(estimated(tmp_path / "run"), model=model, display=False)
    names = ("metrics.jsonl", "sae/sae_weights.safetensors")
    written = [(run.folder / name).read_bytes() for name in names]
    lines = [json.loads(line) for line in written[0].splitlines()]
    assert all(line["kl_subset"] > 0 for line in lines) and run.config.objective.name == "kl_subset"
    endwise.train(run.config, model=model, resume=True, from_step=5, display=False)
    assert [(run.folder / name).read_bytes() for name in names] == written
    cut = endwise.train(estimated(tmp_path / "cut", microbatch=1, accumulation=2), model=model, display=False)
    others = [json.loads(line)["kl_subset"] for line in (cut.folder / "metrics.jsonl").read_text().splitlines()]
    assert others[:4] == pytest.approx([line["kl_subset"] for line in lines[:4]], rel=1e-4)


def test_a_stride_of_one_is_refused():
    values = recipe("x")
    values["objective"]["terms"] = {"kl_subset": {"weight": 1.0, "stride": 1}}
    with pytest.raises(ConfigError, match="greater than or equal to 2"):
        RunConfig.build(values)
