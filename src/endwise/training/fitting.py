"""Fits to activations, for what is not trained: scales before the first step, thresholds after the last, dead
features at the steps in between that a recipe states.
"""

import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence, Set
from typing import Any, TypeVar

import torch
from torch import Tensor

from endwise.common.axes import TokenMask
from endwise.common.remarks import FEWER_LEFT_OUT
from endwise.common.seeds import numpy_stream
from endwise.common.terminal import note
from endwise.dictionaries import SAE, TokenLosses, at_inference
from endwise.evaluation.provenance import pinned
from endwise.models.language_model import Clean, LanguageModel
from endwise.models.sites import Site
from endwise.models.splicing import SplicedPass, microbatches, sequences_at_a_time
from endwise.tokens import BatchOrder, Corpus, TokenBatch
from endwise.training.joint import AnyTrainee, met_in_use, spliced_before
from endwise.training.members import Member
from endwise.training.outliers import MEASURED_ON, CountedTokens, Outliers
from endwise.training.step import clean_passes
from endwise.training.taking_over import COMPARED_ON, TakenOver
from endwise.training.trainee import Trainee, harmless

Recorded = TypeVar("Recorded")


class TrainingText:
    """A model, and the training text in the order in which it is read.

    What was recorded last is kept, since the members of a group ask for the same in turn: one clean pass serves all.
    """

    def __init__(self, model: LanguageModel, corpus: Corpus, order: BatchOrder) -> None:
        self.model, self.corpus, self.order = model, corpus, order
        self._kept: tuple[Hashable, Any] | None = None

    def recorded(self, trainee: AnyTrainee, what: Hashable, record: Callable[[], Recorded]) -> Recorded:
        """Return what `record` does, or did when it was last asked for the same.

        Args:
            trainee: the tokens that count are those that count for it.
            what: all else that the record depends on.
        """
        limits = ((part.place, part.sae.norm_limit) for part in trainee.parts)
        key = what, tuple((place, None if limit is None else float(limit)) for place, limit in limits)
        if self._kept is None or self._kept[0] != key:
            self._kept = None  # its memory is free before more is taken
            self._kept = key, record()
        return self._kept[1]


def fit_first(text: TrainingText, member: Member) -> None:
    """Show dictionaries whose training starts the first of their training text (`SAE.see_first`)."""
    for part in member.trainee.parts:
        if part.sae.first_tokens:
            with torch.no_grad():
                part.sae.see_first(*activations(text, part, part, part.sae.first_tokens, [range(len(text.order))]))


def measure_norms(text: TrainingText, member: Member, display: bool) -> None:
    """Set the norm above which each dictionary whose training starts leaves positions out; put it down in the run's
    folder, and say so where these are many.
    """
    for (part, folder, _), recipe in zip(member.outputs(), member.of_each(), strict=True):
        if (multiple := recipe.data.leave_out_norms) is None:
            continue
        with torch.no_grad():
            read, _ = activations(text, part, part, MEASURED_ON, [range(len(text.order))])
        found = Outliers.of(part.place, multiple, read.norm(dim=-1))
        part.sae.leave_out_above(found.limit)
        if member.writes:
            folder.note_start(found.record)
        if found.many:
            note(f"! {found} {FEWER_LEFT_OUT}", display)


def measure_error_scales(text: TrainingText, member: Member) -> None:
    """Measure what relative errors are divided by, on the first of the training text, and put it down in the run's
    folder.
    """
    courses = {part.course for part in member.trainee.parts} | {member.trainee.course}
    scales = [scale for course in courses for scale in course.scales]
    if not scales:
        return
    sites = frozenset(scale.site for scale in scales)
    found = text.recorded(member.trainee, sites, lambda: _at_sites(text, member.trainee, sites, MEASURED_ON))
    for scale in scales:
        scale.measure(found[scale.site])
    record = {scale.site.name: scale.record for scale in sorted(scales, key=lambda scale: scale.site)}
    for _, folder, _ in member.outputs() if member.writes else ():
        folder.note_start({"error_scales": record})


def _at_sites(text: TrainingText, trainee: AnyTrainee, sites: Set[Site], tokens: int) -> dict[Site, Tensor]:
    """Collect what is at each site, `[tokens width]`, of the first tokens that count."""
    found: dict[Site, list[Tensor]] = {site: [] for site in sites}
    count = 0
    for step in range(len(text.order)):
        batch = text.corpus.batch(text.order[step]).to(text.model.device)
        mask = _counted(trainee, text.model, batch)
        for rows in microbatches(len(mask), mask):
            clean = text.model.clean(batch.tokens[rows], record=sites)
            for site in sites:
                found[site].append(clean.activations[site][mask[rows]].float())
        count += int(mask.sum())
        if count >= tokens:
            break
    return {site: torch.cat(each)[:tokens] for site, each in found.items()}


def measure_start(text: TrainingText, member: Member, display: bool) -> None:
    """Say what it changes to take the SAE in `init_from` over, in the run's folder and, if anything, in a line; and let
    a λ that is steered begin at the size that fits it.
    """
    for (part, folder, _), recipe in zip(member.outputs(), member.of_each(), strict=True):
        if (start := pinned(folder.path, recipe).init_from) is None:
            continue
        with torch.no_grad():
            read, written = activations(text, part, part, COMPARED_ON, [range(len(text.order))])
        taken = TakenOver.of(SAE.load(start, read.device), part.sae, read, written)
        if member.writes:
            folder.note_start(taken.record)
        with torch.no_grad(), part.sae.aside():
            latents = part.sae.encode(read[None])
            part.course.start(latents, part.sae.reconstruct(latents, read[None]), written[None])
        if not taken.kept:
            note(f"! {taken}", display)


