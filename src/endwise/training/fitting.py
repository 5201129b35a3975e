"""What is fitted to activations rather than trained: scales before the first step, thresholds after the last."""

import itertools
from collections.abc import Callable, Iterable

import torch
from rich.console import Console
from torch import Tensor

from endwise.common.axes import TokenMask
from endwise.common.terminal import show
from endwise.dictionaries import SAE
from endwise.models.language_model import Clean, LanguageModel
from endwise.models.sites import Place, Site
from endwise.tokens import BatchOrder, Corpus
from endwise.training.members import Member
from endwise.training.taking_over import COMPARED_ON, TakenOver
from endwise.training.trainee import Trainee

Text = tuple[LanguageModel, Corpus, BatchOrder]
"""A model, and the training text in the order in which it is read."""


def fit_first(text: Text, member: Member) -> None:
    """Show dictionaries whose training starts the first of their training text (`SAE.see_first`)."""
    for part in member.trainee.parts:
        _show(text, part, part.sae.first_tokens, range(len(text[-1])), part.sae.see_first)


def measure_start(text: Text, member: Member, display: bool) -> None:
    """Say what it changes to take the SAE in `init_from` over, in the run's folder and, if anything, in a line."""
    for (part, folder, _), recipe in zip(member.outputs(), member.of_each(), strict=True):
        if (start := recipe.init_from) is None:
            continue
        with torch.no_grad():
            read, written = _activations(text, part.place, COMPARED_ON, range(len(text[-1])))
        taken = TakenOver.of(SAE.load(start, read.device), part.sae, read, written)
        folder.note_start(taken.record)
        if not taken.kept:
            show(f"! {taken}", Console(stderr=True, quiet=not display))


def fit_last(text: Text, member: Member) -> None:
    """Show dictionaries that are trained the latest of their training text, and where that is short what would have
    come next (`SAE.see_last`).
    """
    for part in member.trainee.parts:
        total = part.total_steps
        steps = itertools.chain(range(total - 1, -1, -1), range(total, len(text[-1])))
        _show(text, part, part.sae.last_tokens, steps, part.sae.see_last)


def _show(text: Text, part: Trainee, tokens: int, steps: Iterable[int], see: Callable[[Tensor, Tensor], None]) -> None:
    if tokens:
        with torch.no_grad():
            see(*_activations(text, part.place, tokens, steps))


def _activations(text: Text, place: Place, tokens: int, steps: Iterable[int]) -> tuple[Tensor, Tensor]:
    """Collect what is read and what is written, `[tokens width]`, of the tokens that count in the batches of `steps`,
    as many as there are up to `tokens`.
    """
    model, corpus, order = text
    found: list[tuple[Tensor, Tensor]] = []
    count = 0
    for step in steps:
        batch = corpus.batch(order[step]).to(model.device)
        clean = model.clean(batch.tokens, record=place.sites)
        found.append((_counted(clean, place.reads, batch.mask), _counted(clean, place.writes, batch.mask)))
        count += len(found[-1][0])
        if count >= tokens:
            break
    read, written = (torch.cat(each)[:tokens] for each in zip(*found, strict=True))
    return read, written


def _counted(clean: Clean, site: Site, mask: TokenMask) -> Tensor:
    return clean.activations[site][mask].float()
