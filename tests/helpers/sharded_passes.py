"""Passes of a sharded model beside those of the whole one, as a process of torchrun's."""

import sys

import torch

from endwise import Site, load_model
from endwise.common.processes import joined
from endwise.models.sharding import shares
from endwise.models.sites import Part


def gradient(model, site, ids, record=(), *, final=True, backwards=1):
    clean = model.clean(ids, [site], final=final)
    value = clean.activations[site].clone().requires_grad_()
    spliced = model.replay(clean, {site: lambda _: 0.9 * value}, record=record, final=final)
    tensors = [*spliced.activations.values(), *([spliced.final] if final else [])]
    total = sum(each.square().sum() for each in tensors)
    for number in range(backwards):
        total.backward(retain_graph=number + 1 < backwards)
    return value.grad


def compared(whole, sharded, ids):
    """Every place to enter at and to stop at, forward and backward."""
    assert torch.equal(sharded.logits(ids), whole.logits(ids))
    for site in whole.sites():
        assert torch.equal(gradient(sharded, site, ids), gradient(whole, site, ids)), site
    enter = Site(1, Part.RESID_PRE)
    for site in whole.sites():
        if site > enter:
            ours, theirs = (gradient(m, enter, ids, [site], final=False, backwards=2) for m in (sharded, whole))
            assert torch.equal(ours, theirs), site


def main(folder):
    torch.set_num_threads(1)
    whole = load_model(folder)
    ids = torch.arange(24).view(3, 8) * 7 % whole.vocab_size
    with joined() as world:
        sharded = load_model(folder, sharded=True)
        assert shares(sharded.model) == world.size == 2 and shares(whole.model) == 1
        assert sharded.sites() == whole.sites()
        assert sharded.weights_digest() == whole.weights_digest()
        if world.is_first:  # the other lends its parts
            compared(whole, sharded, ids)
        compared(whole, sharded, (ids + world.rank) % whole.vocab_size)
        own = sum(each.to_local().numel() for each in sharded.model.parameters() if hasattr(each, "to_local"))
        of_blocks = sum(each.numel() for each in sharded.model.parameters() if hasattr(each, "to_local"))
        assert world.total(own) == of_blocks and own < 0.6 * of_blocks
        assert not any(
            parameter.requires_grad or parameter.grad is not None for parameter in sharded.model.parameters()
        )
    print("equal", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
