"""Targets that λ is steered to: the CE increase is measured in training, and what is left of an error at the end is
made up for.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from endwise.common.errors import ConfigError
from endwise.common.processes import ALONE, World
from endwise.config.places import Recipe
from endwise.config.run import EvaluationConfig
from endwise.dictionaries import SAE, at_inference
from endwise.models.language_model import LanguageModel
from endwise.models.readout import next_tokens
from endwise.models.sites import Place
from endwise.models.splicing import SplicedPass, sequences_at_a_time
from endwise.tokens import Corpus
from endwise.training.fitting import TrainingText, activations
from endwise.training.members import Member
from endwise.training.objectives import Objective
from endwise.training.steering import MOST_LEFT, Steering, settled
from endwise.training.trainee import Trainee

SLICE = 32_768
"""Tokens of held-out text by which a CE increase is steered, after those of evaluations."""
SETTLED_ON = 16_384
"""Tokens by which the target is met after the last step: of that text, or for L0 the latest training text."""
EVERY = 10
"""Steps between measurements of the CE increase; more, where one sequence as often would cost more than `SHARE`."""
SHARE = 0.1
"""Largest cost of measuring, as a share of the step's."""
ROWS = 1024
"""Tokens at a time where L0 is measured."""


@dataclass(frozen=True)
class Slice:
    """Held-out text that follows what evaluations of a run read, so that nothing is reported on it."""

    corpus: Corpus
    sequences: range

    @classmethod
    def of(cls, corpus: Corpus, evaluation: EvaluationConfig) -> "Slice":
        """
        Raises:
            ConfigError: there is not so much text.
        """
        first = -(-evaluation.needed // corpus.context)
        sequences = range(first, first + max(1, SLICE // corpus.context))
        if sequences.stop > len(corpus):
            raise ConfigError(
                f"objective.sparsity.target_ce_increase needs {SLICE:,} tokens of held-out text after the "
                f"{evaluation.needed:,} of evaluations, and {corpus.name} has {corpus.tokens:,} in all. Lower "
                "evaluation.tokens, raise data.heldout_share, or set data.heldout."
            )
        return cls(corpus, sequences)

    def some(self, start: int, count: int) -> list[int]:
        """Return `count` of the sequences, from number `start` on and around again."""
        return [self.sequences[(start + number) % len(self.sequences)] for number in range(count)]


def held_out_wanted(config: Recipe, context: int | None, *, least: bool = False) -> int:
    """Return the tokens of held-out text that a run must have.

    Args:
        context: tokens per sequence.
        least: see `EvaluationConfig.least`.
    """
    penalties = (phase.objective.sparsity for each in config.recipes for phase in each.in_phases)
    by_ce = any(each is not None and each.target_ce_increase is not None for each in penalties)
    evaluated = config.evaluation.least if least else config.evaluation.needed
    return evaluated + (max(SLICE, context or 0) + (context or 0) if by_ce else 0)


def observe_increase(model: LanguageModel, heldout: Corpus, world: World, step: int, member: Member) -> None:
    """Measure, before the step after `step` others, the CE increases that are steered, where they are due."""
    for part in member.trainee.parts:
        steering = steering_of(part, step)
        if steering is not None and steering.by_ce:
            batch = part.config.batch
            every, count = pace_of_measuring(model, part.place, part.sae, part.objective, batch)
            if step % every == 0:
                chosen = Slice.of(heldout, member.config.evaluation).some(step // every * count, count)
                steering.observe(ce_increase(model, part.place, part.sae, heldout, chosen, world))


def pace_of_measuring(
    model: LanguageModel, place: Place, sae: SAE, objective: Objective, batch: int
) -> tuple[int, int]:
    """Return how many steps lie between two measurements of the CE increase, and how many sequences one is of, so that
    it costs at most `SHARE` of the steps, in products with the model's weights and the encoder's: forwards all of them
    once and those after the site again, against a step's.
    """
    unembedding, encoder = model.readout.unembedding.weight, sae.d_in * sae.d_sae
    blocks = sum(each.numel() for each in model.model.parameters() if each.ndim > 1 and len(each) != len(unembedding))
    tail = blocks * (model.n_layers - place.writes.layer) // model.n_layers
    head, vocabulary = blocks - tail, unembedding.numel()
    measured = blocks + tail + 2 * vocabulary + encoder
    step = head + encoder
    if objective.final:
        step += 3 * tail + 3 * vocabulary  # the clean pass, the spliced one, and its gradient
    each_step = SHARE * batch * step / measured
    return (EVERY, int(EVERY * each_step)) if EVERY * each_step >= 1 else (math.ceil(1 / each_step), 1)


@torch.no_grad()
def ce_increase(
    model: LanguageModel, place: Place, sae: SAE, corpus: Corpus, sequences: list[int], world: World = ALONE
) -> Tensor:
    """CE increase with reconstructions in place, nats per token that predicts another.

    Args:
        world: the processes that share the sequences; each gets the result.
    """
    total, predicting = (torch.zeros((), dtype=torch.float64, device=model.device) for _ in range(2))
    with world.together("measuring the CE increase"), at_inference([sae]):
        own = list(world.share(sequences))
        size = sequences_at_a_time(corpus.context, model.device)
        for some in (own[start : start + size] for start in range(0, len(own), size)):
            batch = corpus.batch(some).to(model.device)
            clean = model.clean(batch.tokens, record=set(place.sites), final=True)
            read = clean.activations[place.reads]
            mask = sae.within_limit(read, batch.mask)
            spliced = SplicedPass(model, place.writes).run(clean, sae.reconstruct(sae.encode(read), read), mask)
            assert clean.final is not None and spliced.final is not None
            before, after = (
                model.readout.cross_entropy(final, batch.tokens, mask) for final in (clean.final, spliced.final)
            )
            total += (after - before).sum(dtype=torch.float64)
            predicting += next_tokens(batch.tokens, mask)[1].sum()
    world.add([total, predicting])
    return total / predicting


def steering_of(part: Trainee, step: int | None = None) -> Steering | None:
    """Return what steers λ in the step after `step` others, None: in the last one; None: nothing does."""
    schedule = part.course.schedule(part.total_steps - 1 if step is None else step)
    return None if schedule is None else schedule.steering


def meet_target(text: TrainingText, heldout: Corpus, display: bool, member: Member) -> None:
    """Bring what λ was steered by to its target, where it is not far (`steering.settled`). Of dictionaries that are
    spliced jointly L0 is of what each meets with the earlier ones in place.
    """
    for part in member.trainee.parts:
        if (steering := steering_of(part)) is None:
            continue
        with torch.no_grad():
            read, _ = activations(text, member.trainee, part, SETTLED_ON, [range(part.total_steps - 1, -1, -1)])
        asked = max(1, SETTLED_ON // heldout.context)
        chosen = Slice.of(heldout, member.config.evaluation).some(0, asked) if steering.by_ce else []

        def measure(part: Trainee = part, read: Tensor = read, chosen: list[int] = chosen) -> float:
            if chosen:
                return float(ce_increase(text.model, part.place, part.sae, heldout, chosen))
            return sum(float(part.sae.encode(rows).l0().sum()) for rows in read.split(ROWS)) / len(read)

        found = settled(part.sae, steering, measure, 1e-3 * float(read.square().mean().sqrt()))
        if not 1 / MOST_LEFT <= found / steering.target <= MOST_LEFT:
            what, key = ("the CE increase", "target_ce_increase") if steering.by_ce else ("L0", "target_l0")
            where = f"{member.folder.path}, {part.place}"
            message = f"{where}: {what} ended at {found:.3g}, and objective.sparsity.{key} is {steering.target:g}"
            advice = "Raise training.tokens, or start nearer to the last λ: objective.sparsity.coefficient."
            member.advise(f"! {message}. {advice}", display)