def fit_last(text: TrainingText, member: Member) -> None:
    """Show dictionaries that are trained the latest of their training text, and where that is short what would have
    come next (`SAE.see_last`). Of several that are spliced jointly each is shown what it meets with the earlier ones in
    place, which are fitted before it.
    """
    for part in member.trainee.parts:
        total = part.total_steps
        steps = [range(total - 1, -1, -1), range(total, len(text.order))]
        if part.sae.last_tokens:
            with torch.no_grad():
                part.sae.see_last(*activations(text, member.trainee, part, part.sae.last_tokens, steps))


def resample(text: TrainingText, tail: LanguageModel, done: int, member: Member) -> None:
    """Show a dictionary, after `done` steps, the latest of its training text with the losses (`SAE.see_losses`). The
    optimiser's moments of features that it replaces start again from 0.
    """
    for part, recipe in zip(member.trainee.parts, member.of_each(), strict=True):
        if wanted := part.sae.wants_losses(part.total_steps).get(done):
            shown = _with_losses(text, tail, part, wanted, range(done - 1, -1, -1))
            generator = numpy_stream(recipe.seed, "resampling", done)
            features = part.sae.see_losses(TokenLosses(*shown, part.dead(), generator))
            for parameter in part.sae.per_feature():
                for moment in part.optimizer.state.get(parameter, {}).values():
                    if moment.ndim:
                        moment[features] = 0.0


def _with_losses(
    text: TrainingText, tail: LanguageModel, part: Trainee, tokens: int, steps: Iterable[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Collect what is read, what is to be written and the objective of the tokens that count, up to `tokens`."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    with torch.no_grad(), at_inference([part.sae]):
        for step in steps:
            batch = text.corpus.batch(text.order[step]).to(text.model.device)
            clean = clean_passes(text.model, tail, [part], batch.tokens)[part.site]
            mask = part.sae.within_limit(clean.activations[part.place.reads], batch.mask)
            for row in range(len(batch.tokens)):
                rows = slice(row, row + 1)
                found.append(losses_of(part, tail, clean.rows(rows), mask[rows]))
            if sum(len(losses) for *_, losses in found) >= tokens:
                break
    read, written, losses = (torch.cat(each)[:tokens] for each in zip(*found, strict=True))
    return read, written, losses


def losses_of(trainee: Trainee, tail: LanguageModel, clean: Clean, mask: TokenMask) -> tuple[Tensor, Tensor, Tensor]:
    """Return what is read and to be written, `[tokens width]`, and the objective, `[tokens]`, of a sequence's tokens
    that count: its terms, each of that token alone.
    """
    objective, sae = trainee.objective, trainee.sae
    read, target = (harmless(each, mask).float() for each in trainee.meets(clean))
    spliced = None
    if objective.spliced_terms:
        value = sae.reconstruct(sae.encode(read, mask), read)
        spliced = SplicedPass(tail, trainee.site, objective.sites, objective.final).run(clean, value, mask)
    losses, one = [], mask.new_ones(1, 1)
    for place in mask[0].nonzero()[:, 0].tolist():
        here = slice(place, place + 1)
        latents = sae.encode(read[:, here], one)
        estimate = sae.reconstruct(latents, read[:, here])
        terms = [
            term.coefficient * term.total(target[:, here], estimate, latents, one) for term in objective.site_terms
        ]
        if spliced is not None:
            alone = torch.zeros_like(mask)
            alone[0, place] = True
            compared = [(term, term.total(tail.readout, clean, spliced, alone)) for term in objective.spliced_terms]
            terms += [term.coefficient * total for term, total in compared]
        losses.append(torch.stack([term.float() for term in terms]).sum())
    return read[mask], target[mask], torch.stack(losses) if losses else read.new_zeros(0)


def activations(
    text: TrainingText, trainee: AnyTrainee, part: Trainee, tokens: int, steps: Sequence[range]
) -> tuple[Tensor, Tensor]:
    """Collect what a part of a trainee meets (`met_in_use`), `[tokens width]`, of the tokens that count in the
    batches of `steps`, as many as there are up to `tokens`.
    """
    if spliced_before(trainee, part):  # what it meets is its own
        return _met(text, trainee, part, tokens, steps)
    what = part.place, tokens, tuple(steps)
    return text.recorded(trainee, what, lambda: _met(text, trainee, part, tokens, steps))


def _met(
    text: TrainingText, trainee: AnyTrainee, part: Trainee, tokens: int, steps: Sequence[range]
) -> tuple[Tensor, Tensor]:
    found: list[tuple[Tensor, Tensor]] = []
    count = 0
    chained = itertools.chain.from_iterable
    sequences = chained(text.order[step] for step in chained(steps))
    size = sequences_at_a_time(text.corpus.context, text.model.device)
    while count < tokens and (some := list(itertools.islice(sequences, size))):
        batch = text.corpus.batch(some).to(text.model.device)
        mask = _counted(trainee, text.model, batch)
        read, written = (each[mask].float() for each in met_in_use(trainee, part, text.model, batch.tokens, mask))
        found.append((read, written))
        count += len(found[-1][0])
    read, written = (torch.cat(each)[:tokens] for each in zip(*found, strict=True))
    return read, written


def _counted(trainee: AnyTrainee, model: LanguageModel, batch: TokenBatch) -> TokenMask:
    """The positions that count for a trainee, by the clean pass; where nothing is left out, that is not needed."""
    if all(part.sae.norm_limit is None for part in trainee.parts):
        return batch.mask
    clean = model.clean(batch.tokens, record={part.place.reads for part in trainee.parts})
    return CountedTokens(trainee).of_these(clean, batch.mask)
