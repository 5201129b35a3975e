"""Several documents in one sequence, each attending to itself alone: by positions that start at 0 at every joint.

transformers makes the mask of such a sequence from its positions, where a family's attention takes masks. Whether a
model does so is tried on a few tokens, never taken from its name.
"""

import torch
from torch import Tensor

from endwise.common.axes import Tokens
from endwise.common.errors import ModelError
from endwise.models.checks import FAILURES, Tried, same


def positions(tokens: Tokens, separator: int) -> Tensor:
    """Positions `[batch pos]` within the documents, each of which ends with the separator."""
    place = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    begins = torch.zeros_like(tokens, dtype=torch.bool)
    begins[:, 1:] = tokens[:, :-1] == separator
    return place - place.where(begins, 0).cummax(dim=1).values


def refuse_joined(model: Tried, separator: int, longest: int) -> None:
    """Read documents of unequal lengths in one batch of sequences, and each by itself, which must give the same.

    Args:
        model: attends within documents by now.
        longest: tokens of the sequences that are tried, if the model takes so many.

    Raises:
        ModelError: it is not.
    """
    length = min(longest, model.context or longest)
    words = [token for token in range(length * 7) if token % model.vocab_size != separator][: 2 * length]
    rows = torch.tensor([token % model.vocab_size for token in words], device=model.device).view(2, length)
    joints = (length // 2, length // 3)
    for row, joint in zip(rows, joints, strict=True):
        row[joint - 1] = separator
    try:
        joined = model.clean(rows, final=True).final
        for row, joint, found in zip(rows, joints, joined, strict=True):
            for part in (slice(0, joint), slice(joint, length)):
                if not same(found[part], model.clean(row[None, part], final=True).final[0]):
                    raise ModelError(_text(model, "a document behind another one gives other predictions than alone"))
    except FAILURES as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise ModelError(_text(model, f"it takes no positions of its tokens ({reason})")) from None


def _text(model: Tried, why: str) -> str:
    return (
        f"{model.name} cannot keep documents of one sequence apart (data.document_attention): {why}. Set it to false; "
        "with data.packing=document no sequence holds more than one."
    )
