"""Use that the model makes of each direction at a site: the KL when its component is another token's (figure 22).

The component ⟨a, v⟩ of every token that counts is replaced by that of another token, all at once, one direction at a
time; the rest of the activation stays. So a direction is put out of use while its distribution stays what it was, and
the KL(clean ‖ ablated) of the predictions is what the model loses with it.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from endwise.analysis.directions.principal import Floats, Principal
from endwise.analysis.directions.text_at_site import SiteBatch, TextAtSite
from endwise.common.counting import counting
from endwise.common.seeds import numpy_stream
from endwise.models.splicing import SplicedPass

AT_ONCE = 8
"""Directions whose predictions are compared in one pass over the clean ones."""


def other_tokens(count: int, seed: int) -> NDArray[np.int64]:
    """Draw for each of `count` tokens the one whose component it gets: a permutation drawn from the seed."""
    return numpy_stream(seed, "resample ablation").permutation(count).astype(np.int64)


@torch.no_grad()
def resample_ablation(
    text: TextAtSite,
    principal: Principal,
    directions: Sequence[int],
    others: NDArray[np.int64] | None = None,
    *,
    seed: int = 12345,
    with_starts: bool = False,
) -> tuple[Floats, Floats]:
    """The KL of each direction, in nats, summed per sequence `[sequences directions]`; and the tokens `[sequences]`.

    Args:
        directions: their numbers, from 0.
        others: which token's component each gets, a permutation of the tokens that count, in the order of the text;
            None: `other_tokens`.
        with_starts: position 0 and document starts count too; otherwise they keep what they have.
    """
    chosen = torch.as_tensor(list(directions), device=principal.directions.device)
    vectors = principal.directions[chosen]
    own = torch.cat([(batch.activation[batch.counted(with_starts)].double() @ vectors.T) for batch in text.batches()])
    order = other_tokens(len(own), seed) if others is None else others
    change = own[torch.from_numpy(order).to(own.device)] - own
    kl, tokens, begin = [], [], 0
    with counting("ablating directions", text.sequences, None) as advance:
        for batch in text.batches(final=True):
            counted = batch.counted(with_starts)
            end = begin + int(counted.sum())
            kl.append(_of_batch(text, batch, counted, change[begin:end], vectors))
            tokens.append(counted.sum(1).double().cpu().numpy())
            begin = end
            advance(len(counted))
    return np.concatenate(kl), np.concatenate(tokens)


def _of_batch(text: TextAtSite, batch: SiteBatch, counted: Tensor, change: Tensor, vectors: Tensor) -> Floats:
    """The sums of some sequences, `[batch directions]`.

    Args:
        change: of each counted token's component along each direction, `[n directions]`.
    """
    model, clean = text.model, batch.clean
    assert clean.final is not None
    columns = []
    for start in range(0, len(vectors), AT_ONCE):
        finals = []
        for column in range(start, min(start + AT_ONCE, len(vectors))):
            ablated = batch.activation.clone()
            moved = change[:, column, None] * vectors[column]
            ablated[counted] = (ablated[counted].double() + moved).to(ablated.dtype)
            final = SplicedPass(model, text.site).run(clean, ablated).final
            assert final is not None
            finals.append(final)
        compared = model.readout.compare(clean.final, finals, clean.tokens, counted)
        columns += [comparison.kl.sum(1).double().cpu().numpy() for comparison in compared]
    return np.stack(columns, axis=1)
