"""A sharded model beside the whole one, passes and training, in a process of torchrun's: `... MADE FOLDER ALONE`."""

import sys
from pathlib import Path

import torch

from endwise import Site, load_model, train, train_together
from endwise.common.processes import joined
from endwise.models.sharding import shares
from endwise.models.sites import Part
from small_gpt2 import data, recipe

KINDS = ("local", "e2e", "e2e_ds")
SHARED = {"tokens": 96, "batch": 3, "accumulation": 3, "log_every": 1, "evaluate_every": 2, "checkpoint_every": 2}
"""Three sequences a step: one process reads one and the other two, in as many passes."""


def configs(made, folder, *, sharded):
    """A recipe of each objective, on one pass."""
    found = []
    for seed, kind in enumerate(KINDS):
        one = recipe(folder / kind, kind, seed, **SHARED)
        model = one.model.model_copy(update={"name": str(made / "model"), "device": "cpu", "sharded": sharded})
        evaluation = one.evaluation.model_copy(update={"batch": 3, "during_training_tokens": 104})
        found.append(one.model_copy(update={"model": model, "data": data(made), "evaluation": evaluation}))
    return found


def gradient(model, enter, ids, record=(), *, final=True, backwards=1):
    """Gradient, at a site, of the squares of what is recorded."""
    clean = model.clean(ids, [enter], final=final)
    value = clean.activations[enter].clone().requires_grad_()
    spliced = model.replay(clean, {enter: 0.9 * value}, record=record, final=final)
    tensors = [*spliced.activations.values(), *([spliced.final] if final else [])]
    total = sum(each.square().sum() for each in tensors)
    for number in range(backwards):
        total.backward(retain_graph=number + 1 < backwards)
    return value.grad


def compare_passes(made):
    """Enter and end passes at every place; the two processes do so in opposite orders, and one does more."""
    whole = load_model(str(made / "model"))
    with joined() as world:
        sharded = load_model(str(made / "model"), sharded=True)
        assert shares(sharded.model) == world.size == 2 and shares(whole.model) == 1
        assert sharded.sites() == whole.sites() and sharded.weights_digest() == whole.weights_digest()
        ids = torch.arange(16).view(2, 8) * 7 % whole.vocab_size
        if world.is_first:
            assert torch.equal(sharded.logits(ids), whole.logits(ids))
        order = sorted(whole.sites(), reverse=not world.is_first)
        for site in (each for each in order if each.layer == 2):
            assert torch.equal(gradient(sharded, site, ids), gradient(whole, site, ids)), site
        enter = Site(2, Part.RESID_PRE)
        for site in (each for each in order if each.layer == 3):
            two = [gradient(each, enter, ids, [site], final=False, backwards=2) for each in (sharded, whole)]
            assert torch.equal(*two), site
        weights = list(sharded.model.parameters())
        of_blocks = [each for each in weights if hasattr(each, "to_local")]
        own, every = (
            sum(each.numel() for each in tensors) for tensors in ([w.to_local() for w in of_blocks], of_blocks)
        )
        assert world.total(own) == every and own < 0.6 * every
        assert len(of_blocks) == sum(1 for _ in whole.model.transformer.h.parameters())
        assert not any(each.requires_grad or each.grad is not None for each in weights)


if __name__ == "__main__":
    made, folder, alone = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    compare_passes(made)
    train_together(configs(made, folder, sharded=True), display=False)
    resumed = configs(made, alone, sharded=True)[-1]
    train(resumed, resume=True, from_step=2, display=False)
