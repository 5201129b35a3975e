"""Spliced terms of an objective: their gradient at the reconstruction, and what balances them against each other.

Terms are of different size: nats per token beside squared activations. A balance makes a weight a share, not a factor.
Term t's weight w_t becomes w_t·α_t, with α_t the local squared error over the term, both of the step's tokens and taken
as constants:

    `loss`:      α_t = L_local / (L_t + 1e-8), as a finished SAE is tuned with ½·(MSE + α·KL) (Karvonen 2025,
                 arXiv 2503.17272);
    `gradient`:  α_t = ‖∂L_local/∂x̂‖ / ‖∂L_t/∂x̂‖, norms over all tokens of a step and all dimensions.

The yardstick is the local error in both, so that a learning rate and a sparsity coefficient mean what they mean for
local training, whether or not the local error is a term itself.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from endwise.common.axes import Activation, TokenMask
from endwise.common.processes import World
from endwise.config.objective import Balance
from endwise.models.language_model import Clean
from endwise.models.readout import Readout
from endwise.models.splicing import Scalar, SplicedPass, SplicedRows
from endwise.training.objectives import Objective, SplicedTerm

EPSILON = 1e-8
"""Added to a term, per token."""


@dataclass(frozen=True)
class Pulls:
    """Gradients of spliced terms at a reconstruction, of one pass of one process.

    Args:
        gradients: one, of the weighted sum, or one for each term, unweighted.
        sizes: of what is balanced: the count of tokens, the local error's size, each term's; None: nothing is.
    """

    gradients: Sequence[Activation]
    sizes: Tensor | None = None


def pulls(
    spliced: SplicedPass,
    objective: Objective,
    clean: Clean,
    reconstruction: Activation,
    target: Activation,
    mask: TokenMask,
    seen: Callable[[str, Scalar], None],
) -> Pulls:
    """Run the tail, and go back through it: once, or for each term that is balanced.

    Args:
        seen: called with the name and the unweighted sum of each term, for each microbatch.
    """
    readout, terms = spliced.model.readout, objective.spliced_terms
    if objective.balance is None:
        loss = partial(_weighted, terms, readout, seen)
        return Pulls(spliced.gradients(clean, reconstruction, mask, [loss]))
    totals = {term.name: reconstruction.new_zeros(()) for term in terms}

    def noted(name: str, total: Scalar) -> None:
        totals[name] += total
        seen(name, total)

    losses = [partial(_unweighted, term, readout, noted) for term in terms]
    gradients = spliced.gradients(clean, reconstruction, mask, losses)
    local = reconstruction.detach().requires_grad_()
    error = objective.local_error(local, target, mask)
    (at_local,) = torch.autograd.grad(error, local)
    size = _SIZES[objective.balance]
    found = [size(total, each) for total, each in zip(totals.values(), gradients, strict=True)]
    return Pulls(gradients, torch.stack([mask.sum().double(), size(error.detach(), at_local), *found]))


def balanced(objective: Objective, pulls: Pulls, world: World) -> tuple[Activation, Mapping[str, Tensor]]:
    """Return the gradient of the weighted sum, and the weight of each term that is balanced.

    Args:
        world: the processes that share the step's tokens, over which sizes are added up.
    """
    if pulls.sizes is None or objective.balance is None:
        (gradient,) = pulls.gradients
        return gradient, {}
    sizes = pulls.sizes.clone()
    world.add([sizes])
    local, found = sizes[1] / sizes[0], sizes[2:] / sizes[0]
    shares = _SHARES[objective.balance](local, found)
    weights = [term.coefficient * share for term, share in zip(objective.spliced_terms, shares, strict=True)]
    each = [weight.to(at.dtype) * at for weight, at in zip(weights, pulls.gradients, strict=True)]
    names = [term.name for term in objective.spliced_terms]
    return torch.stack(each).sum(0), dict(zip(names, weights, strict=True))


def _weighted(
    terms: Sequence[SplicedTerm], readout: Readout, seen: Callable[[str, Scalar], None], part: SplicedRows
) -> Scalar:
    loss = torch.zeros((), device=part.mask.device)
    for term in terms:
        loss = loss + term.coefficient * _unweighted(term, readout, seen, part)
    return loss


def _unweighted(term: SplicedTerm, readout: Readout, seen: Callable[[str, Scalar], None], part: SplicedRows) -> Scalar:
    total = term.total(readout, part.clean, part.spliced, part.mask)
    seen(term.name, total.detach())
    return total


_SIZES: Mapping[Balance, Callable[[Tensor, Activation], Tensor]] = {
    "loss": lambda total, _gradient: total.double(),
    "gradient": lambda _total, gradient: gradient.double().square().sum(),
}
_SHARES: Mapping[Balance, Callable[[Tensor, Tensor], Tensor]] = {
    "loss": lambda local, found: local / (found.clamp_min(0) + EPSILON),
    "gradient": lambda local, found: (local / found).sqrt().where(found > 0, 0.0),
}
